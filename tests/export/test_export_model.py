from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from export_helpers import NEXTLAT, MemoryCheckpoint, bytes_tokenizer, left_behind, sentencepiece_tokenizer
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain.export as export_module
from data_pipeline import UserError
from pretrain.decoding import load_export
from pretrain.decoding.llama import llama_name
from pretrain.export import export, verification
from pretrain.export.__main__ import main


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(checkpoint: MemoryCheckpoint, out: Path, dtype: str = "float32", **options) -> Path:
    return export(checkpoint, out, dtype, console=Console(file=io.StringIO()), **options)


SHAPES = [
    {},
    {"tie_embeddings": True},
    {"kv_heads": 2, "rope_theta": 50.0, "norm_epsilon": 0.1},
    {"kv_heads": 1, "tie_embeddings": True, "mlp_width": None},
]


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "grouped", "grouped, tied"])
@torch.no_grad()
def test_logits_of_the_loaded_folder_equal_the_trained_models(shape, tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), **shape)
    out = run(checkpoint, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert type(exported).__name__ == "LlamaForCausalLM" and exported.dtype == torch.float32
    tokens = torch.randint(checkpoint.vocab_size, (3, 40), generator=torch.Generator().manual_seed(3))
    hidden = checkpoint.model.trunk(tokens, torch.zeros_like(tokens), torch.arange(40).expand_as(tokens)).hidden
    expected = checkpoint.model.lm_head(hidden)
    assert expected.std() > 0.5
    assert (exported(tokens).logits - expected).abs().max() <= 1e-5
    assert left_behind(tmp_path) == ["model"]

    names = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert ("lm_head.weight" in names) is not bool(shape.get("tie_embeddings"))
    loaded = load_export(out)
    step = checkpoint.model.objective.dynamics.step(hidden[0, 0], hidden[0, 1])
    torch.testing.assert_close(loaded.dynamics.step(hidden[0, 0], hidden[0, 1]), step)


def test_files_say_what_other_tools_read(tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), rope_theta=500.0, kv_heads=2)
    out = run(checkpoint, tmp_path / "model")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert config["rms_norm_eps"] == 1e-5 and config["head_dim"] == 8 and config["dtype"] == "float32"
    generation = json.loads((out / "generation_config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == generation["eos_token_id"] == 256
    assert json.loads((out / "nextlat" / "config.json").read_text()) == {
        "width": 32, "hidden_width": 48, "norm_epsilon": 1e-5, "horizon": 2, "next_latent_weight": 1.0,
        "kl_weight": 0.5, "step": 7, "dtype": "float32",
    }  # fmt: skip
    manifest = json.loads((out / "nextlat_manifest.json").read_text())
    assert manifest["source"] == {"checkpoint": str(checkpoint.path), "step": 7, "tokens": 1792}
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"nextlat_manifest.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
    assert "7 steps, 1,792 tokens" in (out / "README.md").read_text()


def test_gpt_has_no_dynamics_folder(tmp_path):
    out = run(MemoryCheckpoint(bytes_tokenizer(), {"name": "next_token"}), tmp_path / "model")
    assert not (out / "nextlat").exists()
    assert load_export(out).dynamics is None


def test_small_shards_hold_every_tensor_once(tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    out = run(checkpoint, tmp_path / "model", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        for name in load_file(file):
            assert name not in found
            found[name] = file.name
        # one tensor alone may be larger
        assert file.stat().st_size < 22_000 or list(found.values()).count(file.name) == 1
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(
        weight.numel() for name, weight in checkpoint.weights.items() if not name.startswith("objective.")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision_holds_the_rounded_weights(dtype, tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    out = run(checkpoint, tmp_path / "model", dtype)
    loaded = load_export(out)
    torch_dtype = getattr(torch, dtype)
    assert loaded.model.dtype == loaded.dynamics.input.weight.dtype == torch_dtype
    expected = checkpoint.weights["trunk.layers.1.mlp.up_proj.weight"].to(torch_dtype)
    assert torch.equal(loaded.model.model.layers[1].mlp.up_proj.weight, expected)
    measured = json.loads((out / "nextlat_manifest.json").read_text())["verified"]
    assert 0 < measured["log_probability_difference"] < 0.1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w["trunk.norm.weight"].fill_(float("nan")), "trunk.norm.weight holds NaN or infinite"),
        (lambda w: w["objective.dynamics.hidden.weight"].view(-1)[5].fill_(float("inf")), "hidden.weight holds NaN"),
        (lambda w: w.pop("trunk.layers.1.mlp.up_proj.weight"), "1 weights are missing, such as trunk.layers.1.mlp"),
        (lambda w: w.update({"trunk.extra": torch.ones(2)}), "1 weights are left over, such as trunk.extra"),
        (lambda w: w.update({"lm_head.weight": torch.ones(5, 32)}), r"lm_head.weight has shape \(5, 32\)"),
    ],
    ids=["NaN", "infinite", "missing", "left over", "shape"],
)
def test_refuses_damaged_weights_and_leaves_nothing(damage, message, tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    damage(checkpoint.weights)
    with pytest.raises(UserError, match=message):
        run(checkpoint, tmp_path / "model")
    assert left_behind(tmp_path) == []


def test_refuses_values_beyond_float16(tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    checkpoint.weights["trunk.layers.0.mlp.down_proj.weight"][0, 0] = 70_000.0
    with pytest.raises(UserError, match=r"down_proj.weight has values beyond the range .* --dtype bfloat16"):
        run(checkpoint, tmp_path / "model", "float16")
    assert left_behind(tmp_path) == []


def wrong_config(key, value):
    original = export_module.llama_config
    return lambda *arguments: original(*arguments) | {key: value}


def swapped_names(name: str) -> str | None:
    swap = {"q_proj": "o_proj", "o_proj": "q_proj"}
    target = llama_name(name)
    return target and ".".join(swap.get(part, part) for part in target.split("."))


@pytest.mark.parametrize(
    ("attribute", "mistake"),
    [
        ("llama_config", wrong_config("rms_norm_eps", 1e-2)),
        ("llama_config", wrong_config("rope_parameters", {"rope_type": "default", "rope_theta": 9000.0})),
        ("weights.llama_name", swapped_names),
    ],
    ids=["epsilon", "theta", "names"],
)
def test_a_mistake_in_the_exporter_is_caught_by_its_own_verification(attribute, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(f"pretrain.export.{attribute}", mistake)
    with pytest.raises(UserError, match="logits differ from the trained model's"):
        run(MemoryCheckpoint(bytes_tokenizer()), tmp_path / "model")
    assert left_behind(tmp_path) == []


def test_verification_reads_the_dynamics_and_the_greedy_text(tmp_path, monkeypatch):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    out = run(checkpoint, tmp_path / "model")
    checkpoint.weights["objective.dynamics.output.weight"] *= 1.01
    with pytest.raises(UserError, match="p_psi's states differ"):
        verification.compare_models(out, checkpoint, torch.float32)
    monkeypatch.setattr(verification, "TOLERANCE", 10.0)
    checkpoint.weights["lm_head.weight"] *= -1
    monkeypatch.setattr(verification, "_require", lambda found, allowed, what: seen.update({what: found}))
    seen: dict[str, float] = {}
    verification.compare_models(out, checkpoint, torch.float32)
    assert seen["greedy texts"] > 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
def test_an_interrupted_export_leaves_nothing_and_an_old_one_alone(error, tmp_path, monkeypatch):
    checkpoint = MemoryCheckpoint(bytes_tokenizer())

    def interrupted(*_):
        raise error

    monkeypatch.setattr(export_module, "verify_export", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        run(checkpoint, tmp_path / "model")
    assert left_behind(tmp_path) == []

    monkeypatch.undo()
    run(checkpoint, tmp_path / "model")
    before = (tmp_path / "model" / "nextlat_manifest.json").read_bytes()
    monkeypatch.setattr(export_module, "verify_export", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        run(checkpoint, tmp_path / "model", overwrite=True)
    assert left_behind(tmp_path) == ["model"]
    assert (tmp_path / "model" / "nextlat_manifest.json").read_bytes() == before


def test_folders_in_use(tmp_path):
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), NEXTLAT)
    out = tmp_path / "model"
    out.mkdir()
    run(checkpoint, out)  # an empty folder will do
    with pytest.raises(UserError, match=r"exists and is not empty.*--overwrite"):
        run(checkpoint, out)
    checkpoint.step = 8
    run(checkpoint, out, overwrite=True)
    assert json.loads((out / "nextlat_manifest.json").read_text())["source"]["step"] == 8
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="is no exported model, so --overwrite leaves it alone"):
        run(checkpoint, precious, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        run(checkpoint, precious / "thesis.txt")
    assert sorted(left_behind(tmp_path)) == ["model", "precious"]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="GB are free"):
        run(MemoryCheckpoint(bytes_tokenizer()), tmp_path / "model")
    assert left_behind(tmp_path) == []


def test_a_truncated_export_is_refused(tmp_path):
    out = run(MemoryCheckpoint(bytes_tokenizer()), tmp_path / "model")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors: missing or not of its recorded size"):
        load_export(out)
    with pytest.raises(UserError, match="not an exported model"):
        load_export(tmp_path)


def test_the_command_exports_a_sentencepiece_model_that_transformers_runs(tmp_path, monkeypatch, capsys):
    checkpoint = MemoryCheckpoint(sentencepiece_tokenizer(tmp_path))
    monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: checkpoint)
    out = tmp_path / "model"
    main(["runs/test", "--out", str(out), "--dtype", "bfloat16"])
    assert "exported step 7 of test" in capsys.readouterr().err
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("def f(x):\n\treturn 1", return_tensors="pt")
    assert ids["input_ids"][0].tolist() == [1, *checkpoint.tokenizer().encode("def f(x):\n\treturn 1")]
    assert model.generate(**ids, do_sample=False, max_new_tokens=5).shape[1] == ids["input_ids"].shape[1] + 5


def test_mistakes_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match=r"--shard-gb 0.0 must be above 0"):
        main(["runs/test", "--out", str(tmp_path / "model"), "--shard-gb", "0"])
    with pytest.raises(UserError, match="no whole checkpoint here"):
        main([str(tmp_path), "--out", str(tmp_path / "model")])
    assert left_behind(tmp_path) == []

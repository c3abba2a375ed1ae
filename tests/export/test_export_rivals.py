"""MTP exports as a plain Llama with its extra heads beside it; what is no Llama is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from export_helpers import MemoryCheckpoint, bytes_tokenizer
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data_pipeline import UserError
from pretrain.decoding import Sampling, load_export
from pretrain.decoding.continuation import continue_text
from pretrain.decoding.loading import load_checkpoint_as_llama
from pretrain.export import export, verification
from pretrain.generate import main as generate_command

MTP = {"name": "mtp", "horizon": 2, "multi_token_weight": 0.5}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return MemoryCheckpoint(bytes_tokenizer(), MTP, kv_heads=2)


@pytest.fixture(scope="module")
def folder(checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exports") / "model", console=Console(file=io.StringIO()))


@torch.no_grad()
def test_mtp_is_a_plain_llama_and_the_extra_heads_lie_beside_it(checkpoint: MemoryCheckpoint, folder: Path):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.num_hidden_layers == 2
    tokens = torch.randint(checkpoint.vocab_size, (3, 40), generator=torch.Generator().manual_seed(3))
    states = checkpoint.model.trunk(tokens, torch.zeros_like(tokens), torch.arange(40).expand_as(tokens))
    assert (plain(tokens).logits - checkpoint.model.lm_head(states.hidden)).abs().max() <= 1e-5
    heads = load_file(folder / "mtp" / "model.safetensors")
    trained = {name: w for name, w in checkpoint.weights.items() if name.startswith("objective.heads.")}
    assert {f"objective.heads.{name}" for name in heads} == set(trained)
    assert all(torch.equal(weight, trained[f"objective.heads.{name}"]) for name, weight in heads.items())
    described = json.loads((folder / "mtp" / "config.json").read_text())
    assert described == {"horizon": 2, "multi_token_weight": 0.5, "step": 7, "dtype": "float32"}
    manifest = json.loads((folder / "nextlat_manifest.json").read_text())
    assert {"mtp/config.json", "mtp/model.safetensors"} < set(manifest["files"])
    assert "2 extra heads" in (folder / "README.md").read_text()
    assert not (folder / "nextlat").exists()


def test_the_exported_folder_drafts_as_its_checkpoint_does(checkpoint: MemoryCheckpoint, folder: Path):
    exported, original = load_export(folder), load_checkpoint_as_llama(checkpoint)
    assert exported.can_draft and exported.model.longest_draft == 2
    for prompt in ([256], [256, 70, 71, 9]):
        plain, _ = continue_text(exported, prompt, 30, 0, Sampling())
        for model in (exported, original):
            text, statistics = continue_text(model, prompt, 30, 4, Sampling())
            assert text == plain
            assert statistics.drafted > 10 and len(statistics.alive_by_position) <= 2


def test_the_command_generates_with_the_heads_drafts(folder: Path, capsys: pytest.CaptureFixture[str]):
    generate_command([str(folder), "--prompt", "def f", "--max-new-tokens", "12", "--draft", "2", "--stats"])
    assert "text equal to plain greedy text: yes" in capsys.readouterr().out


def test_verification_reads_the_extra_heads(folder: Path):
    other = MemoryCheckpoint(bytes_tokenizer(), MTP, kv_heads=2)
    other.weights["objective.heads.1.block.mlp.up_proj.weight"] *= 1.01
    with pytest.raises(UserError, match="extra heads' states differ"):
        verification.compare_models(folder, other, torch.float32)


def test_heads_load_in_the_models_precision(checkpoint: MemoryCheckpoint, tmp_path: Path):
    out = export(checkpoint, tmp_path / "half", "bfloat16", console=Console(file=io.StringIO()))
    loaded = load_export(out)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.heads.training


@pytest.mark.parametrize("objective", [{"name": "jtp", "horizon": 2, "joint_token_weight": 1.0}, {"name": "bst"}])
def test_what_is_no_llama_is_refused_in_one_line_and_leaves_nothing(objective: dict[str, object], tmp_path: Path):
    with pytest.raises(UserError) as caught:
        export(MemoryCheckpoint(bytes_tokenizer(), objective), tmp_path / "model", console=Console(file=io.StringIO()))
    message = str(caught.value)
    for part in (f"objective.name={objective['name']}", "LlamaForCausalLM", "python -m pretrain.evaluate"):
        assert part in message
    assert "\n" not in message and list(tmp_path.iterdir()) == []

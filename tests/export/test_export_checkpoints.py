"""From the files of a ZeRO-3 checkpoint of many ranks, made without an engine: every value once, or one clear line."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import left_behind, sentencepiece_tokenizer
from safetensors.torch import load_file

from benchmarks.export import CONFIG, RANKS, SIZES
from benchmarks.synthetic_checkpoint import parameter_groups, part_of, write_checkpoint
from data_pipeline import UserError
from pretrain.checkpoints import open_checkpoint
from pretrain.checkpoints.manifest import MANIFEST, flush_and_hash, write_manifest
from pretrain.config import Config, load_config
from pretrain.decoding.llama import DYNAMICS_PREFIX, llama_name
from pretrain.export import export, verification, weights
from pretrain.export.__main__ import main
from pretrain.resident_memory import copy_mapped

RANK_3 = "zero_pp_rank_3_mp_rank_00_optim_states.pt"


def small_config(*overrides: str) -> Config:
    return load_config(CONFIG, [*SIZES["small"][0], *overrides])


def make(folder: Path, config: Config, ranks: int = RANKS) -> Path:
    """A run's folder with one checkpoint."""
    folder.mkdir(exist_ok=True)
    path = folder / "run" / "checkpoints" / "step_00000001"
    write_checkpoint(path, config, SIZES["small"][1], ranks, sentencepiece_tokenizer(folder))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole"), small_config())


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run" / "checkpoints" / whole.name))


def expected(config: Config, ranks: int) -> dict[str, torch.Tensor]:
    """Every parameter, joined from the parts of all ranks without the padding."""
    found = {}
    for group in parameter_groups(config, SIZES["small"][1]):
        for name, shape in group.items():
            flat = torch.cat([part_of(name, shape, rank, ranks) for rank in range(ranks)])
            found[name] = flat[: shape.numel()].view(shape)
    return found


@pytest.mark.parametrize(
    ("ranks", "tied", "dtype"),
    [(8, "false", "float32"), (8, "true", "bfloat16"), (3, "true", "float32"), (1, "false", "float16")],
)
def test_every_value_of_all_ranks_is_exported_once_in_shards(
    ranks: int, tied: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (weights, verification):  # so that blocks begin and end inside the parts of ranks
        monkeypatch.setattr(module, "BLOCK_VALUES", 1_000)
    config = small_config(f"model.tie_embeddings={tied}")
    path = make(tmp_path, config, ranks)
    out = tmp_path / "model"
    main([str(path.parents[1]), "--out", str(out), "--dtype", dtype, "--shard-gb", "0.0001"])
    found = {name: weight for file in out.glob("*.safetensors") for name, weight in load_file(file).items()}
    found |= {f"{DYNAMICS_PREFIX}{n}": w for n, w in load_file(out / "nextlat" / "model.safetensors").items()}
    trained = {llama_name(name) or name: value for name, value in expected(config, ranks).items()}
    assert ranks == 1 or any(value.numel() % ranks for value in trained.values()), "some parts are padded"
    assert found.keys() == trained.keys() and ("lm_head.weight" in found) is (tied == "false")
    for name, value in trained.items():
        assert torch.equal(found[name], value.to(getattr(torch, dtype))), name
    verified = json.loads((out / "nextlat_manifest.json").read_text())["verified"]
    assert verified["weights_equal"] == len(trained)
    assert verified["values_equal"] == sum(value.numel() for value in trained.values())
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a rank's file, and list it in the manifest as if it had been saved so."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    relist(path.parent)


def relist(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    write_manifest(folder, {"step": 1}, flush_and_hash(folder, sorted(folder.iterdir())))


def with_values_of_nothing(content: dict[str, Any]) -> None:
    groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    groups[-1] = torch.cat([groups[-1], torch.ones(3)])


def without_its_end(content: dict[str, Any]) -> None:
    groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    groups[-1] = groups[-1][:-3].clone()


def with_nan(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["fp32_flat_groups"][0][7] = float("nan")


def swap_ranks(folder: Path) -> None:
    other = folder / RANK_3.replace("3", "4")
    (folder / RANK_3).rename(folder / "aside")
    other.rename(folder / RANK_3)
    (folder / "aside").rename(other)


def truncate(folder: Path) -> None:
    with (folder / RANK_3).open("r+b") as file:
        file.truncate(1000)


def lose_listed(folder: Path) -> None:
    (folder / RANK_3).unlink()
    relist(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / RANK_3).unlink(), f"damaged checkpoint: {RANK_3} is missing; give the run's folder"),
        (lose_listed, r"the optimizer file of rank 3 does not fit; written by 8 ranks, and not whole"),
        (truncate, rf"damaged checkpoint: {RANK_3} has 1000 bytes, not \d+; give the run's folder"),
        (swap_ranks, rf"damaged checkpoint: {RANK_3} does not have the recorded sha256"),
        (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} cannot be read .*; give the run's folder"),
        (lambda folder: edit(folder / RANK_3, with_values_of_nothing), "values in flat buffer . of rank 3; the files"),
        (lambda folder: edit(folder / RANK_3, without_its_end), "values in flat buffer . of rank 3; the files"),
        (lambda folder: edit(folder / RANK_3, with_nan), "trunk.embed_tokens.weight holds NaN or infinite values"),
    ],
    ids=["missing", "missing, unlisted", "truncated", "swapped", "unfinished", "too long", "too short", "NaN"],
)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        main([str(checkpoint), "--out", str(tmp_path / "out" / "model")])
    assert "\n" not in str(caught.value) and left_behind(tmp_path / "out") == []


def test_a_run_whose_only_checkpoint_is_unfinished_has_none(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    checkpoint.rename(checkpoint.with_name(f".writing_{checkpoint.name}"))
    with pytest.raises(UserError, match="no whole checkpoint here"):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    assert left_behind(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype int8: no such precision of weights; there are float32, bfloat16, float16"),
        (["--out", "{}/used"], "used: exists and is not empty; give a new folder, or --overwrite"),
        (["--out", "{}/used/thesis.txt"], "is a file; give a new folder"),
        (["--out", "{}/used/thesis.txt/model"], "thesis.txt is no folder that you may write to; give another folder"),
        (["--out", "{}/locked/model"], "locked is no folder that you may write to; give another folder"),
        (["--push-to", "s4://bucket/model"], "--push-to s4://bucket/model: Protocol not known"),
    ],
    ids=["precision", "used", "file", "below a file", "unwritable", "unknown URL"],
)
def test_what_is_wrong_with_the_target_is_said_before_the_checkpoint_is_read(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("all of it")
    (tmp_path / "locked").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode))
    monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: pytest.fail("was read"))
    options = [option.format(tmp_path) for option in options]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        main(["runs/test", *(["--out", str(tmp_path / "model")] if "--out" not in options else []), *options])
    assert "\n" not in str(caught.value) and sorted(left_behind(tmp_path)) == ["locked", "used"]


def test_a_target_that_the_file_system_refuses_is_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, **how: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    opened = open_checkpoint(whole)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"model: cannot be made here \(Permission denied\); give another folder"):
        export(opened, tmp_path / "model")
    assert left_behind(tmp_path) == []


def resident_file_bytes() -> int:
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_what_is_read_from_a_mapped_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    size = 24 * 2**20
    torch.save({"weights": torch.arange(size, dtype=torch.int32)}, tmp_path / "rank.pt")
    mapped = torch.load(tmp_path / "rank.pt", weights_only=True, mmap=True)["weights"]
    target = torch.zeros(size, dtype=torch.int32)
    before = resident_file_bytes()
    copy_mapped(mapped, target)
    assert resident_file_bytes() - before < 8 * 2**20 < target.nbytes / 8
    assert torch.equal(target, torch.arange(size, dtype=torch.int32))
    again = torch.zeros(1000, dtype=torch.int32)
    copy_mapped(mapped[5_000_000:5_001_000], again)
    assert torch.equal(again, target[5_000_000:5_001_000]), "what was let go of comes back from the file"

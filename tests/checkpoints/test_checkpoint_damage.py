"""Whatever happens to a checkpoint's files is found, and a whole one is taken instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import make_config, publish_step
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from data_pipeline import UserError
from pretrain.checkpoints import find_whole
from pretrain.checkpoints.manifest import MANIFEST, find_problems, flush_and_hash, read_manifest, write_manifest
from pretrain.checkpoints.unpickling import load_data_only
from pretrain.config import Config
from pretrain.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << (len(content) % 8)
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Config:
    return make_config(tmp_path, tiny_data)


@pytest.mark.parametrize("damage", [truncate, empty, flip, append, Path.unlink], ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_taken(
    config: Config, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = publish_step(config, 4), publish_step(config, 8)
    names = sorted(path.name for path in newer.iterdir())
    assert names == ["config.yaml", MANIFEST, "rank0.pt", "rank1.pt", "state.json"]
    for name in names:
        whole = (newer / name).read_bytes()
        assert find_whole(newer.parent, ALONE) == newer
        damage(newer / name)
        assert find_whole(newer.parent, ALONE) == older
        assert f"leaving damaged checkpoint {newer}: {name}" in capsys.readouterr().err
        (newer / name).write_bytes(whole)


def test_every_flipped_bit_of_the_manifest_is_found(config: Config) -> None:
    path = publish_step(config, 4)
    whole = (path / MANIFEST).read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (path / MANIFEST).write_bytes(content)
        assert find_problems(path, ALONE), f"byte {place}"
    (path / MANIFEST).write_bytes(whole)
    assert find_problems(path, ALONE) == []


def test_files_swapped_between_ranks_are_found(config: Config) -> None:
    path = publish_step(config, 4)
    first, second = path / "rank0.pt", path / "rank1.pt"
    one, other = first.read_bytes(), second.read_bytes()
    assert len(one) == len(other)
    first.write_bytes(other)
    second.write_bytes(one)
    assert find_problems(path, ALONE) == [f"rank{rank}.pt does not have the recorded sha256" for rank in (0, 1)]


def test_a_file_of_weights_that_is_not_listed_is_found(config: Config) -> None:
    path = publish_step(config, 4)
    shutil.copyfile(path / "rank0.pt", path / "a_model_states.pt")
    assert find_problems(path, ALONE) == [f"a_model_states.pt is not in {MANIFEST}"]


def test_many_files_checked_at_once_have_no_problem(tmp_path: Path) -> None:
    for number in range(24):
        torch.save({"stage": ZeroStageEnum.weights, "number": number}, tmp_path / f"{number}.pt")
    write_manifest(tmp_path, {"step": 4}, flush_and_hash(tmp_path, tmp_path.glob("*.pt")))
    for _ in range(10):
        assert find_problems(tmp_path, ALONE) == []


def test_ranks_share_the_checking(config: Config) -> None:
    path = publish_step(config, 4)
    flip(path / "rank1.pt")
    found = [find_problems(path, Ranks(rank, 3, rank, 3)) for rank in range(3)]
    assert sum(map(len, found)) == 1


class RunsOnLoading:
    """What an attacker pickles: unpickled with trust, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused_though_its_manifest_is_right(config: Config, tmp_path: Path) -> None:
    older, newer = publish_step(config, 4), publish_step(config, 8)
    marker = tmp_path / "executed"
    torch.save({"weights": RunsOnLoading(marker)}, newer / "rank1.pt")
    described = {
        key: value for key, value in read_manifest(newer).items() if key not in ("checksum", "files", "format")
    }
    files = [path for path in newer.iterdir() if path.name != MANIFEST]
    write_manifest(newer, described, flush_and_hash(newer, files))
    assert find_problems(newer, ALONE)[0].startswith("rank1.pt is no file of plain data")
    assert find_whole(newer.parent, ALONE) == older
    for mmap in (True, False):
        with pytest.raises(UserError, match=r"rank1\.pt: cannot be read as a checkpoint file"):
            load_data_only(newer / "rank1.pt", mmap=mmap)
    assert not marker.exists()
    torch.load(newer / "rank1.pt", weights_only=False)
    assert marker.exists(), "the attack works where pickles are trusted"


class Gets:
    """Is pickled as an attribute of something, as enums' members are by Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: object, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_an_enums_member_is_data_however_python_writes_it(tmp_path: Path) -> None:
    torch.save({"zero_stage": Gets(ZeroStageEnum, "weights"), "again": ZeroStageEnum.weights}, tmp_path / "stage.pt")
    assert load_data_only(tmp_path / "stage.pt") == {
        "zero_stage": ZeroStageEnum.weights,
        "again": ZeroStageEnum.weights,
    }


@pytest.mark.parametrize("what", [(ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "backward")])
def test_no_other_attribute_of_anything_is_data(what: tuple[object, str], tmp_path: Path) -> None:
    torch.save({"attack": Gets(*what)}, tmp_path / "stage.pt")
    assert torch.load(tmp_path / "stage.pt", weights_only=False)["attack"] is not None
    with pytest.raises(UserError, match=r"stage\.pt: cannot be read as a checkpoint file \(.*Unsupported getattr"):
        load_data_only(tmp_path / "stage.pt")


def test_a_newer_format_is_refused_and_not_taken_for_damage(config: Config) -> None:
    publish_step(config, 4)
    newer = publish_step(config, 8)
    manifest = json.loads((newer / MANIFEST).read_text())
    described = {key: value for key, value in manifest.items() if key not in ("checksum", "files")}
    write_manifest(newer, described | {"format": 7}, manifest["files"])
    with pytest.raises(
        UserError, match=r"step_00000008: written in checkpoint format 7, and this version reads up to 1"
    ):
        find_whole(newer.parent, ALONE)

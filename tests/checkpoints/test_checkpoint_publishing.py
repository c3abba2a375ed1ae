"""A checkpoint gets its name when it is whole; what a kill leaves behind is never taken for one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import make_config, publish_step, steps_in, write_unfinished

from data_pipeline import UserError
from pretrain.checkpoints import find_whole, open_checkpoint, publishing
from pretrain.checkpoints.files import CheckpointFiles
from pretrain.checkpoints.manifest import MANIFEST, flush_and_hash
from pretrain.checkpoints.retention import hold, name_of, prune, remove, remove_leftovers, retained
from pretrain.config import CheckpointConfig, Config
from pretrain.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that is meant for errors may catch it."""


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Config:
    return make_config(tmp_path, tiny_data)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("flush_and_hash", 4),
        ("write_manifest", 4),
        ("flush_folder", 8),
        ("write_durably", 8),
        ("remove_leftovers", 8),
        ("prune", 8),
    ],
)
def test_a_kill_at_any_point_of_publishing_leaves_a_whole_checkpoint_to_go_on_from(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str, expected: int
) -> None:
    publish_step(config, 4)
    unfinished = write_unfinished(config, 8)
    folder = unfinished.parent
    files = flush_and_hash(unfinished, unfinished.glob("*.pt"))

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(publishing, where, kill)
        with pytest.raises(Killed):
            publishing.publish(unfinished, folder / name_of(8), files, {"step": 8}, config)
    assert find_whole(folder, ALONE) == folder / name_of(expected)
    remove_leftovers(folder)
    assert {path.name for path in folder.iterdir()} <= {"latest", name_of(4), name_of(8)}
    if expected == 4:
        publish_step(config, 8)
    assert find_whole(folder, ALONE) == folder / name_of(8)


def test_a_damaged_checkpoint_is_replaced_by_the_one_saved_again(config: Config) -> None:
    damaged = publish_step(config, 8)
    (damaged / "rank0.pt").unlink()
    assert find_whole(damaged.parent, ALONE) is None
    publish_step(config, 8)
    assert find_whole(damaged.parent, ALONE) == damaged
    assert sorted(path.name for path in damaged.parent.iterdir()) == ["latest", name_of(8)]


def test_retention_keeps_the_last_every_nth_and_the_best() -> None:
    losses = dict(zip(range(10, 101, 10), [5.0, 4.0, 1.0, 3.0, None, 2.0, float("nan"), 2.5, 3.0, 3.5], strict=True))
    rules = CheckpointConfig(every=10, keep=2, keep_every=50, keep_best=2)
    assert retained(losses, rules) == {90, 100, 50, 30, 60}
    assert retained(losses, CheckpointConfig(keep=1)) == {100}


def test_pruning_removes_by_the_rules_and_never_the_newest(config: Config) -> None:
    for step, loss in [(4, 1.0), (8, 3.0), (12, 2.0), (16, 4.0)]:
        publish_step(config, step, loss)
    assert steps_in(config) == [12, 16]
    rules = config.checkpoint.model_copy(update={"keep": 1})
    prune(config.run.folder / "checkpoints", rules, 16)
    assert steps_in(config) == [16]
    assert (config.run.folder / "checkpoints" / "latest").read_text() == name_of(16)


def test_a_later_damaged_checkpoint_does_not_push_out_the_good_ones(config: Config) -> None:
    for step in (4, 8, 12):
        publish_step(config, step)
    for step in (8, 12):
        (config.run.folder / "checkpoints" / name_of(step) / "rank0.pt").unlink()
    shutil.rmtree(config.run.folder / "checkpoints" / name_of(8))
    publish_step(config, 6)
    publish_step(config, 8)
    assert steps_in(config) == [6, 8, 12]
    assert find_whole(config.run.folder / "checkpoints", ALONE) == config.run.folder / "checkpoints" / name_of(8)


def test_a_checkpoint_that_is_being_read_stays(config: Config) -> None:
    first = publish_step(config, 4)
    lease = hold(first)
    for step in (8, 12, 16):
        publish_step(config, step)
    assert steps_in(config) == [4, 12, 16]
    lease.close()
    publish_step(config, 20)
    assert steps_in(config) == [16, 20]
    with pytest.raises(UserError, match="was removed while it was being opened"):
        hold(first)


def test_removing_says_whether_it_did(config: Config) -> None:
    path = publish_step(config, 4)
    with hold(path):
        assert not remove(path)
    assert path.exists() and remove(path) and not path.exists()


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole checkpoint here"):
        open_checkpoint(tmp_path)
    (tmp_path / "step_00000004").mkdir()
    with pytest.raises(UserError, match=f"damaged checkpoint: {MANIFEST} cannot be read"):
        open_checkpoint(tmp_path / "step_00000004")


def test_a_copy_in_the_background_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"tied": whole, "head": whole, "part": whole[2:4], "count": [torch.tensor(3), (1, "a")]}
    files = CheckpointFiles(in_background=True)
    files.save(state, tmp_path / "x.pt")
    whole.fill_(-1)  # training goes on
    assert not (tmp_path / "x.pt").exists()
    files.write()
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(saved["tied"], torch.arange(6.0)) and saved["part"].tolist() == [2, 3]
    assert saved["tied"].data_ptr() == saved["head"].data_ptr(), "tied weights stay tied"
    assert saved["count"] == [torch.tensor(3), (1, "a")]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_fails_is_noted_and_not_raised(tmp_path: Path, in_background: bool) -> None:
    files = CheckpointFiles(in_background)
    files.save({"x": torch.ones(2)}, tmp_path / "nowhere" / "x.pt")
    if in_background:
        with pytest.raises(RuntimeError, match="nowhere"):
            files.write()
    else:
        assert files.problem is not None and "nowhere" in files.problem

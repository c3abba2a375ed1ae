"""The second copy: uploaded whole or not at all, taken up again after an outage, enough to go on from an empty disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_helpers import make_config, publish_step

from data_pipeline import UserError
from pretrain.checkpoints import find_start, find_whole, mirror
from pretrain.checkpoints.manifest import MANIFEST
from pretrain.checkpoints.mirror import Mirror, MirrorThread
from pretrain.checkpoints.retention import name_of
from pretrain.config import Config
from pretrain.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1)
URL = "memory://mirror/run"


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Iterator[Config]:
    yield make_config(tmp_path, tiny_data, {"checkpoint.mirror": URL})
    fsspec.filesystem("memory").rm("/mirror", recursive=True)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_PAUSE_SECONDS", 0.0)


@pytest.fixture
def saved(config: Config) -> Path:
    """The run's folder, with checkpoints of steps 4 and 8, metrics and a wandb id."""
    for step in (4, 8):
        publish_step(config, step)
    (config.run.folder / "metrics.jsonl").write_text("{}\n")
    (config.run.folder / "wandb_id").write_text("abc")
    return config.run.folder


def mirrored() -> dict[str, bytes]:
    files = fsspec.filesystem("memory")
    return {path.removeprefix("/mirror/run/"): files.cat(path) for path in files.find("/mirror/run")}


def test_everything_is_copied_and_latest_named(config: Config, saved: Path) -> None:
    MirrorThread(Mirror(URL), config).close(60)
    there = mirrored()
    assert there["latest"] == name_of(8).encode()
    for path in (saved / "checkpoints").glob("step_*/*"):
        assert there[f"{path.parent.name}/{path.name}"] == path.read_bytes()
    assert Mirror(URL).whole_steps() == [8, 4]


def test_an_empty_disk_goes_on_from_the_mirror(config: Config, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MirrorThread(Mirror(URL), config).close(60)
    before = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("step_00000008/*")}
    shutil.rmtree(saved)
    assert find_start(config, ALONE) == saved / "checkpoints" / name_of(8)
    assert "was fetched from memory://mirror/run" in capsys.readouterr().err
    assert {path.relative_to(saved): path.read_bytes() for path in saved.rglob("step_00000008/*")} == before
    assert (saved / "wandb_id").read_text() == "abc" and (saved / "metrics.jsonl").exists()


def test_a_damaged_mirrored_checkpoint_is_left_for_an_older_one(config: Config, saved: Path) -> None:
    MirrorThread(Mirror(URL), config).close(60)
    files = fsspec.filesystem("memory")
    content = bytearray(files.cat(f"/mirror/run/{name_of(8)}/rank1.pt"))
    content[100] ^= 1
    files.pipe(f"/mirror/run/{name_of(8)}/rank1.pt", bytes(content))
    shutil.rmtree(saved)
    assert find_start(config, ALONE) == saved / "checkpoints" / name_of(4)
    assert [path.name for path in (saved / "checkpoints").iterdir()] == [name_of(4)]


class Outage:
    """Makes one of the file system's functions fail from its `after`-th call on, `times` times; None: for good."""

    def __init__(self, action: Callable[..., Any], after: int, times: int | None):
        self.action, self.after, self.left, self.calls = action, after, times, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > self.after and self.left != 0:
            self.left = None if self.left is None else self.left - 1
            raise ConnectionError("no route to host")
        return self.action(*args, **options)


def test_an_outage_is_told_counted_and_made_good(
    config: Config, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Mirror(URL)
    upload = Outage(target.fs.put_file, after=3, times=2)
    monkeypatch.setattr(target.fs, "put_file", upload)
    thread = MirrorThread(target, config)
    thread.close(60)
    assert thread.failures == 2 and thread.new_failures() and not thread.new_failures()
    assert "no route to host; the run goes on" in capsys.readouterr().err
    assert Mirror(URL).whole_steps() == [8, 4]
    files = len(list((saved / "checkpoints").glob("step_*/*"))) + 2  # the wandb id beside each
    assert upload.calls - 2 == files, "what was there already is not uploaded again"


def test_a_lasting_outage_leaves_nothing_that_looks_whole_and_never_stops_the_run(
    config: Config, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Mirror(URL)
    monkeypatch.setattr(target.fs, "put_file", Outage(target.fs.put_file, after=2, times=None))
    start = time.monotonic()
    thread = MirrorThread(target, config)
    thread.close(60)
    assert thread.failures and time.monotonic() - start < 30
    monkeypatch.undo()
    assert Mirror(URL).whole_steps() == []
    assert "latest" not in mirrored()
    MirrorThread(Mirror(URL), config).close(60)  # the next start
    assert Mirror(URL).whole_steps() == [8, 4]


def test_what_does_not_read_back_is_not_taken_for_whole(
    config: Config, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Mirror(URL)
    put = target.fs.put_file

    def corrupting(local: str, remote: str) -> None:
        put(local, remote)
        if remote.endswith("rank0.pt"):
            target.fs.pipe_file(remote, target.fs.cat_file(remote)[:-1] + b"?")

    monkeypatch.setattr(target.fs, "put_file", corrupting)
    MirrorThread(target, config).close(60)
    assert Mirror(URL).whole_steps() == []


def test_a_local_checkpoint_that_is_damaged_holds_up_no_other(config: Config, saved: Path) -> None:
    (saved / "checkpoints" / name_of(8) / "rank0.pt").write_bytes(b"rot")
    thread = MirrorThread(Mirror(URL), config)
    thread.close(60)
    assert thread.failures and Mirror(URL).whole_steps() == [4]


def test_the_mirror_keeps_what_the_rules_keep(config: Config, saved: Path) -> None:
    thread = MirrorThread(Mirror(URL), config)
    for step in (12, 16):
        publish_step(config, step)
        thread.wake()
    thread.close(60)
    assert Mirror(URL).whole_steps() == [16, 12]
    assert not any(name.startswith((name_of(4), name_of(8))) for name in mirrored())


def test_a_mirror_that_cannot_be_read_is_no_reason_to_begin_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: Mirror) -> list[int]:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Mirror, "whole_steps", unreachable)
    with pytest.raises(UserError, match=rf"checkpoint.mirror={URL}: cannot be read \(no route to host\)"):
        find_start(config, ALONE)
    monkeypatch.undo()
    publish_step(config, 4)
    monkeypatch.setattr(Mirror, "whole_steps", unreachable)
    assert find_start(config, ALONE) is not None, "with a whole checkpoint here the mirror is not asked"
    fsspec.filesystem("memory").makedirs("/mirror", exist_ok=True)


def test_an_unknown_kind_of_url_is_one_line(tmp_path: Path, tiny_data: Path) -> None:
    config = make_config(tmp_path, tiny_data, {"checkpoint.mirror": "s4://bucket/run"})
    with pytest.raises(UserError, match=r"checkpoint\.mirror=s4://bucket/run: Protocol not known"):
        find_start(config, ALONE)


@pytest.mark.parametrize(
    ("word", "has_checkpoint", "expected"),
    [
        ("auto", False, "beginning"),
        ("auto", True, "checkpoint"),
        ("must", True, "checkpoint"),
        ("must", False, "holds no whole checkpoint, and run.resume is must"),
        ("never", False, "beginning"),
        ("never", True, "holds checkpoints, and run.resume is never"),
    ],
)
def test_resume_never_auto_and_must(
    tmp_path: Path, tiny_data: Path, word: str, has_checkpoint: bool, expected: str
) -> None:
    config = make_config(tmp_path, tiny_data, {"run.resume": word})
    path = publish_step(config, 4) if has_checkpoint else None
    if expected in ("beginning", "checkpoint"):
        assert find_start(config, ALONE) == path
    else:
        with pytest.raises(UserError, match=expected):
            find_start(config, ALONE)


def test_a_manifest_is_the_last_thing_uploaded(config: Config, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Mirror(URL)
    put, order = target.fs.put_file, []

    def noting(local: str, remote: str) -> None:
        order.append(Path(local).name)
        put(local, remote)

    monkeypatch.setattr(target.fs, "put_file", noting)
    target.upload(saved / "checkpoints" / name_of(8), 8)
    assert order[-1] == MANIFEST and len(order) == 6
    assert find_whole(saved / "checkpoints", ALONE) is not None

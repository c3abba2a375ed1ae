"""Remote data sets: the same batches, fetched once, ahead, again, and checked."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from data_helpers import REMOTE_SIZES, same_batches, used

from data_pipeline import Dataset, Stream, UserError, open_dataset
from data_pipeline import cache as module
from data_pipeline.cache import open_remote
from data_pipeline.damage import DamagedFile


@pytest.fixture
def remote(dataset: Dataset) -> Iterator[str]:
    """The data set in fsspec's memory file system."""
    fs = fsspec.filesystem("memory")
    fs.put(str(dataset.path), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    fs.rm("/bucket", recursive=True)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each remote address is read."""
    counts: Counter[str] = Counter()
    read = module.read_remote

    def counted(url: str, *place: int) -> bytes:
        counts[url] += 1
        return read(url, *place)

    monkeypatch.setattr(module, "read_remote", counted)
    return counts


def test_a_remote_set_gives_the_same_batches(dataset: Dataset, remote: str, tmp_path: Path) -> None:
    far = open_dataset(remote, cache=tmp_path / "c")
    assert far.fingerprint == dataset.fingerprint and far.tokenizer().fingerprint == dataset.tokenizer_fingerprint
    same_batches(dataset, far)
    assert np.array_equal(far.split("train").document_starts, dataset.split("train").document_starts)


@pytest.fixture
def many(make_dataset: Callable[..., Dataset]) -> Iterator[tuple[Dataset, str]]:
    """A data set of 12 shards, and where it is in fsspec's memory file system."""
    made = make_dataset([47, 53, 50, 61] * 60, shards=12)
    fs = fsspec.filesystem("memory")
    fs.put(str(made.path), "/many/set", recursive=True)
    yield made, "memory://many/set"
    fs.rm("/many", recursive=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_shard_is_fetched_once_per_pass(
    many: tuple[Dataset, str], tmp_path: Path, requests: Counter[str], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """With room for few shards, by ranks that share the cache of a node."""
    monkeypatch.setattr(module, "OPEN_FILES", 4)
    near, url = many
    split = near.split("train")
    sizes = [sum(file["bytes"] for file in shard["files"].values()) for shard in split.shards]
    shares = [
        Stream(
            open_dataset(url, cache=tmp_path / "c", cache_bytes=5 * max(sizes)).split("train"),
            shard_window=2,
            **REMOTE_SIZES,
        )
        for _ in range(ranks)
    ]
    assert sum(sizes) > 2 * 5 * max(sizes)
    for step in range(shares[0].samples_per_epoch // 12):
        for rank, stream in enumerate(shares):
            stream.batch(step, rank, ranks)
            assert used(tmp_path / "c") <= 5 * max(sizes)
    tokens = {name: count for name, count in requests.items() if name.endswith(".tokens")}
    assert len(tokens) == 12 and set(tokens.values()) == {1}


def test_shards_to_come_are_fetched_ahead(
    many: tuple[Dataset, str], tmp_path: Path, requests: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = open_dataset(many[1], cache=tmp_path / "c")
    stream = Stream(far.split("train"), shard_window=1, **{**REMOTE_SIZES, "global_sequences": 2})
    monkeypatch.setattr("data_pipeline.stream.TOKENS_PER_GROUP", 1)
    batches: Any = stream.batches(0, stream.samples_per_epoch // 2)
    next(batches)
    now = {shard for _, shard in stream.shards(0, 3)}
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        fetched = {int(url[-12:-7]) for url in requests if url.endswith(".tokens")}
        if fetched - now:
            break
        time.sleep(0.01)
    batches.close()
    assert fetched - now and not [t for t in threading.enumerate() if t.name.startswith("data_pipeline-fetch")]


def test_failures_are_tried_again(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.001)
    read, failures = module.read_remote, Counter[str]()

    def flaky(url: str, *place: int) -> bytes:
        failures[url] += 1
        if failures[url] <= 3:
            raise ConnectionResetError("reset by peer")
        return read(url, *place)

    monkeypatch.setattr(module, "read_remote", flaky)
    far = open_remote(remote, tmp_path / "c")
    assert far.split("train").read(0, 5)[0] == far.eos_id
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    failures.clear()
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read after 3 attempts \(reset by peer\)"):
        open_remote(remote, tmp_path / "d")


class ServerDisconnected(Exception):
    """As some network packages have them: no OSError."""

    __module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize("error", [ServerDisconnected("gone"), TimeoutError("slow"), EOFError("cut off")])
def test_what_a_network_throws_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.001)
    answers = iter([error, error, b"content"])

    def read() -> bytes:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert module.retry(read, "x") == b"content"


@pytest.mark.parametrize("error", [TypeError("a defect"), KeyError("a defect"), ZeroDivisionError()])
def test_a_defect_of_ours_is_told_at_once(error: Exception) -> None:
    attempts = []

    def read() -> bytes:
        attempts.append(1)
        raise error

    with pytest.raises(type(error)):
        module.retry(read, "x")
    assert len(attempts) == 1


def test_damage_on_the_way_is_fetched_again_and_at_the_source_told(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = module.read_remote, Counter[str]()

    def damaged(url: str, *place: int) -> bytes:
        times[url] += 1
        content = read(url, *place)
        if url.endswith("train/00000.tokens") and times[url] <= bad:
            return content[:5] + bytes([content[5] ^ 8]) + content[6:]
        return content

    monkeypatch.setattr(module, "read_remote", damaged)
    bad = 1
    far = open_remote(remote, tmp_path / "c")
    assert far.split("train").file(0, "tokens")[0] == far.eos_id
    bad = 10**9
    again = open_remote(remote, tmp_path / "d").split("train")
    with pytest.raises(DamagedFile, match=r"train/00000\.tokens: damaged between byte 0"):
        again.file(0, "tokens")
    assert not [path for path in (tmp_path / "d").iterdir() if path.name != "lock"]
    stream = Stream(again, on_damage="skip", shard_window=8, **REMOTE_SIZES)
    assert sum(1 for _ in stream.batches(0, stream.samples_per_epoch // 12)) and stream.skipped["samples"] > 0
    with pytest.raises(DamagedFile):
        list(Stream(again, shard_window=8, **REMOTE_SIZES).batches(0, 1000))


def test_a_truncated_remote_file_and_what_is_not_there(remote: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    content = fs.cat_file("/bucket/set/train/00000.tokens")
    fs.pipe_file("/bucket/set/train/00000.tokens", content[:-4])
    with pytest.raises(DamagedFile, match="ends at byte"):
        open_remote(remote, tmp_path / "c").split("train").file(0, "tokens")
    fs.rm("/bucket/set/train/00000.tokens")
    with pytest.raises(UserError, match=r"00000\.tokens: cannot be read"):
        open_remote(remote, tmp_path / "c").split("train").file(0, "tokens")
    with pytest.raises(UserError, match=r"none/manifest\.json: cannot be read"):
        open_dataset("memory://none", cache=tmp_path / "c")
    with pytest.raises(UserError, match="give cache"):
        open_dataset(remote)
    with pytest.raises(UserError, match="cache_bytes 0"):
        open_dataset(remote, cache=tmp_path / "c", cache_bytes=0)
    with pytest.raises(UserError, match="nosuch"):
        open_dataset("nosuch://x", cache=tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_dataset(remote, cache=tmp_path / "file" / "c")

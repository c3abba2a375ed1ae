from __future__ import annotations

import hashlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest

from data_pipeline import Dataset, Stream, UserError, open_dataset
from data_pipeline import cache as module
from data_pipeline.cache import Cache, CacheFull, open_remote
from data_pipeline.damage import DamagedFile

ROOT = Path(__file__).resolve().parents[2]


def blob(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def fetch(cache: Cache, content: bytes) -> BinaryIO:
    return cache.fetch(hashlib.sha256(content).hexdigest(), len(content), lambda file: file.write(content) and None)


def used(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # removed meanwhile
            total += entry.stat().st_size
    return total


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


# ---- the folder


def test_bound_is_kept_to_the_byte_and_the_oldest_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 3000)
    for number in (0, 1, 2):
        fetch(cache, blob(number)).close()
        time.sleep(0.002)
    assert used(cache.folder) == 3000
    fetch(cache, blob(0)).close()  # used again
    fetch(cache, blob(3, 1)).close()
    kept = {path.name for path in cache.folder.iterdir()} - {"lock"}
    assert kept == {hashlib.sha256(c).hexdigest() for c in (blob(0), blob(2), blob(3, 1))}
    assert used(cache.folder) == 2001
    with pytest.raises(UserError, match="3,000 bytes cannot hold a file of 3,001"):
        fetch(cache, blob(4, 3001))


def test_a_file_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 2500)
    held = [fetch(cache, blob(0)), fetch(cache, blob(1))]
    with pytest.raises(CacheFull, match="are in use at once, 1,000 more do not fit"):
        fetch(cache, blob(2))
    held[0].close()
    assert fetch(cache, blob(2)).read() == blob(2) and held[1].read() == blob(1)


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 5000)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.fetch("k", 1000, fail)
    assert used(cache.folder) == 0 and [p.name for p in cache.folder.iterdir()] == ["lock"]


def test_one_download_serves_all_who_wait(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 5000)
    downloads = []

    def download(file: BinaryIO) -> None:
        downloads.append(1)
        time.sleep(0.1)
        file.write(blob(0))

    got: list[bytes] = []
    key = hashlib.sha256(blob(0)).hexdigest()
    threads = [threading.Thread(target=lambda: got.append(cache.fetch(key, 1000, download).read())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1 and len(got) == 5
    with cache.fetch(key, 1000, download) as file:
        file.seek(0)
        assert file.read() == blob(0)


USER = """
import hashlib, random, sys
from pathlib import Path
from data_pipeline.cache import Cache
import time
cache, chance = Cache(Path(sys.argv[1]), int(sys.argv[2])), random.Random(int(sys.argv[3]))
print("ready", flush=True)
count = 0
while True:
    number = chance.randrange(12)
    content = random.Random(number).randbytes(20_000 + 1000 * number)
    def download(file):
        for start in range(0, len(content), 5000):
            file.write(content[start : start + 5000]); file.flush(); time.sleep(0.0005)
    with cache.fetch(hashlib.sha256(content).hexdigest(), len(content), download) as file:
        file.seek(0)
        assert file.read() == content
    count += 1
    if count % 20 == 0:
        print(count, flush=True)
"""


def test_processes_that_are_killed_leave_it_whole_and_below_its_bound(tmp_path: Path) -> None:
    """Two processes at a time, 20 of them killed at random instants, with room for four files."""
    folder, limit, chance = tmp_path / "c", 110_000, random.Random(0)
    most, kills, stop = [0], 0, threading.Event()
    Cache(folder, limit)

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], used(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()

    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", USER, str(folder), str(limit), str(seed)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running = [start(0), start(1)]
    try:
        while kills < 20:
            victim = running.pop(0)
            assert victim.stdout and victim.stdout.readline() == "ready\n", victim.communicate()[1]
            time.sleep(chance.uniform(0.0, 0.08))
            assert victim.poll() is None, victim.communicate()[1]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            kills += 1
            running.append(start(kills + 1))
        last = running.pop()
        assert last.stdout
        assert last.stdout.readline() == "ready\n" and last.stdout.readline() == "20\n"  # it goes on afterwards
        running.append(last)
    finally:
        for process in running:
            process.kill()
            process.wait()
        stop.set()
        watcher.join()
    assert limit // 2 < most[0] <= limit
    fetch(Cache(folder, limit), blob(99, 60_000)).close()
    for path in folder.iterdir():
        assert not path.name.endswith(".partial")
        if path.name != "lock":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


# ---- remote data sets

SIZES: dict[str, Any] = {"seed": 3, "sequence_length": 64, "global_sequences": 12}


def same_batches(dataset: Dataset, remote: Dataset, steps: int = 30) -> None:
    near = Stream(dataset.split("train"), shard_window=2, **SIZES)
    far = Stream(remote.split("train"), shard_window=2, **SIZES)
    for a, b in zip(near.batches(0, steps), far.batches(0, steps), strict=True):
        for name in ("tokens", "document_ids", "positions", "target_mask"):
            assert np.array_equal(getattr(a, name), getattr(b, name))


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
            open_dataset(url, cache=tmp_path / "c", cache_bytes=5 * max(sizes)).split("train"), shard_window=2, **SIZES
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
    stream = Stream(far.split("train"), shard_window=1, **{**SIZES, "global_sequences": 2})
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
    stream = Stream(again, on_damage="skip", shard_window=8, **SIZES)
    assert sum(1 for _ in stream.batches(0, stream.samples_per_epoch // 12)) and stream.skipped["samples"] > 0
    with pytest.raises(DamagedFile):
        list(Stream(again, shard_window=8, **SIZES).batches(0, 1000))


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


# ---- real servers on loopback


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, or without where `ranges` says so."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        if self.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_http(dataset: Dataset, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_BLOCK", 4096)
    handler = type("Handler", (Ranges,), {"ranges": ranges})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(dataset.path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        same_batches(dataset, open_dataset(url, cache=tmp_path / "c"))
        with pytest.raises(UserError, match=r"none/manifest\.json: cannot be read"):
            open_dataset(f"{url}/none", cache=tmp_path / "c")
    finally:
        server.shutdown()
        server.server_close()


def test_s3(dataset: Dataset, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, which speaks S3 over HTTP: a data set read, and documents prepared from a bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(dataset.path), "bucket/set", recursive=True)
        fs.put(str(corpus), "bucket/corpus", recursive=True)
        same_batches(dataset, open_dataset("s3://bucket/set", cache=tmp_path / "c", cache_bytes=200_000))
        from data_helpers import quiet

        from data_pipeline.prepare import prepare

        made = prepare(
            "s3://bucket/corpus",
            "bytes",
            tmp_path / "o",
            workers=1,
            validation=0.2,
            shard_bytes=15_000,
            console=quiet(),
        )
        assert made is not None and made.fingerprint == dataset.fingerprint
    finally:
        server.stop()

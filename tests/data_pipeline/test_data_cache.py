"""The cache's folder: its bound, its locks, and processes that are killed."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from data_helpers import ROOT, used

from data_pipeline import UserError
from data_pipeline.cache import Cache, CacheFull


def blob(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def fetch(cache: Cache, content: bytes) -> BinaryIO:
    return cache.fetch(hashlib.sha256(content).hexdigest(), len(content), lambda file: file.write(content) and None)


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

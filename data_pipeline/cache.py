"""Remote data sets: shards are fetched through fsspec into a local folder of bounded size.

The folder holds whole, checked files named by their sha256, so data sets and runs share it, and so do the processes
of a node. All that keeps it right is file locks, which the system lets go when a process dies:

    lock               held for the moment in which the folder's content changes
    SHA256             a file; whoever reads it holds a shared lock, and what is so held is not removed
    SHA256.partial     a file on its way, at its full size from the start; its downloader holds it exclusively

A partial file that nobody holds is what a killed process left; the next one removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.damage import DamagedFile
from data_pipeline.errors import FULL_DISK, UserError, is_failed_reading
from data_pipeline.shards import MANIFEST, Dataset, parse_manifest
from data_pipeline.splits import OpenFile

DEFAULT_BYTES = 10 << 30
FETCH_BLOCK = 8 << 20  # bytes of one request
ATTEMPTS = 6
FIRST_DELAY = 0.2  # seconds; doubled for each further attempt
OPEN_FILES = 24  # mapped at a time by a process
WAIT_FOR_ROOM = 60.0  # seconds

T = TypeVar("T")


class CacheFull(UserError):
    """Everything in the cache is in use, and one more file does not fit."""


class PinnedMap(mmap.mmap):
    """A mapped file of the cache; it keeps the lock that keeps the file."""

    file: BinaryIO


class Cache:
    """A folder that holds at most `limit` bytes of files. Any number of processes may use it at once."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
        except OSError as error:
            raise UserError(f"cache {folder}: cannot be written ({error.strerror}): choose another") from error

    def fetch(self, key: str, size: int, download: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file `key`, downloaded unless it is there, opened and held until it is closed.

        download: writes the content, of `size` bytes and sha256 `key`, or raises. Raises CacheFull.
        """
        self.check_holds(size)
        while True:
            with self._locked():
                if file := self._open_held(self.folder / key, fcntl.LOCK_SH):
                    os.utime(file.fileno())
                    return file
                partial = self.folder / f"{key}.partial"
                if file := self._open_held(partial, fcntl.LOCK_EX):
                    partial.unlink()  # its downloader was killed
                    file.close()
                if not partial.exists():
                    self._make_room(size)
                    mine = partial.open("w+b")
                    fcntl.flock(mine, fcntl.LOCK_EX)
                    mine.truncate(size)
                    break
            self._wait_for(partial)
        return self._fill(key, mine, partial, download)

    def check_holds(self, size: int) -> None:
        """Raise UserError if a file of this size cannot be held even alone."""
        if size > self.limit:
            raise UserError(f"cache {self.folder}: {self.limit:,} bytes cannot hold a file of {size:,}: make it larger")

    def _fill(self, key: str, file: BinaryIO, partial: Path, download: Callable[[BinaryIO], None]) -> BinaryIO:
        try:
            download(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            with self._locked():
                partial.unlink()
            file.close()
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise UserError(f"cache {self.folder}: its disk is full: free space, or lower cache_bytes") from error
            raise
        with self._locked():
            partial.rename(self.folder / key)
            fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        return file

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until `size` more bytes fit."""
        entries = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self.folder)]
        used = sum(status.st_size for status, _ in entries)
        for status, path in sorted(entries, key=lambda one: (one[1].suffix != ".partial", one[0].st_mtime_ns)):
            stale = path.suffix == ".partial"
            if path.name == "lock" or (used + size <= self.limit and not stale):
                continue
            if file := self._open_held(path, fcntl.LOCK_EX):
                path.unlink()
                file.close()
                used -= status.st_size
        if used + size > self.limit:
            raise CacheFull(
                f"cache {self.folder}: {used:,} of {self.limit:,} bytes are in use at once, {size:,} more do "
                "not fit: make it larger"
            )

    @staticmethod
    def _open_held(path: Path, how: int) -> BinaryIO | None:
        """The file, opened and locked; None if it is not there or someone else holds it."""
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    @staticmethod
    def _wait_for(partial: Path) -> None:
        """Return when nobody is downloading the file any more."""
        try:
            with partial.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            pass

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class RemoteFiles:
    """Opens the files of a remote data set: fetched, checked and mapped; the last few stay open."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._open: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The content of the file of a manifest's entry. Raises DamagedFile if it is not what was written."""
        if entry["bytes"] == 0:
            return np.empty(0, dtype)
        key = entry["file"]
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        array = self._fetch(entry, dtype)
        with self._lock:
            self._open[key] = array
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return array

    def _fetch(self, entry: Mapping[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        deadline = time.monotonic() + WAIT_FOR_ROOM
        while True:
            try:
                file = self.cache.fetch(entry["sha256"], entry["bytes"], self._downloader(entry))
            except CacheFull:
                with self._lock:
                    if self._open:  # our own may be what is in the way
                        self._open.popitem(last=False)
                        continue
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
            mapped = PinnedMap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.file = file
            return np.frombuffer(mapped, dtype)

    def _downloader(self, entry: Mapping[str, Any]) -> Callable[[BinaryIO], None]:
        url = f"{self.url}/{entry['file']}"

        def once(file: BinaryIO) -> None:
            sha256 = hashlib.sha256()
            file.seek(0)
            for start in range(0, entry["bytes"], FETCH_BLOCK):
                stop = min(start + FETCH_BLOCK, entry["bytes"])
                block = retry(lambda a=start, b=stop: read_remote(url, a, b), url)  # type: ignore[misc]
                if len(block) != stop - start:
                    raise DamagedFile(
                        f"{url}: ends at byte {start + len(block):,} where the manifest records "
                        f"{entry['bytes']:,}: restore the file"
                    )
                sha256.update(block)
                file.write(block)
            if sha256.hexdigest() != entry["sha256"]:
                raise DamagedFile(
                    f"{url}: damaged between byte 0 and byte {entry['bytes']:,}, its content is not what was "
                    "written (sha256 differs): restore the file"
                )

        def download(file: BinaryIO) -> None:
            try:
                once(file)
            except DamagedFile:
                once(file)  # the damage may have happened on the way

        return download


_file_systems = threading.local()  # fsspec's are safe neither across threads nor across forks


def read_remote(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes start … stop − 1 of a remote file, or all of it."""
    protocol = url.partition("://")[0]
    name = f"{protocol} {os.getpid()}"
    if not hasattr(_file_systems, name):
        setattr(_file_systems, name, fsspec.filesystem(protocol, skip_instance_cache=True))
    content: bytes = getattr(_file_systems, name).cat_file(url, start=start, end=stop)
    if start is not None and stop is not None and len(content) > stop - start:
        return content[start:stop]  # a server that does not know ranges sends all of it
    return content


def retry(action: Callable[[], T], name: str) -> T:
    """action(), again after a growing pause where the network fails. Raises UserError when it goes on failing."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{name}: cannot be read ({error}): check the address and your access to it") from error
        except Exception as error:  # each file system has errors of its own; a mistake in the program is none of them
            if not is_failed_reading(error):
                raise
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f"{name}: cannot be read after {ATTEMPTS} attempts ({error}): check the network"
                ) from error
            time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError


def open_remote(url: str, cache: str | os.PathLike[str] | None, cache_bytes: int | None = None) -> Dataset:
    """Open a data set at an fsspec URL, its shards kept in the folder `cache`, at most cache_bytes (10 GiB).

    The manifest and tokenizer, which are small, are read anew into a folder of their own beside it.
    """
    if cache is None:
        raise UserError(f"{url}: is remote, its shards need a local folder to be kept in: give cache")
    limit = DEFAULT_BYTES if cache_bytes is None else cache_bytes
    if limit < 1:
        raise UserError(f"cache_bytes {limit}: give 1 or more")
    url, kept = url.rstrip("/"), Cache(Path(cache), limit)
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise UserError(f"{url}: {error}: give a folder or an fsspec URL") from error
    content = retry(lambda: read_remote(f"{url}/{MANIFEST}"), f"{url}/{MANIFEST}")
    manifest = parse_manifest(content, f"{url}/{MANIFEST}")
    files: OpenFile = RemoteFiles(url, kept)
    remote = Dataset(Path(), manifest, files, open_files=0, remote=True)
    kept.check_holds(max((entry["bytes"] for entry in remote.files()), default=0))
    folder = Path(f"{os.fspath(cache)}.manifests") / manifest["fingerprint"]
    _keep(folder / MANIFEST, content)
    if name := manifest["tokenizer"]["file"]:
        _keep(folder / name, retry(lambda: read_remote(f"{url}/{name}"), f"{url}/{name}"))
    return replace(remote, path=folder)


def _keep(path: Path, content: bytes) -> None:
    """Write a file that other processes may be writing at the same moment."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(path)

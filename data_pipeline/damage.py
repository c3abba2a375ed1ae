"""Finding damage: a file's bytes against the checksums that the manifest records."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.splits import Split

BLOCK = 1 << 20  # bytes that one crc32 covers
REMEDY = "restore the file or prepare the data set again"


class DamagedFile(UserError):
    """A file that is not what was written."""


def checksums(data: bytes | memoryview) -> dict[str, Any]:
    """What the manifest records of a file's content: sha256 of the whole, crc32 of every MiB to find a place."""
    view = memoryview(data).cast("B")
    blocks = [f"{zlib.crc32(view[start : start + BLOCK]):08x}" for start in range(0, len(view), BLOCK)]
    return {"bytes": len(view), "sha256": hashlib.sha256(view).hexdigest(), "crc32": blocks}


def find_damage(path: Path, entry: Mapping[str, Any], advance: Callable[[int], None] = lambda _: None) -> str | None:
    """What is wrong with a file, and where, in a few words; None if it is what its entry records.

    advance: told the bytes that have been read. An entry without checksums is taken at its size.
    """
    sha256, place, first_bad = hashlib.sha256(), 0, None
    blocks = entry.get("crc32", [])
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                number = place // BLOCK
                if first_bad is None and number < len(blocks) and f"{zlib.crc32(block):08x}" != blocks[number]:
                    first_bad = place
                sha256.update(block)
                place += len(block)
                advance(len(block))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if place != entry["bytes"]:
        return f"ends at byte {place:,} where the manifest records {entry['bytes']:,}"
    if first_bad is not None:
        return f"damaged between byte {first_bad:,} and byte {min(first_bad + BLOCK, place):,}"
    if "sha256" in entry and sha256.hexdigest() != entry["sha256"]:
        return "its content is not what was written (sha256 differs)"
    return None


def shard_damage(split: Split, number: int) -> str | None:
    """What is wrong with a shard of a split, naming the file; None if it is whole."""
    for kind, entry in split.shards[number]["files"].items():
        if split.remote:
            try:
                split.file(number, kind)  # checked on arrival
            except DamagedFile as error:
                return str(error)
        elif problem := find_damage(split.folder / entry["file"], entry):
            return f"{split.folder / entry['file']}: {problem}: {REMEDY}"
    return None


class ShardCheck:
    """Tells whole shards from damaged ones; each is read once, before the first sample of it is used."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.damage: dict[int, str | None] = {}

    def are_whole(self, shards: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether all shards of each row (B, any number) are whole: (B,)."""
        for number in np.unique(shards).tolist():
            if number not in self.damage:
                self.damage[number] = shard_damage(self.split, number)
        bad = [number for number, problem in self.damage.items() if problem]
        return np.asarray(~np.isin(shards, bad).any(axis=-1))


class BackgroundCheck:
    """A thread that reads every local shard once, beside the run. Rank r of R checks the r-th of every R."""

    def __init__(self, splits: Sequence[Split], rank: int, ranks: int) -> None:
        self._stopped = threading.Event()
        self._damage: str | None = None
        work = [(split, number) for split in splits for number in range(rank, len(split.shards), ranks)]
        self._thread = threading.Thread(target=self._check, args=(work,), name="data_pipeline-check", daemon=True)

    def _check(self, work: list[tuple[Split, int]]) -> None:
        for split, number in work:
            if self._stopped.is_set():
                return
            if problem := shard_damage(split, number):
                self._damage = problem
                return

    def raise_damage(self) -> None:
        """Raise DamagedFile if a damaged shard has been found. The first call starts the reading."""
        if self._thread.ident is None:  # after the first batch, which is not to wait for it
            self._thread.start()
        if self._damage:
            raise DamagedFile(self._damage)

    def stop(self) -> None:
        """End the thread after the shard that it is reading."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

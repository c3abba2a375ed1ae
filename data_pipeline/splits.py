"""One split of a data set as a stream of tokens: windows of it, and where its documents begin.

Files are opened when they are first read and a bounded number of them stays open, so that a split of 10^5 shards
opens as fast as one of a single shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data_pipeline.errors import UserError

OPEN_FILES = 1024  # of a split at a time; a process may hold 65,530 mappings
SMALL_FILE = 1 << 16  # bytes; reading one takes a tenth of the time of mapping it
# Up to this many documents (8 bytes each) their starts are held in memory as one array, which is searched several
# times faster than shard by shard.
INDEX_IN_MEMORY = 1 << 22
DTYPES: dict[str, np.dtype[Any]] = {"documents": np.dtype("<i8"), "prompts": np.dtype("<u4")}

OpenFile = Callable[[Mapping[str, Any], "np.dtype[Any]"], NDArray[Any]]


def map_file(path: Path, dtype: np.dtype[Any], offset: int = 0, count: int | None = None) -> NDArray[Any]:
    """A file's content, or `count` entries of it from byte `offset`, read in place. Raises UserError."""
    try:
        shape = None if count is None else (count,)
        # A plain array over the mapping: np.memmap's own slicing is several times slower.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({error}): prepare the data set again or restore the file")


def open_in(folder: Path) -> OpenFile:
    """How the shards in a local folder are opened: mapped; small files are read."""

    def open_file(entry: Mapping[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        if entry["bytes"] <= SMALL_FILE:
            try:
                return np.fromfile(folder / entry["file"], dtype)
            except OSError as error:
                raise _unreadable(folder / entry["file"], error) from error
        return map_file(folder / entry["file"], dtype)

    return open_file


@dataclass(frozen=True)
class Split:
    """One split of a data set: a stream of tokens that runs through its shards, read in place.

    tokens, documents, text_bytes: totals; text_bytes counts the UTF-8 bytes of the source text. open_file: from a
    file's entry in the manifest and its type to its content. open_files: how many stay open. remote: the files are
    fetched, so samples should be read in an order that goes through few shards at a time. whole_index: the document
    index may be read as a whole, which is faster, and needs every shard.
    """

    name: str
    folder: Path
    dtype: np.dtype[Any]
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[dict[str, Any], ...]
    open_file: OpenFile = field(repr=False, compare=False)
    open_files: int = OPEN_FILES
    remote: bool = False
    whole_index: bool = True

    def read(self, start: int, stop: int, kind: str = "tokens") -> NDArray[Any]:
        """Tokens start … stop−1 of the stream, (stop − start,) of the type on disk; a view within one shard.

        kind: "tokens", or "labels" for their labels. Raises IndexError outside 0 … tokens.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} … {stop} of a split of {self.tokens}")
        shard = max(bisect_right(self._offsets, start) - 1, 0)
        parts = []
        while start < stop:
            offset, end = self._offsets[shard], min(stop, self._offsets[shard + 1])
            if end > start:
                parts.append(self.file(shard, kind)[start - offset : end - offset])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def windows(self, starts: NDArray[np.int64], length: int, out: NDArray[np.int64], kind: str = "tokens") -> None:
        """Copy tokens (or labels: see read) s … s + length − 1 into a row of `out` for each s in `starts`."""
        if not len(starts):
            return
        if not 0 <= starts.min() <= starts.max() <= self.tokens - length:
            raise IndexError(f"a window of {length} tokens outside a split of {self.tokens}")
        if len(self.shards) == 1:
            out[...] = sliding_window_view(self.file(0, kind), length)[starts]
            return
        shards = self.shard_of(starts)
        places = starts - self.shard_starts[shards]
        for row, (shard, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            window = self.file(shard, kind)[place : place + length]
            if len(window) < length:  # it runs on into the next shard
                window = self.read(int(starts[row]), int(starts[row]) + length, kind)
            out[row] = window

    def shard_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that each place of the stream lies in, int64 of the same shape."""
        return np.searchsorted(self.shard_starts, places, side="right") - 1

    def document_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document that each place of the stream lies in, int64 of the same shape."""
        if self._index_in_memory:
            return np.searchsorted(self.document_starts, places, side="right") - 1
        found = np.empty(places.shape, np.int64)
        shards = self.shard_of(places)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            starts = self.file(shard, "documents")
            within = np.searchsorted(starts, places[here] - self._offsets[shard], side="right") - 1
            found[here] = within + self._document_offsets[shard]
        return found

    def document_start(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of the documents begins in the stream, int64 of the same shape."""
        if self._index_in_memory:
            return np.asarray(self.document_starts[documents])
        return self._of_documents(documents, "documents")

    def prompt_length(self, documents: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Tokens of each of the documents, after its EOS, that are given; int64, or None if unrecorded."""
        return self._of_documents(documents, "prompts") if self.has_prompts else None

    @cached_property
    def has_prompts(self) -> bool:
        """Whether any document has tokens that are given and never targets."""
        return any("prompts" in shard["files"] for shard in self.shards)

    @cached_property
    def has_labels(self) -> bool:
        """Whether tokens are answered with labels of their own, and not with the next token."""
        return any("labels" in shard["files"] for shard in self.shards)

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each document, after its EOS, that are given: (documents,) int64; None if unrecorded."""
        return self.prompt_length(np.arange(self.documents))

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document begins in the stream, at its EOS: (documents,) int64, sorted."""
        parts = [self.file(number, "documents") for number in range(len(self.shards))]
        if len(parts) == 1:
            return parts[0]
        moved = [part + offset for part, offset in zip(parts, self._offsets, strict=False)]
        return np.concatenate(moved) if moved else np.empty(0, np.int64)

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Where each shard begins in the stream: (shards,) int64."""
        return np.array(self._offsets[:-1], np.int64)

    @property
    def _index_in_memory(self) -> bool:
        return self.whole_index and not self.remote and self.documents <= INDEX_IN_MEMORY

    @cached_property
    def file(self) -> Callable[[int, str], NDArray[Any]]:
        """file(number, kind): the content of one file of a shard. Raises UserError if it cannot be read."""

        def open_one(number: int, kind: str) -> NDArray[Any]:
            return self.open_file(self.shards[number]["files"][kind], DTYPES.get(kind, self.dtype))

        return lru_cache(maxsize=self.open_files)(open_one)

    def _of_documents(self, documents: NDArray[np.int64], kind: str) -> NDArray[np.int64]:
        """What the files of a kind record of each document; starts become places of the stream."""
        values = np.zeros(documents.shape, np.int64)
        shards = np.searchsorted(self._document_offsets, documents, side="right") - 1
        for shard in np.unique(shards).tolist():
            if kind in self.shards[shard]["files"]:
                here = shards == shard
                values[here] = self.file(shard, kind)[documents[here] - self._document_offsets[shard]]
                if kind == "documents":
                    values[here] += self._offsets[shard]
        return values

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each shard begins in the stream, and the stream's end."""
        return _sums(shard["tokens"] for shard in self.shards).tolist()

    @cached_property
    def _document_offsets(self) -> NDArray[np.int64]:
        return _sums(shard["documents"] for shard in self.shards)[:-1]


def _sums(counts: Any) -> NDArray[np.int64]:
    return np.cumsum([0, *counts], dtype=np.int64)

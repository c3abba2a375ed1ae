"""The format of a data set on disk, its writer and its reader.

DIR/manifest.json             written last: a folder without it is not a data set
DIR/tokenizer.model|.json     the tokenizer (none for `bytes`)
DIR/{train,validation}/
    00000.tokens              little-endian uint16, or uint32 for a vocabulary above 65,536; each document is
                              [EOS, tokens…]
    00000.documents           int64: where each document begins in the shard, at its EOS
    00000.prompts             optional, uint32: tokens of each document, after its EOS, that are never targets
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import FULL_DISK, UserError
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of the two token types that holds ids below vocab_size."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- writing


def write_file(path: Path, data: bytes | memoryview) -> dict[str, Any]:
    """Write a file so that it is whole or absent whatever happens; returns {"bytes", "sha256"}.

    Raises UserError when the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in FULL_DISK:
            raise UserError(
                f"the disk is full, cannot write {path}: free space there, or choose another --out; "
                "the same command goes on with what is finished"
            ) from error
        raise
    _flush_folder(path.parent)
    return {"bytes": len(memoryview(data).cast("B")), "sha256": hashlib.sha256(data).hexdigest()}


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as write_file does: whole or absent."""
    write_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_shard(
    folder: Path,
    split: str,
    number: int,
    tokens: NDArray[Any],
    document_starts: NDArray[np.int64],
    prompt_lengths: NDArray[np.uint32] | None = None,
    *,
    text_bytes: int,
) -> dict[str, Any]:
    """Write one shard of a split below `folder`; returns its entry for the manifest.

    tokens: (N,) of token_dtype, each document opened by EOS. document_starts: (D,) offsets into tokens.
    prompt_lengths: (D,) or None. text_bytes: UTF-8 bytes of the documents' text. Raises UserError on a full
    disk.
    """
    parts: dict[str, NDArray[Any]] = {"tokens": tokens, "documents": document_starts.astype("<i8")}
    if prompt_lengths is not None:
        parts["prompts"] = prompt_lengths.astype("<u4")
    files = {}
    for kind, array in parts.items():
        name = f"{split}/{number:05d}.{kind}"
        files[kind] = {"file": name} | write_file(folder / name, np.ascontiguousarray(array).data)
    return {
        "documents": len(document_starts),
        "tokens": len(tokens),
        "text_bytes": text_bytes,
        "files": files,
    }


def write_manifest(
    folder: Path, tokenizer: Tokenizer, shards: Mapping[str, list[dict[str, Any]]], **provenance: Any
) -> None:
    """Make the folder a data set. shards: for each split the entries of write_shard, in stream order."""
    splits = {}
    for split in SPLITS:
        entries = shards.get(split, [])
        totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "tokens", "text_bytes")}
        splits[split] = totals | {"shards": entries}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": tokenizer.path.name if tokenizer.path else None,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "splits": splits,
    }
    write_json(folder / MANIFEST, manifest | provenance | {"fingerprint": fingerprint(manifest)})


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of what determines the data in a manifest: format, type, tokenizer, shards' counts and sums."""
    content = {key: manifest[key] for key in ("format", "dtype", "tokenizer", "splits")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- reading


@dataclass(frozen=True)
class Split:
    """One split of a data set: a stream of tokens that runs through its shards, read in place.

    tokens, documents, text_bytes: totals; text_bytes counts the UTF-8 bytes of the source text.
    """

    name: str
    folder: Path
    dtype: np.dtype[Any]
    tokens: int
    documents: int
    text_bytes: int
    shards: tuple[dict[str, Any], ...]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start … stop−1 of the stream, (stop − start,) of the type on disk; a view within one shard.

        Raises IndexError outside 0 … tokens.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} … {stop} of a split of {self.tokens}")
        shard = max(bisect_right(self._offsets, start) - 1, 0)
        if shard < len(self.shards) and stop <= self._offsets[shard + 1]:
            return self._maps[shard][start - self._offsets[shard] : stop - self._offsets[shard]]
        parts = []
        while start < stop:
            end = min(stop, self._offsets[shard + 1])
            parts.append(self._maps[shard][start - self._offsets[shard] : end - self._offsets[shard]])
            start, shard = end, shard + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document begins in the stream, at its EOS: (documents,) int64, sorted."""
        parts = [_map(self.folder, shard, "documents", "<i8") for shard in self.shards]
        if len(parts) == 1:
            return parts[0]
        moved = [part + offset for part, offset in zip(parts, self._offsets, strict=False)]
        return np.concatenate(moved) if moved else np.empty(0, np.int64)

    @cached_property
    def prompt_lengths(self) -> NDArray[np.uint32] | None:
        """Tokens of each document, after its EOS, that are given: (documents,) uint32; None if unrecorded."""
        if not any("prompts" in shard["files"] for shard in self.shards):
            return None
        return np.concatenate(
            [
                _map(self.folder, shard, "prompts", "<u4")
                if "prompts" in shard["files"]
                else np.zeros(shard["documents"], np.uint32)
                for shard in self.shards
            ]
        )

    @cached_property
    def _offsets(self) -> list[int]:
        """Where each shard begins in the stream, and the stream's end."""
        return [0, *np.cumsum([shard["tokens"] for shard in self.shards], dtype=np.int64).tolist()]

    @cached_property
    def _maps(self) -> list[NDArray[Any]]:
        return [_map(self.folder, shard, "tokens", self.dtype) for shard in self.shards]


def _map(folder: Path, shard: Mapping[str, Any], kind: str, dtype: str | np.dtype[Any]) -> NDArray[Any]:
    path = folder / shard["files"][kind]["file"]
    try:
        # A plain array over the mapping: np.memmap's own slicing is several times slower.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): prepare the data set again or restore the file"
        ) from error


@dataclass(frozen=True)
class Dataset:
    """An opened data set; manifest is the whole of manifest.json."""

    path: Path
    manifest: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """How many token ids there are; every token is below it."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def eos_id(self) -> int:
        """The token that opens each document."""
        return int(self.manifest["tokenizer"]["eos_id"])

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of the tokenizer's file."""
        return str(self.manifest["tokenizer"]["fingerprint"])

    @property
    def fingerprint(self) -> str:
        """sha256 of all that determines the data: type, tokenizer, counts and checksums of the shards."""
        return str(self.manifest["fingerprint"])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises UserError if its file is not the one that did."""
        file = self.manifest["tokenizer"]["file"]
        tokenizer = load_tokenizer("bytes" if file is None else self.path / file, eos_id=self.eos_id)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.path / file}: not the tokenizer that made this data set: restore the original file"
            )
        return tokenizer

    def split(self, name: str) -> Split:
        """The split "train" or "validation". Raises KeyError for another name."""
        content = self.manifest["splits"][name]
        return Split(
            name=name,
            folder=self.path,
            dtype=np.dtype(self.manifest["dtype"]).newbyteorder("<"),
            tokens=content["tokens"],
            documents=content["documents"],
            text_bytes=content["text_bytes"],
            shards=tuple(content["shards"]),
        )

    def files(self) -> list[dict[str, Any]]:
        """Every shard file's entry: file, bytes, sha256."""
        shards = [shard for name in SPLITS for shard in self.manifest["splits"][name]["shards"]]
        return [entry for shard in shards for entry in shard["files"].values()]


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Open a prepared data set: read its manifest, check that every file is there with its recorded size.

    Raises UserError for a folder that is missing, no data set, unfinished, of another format, altered or
    truncated.
    """
    folder = Path(path)
    dataset = Dataset(folder, _read_manifest(folder))
    for entry in dataset.files():
        file = folder / entry["file"]
        if not file.is_file():
            raise UserError(
                f"{file}: missing from the data set: restore the file or prepare the data set again"
            )
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(
                f"{file}: {size:,} bytes where the manifest records {entry['bytes']:,}: restore the file or "
                "prepare the data set again"
            )
    if (name := dataset.manifest["tokenizer"]["file"]) is not None and not (folder / name).is_file():
        raise UserError(f"{folder / name}: the data set's tokenizer is missing: restore the file")
    return dataset


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such data set: make it with python -m data_pipeline.prepare --out {folder} …"
        )
    if not file.is_file():
        raise UserError(
            f"{folder}: not a finished data set, it has no {MANIFEST}: run its python -m "
            "data_pipeline.prepare command again, which goes on where it stopped"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        if version == FORMAT and fingerprint(manifest) == manifest["fingerprint"]:
            return dict(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}): restore it or prepare the data set again") from error
    if version != FORMAT:
        raise UserError(
            f"{file}: format {version}, this version reads format {FORMAT}: prepare the data set again"
        )
    raise UserError(f"{file}: its content does not match its own fingerprint: restore it or prepare again")

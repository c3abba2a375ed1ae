"""Other programs' token files, read in place: Megatron's .bin with its .idx, and nanoGPT's and llm.c's .bin.

They carry no checksums and no vocabulary, so the tokenizer that made them must be named; their data set is known
by sizes, index and tokenizer, not by its content.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.shards import FORMAT, SPLITS, Dataset, fingerprint
from data_pipeline.splits import map_file
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
LLMC_MAGIC = 20240520
LLMC_HEADER = 1024  # bytes
SCAN = 1 << 22  # tokens looked through at a time


@dataclass(frozen=True)
class TokenFile:
    """A foreign file: its kind, the type of its tokens, their count, and where they begin, in bytes."""

    path: Path
    kind: str
    dtype: np.dtype[Any]
    tokens: int
    offset: int = 0


def open_foreign(path: Path, tokenizer: str | os.PathLike[str] | None) -> Dataset:
    """The data set that a .bin file is; of nanoGPT and llm.c, its val.bin beside a train.bin is its validation.

    Raises UserError for a file that is missing or of none of these kinds, and without its tokenizer.
    """
    if tokenizer is None:
        raise UserError(f"{path}: does not say what made its tokens: give its tokenizer")
    made = load_tokenizer(tokenizer)
    beside = path.with_name(path.name.replace("train", "val"))
    paths = {"train": path, "validation": beside if beside != path and beside.is_file() else None}
    files = {name: _recognise(file, made) if file else None for name, file in paths.items()}
    indices = {name: _document_starts(file, made) if file else None for name, file in files.items()}
    manifest = _manifest(files, indices, tokenizer, made)
    train = files["train"]
    assert train is not None
    validation = files["validation"]
    if validation and validation.dtype != train.dtype:
        raise UserError(f"{validation.path}: of type {validation.dtype}, {path} of {train.dtype}: move one away")

    def open_file(entry: Mapping[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        if "index" in entry:
            index = indices[entry["index"]]
            assert index is not None
            return index
        return map_file(path.parent / entry["file"], dtype, entry["offset"], entry["count"])

    return Dataset(path.parent, manifest, open_file)


def _recognise(path: Path, tokenizer: Tokenizer) -> TokenFile:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(12)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    if path.with_suffix(".idx").exists():
        code = _read_index(path.with_suffix(".idx"))[0]
        return TokenFile(path, "megatron", code, size // code.itemsize)
    if len(header) == 12 and struct.unpack("<i", header[:4])[0] == LLMC_MAGIC:
        version, count = struct.unpack("<ii", header[4:])
        dtype = np.dtype("<u2" if version == 1 else "<u4")
        if size != LLMC_HEADER + count * dtype.itemsize:
            raise UserError(f"{path}: {size:,} bytes where its header counts {count:,} tokens: restore the file")
        return TokenFile(path, "llm.c", dtype, count, LLMC_HEADER)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path}: {size:,} bytes are no whole number of {dtype.itemsize}-byte tokens: restore it")
    return TokenFile(path, "nanogpt", dtype, size // dtype.itemsize)


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Megatron's index: the tokens' type, where each sequence begins (bytes), and its documents' first sequences."""
    data = path.read_bytes()
    if data[:9] != MEGATRON_MAGIC or len(data) < 34:
        raise UserError(f"{path}: not an index of Megatron's: restore the file")
    version, code, sequences, documents = struct.unpack("<QBQQ", data[9:34])
    if version != 1 or code not in MEGATRON_DTYPES or len(data) != 34 + 12 * sequences + 8 * documents:
        raise UserError(f"{path}: version {version}, type {code}, {len(data):,} bytes: not a whole index: restore it")
    dtype = np.dtype(MEGATRON_DTYPES[code])
    lengths = np.frombuffer(data, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    firsts = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    if not np.array_equal(pointers, (np.cumsum(lengths) - lengths) * dtype.itemsize):
        raise UserError(f"{path}: its sequences do not lie end to end, which is how they are read: rebuild it")
    return dtype, np.append(pointers, int(lengths.sum()) * dtype.itemsize), firsts


def _document_starts(file: TokenFile, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Where each document begins: from Megatron's index, else from end-of-text tokens.

    llm.c's opens a document, nanoGPT's closes one.
    """
    if file.kind == "megatron":
        _, pointers, firsts = _read_index(file.path.with_suffix(".idx"))
        if pointers[-1] != file.tokens * file.dtype.itemsize:
            raise UserError(f"{file.path}: {file.tokens:,} tokens, its index counts others: restore the file")
        starts = np.unique(pointers[firsts[:-1]] // file.dtype.itemsize)
        return starts[starts < file.tokens]
    tokens = map_file(file.path, file.dtype, file.offset, file.tokens)
    ends = [np.flatnonzero(tokens[a : a + SCAN] == tokenizer.eos_id) + a for a in range(0, len(tokens), SCAN)]
    starts = np.concatenate(ends) + (file.kind == "nanogpt")
    return np.unique(np.concatenate([[0], starts[starts < file.tokens]]))


def _manifest(
    files: Mapping[str, TokenFile | None],
    indices: Mapping[str, NDArray[np.int64] | None],
    spec: str | os.PathLike[str],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    splits = {}
    for name in SPLITS:
        file, starts = files[name], indices[name]
        content: dict[str, Any] = {"documents": 0, "tokens": 0, "text_bytes": 0}
        shards = []
        if file and starts is not None:
            content = {"documents": len(starts), "tokens": file.tokens, "text_bytes": 0}
            index_sum = hashlib.sha256(starts.tobytes()).hexdigest()
            entry = {"file": file.path.name, "bytes": file.path.stat().st_size}
            tokens = entry | {"offset": file.offset, "count": file.tokens}
            documents = entry | {"index": name, "count": len(starts), "sha256 of the index": index_sum}
            shards = [content | {"files": {"tokens": tokens, "documents": documents}}]
        splits[name] = content | {"shards": shards}
    train = files["train"]
    assert train is not None
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": train.dtype.name,
        "tokenizer": {
            "kind": tokenizer.kind,
            "file": tokenizer.path.name if tokenizer.path else None,
            "spec": os.fspath(spec),
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "splits": splits,
        "foreign": train.kind,
        "source": str(train.path),
    }
    return manifest | {"fingerprint": fingerprint(manifest)}

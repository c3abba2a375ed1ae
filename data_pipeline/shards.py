"""The format of a data set on disk, its writer and its reader.

DIR/manifest.json             written last: a folder without it is not a data set
DIR/tokenizer.model|.json     the tokenizer (none for `bytes`)
DIR/{train,validation}/
    00000.tokens              little-endian uint8, uint16 or uint32, the smallest that holds the vocabulary; each
                              document is [EOS, tokens…]
    00000.documents           int64: where each document begins in the shard, at its EOS
    00000.prompts             optional, uint32: tokens of each document, after its EOS, that are never targets
    00000.labels              optional, in the tokens' type: what each token is to be answered with, where that is
                              not the next token
    00000.names               optional, text: a line for each document, where it comes from
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.damage import checksums
from data_pipeline.errors import FULL_DISK, UserError
from data_pipeline.splits import OPEN_FILES, OpenFile, Split, open_in
from data_pipeline.tokenizers import Tokenizer, load_tokenizer, tokenizer_file

FORMAT = 2
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds ids below vocab_size."""
    return np.min_scalar_type(max(vocab_size - 1, 0)).newbyteorder("<")


# ---- writing


def write_file(path: Path, data: bytes | memoryview) -> dict[str, Any]:
    """Write a file so that it is whole or absent whatever happens; returns its checksums.

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
    return checksums(data)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as write_file does: whole or absent."""
    write_file(path, _json_bytes(content))


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def write_shard(
    folder: Path,
    split: str,
    number: int,
    tokens: NDArray[Any],
    document_starts: NDArray[np.int64],
    prompt_lengths: NDArray[np.uint32] | None = None,
    *,
    text_bytes: int,
    names: list[str] | None = None,
    labels: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Write one shard of a split below `folder`; returns its entry for the manifest.

    tokens: (N,) of token_dtype, each document opened by EOS. document_starts: (D,) offsets into tokens.
    prompt_lengths: (D,) or None. text_bytes: UTF-8 bytes of the documents' text. names: where each document comes
    from, a line each. labels: (N,) token ids, or None. Raises UserError on a full disk.
    """
    parts: dict[str, NDArray[Any]] = {"tokens": tokens, "documents": document_starts.astype("<i8")}
    if prompt_lengths is not None:
        parts["prompts"] = prompt_lengths.astype("<u4")
    if labels is not None:
        parts["labels"] = labels.astype(tokens.dtype)
    contents = {kind: np.ascontiguousarray(array).tobytes() for kind, array in parts.items()}
    if names is not None:
        contents["names"] = "".join(f"{name}\n" for name in names).encode()
    files = {}
    for kind, content in contents.items():
        name = f"{split}/{number:05d}.{kind}"
        files[kind] = {"file": name} | write_file(folder / name, content)
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
    manifest |= provenance | {"fingerprint": fingerprint(manifest)}
    write_json(folder / MANIFEST, manifest | {"sha256": manifest_sha256(manifest)})


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of what determines the data in a manifest: format, type, tokenizer, shards' counts and sums.

    Where documents come from does not.
    """
    content = {key: manifest[key] for key in ("format", "dtype", "tokenizer")}
    content["splits"] = {
        name: split | {"shards": list(map(_unnamed, split["shards"]))} for name, split in manifest["splits"].items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unnamed(shard: Mapping[str, Any]) -> dict[str, Any]:
    return {**shard, "files": {kind: entry for kind, entry in shard["files"].items() if kind != "names"}}


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything that a manifest says but this sum itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- reading


@dataclass(frozen=True)
class Dataset:
    """An opened data set; manifest is the whole of manifest.json.

    path: its folder; of a remote one, where its manifest and tokenizer are kept. open_file, open_files, remote: see
    Split; None for the files in the folder.
    """

    path: Path
    manifest: dict[str, Any]
    open_file: OpenFile | None = field(default=None, repr=False, compare=False)
    open_files: int = OPEN_FILES
    remote: bool = False

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

    @property
    def foreign(self) -> bool:
        """Whether it is another program's file, read in place; its documents need not open with EOS."""
        return "foreign" in self.manifest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises UserError if its file is not the one that did."""
        tokenizer = load_tokenizer(self._tokenizer_spec, eos_id=self.eos_id)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self._tokenizer_spec}: not the tokenizer that made this data set: restore the original file"
            )
        return tokenizer

    def tokenizer_file(self) -> tuple[str, bytes] | None:
        """The name and content of the tokenizer's one file, for a copy; None if it has none."""
        return None if self._tokenizer_spec == "bytes" else tokenizer_file(self._tokenizer_spec)

    @property
    def _tokenizer_spec(self) -> str | Path:
        recorded = self.manifest["tokenizer"]
        here = "bytes" if recorded["file"] is None else self.path / recorded["file"]
        spec: str | Path = recorded.get("spec", here)
        return spec

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
            open_file=self.open_file or open_in(self.path),
            open_files=self.open_files,
            remote=self.remote,
        )

    def files(self) -> list[dict[str, Any]]:
        """Every shard file's entry: file, bytes, sha256."""
        shards = [shard for name in SPLITS for shard in self.manifest["splits"][name]["shards"]]
        return [entry for shard in shards for entry in shard["files"].values()]


def open_dataset(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    check_files: bool = True,
) -> Dataset:
    """Open a prepared data set: read its manifest, check that every file is there with its recorded size.

    path: a folder; an fsspec URL of one (s3://…), whose shards are then kept in the folder `cache`, at most
    `cache_bytes` of them; or a .bin file of Megatron, nanoGPT or llm.c, whose tokens `tokenizer` made. check_files:
    False leaves shard files for their reader to check. Raises UserError for what is missing, no data set, unfinished,
    of another format, altered or truncated.
    """
    if str(path).endswith(".bin"):
        from data_pipeline.foreign import open_foreign

        return open_foreign(Path(path), tokenizer)
    if tokenizer is not None:
        raise UserError(f"{path}: a data set holds its own tokenizer: leave tokenizer out")
    if "://" in str(path):
        from data_pipeline.cache import open_remote

        return open_remote(str(path), cache, cache_bytes)
    folder = Path(path)
    dataset = Dataset(folder, _read_manifest(folder))
    for entry in dataset.files() if check_files else []:
        file = folder / entry["file"]
        if not file.is_file():
            raise UserError(f"{file}: missing from the data set: restore the file or prepare the data set again")
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
        raise UserError(f"{folder}: no such data set: make it with python -m data_pipeline.prepare --out {folder} …")
    if not file.is_file():
        raise UserError(
            f"{folder}: not a finished data set, it has no {MANIFEST}: run its python -m "
            "data_pipeline.prepare command again, which goes on where it stopped"
        )
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """A manifest from its file's bytes. Raises UserError unless it is of this format and unaltered."""
    try:
        manifest = json.loads(content)
        version = manifest["format"]
        if version == FORMAT and fingerprint(manifest) == manifest["fingerprint"]:
            if manifest_sha256(manifest) == manifest["sha256"] and content == _json_bytes(manifest):
                return dict(manifest)
            raise UserError(f"{name}: its content is not what was written: restore it or prepare again")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: damaged ({error!r}): restore it or prepare the data set again") from error
    if version != FORMAT:
        raise UserError(f"{name}: format {version}, this version reads format {FORMAT}: prepare the data set again")
    raise UserError(f"{name}: its content does not match its own fingerprint: restore it or prepare again")

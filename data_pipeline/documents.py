"""Where documents come from: the standard library, files on any fsspec URL, Hugging Face data sets.

A source always gives the same documents in the same order, so that preparation can be stopped and gone on
with.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import sys
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from data_pipeline.errors import UserError, is_failed_reading

FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")


class Document(NamedTuple):
    """A text and where it comes from.

    name: for messages. text: never empty where a Source gives it. source_bytes: bytes of the source read to
    get it. language: what the source says it is, if anything.
    """

    name: str
    text: str
    source_bytes: int
    language: str | None = None


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order. Reading counts what it skips, by reason, in the Counter it is given.

    identity: what the documents depend on, as far as can be told without reading them. total_bytes: the sum
    of source_bytes to come, where known. root: what every document's name begins with and need not be kept.
    """

    identity: str
    total_bytes: int | None
    read: Callable[[Counter[str]], Iterator[Document]]
    root: str = ""


@dataclass(frozen=True)
class Fields:
    """How records are read. text, language: the fields that hold them. skip_invalid: leave out and count records
    that are not text, in place of an error."""

    text: str = "text"
    language: str | None = None
    skip_invalid: bool = False


def open_source(spec: str, fields: Fields = Fields()) -> Source:
    """A source by its name: `stdlib`, `hub:NAME[:CONFIG[:SPLIT]]`, a path, glob or URL of files or a folder.

    fields: of JSONL, Parquet, Arrow and hub records. Raises UserError if there is no such source; reading it
    raises UserError for a document that is not text.
    """
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        return _standard_library()
    if kind == "hub":
        return _hub(rest, fields)
    return _files(spec, fields)


def _identity(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---- the standard library


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        files += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    names = sorted(file.as_posix() for file in files)
    if not names:
        raise UserError(f"source stdlib: {sys.executable} has no .py files under {root}: use another interpreter")
    sizes = [(root / name).stat().st_size for name in names]

    def read(skipped: Counter[str]) -> Iterator[Document]:
        for name, size in zip(names, sizes, strict=True):
            try:
                with tokenize.open(root / name) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):  # what the library keeps to test its own decoding with
                skipped["undecodable"] += 1
                continue
            if text:
                yield Document(name, text, size)
            else:
                skipped["empty"] += 1

    return Source(_identity("stdlib", platform.python_version(), names, sizes), sum(sizes), read)


# ---- files


def _files(spec: str, fields: Fields) -> Source:
    try:
        fs, path = fsspec.core.url_to_fs(spec)
        listing = _list(fs, spec, path)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise UserError(f"source {spec}: {error}: give stdlib, a path or URL of text files, or hub:NAME") from error
    except Exception as error:  # each file system has errors of its own; others go on
        if not is_failed_reading(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"source {spec}: cannot be read ({reason}): check the network and your access") from error
    if not listing:
        raise UserError(
            f"source {spec}: nothing found: give an existing file, a glob that matches, or a folder of "
            f"{', '.join(FOLDER_SUFFIXES)} files (.txt and .jsonl also as {' or '.join(COMPRESSED)})"
        )

    def read(skipped: Counter[str]) -> Iterator[Document]:
        for file, size in listing.items():
            yield from _read_file(fs, file, size, fields, skipped)

    parts = fields.text if fields == Fields(fields.text) else asdict(fields)
    root = os.path.commonpath([os.path.dirname(name) for name in listing])  # noqa: PTH120, URLs too
    identity = _identity("files", parts, list(listing.items()))
    return Source(identity, sum(listing.values()), read, root and root.rstrip("/") + "/")


def _list(fs: Any, spec: str, path: str) -> dict[str, int]:
    """The source's files, sorted by path, with their sizes in bytes."""
    if fs.isdir(path):
        local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
        found = _walk(path) if local else fs.find(path, detail=True)
        found = {name: info for name, info in found.items() if _kind(name)[0] in FOLDER_SUFFIXES}
    elif fsspec.core.has_magic(path):
        found = {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
    else:
        found = {path: fs.info(path)} if fs.exists(path) else {}
    return {name: int(found[name].get("size") or 0) for name in sorted(found)}


def _walk(folder: str) -> dict[str, dict[str, Any]]:
    """What fsspec's find gives, but an error where a folder may not be read: skipping it loses documents."""

    def fail(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=fail, followlinks=True)
    files = [Path(parent, name) for parent, _, names in walk for name in names]
    return {file.as_posix(): {"size": file.stat().st_size} for file in files if file.is_file()}


def _kind(name: str) -> tuple[str, str]:
    """The suffixes that say what a file holds and how it is compressed, the second one perhaps empty."""
    suffixes = ["", *PurePosixPath(name).suffixes]
    if suffixes[-1] in COMPRESSED:
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def _read_file(fs: Any, name: str, size: int, fields: Fields, skipped: Counter[str]) -> Iterator[Document]:
    kind, compression = _kind(name)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".arrow": _read_arrow}
    try:
        with fs.open(name, "rb") as raw:
            file = _decompress(raw, compression)
            if kind in readers:
                yield from readers[kind](file, raw, name, size, fields, skipped)
            else:
                yield from _checked(lambda: _read_text(file.read(), name, size), fields, skipped)
    except Exception as error:  # as above, and each format has its own
        if isinstance(error, zlib.error) or is_failed_reading(error):
            raise UserError(f"{name}: cannot be read ({error}): restore the file or leave it out") from error
        raise


def _checked(make: Callable[[], Document], fields: Fields, skipped: Counter[str]) -> Iterator[Document]:
    """The document that `make` gives, unless it is empty or, where that is to be skipped, no text."""
    try:
        document = make()
        _check_unicode(document)
    except UserError:
        if not fields.skip_invalid:
            raise
        skipped["invalid"] += 1
        return
    if document.text:
        yield document
    else:
        skipped["empty"] += 1


def _decompress(raw: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _check_unicode(document: Document) -> None:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{document.name}: half of a surrogate pair at character {error.start}, which is no text: "
            "mend or remove the record"
        ) from error


def _read_text(content: bytes, name: str, size: int) -> Document:
    if (offset := content.find(b"\0")) >= 0:
        raise UserError(f"{name}: NUL byte at byte {offset}, not a text file: leave it out of the source")
    return Document(name, _decode(content, name, 0), size)


def _decode(content: bytes, name: str, offset: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 at byte {offset + error.start}: convert it (iconv -t UTF-8) or leave it out"
        ) from error


def _read_jsonl(file: Any, raw: Any, name: str, size: int, fields: Fields, skipped: Counter[str]) -> Iterator[Document]:
    offset = seen = 0
    for number, line in enumerate(file, 1):
        position = raw.tell()  # of the file itself, so that compressed files report progress too
        make = partial(_parse_line, line, name, number, offset, fields, position - seen)
        if line.strip():
            yield from _checked(make, fields, skipped)
            seen = position
        offset += len(line)


def _parse_line(line: bytes, name: str, number: int, offset: int, fields: Fields, size: int) -> Document:
    where = f"{name}:{number}"
    try:
        record = json.loads(_decode(line, name, offset))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): mend or remove the line") from error
    return _record(record, where, size, fields)


def _read_parquet(
    file: Any, raw: Any, name: str, size: int, fields: Fields, skipped: Counter[str]
) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = _columns(name, fields, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=1024, columns=columns)
        yield from _read_rows(batches, name, size // max(1, table.metadata.num_rows), fields, skipped)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name}: not a Parquet file ({error}): restore the file or leave it out") from error


def _read_arrow(file: Any, raw: Any, name: str, size: int, fields: Fields, skipped: Counter[str]) -> Iterator[Document]:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow

    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        columns = _columns(name, fields, reader.schema.names)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
        yield from _read_rows((batch.select(columns) for batch in batches), name, 0, fields, skipped)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{name}: not an Arrow file ({error}): restore the file or leave it out") from error


def _columns(name: str, fields: Fields, names: list[str]) -> list[str]:
    columns = [field for field in (fields.text, fields.language) if field is not None]
    for field in columns:
        if field not in names:
            raise UserError(_no_field(name, field, names))
    return columns


def _read_rows(
    batches: Iterable[Any], name: str, size: int, fields: Fields, skipped: Counter[str]
) -> Iterator[Document]:
    """Documents of Arrow record batches; size: bytes of the source for each row."""
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield from _checked(partial(_record, record, f"{name} row {number}", size, fields), fields, skipped)


def _record(record: Any, where: str, size: int, fields: Fields) -> Document:
    """A record's document, its text empty for null. Raises UserError if a field is missing or no text."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a record with fields: each line must be one JSON object")
    values: list[str | None] = []
    for field in (fields.text, fields.language):
        if field is not None and field not in record:
            raise UserError(_no_field(where, field, list(record)))
        value = record[field] if field is not None else None
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: field {field!r} is not text: name another with --field")
        values.append(value)
    return Document(where, values[0] or "", size, values[1])


def _no_field(where: str, field: str, fields: list[str]) -> str:
    return f"{where}: no field {field!r}, it has {', '.join(map(repr, fields)) or 'none'}: name one with --field"


# ---- the hub


def _hub(spec: str, fields: Fields) -> Source:
    name, config, split = [*spec.split(":"), "", ""][:3]
    if not name or spec.count(":") > 2:
        raise UserError(f"source hub:{spec}: write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    split = split or "train"

    def read(skipped: Counter[str]) -> Iterator[Document]:
        import datasets

        try:
            records = datasets.load_dataset(name, config or None, split=split, streaming=True)
            for number, record in enumerate(records, 1):
                yield from _checked(partial(_record, record, f"hub:{spec} row {number}", 0, fields), fields, skipped)
        except Exception as error:  # as above
            if not (isinstance(error, ValueError) or is_failed_reading(error)):  # no such data set, config or split
                raise
            raise UserError(f"source hub:{spec}: {error}: check the name, config, split and network") from error

    parts = fields.text if fields == Fields(fields.text) else asdict(fields)
    return Source(_identity("hub", name, config, split, parts), None, read, f"hub:{spec} ")

"""The list of a checkpoint's files with sizes and sha256, and whether the files still are as listed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline import UserError
from pretrain.checkpoints.unpickling import why_not_data_only
from pretrain.distributed import Ranks

MANIFEST = "manifest.json"
FORMAT = 1
HASHING_THREADS = 4

FileEntries = dict[str, dict[str, Any]]
"""`bytes` and `sha256` by path relative to the checkpoint's folder."""


class DamagedManifest(ValueError):
    """The manifest itself is not as it was written."""


def write_manifest(folder: Path, described: dict[str, Any], files: FileEntries) -> None:
    """Write the manifest of a folder, durably; `described` is what the manifest says of the checkpoint itself."""
    write_durably(folder / MANIFEST, _render({"format": FORMAT, **described, "files": files}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises DamagedManifest; UserError where a newer version of this project wrote it."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), folder)
    except OSError as error:
        raise DamagedManifest(f"{MANIFEST} cannot be read ({error.strerror})") from None


def parse_manifest(content: bytes, where: Path | str) -> dict[str, Any]:
    """As `read_manifest`, from the file's bytes; `where` names it in errors."""
    try:
        text = content.decode("utf-8")
        parsed = json.loads(text)
        written = _render({key: value for key, value in parsed.items() if key != "checksum"})
        format_ = int(parsed["format"])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedManifest(f"{MANIFEST} is not a manifest") from None
    if text != written:  # byte for byte: no flipped bit in it goes unseen
        raise DamagedManifest(f"{MANIFEST} does not have its own checksum")
    if format_ > FORMAT:
        raise UserError(
            f"{where}: written in checkpoint format {format_}, and this version reads up to {FORMAT}; "
            "go on with the newer version that wrote it, or choose another run.name"
        )
    return dict(parsed)


def find_problems(folder: Path, ranks: Ranks) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files; UserError as `read_manifest`."""
    try:
        listed: FileEntries = read_manifest(folder)["files"]
    except DamagedManifest as problem:
        return [str(problem)]
    unlisted = sorted(path.name for path in folder.glob("*.pt") if path.name not in listed)
    if unlisted:
        return [f"{unlisted[0]} is not in {MANIFEST}"]
    mine = sorted(listed)[ranks.rank :: ranks.world]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = pool.map(lambda name: check_file(folder / name, listed[name]), mine)
        return [f"{name} {problem}" for name, problem in zip(mine, found, strict=True) if problem]


def check_file(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file, to be read after its name; None if nothing is.

    A file that is as listed and would run code when unpickled is wrong too: whoever can write it can list it.
    """
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, not {entry['bytes']}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return "does not have the recorded sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return why_not_data_only(path) if path.suffix == ".pt" else None


def flush_and_hash(folder: Path, paths: Iterable[Path]) -> FileEntries:
    """Flush files to disk; their entries."""
    entries = {}
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return entries


def write_durably(path: Path, text: str) -> None:
    """Replace a file's content at once and for good: written beside, flushed, renamed, and its folder flushed."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _render(content: dict[str, Any]) -> str:
    """The one text that a content has, with the checksum of that text in it."""

    def dump(value: dict[str, Any]) -> str:
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    return dump(content | {"checksum": hashlib.sha256(dump(content).encode()).hexdigest()})

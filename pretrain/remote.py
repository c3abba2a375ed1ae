"""Files at URLs that fsspec knows, checked by reading them back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline import UserError

BLOCK_BYTES = 16 * 2**20


def open_url(url: str, named: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. UserError for a URL that fsspec does not know.

    named: what the user calls the URL, such as a key or an option.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"{named}{url}: {error}; give a folder or a URL, or install what it needs") from None
    return fs, root.rstrip("/")


def put_file(fs: Any, local: Path, remote: str, **options: Any) -> None:
    """Copy one file there, making its folder. Raises what the file system raises."""
    fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
    fs.put_file(str(local), remote, **options)


def sha256_of(fs: Any, remote: str) -> str:
    """Of a file's content as it is there now."""
    digest = hashlib.sha256()
    with fs.open(remote, "rb", block_size=BLOCK_BYTES) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sizes_in(fs: Any, folder: str) -> dict[str, int]:
    """Bytes of every file below a folder, by path relative to it; none where there is no such folder."""
    fs.invalidate_cache()
    found: dict[str, Any] = fs.find(folder, detail=True)
    return {str(name).removeprefix(folder).lstrip("/"): int(entry["size"]) for name, entry in found.items()}

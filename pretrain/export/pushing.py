"""Copying an exported folder to a URL: checked by checksum, the manifest last.

A folder there without its manifest is half pushed, and no reader of ours takes it; pushing again goes on where that
stopped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_pipeline import UserError
from pretrain.decoding.loading import MANIFEST, read_manifest
from pretrain.remote import open_url, put_file, sha256_of, sizes_in


class _Bar(Callback):
    """What fsspec tells of a transfer, on a progress bar."""

    def __init__(self, progress: Progress, task: Any):
        super().__init__()
        self._update = lambda done: progress.update(task, advance=done)

    def relative_update(self, inc: int = 1) -> None:
        """So many bytes more."""
        self._update(inc)


def check_url(url: str) -> None:
    """Raise UserError for a URL that fsspec does not know."""
    open_url(url, "--push-to ")


def push(folder: str | Path, url: str, console: Console | None = None) -> int:
    """Copy an export to a URL; the number of files that were not there already.

    Raises UserError for a folder that is no export or is damaged, a place that holds other files, and a transfer that
    fails or does not read back as it was written; what has arrived stays, without the manifest.
    """
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    _check_local(folder, files)
    fs, root = open_url(url, "--push-to ")
    columns = (TextColumn("pushing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=sum(entry["bytes"] for entry in files.values()))
            return _push(folder, files, fs, root, bar, task)
    except UserError as error:
        raise UserError(f"--push-to {url}: {error}") from None
    except Exception as error:  # each file system has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--push-to {url}: {reason}; {folder} is whole, and python -m pretrain.export {folder} --push-to {url} "
            "goes on where this stopped"
        ) from None


def _push(folder: Path, files: dict[str, dict[str, Any]], fs: Any, root: str, bar: Progress, task: Any) -> int:
    there = sizes_in(fs, root)
    strangers = sorted(name for name in there if name not in files and name != MANIFEST and name[0] != ".")
    if strangers:
        raise UserError(f"holds {strangers[0]}, which is no file of {folder}; remove it there, or give another URL")
    missing = []
    for name, entry in files.items():
        bar.update(task, description=f"{name} (is it there?)")
        if there.get(name) == entry["bytes"] and sha256_of(fs, f"{root}/{name}") == entry["sha256"]:
            bar.update(task, advance=entry["bytes"])
        else:
            missing.append(name)
    if missing and MANIFEST in there:
        fs.rm_file(f"{root}/{MANIFEST}")  # of another export; from here on the folder is half pushed
    for name in missing:
        bar.update(task, description=name)
        put_file(fs, folder / name, f"{root}/{name}", callback=_Bar(bar, task))
        if sha256_of(fs, f"{root}/{name}") != files[name]["sha256"]:
            raise OSError(f"{name} does not read back as it was written")
    put_file(fs, folder / MANIFEST, f"{root}/{MANIFEST}")
    if json.loads(fs.cat_file(f"{root}/{MANIFEST}"))["files"] != files:
        raise OSError(f"{MANIFEST} does not read back as it was written")
    return len(missing)


def _check_local(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        try:
            with (folder / name).open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        except OSError:
            same = False
        if not same:
            raise UserError(f"{folder / name}: missing or not as it was exported; export the model again")

"""The folder of a data set while it is being filled: whose it is, and whether it is finished already.

Shards leave their records in DIR/.preparing, which is removed when the manifest is written.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.errors import UserError
from data_pipeline.shards import Dataset, open_dataset, write_json

WORK = ".preparing"
PART = "part.json"


def already_complete(folder: Path, settings: dict[str, Any], console: Console) -> Dataset:
    """The finished data set in the folder. Raises UserError if it was made with other settings."""
    dataset = open_dataset(folder)
    if dataset.manifest.get("settings") != settings:
        raise UserError(
            f"{folder}: holds a data set made from another source or with other options: remove it or choose "
            "another --out"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)  # of a run killed between the manifest and this
    console.print(f"{folder} is already complete: {dataset.split('train').tokens:,} training tokens", soft_wrap=True)
    return dataset


@contextmanager
def claim(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this process and these settings. Raises UserError if it is someone else's."""
    work = folder / WORK
    try:
        if folder.exists() and not work.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a data set in the making: choose another --out")
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")  # held until the end of the block below
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another process is preparing it: wait for it or choose another --out"
            ) from error
        record = work / "settings.json"
        if not record.exists() or read_json(record) != settings:
            if any(work.glob("[0-9]*.json")):
                raise UserError(
                    f"{folder}: begun with another source or other options: remove it or choose another --out"
                )
            # Nothing is finished, as after a source that was refused and mended: begin afresh.
            (folder / "tokenizer.model").unlink(missing_ok=True)
            write_json(record, settings)
        yield


def read_json(path: Path) -> Any:
    """A record of the preparation. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: remove the folder it is in and prepare again") from error


def part_already_complete(folder: Path, claimed: dict[str, Any], console: Console) -> None:
    """Say that the part in the folder is finished. Raises UserError if it is another one."""
    made = read_json(folder / PART)
    if made["about"]["settings"] | {"part": made["part"]} != claimed:
        raise UserError(
            f"{folder}: holds part {made['part']} of a data set made with other options: remove it or choose "
            "another --out"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    console.print(f"{folder}: part {made['part']} is already complete", soft_wrap=True)

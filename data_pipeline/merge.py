"""Command: parts that several machines prepared → the data set that one machine would have made, byte for byte.

python -m data_pipeline.merge PART_DIR [PART_DIR …] --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.damage import REMEDY, DamagedFile, find_damage
from data_pipeline.errors import UserError, run_command
from data_pipeline.prepare import PART, collect_shards
from data_pipeline.shards import MANIFEST, Dataset, open_dataset, write_file, write_manifest
from data_pipeline.tokenizers import Tokenizer, load_tokenizer


def merge(parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Dataset:
    """Put all the parts of a data set together in `out`; files are linked where that can be, else copied.

    Raises UserError for parts that are missing, unfinished, damaged or not of one data set.
    """
    folders, folder = [Path(part) for part in parts], Path(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / MERGING).exists():
        raise UserError(f"{folder}: not empty: choose another --out")
    made = [_read_part(part) for part in folders]
    _check_complete(folders, made)
    tokenizer = _same_tokenizer(folders)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MERGING).touch()
    records: dict[int, dict[str, Any]] = {}
    for source, part in zip(folders, made, strict=True):
        for number, record in part["records"].items():
            records[int(number)] = record
            for entry in record["shards"].values():
                for file in entry["files"].values():
                    _take(source, folder, file)
    if tokenizer.path:
        write_file(folder / tokenizer.path.name, tokenizer.path.read_bytes())
        tokenizer = load_tokenizer(folder / tokenizer.path.name, eos_id=tokenizer.eos_id)
    (folder / MERGING).unlink()
    write_manifest(folder, tokenizer, collect_shards(records), **made[0]["about"])
    return open_dataset(folder)


MERGING = ".merging"


def _read_part(folder: Path) -> dict[str, Any]:
    try:
        part: dict[str, Any] = json.loads((folder / PART).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a finished part, it has no {PART}: run its prepare --part again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PART}: cannot be read ({error}): prepare the part again") from error
    return part


def _check_complete(folders: Sequence[Path], made: Sequence[Mapping[str, Any]]) -> None:
    if not made:
        raise UserError("no parts: give the folder of every part")
    for folder, part in zip(folders, made, strict=True):
        if (part["about"], part["count"]) != (made[0]["about"], made[0]["count"]):
            raise UserError(
                f"{folder}: a part of another data set than {folders[0]}, or made with other versions of the "
                "software: prepare it again like the others"
            )
    wanted = int(made[0]["part"].partition("/")[2])
    numbers = sorted(int(part["part"].partition("/")[0]) for part in made)
    if missing := sorted(set(range(1, wanted + 1)) - set(numbers)):
        raise UserError(f"part {missing[0]}/{wanted} is missing: give the folder of every part")
    if len(numbers) != wanted:
        raise UserError(f"{len(numbers)} folders for {wanted} parts: give each part once")


def _same_tokenizer(folders: Sequence[Path]) -> Tokenizer:
    def load(folder: Path) -> Tokenizer:
        kept = sorted(folder.glob("tokenizer.*"))
        return load_tokenizer(kept[0] if kept else "bytes")

    first, *others = [load(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        if other.fingerprint != first.fingerprint:
            raise UserError(f"{folder}: has another tokenizer than {folders[0]}: prepare it again like the others")
    return first


def _take(source: Path, folder: Path, entry: Mapping[str, Any]) -> None:
    """Link or copy one file, checked on the way."""
    path, target = source / entry["file"], folder / entry["file"]
    if problem := find_damage(path, entry):
        raise DamagedFile(f"{path}: {problem}: {REMEDY}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(path)
    except OSError:  # another file system
        shutil.copyfile(path, partial)
    partial.replace(target)
    partial.unlink(missing_ok=True)  # renaming one link of a file over another leaves both


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.merge", description="Put the parts of a data set together."
    )
    parser.add_argument("parts", nargs="+", metavar="PART_DIR", help="what prepare --part i/n made, each of the n")
    parser.add_argument("--out", required=True, help="folder of the data set")
    options = parser.parse_args(argv)
    dataset = merge(options.parts, options.out)
    print(f"{dataset.path / MANIFEST}: {dataset.split('train').tokens:,} training tokens")


if __name__ == "__main__":
    run_command(main)

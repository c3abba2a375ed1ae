"""The moment at which a written folder becomes a checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from pretrain.checkpoints.files import describe
from pretrain.checkpoints.manifest import FileEntries, flush_and_hash, flush_folder, write_durably, write_manifest
from pretrain.checkpoints.retention import REMOVING, prune, remove_leftovers
from pretrain.config import Config


def publish(unfinished: Path, path: Path, files: FileEntries, described: dict[str, Any], config: Config) -> None:
    """Give a written checkpoint its name, once everything in it is on disk; then move `latest`, and prune."""
    others = [found for found in unfinished.rglob("*") if found.is_file()]
    others = [found for found in others if found.relative_to(unfinished).as_posix() not in files]
    write_manifest(unfinished, described, files | flush_and_hash(unfinished, others))
    if path.exists():  # left by an earlier start and found damaged, else this step would not come again
        old = path.with_name(f"{REMOVING}{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    unfinished.rename(path)
    flush_folder(path.parent)
    write_durably(path.parent / "latest", path.name)
    try:
        remove_leftovers(path.parent)
        prune(path.parent, config.checkpoint, described["step"])
    except OSError as error:
        print(f"warning: {path.parent}: old checkpoints stay: {describe(error)}", file=sys.stderr, flush=True)

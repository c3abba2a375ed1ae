"""Which checkpoints stay, and how one that is being read is left alone.

A reader holds a shared lock on the manifest for as long as it reads; a checkpoint is removed only under the exclusive
lock. The kernel drops locks when their process ends, so that no reader's death keeps a checkpoint for ever.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from data_pipeline import UserError
from pretrain.checkpoints.manifest import MANIFEST
from pretrain.checkpoints.state import STATE
from pretrain.config import CheckpointConfig

UNFINISHED, REMOVING = ".writing_", ".removing_"


def retained(losses: Mapping[int, float | None], rules: CheckpointConfig) -> set[int]:
    """The steps that stay: the newest, every `keep_every`-th, and those of the lowest validation loss.

    Args:
        losses: of each saved step its validation loss, None where it was not validated.
        rules: the config's checkpoint section.
    """
    steps = sorted(losses)
    kept = set(steps[-rules.keep :])
    if rules.keep_every is not None:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    measured = sorted((loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
    return kept | {step for _, step in measured[: rules.keep_best]}


def prune(folder: Path, rules: CheckpointConfig, newest: int) -> None:
    """Remove what need not stay, after step `newest` was saved.

    Later steps are left alone: they are of a future that an earlier start has seen and found damaged, and count for
    nothing here.
    """
    paths = {step: path for step, path in saved_steps(folder).items() if step <= newest}
    kept = retained({step: validation_loss(path) for step, path in paths.items()}, rules)
    for step in sorted(paths.keys() - kept):
        remove(paths[step])


def remove(path: Path) -> bool:
    """Remove a checkpoint unless somebody reads it."""
    with _exclusive(path) as is_ours:
        if is_ours:
            doomed = path.with_name(f"{REMOVING}{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)  # from here on it is no checkpoint, even if removing it is interrupted
            shutil.rmtree(doomed, ignore_errors=True)
    return is_ours


def hold(path: Path) -> IO[bytes]:
    """Keep a checkpoint from being removed until the returned file is closed or forgotten."""
    try:
        lease = (path / MANIFEST).open("rb")
        _lock(lease, fcntl.LOCK_SH)
        if os.fstat(lease.fileno()).st_ino != (path / MANIFEST).stat().st_ino:
            raise FileNotFoundError
    except FileNotFoundError:
        raise UserError(f"{path}: was removed while it was being opened; open the run's newest checkpoint") from None
    return lease


def remove_leftovers(folder: Path) -> None:
    """Remove what earlier starts left unfinished when they died."""
    for prefix in (UNFINISHED, REMOVING):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def saved_steps(folder: Path) -> dict[int, Path]:
    """The checkpoint folders by step, newest first; whole or not."""
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return {int(path.name[5:]): path for path in sorted(named, key=lambda path: int(path.name[5:]), reverse=True)}


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def validation_loss(path: Path) -> float | None:
    """The validation loss recorded in a checkpoint, if there is one."""
    try:
        loss = json.loads((path / STATE).read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError):
        return None
    return float(loss) if loss is not None else None


@contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether a checkpoint may be removed: nobody reads it, and nobody can begin to until the context is left."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context((path / MANIFEST).open("rb"))
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except FileNotFoundError:  # no manifest: nobody can be reading it
            is_ours = True
        else:
            is_ours = True
        yield is_ours


def _lock(file: IO[bytes], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks: a reader that loses its files there meets an error, not wrong weights

"""Runs configs as many_runs.py does, each with a trouble planted: `trouble:path|section.key=value`.

An error meant for the user ends its run alone, and must come on all ranks.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from data_pipeline import UserError
from pretrain.checkpoints import files, saving
from pretrain.checkpoints.manifest import MANIFEST, flush_and_hash, write_manifest
from pretrain.config import Config, load_config
from pretrain.distributed import leave
from pretrain.train import train

Trouble = Callable[[Config], AbstractContextManager[Any]]
REAL_SAVE = torch.save


def full_disk(rank: int, where: str) -> Trouble:
    """On one rank, every write of a path that holds `where` fails as on a full disk."""

    def save(content: Any, path: Path) -> None:
        if where in str(path) and int(os.environ["RANK"]) == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        REAL_SAVE(content, path)

    return lambda config: mock.patch.object(files.torch, "save", save)


def no_room(config: Config) -> AbstractContextManager[Any]:
    """The disk has too little room for the checkpoint of step 8."""
    real = saving._lack_of_room

    def lacking(folder: Path, engine: Any) -> str | None:
        return "no room for a checkpoint" if engine.global_steps == 8 else real(folder, engine)

    return mock.patch.object(saving, "_lack_of_room", lacking)


class MakesAFolder:
    """A pickle that runs code where it is trusted."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def attacked(config: Config) -> AbstractContextManager[Any]:
    """The run's newest checkpoint gets a malicious pickle, and a manifest that lists it."""
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(config.run.folder.with_name("stopped"), config.run.folder)
        path = max((config.run.folder / "checkpoints").glob("step_*"))
        for victim in path.glob("*_optim_states.pt"):
            REAL_SAVE({"optimizer_state_dict": MakesAFolder(str(config.run.folder / "executed"))}, victim)
        listed = [file for file in path.iterdir() if file.name != MANIFEST]
        write_manifest(path, {"step": 8}, flush_and_hash(path, listed))
    if dist.is_initialized():
        dist.barrier()
    return nullcontext()


TROUBLES: dict[str, Trouble] = {
    "none": lambda config: nullcontext(),
    "second rank at step 8": full_disk(1, "step_00000008"),
    "second rank always": full_disk(1, "step_"),
    "first rank at the end": full_disk(0, "step_00000020"),
    "no room": no_room,
    "attacked": attacked,
}

if __name__ == "__main__":
    for argument in [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]:
        trouble, _, run = argument.partition(":")
        path, *overrides = run.split("|")
        config = load_config(path, overrides)
        try:
            with TROUBLES[trouble](config):
                train(config)
        except UserError as error:
            sys.stdout.write(f"rank {os.environ['RANK']} error: {error}\n")  # print would write its newline apart
            sys.stdout.flush()
    dist.destroy_process_group()
    leave(0)

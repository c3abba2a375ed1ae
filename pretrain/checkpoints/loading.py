"""Where a run starts: from which checkpoint, whether it may, and with it in the engine."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed

from data_pipeline import UserError
from pretrain.checkpoints.elastic import load_by_name
from pretrain.checkpoints.files import CheckpointFiles, describe
from pretrain.checkpoints.manifest import find_problems
from pretrain.checkpoints.mirror import Mirror
from pretrain.checkpoints.retention import saved_steps
from pretrain.checkpoints.state import CONFIG, TrainState, read_state, read_train_state, restore_generators
from pretrain.config import Config, load_config
from pretrain.distributed import Ranks, gather_objects


def find_start(config: Config, ranks: Ranks) -> Path | None:
    """The checkpoint that `run.resume` lets a run go on from; None where it begins at the beginning.

    The newest whole one of the run's folder, or else of the mirror. Raises UserError, on all ranks, where the folder
    is in use and must not be, or where there is nothing to go on from and must be.
    """
    folder = config.run.folder / "checkpoints"
    mirror = Mirror(config.checkpoint.mirror) if config.checkpoint.mirror is not None else None
    if config.run.resume == "never":
        if saved_steps(folder):
            raise UserError(
                f"{config.run.folder}: holds checkpoints, and run.resume is never; choose another run.name, or set "
                "run.resume=auto to go on from them"
            )
        return None
    found = find_whole(folder, ranks)
    if found is None and mirror is not None:
        found = _restored(mirror, config.run.folder, ranks)
    if found is None and config.run.resume == "must":
        raise UserError(
            f"{config.run.folder}: holds no whole checkpoint, and run.resume is must; look at run.dir and run.name, "
            "or set run.resume=auto to begin at the beginning"
        )
    return found


def find_whole(folder: Path, ranks: Ranks, every: int = 1) -> Path | None:
    """The newest checkpoint under `folder` whose every file is as recorded; None where there is none.

    Only those at multiples of `every` steps count. All ranks share the hashing and come to the same answer. Damaged
    checkpoints are named on stderr. Raises UserError for one that a newer version of this project wrote.
    """
    for step, path in saved_steps(folder).items():
        if step % every:
            continue
        problems = [problem for found in gather_objects(find_problems(path, ranks)) for problem in found]
        if not problems:
            return path
        if ranks.is_first:
            print(f"warning: leaving damaged checkpoint {path}: {problems[0]}", file=sys.stderr, flush=True)
    return None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, path: Path, config: Config, ranks: Ranks) -> TrainState:
    """Load weights, optimizer and generators from a verified checkpoint that `check_same_run` has accepted.

    Where ranks, ZeRO stage, precision and optimizer are those of the save, DeepSpeed loads its own files; otherwise
    they are read by name into the shape that the engine has now.
    """
    if is_same_shape(engine, path, config, ranks):
        CheckpointFiles().take_over(engine)
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise UserError(f"{path}: DeepSpeed could not load it; see its messages above")
    else:
        if ranks.is_first:
            print(f"{path}: written by {read_state(path)['ranks']} ranks in another shape; reading it by name")
        load_by_name(engine, path)
    restore_generators(path, ranks)
    return read_train_state(path)


def is_same_shape(engine: deepspeed.DeepSpeedEngine, path: Path, config: Config, ranks: Ranks) -> bool:
    """Whether a checkpoint's files are as this engine would write them.

    A changed optimizer section counts as another shape: it may group parameters differently, and DeepSpeed would
    take weight decay and the like from the checkpoint.
    """
    saved, old = read_state(path), load_config(path / CONFIG)
    dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
    return (
        saved["ranks"] == ranks.world
        and saved["precision"] == dtype
        and saved["versions"]["deepspeed"] == deepspeed.__version__
        and old.deepspeed == config.deepspeed
        and old.optimizer == config.optimizer
    )


def _restored(mirror: Mirror, run: Path, ranks: Ranks) -> Path | None:
    """The mirror's newest whole checkpoint, fetched by the first rank; UserError on all ranks if it cannot be read."""
    found: tuple[Path | None, str | None] = (None, None)
    if ranks.is_first:
        try:
            found = (mirror.restore(run), None)
        except UserError as error:
            found = (None, str(error))
        except Exception as error:  # each file system has errors of its own
            found = (
                None,
                f"checkpoint.mirror={mirror.url}: cannot be read ({describe(error)}), and the run's folder "
                "holds no whole checkpoint; mend it, or leave the key out to begin at the beginning",
            )
    path, problem = gather_objects(found)[0]
    if problem is not None:
        raise UserError(problem)
    if path is not None and ranks.is_first:
        print(f"warning: {run}: no whole checkpoint here; {path.name} was fetched from {mirror.url}", file=sys.stderr)
    return path

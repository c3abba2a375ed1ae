"""Saving while training goes on: copied first, written, flushed, hashed and published by a thread of each rank.

    checkpoints/.writing_step_00001000/   where the files come to lie first
    checkpoints/step_00001000/            DeepSpeed's files, generators, config, state, tokenizer, manifest.json
    checkpoints/latest                    the name of the newest one

Each rank's thread writes its own files and leaves their checksums beside them; when all are there, the first rank's
writes the manifest, renames the folder, moves `latest` and removes what need not stay. Threads meet through files
alone: collectives belong to the main thread. A kill at any instant leaves either no folder of the final name or a whole
one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import deepspeed
import torch

from data_pipeline import UserError
from pretrain.checkpoints.files import CheckpointFiles, describe
from pretrain.checkpoints.manifest import FileEntries, flush_and_hash, write_durably
from pretrain.checkpoints.mirror import Mirror, MirrorThread
from pretrain.checkpoints.publishing import publish
from pretrain.checkpoints.retention import UNFINISHED, name_of, remove_leftovers
from pretrain.checkpoints.shards import OPTIMIZER_NAMES
from pretrain.checkpoints.state import CONFIG, STATE, TrainState, describe_run, generators, generators_file
from pretrain.config import Config, dump_config
from pretrain.distributed import Ranks, barrier, gather_objects
from pretrain.run_data import RunData

PART = ".part_rank_{:05d}.json"
POLL_SECONDS = 0.02
PATIENCE_AFTER_AN_ERROR = 60.0
"""Seconds that a failing run gives its own part of a save in progress before it leaves that unfinished."""

PATIENCE_FOR_OTHERS = 5.0
"""Seconds, and the time that its own part took once more, that it then gives the other ranks: they may be dead."""


class _AbandonedError(OSError):
    """There is nothing to publish: another rank has told why."""


@dataclass
class _Save:
    """One save, from the copy to the final name."""

    step: int
    unfinished: Path
    files: CheckpointFiles
    described: dict[str, Any]
    stall_seconds: float = 0.0
    write_seconds: float = 0.0
    problem: str | None = None
    thread: threading.Thread | None = None
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's files are on disk, or could not be written."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Another rank has failed: there is nothing to wait for."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def path(self) -> Path:
        """The final folder."""
        return self.unfinished.with_name(name_of(self.step))

    @property
    def is_running(self) -> bool:
        """Whether its thread is still at it."""
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """Saves a run. Entered and left on all ranks; leaving waits until the last save is whole.

    Raises UserError, on all ranks, when more than `checkpoint.failures_allowed` saves in a row have failed, and when
    the last one has.

    Args:
        engine: the run's engine.
        config: the run's config.
        data: what it trains on.
        vocab_size: rows of the embedding.
        ranks: this process among the others.
        say: takes a line for the console.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: Config,
        data: RunData,
        vocab_size: int,
        ranks: Ranks,
        say: Callable[[str], None] = print,
    ):
        self.engine, self.config, self.data, self.vocab_size = engine, config, data, vocab_size
        self.ranks, self.say = ranks, say
        self.folder = config.run.folder / "checkpoints"
        self.failures = 0
        """Saves of this start that failed."""
        self._failures_in_a_row = 0
        self._current: _Save | None = None
        self._last: _Save | None = None
        self._news: dict[str, float] = {}
        self._mirror: MirrorThread | None = None

    def __enter__(self) -> Self:
        if self.ranks.is_first:
            remove_leftovers(self.folder)
            if self.config.checkpoint.mirror is not None:
                self._mirror = MirrorThread(Mirror(self.config.checkpoint.mirror), self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if self._current is not None and self._current.thread is not None:
                _finish_or_abandon(self._current, self._current.thread)
            return
        self.settle()
        if self._last is not None and self._last.problem is not None:
            raise UserError(f"{self._last.path}: not saved, and it was the last: {self._last.problem}; {_REMEDY}")
        if self._mirror is not None:
            # A run that was told to stop has little time: its next start uploads what is missing.
            is_finished = self._last is not None and self._last.step == self.config.total_steps
            patience = 30 * self.config.faults.collective_timeout_minutes  # the other ranks wait for this one
            self._mirror.close(patience if is_finished else 0)

    def save(self, state: TrainState, validation_loss: float | None = None) -> None:
        """Copy the run as it is now, and begin to write it.

        Waits for the save before, if that is still being written. A save that fails is counted and told; the run goes
        on without it.

        Args:
            state: the counters after the step just done.
            validation_loss: nats per token, if this step was validated.
        """
        start = time.perf_counter()
        self.settle()
        save = self._last = self._current = self._prepare(state, validation_loss)
        save.problem = _first(gather_objects(save.problem))
        if save.problem is None:
            save.files.take_over(self.engine)
            self._collect(save)
            save.thread = threading.Thread(target=self._finish, args=(save,), daemon=True)
            save.thread.start()
        elif self.ranks.is_first:
            _warn(save, self.config, self.ranks)
        if save.thread is None or not self.config.checkpoint.in_background:
            self.settle()
        save.stall_seconds = time.perf_counter() - start
        self._news["checkpoint_stall_seconds"] = save.stall_seconds

    def settle(self) -> None:
        """Wait until nothing is being written any more, and agree on what became of it. A collective."""
        save, self._current = self._current, None
        if save is None:
            return
        if save.thread is not None:
            save.written.wait()
            problem = _first(gather_objects(save.problem))
            if problem is not None:
                save.abandoned.set()
            save.thread.join()
            save.problem = problem or _first(gather_objects(save.problem))
        self._tell(save)
        if save.problem is None:
            self._failures_in_a_row = 0
            return
        self.failures += 1
        self._failures_in_a_row += 1
        self._news["checkpoint_failures"] = self.failures
        if self._failures_in_a_row > self.config.checkpoint.failures_allowed:
            raise UserError(
                f"{save.path}: {self._failures_in_a_row} checkpoints in a row could not be saved, the last one "
                f"because: {save.problem}; {_REMEDY}"
            )

    def report(self) -> dict[str, float]:
        """What the next line of metrics.jsonl should say of saving: the stall of the last save, and failures."""
        if self._current is not None and not self._current.is_running:
            self._tell(self._current)
        if self._mirror is not None and self._mirror.new_failures():
            self._news["mirror_failures"] = self._mirror.failures
        news, self._news = self._news, {}
        return news

    def _prepare(self, state: TrainState, validation_loss: float | None) -> _Save:
        """Make the folder and look for room; a problem is noted, so that all ranks come to the next collective."""
        unfinished = self.folder / f"{UNFINISHED}{name_of(state.step)}"
        dtype = next(self.engine.module.parameters()).dtype
        described = describe_run(state, self.config, self.data, self.vocab_size, self.ranks, dtype)
        described["validation_loss"] = validation_loss
        save = _Save(state.step, unfinished, CheckpointFiles(self.config.checkpoint.in_background), described)
        try:
            if self.ranks.is_first:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(unfinished, ignore_errors=True)
                save.problem = _lack_of_room(self.folder, self.engine)
                if save.problem is None:
                    unfinished.mkdir()
        except OSError as error:
            save.problem = describe(error)
        return save

    def _collect(self, save: _Save) -> None:
        """Let DeepSpeed hand over its files, and add this rank's generators. A collective."""
        client_state = {OPTIMIZER_NAMES: _optimizer_names(self.engine)} if self.config.zero_stage == 0 else {}
        self.engine.save_checkpoint(
            str(self.folder), tag=save.unfinished.name, client_state=client_state, save_latest=False
        )
        save.files.save(generators(), save.unfinished / generators_file(self.ranks.rank))

    def _finish(self, save: _Save) -> None:
        """The thread: everything that takes long."""
        try:
            self._write(save)
            save.written.set()
            if self.ranks.is_first:
                publish(save.unfinished, save.path, self._all_parts(save), self._describe(save), self.config)
                save.write_seconds = time.perf_counter() - save.started
                if self._mirror is not None:
                    self._mirror.wake()
        except Exception as error:  # the main thread must hear of whatever it is
            save.problem = describe(error)
            save.written.set()
            if not isinstance(error, _AbandonedError):
                _warn(save, self.config, self.ranks)
            if self.ranks.is_first:
                shutil.rmtree(save.unfinished, ignore_errors=True)

    def _write(self, save: _Save) -> None:
        """Write this rank's files, and their checksums beside them."""
        if save.files.problem is not None:
            raise OSError(save.files.problem)
        save.files.write()
        entries = flush_and_hash(save.unfinished, save.files.paths)
        write_durably(save.unfinished / PART.format(self.ranks.rank), json.dumps(entries))

    def _all_parts(self, save: _Save) -> FileEntries:
        """The checksums of every rank's files, once all are there. Raises OSError where a rank has none to give."""
        files: FileEntries = {}
        deadline = time.monotonic() + 60 * self.config.faults.collective_timeout_minutes
        for rank in range(self.ranks.world):
            part = save.unfinished / PART.format(rank)
            while not part.exists():
                if save.abandoned.wait(POLL_SECONDS):
                    raise _AbandonedError("another rank could not write its files")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not finish writing")
            files |= json.loads(part.read_text(encoding="utf-8"))
        for rank in range(self.ranks.world):
            (save.unfinished / PART.format(rank)).unlink()
        return files

    def _describe(self, save: _Save) -> dict[str, Any]:
        """Write the small files that describe the checkpoint; what the manifest says of it."""
        config = dump_config(self.config)
        (save.unfinished / CONFIG).write_text(config, encoding="utf-8")
        (save.unfinished / STATE).write_text(json.dumps(save.described, indent=2), encoding="utf-8")
        if tokenizer_file := self.data.tokenizer_file():
            (save.unfinished / tokenizer_file[0]).write_bytes(tokenizer_file[1])
        said = {key: save.described[key] for key in ("step", "tokens", "ranks", "zero_stage", "versions")}
        return said | {
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "data_fingerprint": save.described["dataset"]["fingerprint"],
        }

    def _tell(self, save: _Save) -> None:
        if save.problem is None and save.write_seconds:
            self.say(
                f"saved {save.path} (training waited {save.stall_seconds:.2f} s, written in {save.write_seconds:.2f} s)"
            )
            save.write_seconds = 0.0  # said once


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    state: TrainState,
    config: Config,
    data: RunData,
    vocab_size: int,
    ranks: Ranks,
) -> Path:
    """Save once, on all ranks, and return when the checkpoint is whole. Raises UserError where it cannot be."""
    with Saver(engine, config, data, vocab_size, ranks) as saver:
        saver.save(state)
    barrier()
    return config.run.folder / "checkpoints" / name_of(state.step)


def _finish_or_abandon(save: _Save, thread: threading.Thread) -> None:
    """Let a save come to its end if all ranks have written their files; wait in vain for none that has died."""
    save.written.wait(PATIENCE_AFTER_AN_ERROR)
    thread.join(PATIENCE_FOR_OTHERS + time.perf_counter() - save.started)
    save.abandoned.set()
    thread.join(PATIENCE_AFTER_AN_ERROR)  # at once, unless all parts are here: then publishing is under way


def _first(problems: list[str | None]) -> str | None:
    """The problem of the first rank that has one."""
    return next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), None)


_REMEDY = "free some space or mend the file system, and start the same command again"


def _warn(save: _Save, config: Config, ranks: Ranks) -> None:
    print(
        f"warning: rank {ranks.rank}: {save.path}: not saved: {save.problem}; the run goes on, and ends if more than "
        f"{config.checkpoint.failures_allowed} saves in a row fail",
        file=sys.stderr,
        flush=True,
    )


def _lack_of_room(folder: Path, engine: deepspeed.DeepSpeedEngine) -> str | None:
    """Weights and two moments in float32, and the weights once more: 16 bytes a parameter, over all ranks."""
    needed = 16 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"no room for a checkpoint of about {needed / 1e6:,.0f} MB ({free / 1e6:,.0f} MB free)"


def _optimizer_names(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """The parameters in the order in which a plain torch optimizer numbers them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups: list[dict[str, list[torch.nn.Parameter]]] = engine.optimizer.param_groups
    return [names[id(parameter)] for group in groups for parameter in group["params"]]

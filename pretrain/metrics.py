"""Where a run's numbers go: the console, metrics.jsonl, and Weights & Biases if asked."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline import UserError
from pretrain.config import Config
from pretrain.wandb_mirror import WandbMirror

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes one object per optimizer step. On every rank but the first it does nothing.

    Args:
        config: the run's config.
        is_first: whether this rank writes.
        keep_bytes: length to which an existing metrics.jsonl is cut: what came after the checkpoint comes again.
        first_step: steps done already, where the progress bar starts.
    """

    def __init__(self, config: Config, is_first: bool, keep_bytes: int, first_step: int):
        self.config = config
        self.is_first = is_first
        if not is_first:
            return
        path = config.run.folder / METRICS_FILE
        path.touch()
        if path.stat().st_size < keep_bytes:
            raise UserError(f"{path}: shorter than the checkpoint recorded; restore it, or choose another run.name")
        os.truncate(path, keep_bytes)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = None if config.metrics.wandb == "off" else WandbMirror(config)
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._seconds_per_step: float | None = None
        self._task = self._progress.add_task(config.run.name, total=config.total_steps, completed=first_step)

    def __enter__(self) -> Self:
        """Shows the progress bar, where the output is a terminal."""
        if self.is_first:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flushes and closes everything."""
        if self.is_first:
            self._progress.stop()
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=int(error is not None))
                if self._wandb.failures:
                    self._console.print(f"Weights & Biases failed {self._wandb.failures} times; metrics.jsonl is whole")

    def record(self, values: Mapping[str, Any]) -> None:
        """One step's numbers, in full precision; what is not finite is null in the file."""
        if not self.is_first:
            return
        self._file.write(json.dumps({key: _finite(value) for key, value in values.items()}, allow_nan=False) + "\n")
        self._file.flush()
        self._progress.update(self._task, completed=values["step"])
        if self._wandb is not None:
            self._wandb.log(values["step"], values)
        step, total = values["step"], self.config.total_steps
        seconds = values["step_seconds"]
        before = self._seconds_per_step
        self._seconds_per_step = seconds if before is None else 0.9 * before + 0.1 * seconds
        if step % self.config.metrics.console_every == 0 or step == total or {"val_loss", "fault"} & values.keys():
            self._console.print(console_line(values, total, (total - step) * self._seconds_per_step))

    def say(self, message: str) -> None:
        """A line on the console."""
        if self.is_first:
            self._console.print(message)

    def durable_bytes(self) -> int:
        """Flush metrics.jsonl to disk; its length."""
        if not self.is_first:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


def console_line(values: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """One step in one line, in the order in which people look."""
    step = values["step"]
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}", f"loss {values['loss']:.4f}"]
    terms = {"loss_next_token": "next-token", "loss_next_latent": "next-latent", "loss_kl": "kl"}
    terms |= {"loss_multi_token": "multi-token", "loss_joint_token": "joint-token"}
    terms |= {"loss_previous_token": "previous-token"}
    present = [f"{name} {values[key]:.4f}" for key, name in terms.items() if key in values]
    parts += present if len(present) > 1 else []  # a single term is the loss itself
    parts += [
        f"grad {values['grad_norm']:.3g}",
        f"lr {values['learning_rate']:.2e}",
        f"{values['tokens_per_second']:,.0f} tok/s",
    ]
    if values.get("mfu") is not None:
        parts.append(f"mfu {values['mfu']:.1%}")
    parts.append(f"{values['memory_peak_bytes'] / 2**30:.1f} GiB")
    parts.append(f"data {values['data_seconds'] / max(values['step_seconds'], 1e-9):.0%}")
    if values.get("skipped_steps"):
        parts.append(f"skipped {values['skipped_steps']}")
    if values.get("skipped_sequences"):
        parts.append(f"skipped {values['skipped_sequences']} sequences of damaged shards")
    if "val_loss_next_token" in values:
        parts.append(f"val {values['val_loss_next_token']:.4f}")
    parts.append(f"eta {_clock(seconds_left)}")
    return "  ".join(parts)


def memory_peak_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: the accelerator's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

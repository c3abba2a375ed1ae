"""How DeepSpeed's files get onto disk and back: through an engine of ours in the place of DeepSpeed's own.

DeepSpeed asks its checkpoint engine to save and load each file, between collectives. Ours never raises in a save, so
that a rank with a full disk does not leave the others waiting; it can copy what is to be saved and write the copy
later; and it loads data only, where DeepSpeed's unpickles whatever it finds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from torch import Tensor

from pretrain.checkpoints.unpickling import load_data_only


class CheckpointFiles(CheckpointEngine):
    """Collects the files of one save, or loads those of one checkpoint.

    Args:
        in_background: copy what is to be saved to host memory, for `write`; if not, `save` writes at once.
    """

    def __init__(self, in_background: bool = False):
        super().__init__()
        self.in_background = in_background
        self.problem: str | None = None
        """Why a file could not be saved, if one could not."""
        self.paths: list[Path] = []
        """Every file that this rank saves."""
        self._copies: list[tuple[Path, Any]] = []
        self._storages: dict[tuple[str, int], torch.UntypedStorage] = {}

    def take_over(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Save and load through this object from now on."""
        engine.checkpoint_engine = self
        # DeepSpeed adds converters to every checkpoint, which unpickle with full trust; and where the disk is full,
        # copying them would raise on the first rank alone.
        engine._copy_recovery_script = lambda save_path: None

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write a file, or copy its content for `write`; a failure is noted in `problem`."""
        path = Path(path)
        self.paths.append(path)
        try:
            if self.in_background:
                self._copies.append((path, self._copied(state_dict)))
            else:
                torch.save(state_dict, path)
        except Exception as error:  # whatever it is, the other ranks are on their way to the next collective
            self.problem = self.problem or describe(error)

    def write(self) -> None:
        """Write what `save` has copied. Raises what torch.save raises."""
        while self._copies:
            path, content = self._copies.pop(0)
            torch.save(content, path)

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """A file's content, if it is nothing but data; UserError if not."""
        return load_data_only(path, mmap=False)

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed is about to save."""

    def commit(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed has saved."""

    def _copied(self, value: Any) -> Any:
        """The same in host memory; tensors that share their memory go on sharing it, as tied weights must."""
        match value:
            case Tensor():
                storage = value.untyped_storage()
                key = (str(value.device), storage.data_ptr())
                if key not in self._storages:
                    self._storages[key] = storage.clone() if value.device.type == "cpu" else storage.cpu()
                empty = torch.empty(0, dtype=value.dtype)
                return empty.set_(self._storages[key], value.storage_offset(), value.shape, value.stride())
            case dict():
                copied = copy.copy(value)
                for key, item in value.items():
                    copied[key] = self._copied(item)
                return copied
            case list() | tuple() if type(value) in (list, tuple):
                return type(value)(self._copied(item) for item in value)
            case _:
                return copy.deepcopy(value)


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return str(text).splitlines()[0] if text else type(error).__name__

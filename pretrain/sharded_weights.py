"""Weights out of DeepSpeed's checkpoint files, one tensor at a time, without DeepSpeed's engine or a GPU.

Nothing is unpickled with trust: files are opened weights_only, with DeepSpeed's few own types allowed by name.
Under ZeRO-3 the float32 master weights lie in flat buffers, each parameter cut into equal parts, one per rank;
under stages 0 to 2 one file holds the weights that the forward pass uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import UserError


@dataclass(frozen=True)
class _Location:
    """Where each rank's part of a parameter lies: flat buffer `group`, from `start`, `length` values."""

    shape: torch.Size
    group: int
    start: int
    length: int


class ShardedWeights:
    """The weights of one checkpoint folder by name; memory-mapped, so that opening it reads nothing.

    Raises UserError where a rank's file is missing or does not hold what it should.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        first = sorted(folder.glob("*_model_states.pt"))
        if not first:
            raise UserError(f"{folder}: no DeepSpeed model states here; give a checkpoint folder")
        model_states = _open(first[0])
        self._whole: dict[str, Tensor] = {}
        self._locations: dict[str, _Location] = {}
        self._flat_groups_by_rank: list[list[Tensor]] = []
        if first[0].name.startswith("zero_pp_rank_"):
            self._open_zero3(model_states)
        else:
            self._whole = _without_aliases(model_states["module"])

    @property
    def names(self) -> list[str]:
        """Every parameter once; a tied one under the name that owns it."""
        return list(self._whole or self._locations)

    def __getitem__(self, name: str) -> Tensor:
        """The whole parameter in float32, in memory of its own."""
        if name in self._whole:
            return self._whole[name].float().clone()
        where = self._locations[name]
        parts = [groups[where.group][where.start : where.start + where.length] for groups in self._flat_groups_by_rank]
        return torch.cat(parts)[: where.shape.numel()].view(where.shape)

    def _open_zero3(self, model_states: dict[str, Any]) -> None:
        world = int(model_states["dp_world_size"])
        for rank in range(world):
            path = self.folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            if not path.exists():
                raise UserError(f"{path}: missing; the checkpoint was written by {world} ranks and is not whole")
            self._flat_groups_by_rank.append(_open(path)["optimizer_state_dict"]["fp32_flat_groups"])
        sizes = [group.numel() for group in self._flat_groups_by_rank[0]]
        group = start = 0
        for shapes in model_states["param_shapes"]:
            for name, shape in shapes.items():
                while group < len(sizes) and start >= sizes[group]:
                    group, start = group + 1, 0
                length = -(-shape.numel() // world)
                if group == len(sizes) or start + length > sizes[group]:
                    raise UserError(f"{self.folder}: the flat buffers end before {name}; the files do not fit together")
                self._locations[name] = _Location(shape, group, start, length)
                start += length


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once: a tied parameter is stored under two names that share their memory."""
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in first_names.values()}


def _open(path: Path) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file; each means the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint file ({reason})") from None

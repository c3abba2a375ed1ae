"""Weights and optimizer state by name out of DeepSpeed's files, whatever the ZeRO stage and number of ranks.

    stage 3       every parameter cut into equal parts, one per rank, inside each rank's flat buffers
    stages 1, 2   flat buffers of whole parameters, cut into equal parts, one per rank
    stage 0       one file with everything whole

Files are memory-mapped: opening reads nothing, and only what is asked for is read. What was read is let go of at once,
so that however much is read, memory holds a block of it besides the result.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline import UserError
from pretrain.checkpoints.unpickling import load_data_only
from pretrain.resident_memory import copy_mapped

WEIGHT = "weight"
OPTIMIZER_NAMES = "optimizer_parameter_names"


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's values inside the flat buffers of one rank."""

    group: int
    """Which flat buffer."""
    start: int
    """Where in the buffer."""
    length: int
    first: int
    """Which value of the flattened parameter comes first."""


@dataclass(frozen=True)
class FlatState:
    """One rank's share of a run: float32 weights, and the optimizer's state of each flat buffer."""

    weights: Sequence[Tensor]
    optimizer: Sequence[Mapping[str, Any]]

    @classmethod
    def from_zero(cls, state: Mapping[str, Any]) -> FlatState:
        """From what ZeRO's optimizers give as `state_dict()`; views, not copies."""
        if "fp32_flat_groups" in state:
            weights, optimizer = state["fp32_flat_groups"], state["optimizer_state_dict"]["state"]
        else:
            weights, optimizer = state["single_partition_of_fp32_groups"], state["base_optimizer_state"]["state"]
        return cls(weights, [optimizer.get(number, {}) for number in range(len(weights))])

    def values(self, key: str, group: int) -> Tensor:
        """A flat buffer: the weights', or one of the optimizer's."""
        return self.weights[group] if key == WEIGHT else self.optimizer[group][key]


class ShardedState:
    """The weights and optimizer state of one checkpoint folder.

    Raises UserError where a rank's file is missing or does not hold what it should, every value of it exactly once.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        first = next(iter(sorted(folder.glob("*_model_states.pt"))), None)
        if first is None:
            raise UserError(f"{folder}: no DeepSpeed model states here; give a checkpoint folder")
        self.model_states = load_data_only(first)
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[tuple[int, Piece]]] = {}
        self._ranks: list[FlatState] = []
        if self.model_states["param_shapes"] is None:
            self._open_whole()
            return
        self.shapes = {name: shape for group in self.model_states["param_shapes"] for name, shape in group.items()}
        states = self._open_ranks()
        self._ranks = [FlatState.from_zero(state) for state in states]
        if first.name.startswith("zero_pp_rank_"):
            self._locate_cut_parameters()
            self._check_all_is_used(with_padding=False)
        else:
            self._locate_cut_buffers([state["param_slice_mappings"] for state in states])
            self._check_all_is_used(with_padding=True)

    @property
    def names(self) -> list[str]:
        """Every parameter once; a tied one under the name that owns it."""
        return list(self.shapes)

    def weight(self, name: str) -> Tensor:
        """A whole parameter in float32, in memory of its own."""
        shape = self.shapes[name]
        return self.read(name, WEIGHT, 0, shape.numel()).view(shape)

    def read(self, name: str, key: str, first: int, length: int) -> Tensor:
        """`length` values of a flattened parameter from `first` on; zeros beyond its end.

        Args:
            name: of the parameter.
            key: WEIGHT, or one of `optimizer_keys`.
        """
        values = torch.zeros(length)
        for rank, piece in self._pieces[name]:
            start, stop = max(first, piece.first), min(first + length, piece.first + piece.length)
            if start < stop:
                at = piece.start + start - piece.first
                buffer = self._ranks[rank].values(key, piece.group)
                copy_mapped(buffer[at : at + stop - start], values[start - first : stop - first])
        return values

    def optimizer_keys(self, name: str) -> list[str]:
        """What the optimizer keeps per value of a parameter, such as exp_avg."""
        return [key for key, value in self._optimizer_state(name).items() if _is_buffer(value)]

    def optimizer_scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps once for a parameter, such as its number of steps; copies, as each counts on."""
        state = self._optimizer_state(name)
        return {key: copy.deepcopy(value) for key, value in state.items() if not _is_buffer(value)}

    def _optimizer_state(self, name: str) -> Mapping[str, Any]:
        rank, piece = self._pieces[name][0]
        return self._ranks[rank].optimizer[piece.group]

    def _open_ranks(self) -> list[dict[str, Any]]:
        world = int(self.model_states["dp_world_size"])
        paths = {
            int(match[1]): path
            for path in self.folder.glob("*_optim_states.pt")
            if (match := re.fullmatch(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt", path.name))
        }
        if sorted(paths) != list(range(world)):
            missing = min(set(range(world)) - paths.keys(), default=world)
            raise UserError(
                f"{self.folder}: the optimizer file of rank {missing} does not fit; written by {world} ranks, and not "
                "whole, use another checkpoint"
            )
        return [load_data_only(paths[rank])["optimizer_state_dict"] for rank in range(world)]

    def _locate_cut_parameters(self) -> None:
        """ZeRO-3: each parameter lies at the same place in every rank's buffers, an equal part of it in each."""
        sizes = [group.numel() for group in self._ranks[0].weights]
        group = start = 0
        for name, shape in self.shapes.items():
            while group < len(sizes) and start >= sizes[group]:
                group, start = group + 1, 0
            length = -(-shape.numel() // len(self._ranks))
            if group == len(sizes) or start + length > sizes[group]:
                raise UserError(f"{self.folder}: the flat buffers end before {name}; the files do not fit together")
            self._pieces[name] = [
                (rank, Piece(group, start, length, rank * length)) for rank in range(len(self._ranks))
            ]
            start += length

    def _locate_cut_buffers(self, mappings: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """ZeRO-1 and 2: each rank says which parameters its part of each buffer holds; the parts join in rank order."""
        found = dict.fromkeys(self.shapes, 0)
        for rank, groups in enumerate(mappings):
            for group, fragments in enumerate(groups):
                for name, fragment in fragments.items():
                    piece = Piece(group, fragment.start, fragment.numel, found[name])
                    self._pieces.setdefault(name, []).append((rank, piece))
                    found[name] += fragment.numel
        for name, shape in self.shapes.items():
            if found[name] != shape.numel():
                raise UserError(
                    f"{self.folder}: holds {found[name]} of the {shape.numel()} values of {name}; the files do not "
                    "fit together, use another checkpoint"
                )

    def _check_all_is_used(self, with_padding: bool) -> None:
        """No value of a flat buffer belongs to two parameters, and none to nothing but padding, where there is any."""
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for pieces in self._pieces.values():
            for rank, piece in pieces:
                spans.setdefault((rank, piece.group), []).append((piece.start, piece.start + piece.length))
        for rank, state in enumerate(self._ranks):
            for group, buffer in enumerate(state.weights):
                found = sorted(spans.get((rank, group), []))
                taken = sum(stop - start for start, stop in found)
                overlaps = any(start < stop for (_, stop), (start, _) in itertools.pairwise(found))
                ends_inside = not found or found[-1][1] <= buffer.numel()
                if overlaps or not ends_inside or not (with_padding or taken == buffer.numel()):
                    raise UserError(
                        f"{self.folder}: the parameters take {taken} of the {buffer.numel()} values in flat buffer "
                        f"{group} of rank {rank}; the files do not fit together, use another checkpoint"
                    )

    def _open_whole(self) -> None:
        """Stage 0: each parameter is a group of its own."""
        module, optimizer = self.model_states["module"], self.model_states["optimizer"]["state"]
        names = self.model_states[OPTIMIZER_NAMES]
        self.shapes = {name: module[name].shape for name in names}
        self._ranks = [
            FlatState(
                [module[name].flatten() for name in names],
                [{key: _flat(value) for key, value in optimizer[number].items()} for number in range(len(names))],
            )
        ]
        for number, name in enumerate(names):
            self._pieces[name] = [(0, Piece(number, 0, module[name].numel(), 0))]


def _is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _flat(value: Any) -> Any:
    return value.flatten() if _is_buffer(value) else value

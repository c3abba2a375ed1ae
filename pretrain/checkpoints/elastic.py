"""A checkpoint into an engine of another shape: other ranks, another ZeRO stage, another precision.

DeepSpeed's own way is its universal format: a second copy of everything on disk, made by a converter that unpickles
with full trust; and under ZeRO-3 its loader (0.19.8, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`) gives every
parameter group the weight decay of the first and knows no optimizer state but Adam's, while saving the model states of
the first rank alone, resuming as if from scratch, and tied weights are open issues (DeepSpeed #7546, #6691, #3033).
Here each rank reads by name, from the files as they are, the very values that it holds now, fills its engine's own
state with them, and has DeepSpeed load that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import nn

from data_pipeline import UserError
from pretrain.checkpoints.shards import WEIGHT, FlatState, Piece, ShardedState


def load_by_name(engine: deepspeed.DeepSpeedEngine, path: Path) -> None:
    """Fill weights and optimizer from a checkpoint of any shape.

    Raises UserError where the checkpoint does not hold every parameter of the engine's model, or where the engine
    keeps its optimizer on NVMe.
    """
    offload = engine.zero_offload_optimizer()
    if offload is not None and offload.device == OffloadDeviceEnum.nvme:
        raise UserError(
            f"{path}: was saved in another shape, and cannot be read into an optimizer on NVMe; set "
            "deepspeed.zero_optimization.offload_optimizer.device=cpu, or go on in the shape in which it was saved"
        )
    source = ShardedState(path)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    missing = sorted(set(names.values()) - set(source.names))
    if missing:
        raise UserError(f"{path}: holds no {missing[0]}; the checkpoint does not fit its own config, use another one")
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    if engine.zero_optimization_stage() == 3:
        _fill_partitions(engine, source, _zero3_pieces(engine.optimizer, names))
    else:
        _fill_module(engine.module, source)
        if engine.zero_optimization_stage() == 0:
            _fill_plain_optimizer(engine.optimizer, source, names)
        else:
            _fill_partitions(engine, source, _zero12_pieces(engine.optimizer, names))
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, source.model_states[counter])


def _fill_partitions(
    engine: deepspeed.DeepSpeedEngine, source: ShardedState, pieces: Iterator[tuple[str, Piece]]
) -> None:
    """ZeRO: this rank's pieces of every parameter into its flat buffers; DeepSpeed derives the rest from them."""
    state: dict[str, Any] = engine.optimizer.state_dict()
    weights = FlatState.from_zero(state).weights
    optimizer: dict[int, dict[str, Any]] = {number: {} for number in range(len(weights))}
    with torch.no_grad():
        for name, piece in pieces:
            buffers = optimizer[piece.group]
            buffers |= source.optimizer_scalars(name)
            for key in [WEIGHT, *source.optimizer_keys(name)]:
                whole = weights[piece.group]
                if key != WEIGHT:
                    whole = buffers.setdefault(key, torch.zeros_like(_engine_buffer(engine.optimizer, piece.group)))
                values = source.read(name, key, piece.first, piece.length)
                whole[piece.start : piece.start + piece.length].copy_(values)
    key = "optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"
    state[key] = {"state": optimizer, "param_groups": state[key]["param_groups"]}
    by_rank = {dist.get_rank(group=engine.optimizer.dp_process_group): state}
    engine.optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)


def _engine_buffer(optimizer: Any, group: int) -> torch.Tensor:
    """The flat float32 weights of a group with their padding, as the optimizer's own buffers are."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            buffer: torch.Tensor = getattr(optimizer, attribute)[group]
            return buffer
    raise AssertionError(f"{type(optimizer).__name__} holds its weights in a way unknown to this version")


def _zero3_pieces(optimizer: Any, names: dict[int, str]) -> Iterator[tuple[str, Piece]]:
    """Where this rank's part of each parameter lies under ZeRO-3: equal parts, the last one padded."""
    rank = dist.get_rank(group=optimizer.dp_process_group)
    for number, group in enumerate(optimizer.fp16_groups):
        start = 0
        for parameter in group:
            length = parameter.partition_numel()
            yield names[id(parameter)], Piece(number, start, length, rank * length)
            start += length


def _zero12_pieces(optimizer: Any, names: dict[int, str]) -> Iterator[tuple[str, Piece]]:
    """Where this rank's part of each parameter lies under ZeRO-1 and 2; many a parameter lies on other ranks alone."""
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for number, group in enumerate(groups):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield names[id(parameter)], Piece(number, here.start, here.numel, there.start)


def _fill_module(module: nn.Module, source: ShardedState) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(source.weight(name))


def _fill_plain_optimizer(optimizer: torch.optim.Optimizer, source: ShardedState, names: dict[int, str]) -> None:
    """Stage 0: torch's own optimizer, which numbers parameters in the order of its groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(parameters):
        name = names[id(parameter)]
        size = parameter.numel()
        buffers = {key: source.read(name, key, 0, size).view_as(parameter) for key in source.optimizer_keys(name)}
        state[number] = source.optimizer_scalars(name) | buffers
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

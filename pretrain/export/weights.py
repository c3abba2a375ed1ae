"""Safetensors files written tensor by tensor, so that memory holds one tensor however large the model is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from data_pipeline import UserError

SAFETENSORS_NAME = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Plan:
    """One tensor to write: its name in the file, its name in the checkpoint, and its shape."""

    name: str
    source: str
    shape: tuple[int, ...]

    def bytes(self, dtype: torch.dtype) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * dtype.itemsize


def write_weights(
    folder: Path,
    plans: list[Plan],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write model.safetensors, or numbered shards of at most `shard_bytes` (a larger tensor alone) and an index.

    read: a checkpoint name to the whole tensor. Raises UserError for a tensor that is not finite in `dtype` or
    has another shape than planned.
    """
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(p.bytes(dtype) for p in shards[-1]) + plan.bytes(dtype) > shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], read, dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, read, dtype)
        weight_map |= {plan.name: name for plan in shard}
    index = {"metadata": {"total_size": sum(plan.bytes(dtype) for plan in plans)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path: Path, plans: Iterable[Plan], read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """One safetensors file: the header's length as 8 bytes, the header as JSON, the tensors end to end.

    Raises UserError as `write_weights`.
    """
    plans = list(plans)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.bytes(dtype)
        header[plan.name] = {
            "dtype": SAFETENSORS_NAME[dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            _write_tensor(file, plan, read(plan.source), dtype)


def _write_tensor(file: BinaryIO, plan: Plan, tensor: Tensor, dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != plan.shape:
        raise UserError(
            f"{plan.source} has shape {tuple(tensor.shape)} where the config makes it {plan.shape}; "
            "the checkpoint does not fit its own config, use another one"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{plan.source} holds NaN or infinite values; export an earlier checkpoint")
    converted = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(converted).all()):
        raise UserError(f"{plan.source} has values beyond the range of {dtype}; export with --dtype bfloat16")
    file.write(converted.view(torch.uint8).numpy().data)

"""Which weight goes where, and safetensors files written block by block: memory never holds a whole tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from data_pipeline import UserError
from pretrain.decoding.llama import DYNAMICS_PREFIX, llama_name
from pretrain.decoding.loading import check_names
from pretrain.decoding.rivals import HEADS_PREFIX
from pretrain.model import PretrainingModel

if TYPE_CHECKING:
    from pretrain.checkpoints import Checkpoint

SAFETENSORS_NAME = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BLOCK_VALUES = 1 << 22
"""Values of a tensor that are read, converted and written at a time; 16 MB in float32."""

Advance = Callable[[str, int], None]
"""Takes what is being done and how many values are done."""


@dataclass(frozen=True)
class Plan:
    """One tensor to write: its name in the file, its name in the checkpoint, and its shape."""

    name: str
    source: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many there are."""
        return torch.Size(self.shape).numel()

    def bytes(self, dtype: torch.dtype) -> int:
        """Size in the file."""
        return self.values * dtype.itemsize


def plan_weights(checkpoint: Checkpoint) -> tuple[list[Plan], list[Plan]]:
    """Every weight of the model exactly once: those of LlamaForCausalLM, and those that draft.

    Raises UserError for a checkpoint that does not hold exactly the weights of its config, in their shapes; and for an
    objective that needs more to predict the next token: a folder that loads as a Llama and is not the model that was
    trained would be worse than none.
    """
    with torch.device("meta"):
        model = PretrainingModel(checkpoint.config, checkpoint.vocab_size)
    if model.objective.needed_at_inference:
        raise UserError(
            f"{checkpoint.path}: objective.name={checkpoint.config.objective.name} predicts the next token with "
            "modules of its own, which LlamaForCausalLM has no place for; evaluate the checkpoint itself with "
            "python -m pretrain.evaluate"
        )
    check_names(model, checkpoint)
    trunk: list[Plan] = []
    drafter: list[Plan] = []
    for name, parameter in model.named_parameters():
        if checkpoint.shape(name) != tuple(parameter.shape):
            raise UserError(
                f"{name} has shape {checkpoint.shape(name)} where the config makes it {tuple(parameter.shape)}; "
                "the checkpoint does not fit its own config, use another one"
            )
        target = llama_name(name)
        own = name.removeprefix(DYNAMICS_PREFIX).removeprefix(HEADS_PREFIX)
        (drafter if target is None else trunk).append(Plan(target or own, name, tuple(parameter.shape)))
    return trunk, drafter


def write_weights(
    folder: Path, plans: list[Plan], checkpoint: Checkpoint, dtype: torch.dtype, shard_bytes: int, advance: Advance
) -> None:
    """Write model.safetensors, or numbered shards of at most `shard_bytes` (a larger tensor alone) and an index.

    Raises UserError for a tensor that is not finite in `dtype`.
    """
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(p.bytes(dtype) for p in shards[-1]) + plan.bytes(dtype) > shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], checkpoint, dtype, advance)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, checkpoint, dtype, advance)
        weight_map |= {plan.name: name for plan in shard}
    index = {"metadata": {"total_size": sum(plan.bytes(dtype) for plan in plans)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path, plans: Iterable[Plan], checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance
) -> None:
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
            _write_tensor(file, plan, checkpoint, dtype, advance)


def blocks(values: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, length) of each part of at most `step` values."""
    return ((first, min(step, values - first)) for first in range(0, values, step))


def _write_tensor(file: BinaryIO, plan: Plan, checkpoint: Checkpoint, dtype: torch.dtype, advance: Advance) -> None:
    for first, length in blocks(plan.values, BLOCK_VALUES):
        trained = checkpoint.read(plan.source, first, length)
        if not _is_finite(trained):
            raise UserError(f"{plan.source} holds NaN or infinite values; export an earlier checkpoint")
        converted = trained.to(dtype)
        if not _is_finite(converted):
            raise UserError(f"{plan.source} has values beyond the range of {dtype}; export with --dtype bfloat16")
        file.write(converted.view(torch.uint8).numpy().data)
        advance(f"writing {plan.name}", length)


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())

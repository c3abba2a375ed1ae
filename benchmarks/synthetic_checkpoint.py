"""A ZeRO-3 checkpoint of random weights in the files that DeepSpeed writes, made without an engine.

Memory holds the file of one rank. What nothing but DeepSpeed itself reads, its own config and counters, is left out.
"""

from __future__ import annotations

import json
import platform
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor

from data_pipeline import Tokenizer
from pretrain.checkpoints.manifest import flush_and_hash, write_manifest
from pretrain.checkpoints.state import CONFIG, STATE
from pretrain.config import Config, dump_config
from pretrain.engine import build_optimizer
from pretrain.model import PretrainingModel

Groups = list[dict[str, torch.Size]]
"""The optimizer's parameter groups: each parameter's shape by its name."""


def parameter_groups(config: Config, vocab_size: int) -> Groups:
    """As the engine makes them for a run."""
    with torch.device("meta"):
        model = PretrainingModel(config, vocab_size)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config, torch.device("cpu")).param_groups
    return [OrderedDict((names[id(one)], one.shape) for one in group["params"]) for group in groups]


def part_of(name: str, shape: torch.Size, rank: int, ranks: int) -> Tensor:
    """A rank's part of a parameter: an equal share of its values, zeros beyond their end.

    Values are normal: norms around 1, matrices of standard deviation 0.02; a function of name, rank and size alone.
    """
    length = -(-shape.numel() // ranks)
    values = torch.zeros(length)
    count = max(0, min(length, shape.numel() - rank * length))
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1009 + rank)
    values[:count].normal_(1.0 if len(shape) == 1 else 0.0, 0.02, generator=generator)
    return values


def write_checkpoint(
    path: Path,
    config: Config,
    vocab_size: int,
    ranks: int,
    tokenizer: Tokenizer,
    done: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint folder `path`, of a name such as step_00000001, with its manifest.

    done: called after each rank's files.
    """
    path.mkdir(parents=True)
    groups = parameter_groups(config, vocab_size)
    for rank in range(ranks):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00_"
        torch.save(_model_states(groups, ranks), path / f"{prefix}model_states.pt")
        torch.save({"optimizer_state_dict": _optimizer_states(groups, rank, ranks)}, path / f"{prefix}optim_states.pt")
        done()
    (path / CONFIG).write_text(dump_config(config), encoding="utf-8")
    (path / STATE).write_text(json.dumps(_state(config, vocab_size, ranks, tokenizer), indent=2), encoding="utf-8")
    if tokenizer.path is not None:
        (path / f"tokenizer{tokenizer.path.suffix}").write_bytes(tokenizer.path.read_bytes())
    step = int(path.name.removeprefix("step_"))
    write_manifest(path, {"step": step, "ranks": ranks, "zero_stage": 3}, flush_and_hash(path, sorted(path.iterdir())))
    return path


def _model_states(groups: Groups, ranks: int) -> dict[str, Any]:
    names = [name for group in groups for name in group]
    return {
        "module": OrderedDict((name, torch.empty(0)) for name in names),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": groups,
        "shared_params": {},
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": deepspeed.__version__,
    }


def _optimizer_states(groups: Groups, rank: int, ranks: int) -> dict[str, Any]:
    """One flat buffer for each group's weights, and Adam's moments of the same sizes, which are zero."""
    weights = [torch.cat([part_of(name, shape, rank, ranks) for name, shape in group.items()]) for group in groups]
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        for number, flat in enumerate(weights)
    }
    return {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(1),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"params": [n]} for n in range(len(groups))]},
        "fp32_flat_groups": weights,
    }


def _state(config: Config, vocab_size: int, ranks: int, tokenizer: Tokenizer) -> dict[str, Any]:
    dataset = {
        "path": str(config.data.path),
        "fingerprint": "0" * 64,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }
    return {
        "step": 1,
        "tokens": config.batch.global_sequences * config.data.sequence_length,
        "metrics_bytes": 0,
        "ranks": ranks,
        "zero_stage": 3,
        "precision": "float32",
        "vocab_size": vocab_size,
        "dataset": dataset,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        },
        "validation_loss": None,
    }

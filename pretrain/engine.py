"""From a run's config to a DeepSpeed engine: the one place where DeepSpeed is configured."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from data_pipeline import UserError
from pretrain import init_from, schedules
from pretrain.config import Config, NextLatConfig
from pretrain.decoding.llama import DYNAMICS_PREFIX
from pretrain.latent_dynamics import LatentDynamics
from pretrain.model import PretrainingModel, initialise

NEVER = 2**62
FINAL_GAIN = "trunk.norm.weight"


def precision(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the forward and backward pass: `run.precision`, with auto resolved for the device."""
    match config.run.precision:
        case "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        case name:
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def check_precision(config: Config, device: torch.device) -> None:
    """UserError where DeepSpeed (0.19.8) cannot train in the run's precision: bfloat16 without ZeRO."""
    if config.zero_stage == 0 and precision(config, device) == torch.bfloat16:
        raise UserError(
            f"run.precision={config.run.precision} is bfloat16 here, whose gradients DeepSpeed adds up in float32 "
            "under ZeRO alone; set deepspeed.zero_optimization.stage=1, 2 or 3, or run.precision=float32"
        )


def deepspeed_config(config: Config, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """The run's `deepspeed` section, with all that follows from its other sections filled in.

    Raises UserError where the batch does not fit the number of ranks.
    """
    result = copy.deepcopy(config.deepspeed)
    result.setdefault("zero_optimization", {})["stage"] = config.zero_stage
    result.setdefault("steps_per_print", NEVER)  # the run has a console line of its own
    if config.optimizer.name == "muon":  # its update needs whole gradients
        result["zero_optimization"]["reduce_scatter"] = False
    result |= {
        "train_batch_size": config.batch.global_sequences,
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": config.batch.accumulation_steps(ranks),
        "gradient_clipping": config.optimizer.gradient_clip or 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # Micro-batches add up in float32, so that accumulation changes nothing but speed.
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return result


def build_engine(config: Config, vocab_size: int, ranks: int, device: torch.device) -> deepspeed.DeepSpeedEngine:
    """A model with its initial weights, sharded as the config says, with its optimizer.

    Under ZeRO-3 the weights are sharded while the model is built: no rank ever holds it whole.
    """
    dtype = precision(config, device)
    settings = deepspeed_config(config, ranks, dtype)
    sharded = config.zero_stage == 3
    # The dtype is left to `settings`: zero.Init(dtype=torch.float32) gives bfloat16 weights where float16 is not
    # supported, CPUs among them (DeepSpeed 0.19.8).
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=sharded):
        model = PretrainingModel(config, vocab_size)
    whole = _gathered if sharded else _as_it_is
    initialise(model, config.run.seed, config.model.init_std, whole)
    if config.model.init_from is not None:
        init_from.load_weights(model, Path(config.model.init_from), whole)
    if any(isinstance(module, LatentDynamics) for module in model.modules()):
        # p_psi's layers are used once per rollout step: gather them once per pass, as one unit.
        set_z3_leaf_modules(model, [LatentDynamics])
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config, device), config=settings)
    return engine


def build_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone; or Muon for the matrices between embedding and head.

    Trunk and p_ψ have groups of their own; `set_learning_rates` tells them apart, and what is never updated.
    """
    optimizer = config.optimizer
    groups: dict[tuple[bool, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        is_dynamics, is_matrix = name.startswith(DYNAMICS_PREFIX), _dimensions(parameter) >= 2
        use_muon = optimizer.name == "muon" and is_matrix and "embed" not in name and "lm_head" not in name
        parameter.use_muon = use_muon  # type: ignore[attr-defined]  # DeepSpeed asks the parameters themselves
        decay = optimizer.weight_decay if is_matrix else 0.0
        if is_dynamics and isinstance(config.objective, NextLatConfig):
            decay *= config.objective.dynamics_weight_decay_multiple
        is_fixed = config.model.fix_final_gain and name == FINAL_GAIN
        settings = {"params": [], "weight_decay": decay, "is_dynamics": is_dynamics, "use_muon": use_muon}
        settings["is_fixed"] = is_fixed
        groups.setdefault((is_dynamics, is_matrix, use_muon, is_fixed), settings)["params"].append(parameter)
    adamw: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": optimizer.betas, "eps": optimizer.epsilon}
    if optimizer.name == "adamw":
        return torch.optim.AdamW(list(groups.values()), **adamw, fused=device.type == "cuda")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if device.type == "cpu":
        _same_muon_on_every_cpu()
    for group in groups.values():
        group |= {"lr": optimizer.learning_rate, "momentum": optimizer.muon_momentum} if group["use_muon"] else adamw
    return MuonWithAuxAdam(list(groups.values()))


def _same_muon_on_every_cpu() -> None:
    """DeepSpeed's Muon orthogonalises in float16 on CPUs that have it, and else in float32: here in float32 on all.

    So the same run has the same numbers on another machine. And its update is compiled where it can be, which needs a
    compiler, and gains a small model nothing.
    """
    from deepspeed.runtime.zero.muon import original_muon

    original_muon.ns_compute_dtype = lambda ns_method="gram": torch.float32
    torch.compiler.set_stance("force_eager")


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, config: Config, step: int) -> float:
    """Give every group its learning rate in `step`, and tell the objective what it trains; returns the run's own rate.

    While p_ψ is trained alone the others have none. Their gradients are zero then, so their moments stay zero too.
    """
    rate, optimizer, objective = schedules.learning_rate(config, step), config.optimizer, config.objective
    dynamics_multiple, dynamics_only = 1.0, False
    if isinstance(objective, NextLatConfig):
        dynamics_multiple = objective.dynamics_learning_rate_multiple
        engine.module.objective.dynamics_only = dynamics_only = step < objective.dynamics_only_steps
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * (dynamics_multiple if group["is_dynamics"] else 0.0 if dynamics_only else 1.0)
        if group["is_fixed"]:
            group["lr"] = 0.0
        if group["use_muon"]:
            group["lr"] *= (optimizer.muon_learning_rate or 0.0) / optimizer.learning_rate
    return rate


def gradient_norm(engine: deepspeed.DeepSpeedEngine, config: Config) -> float | None:
    """Global norm of the gradient before clipping, where the engine does not tell it after its step (stage 0)."""
    if config.zero_stage != 0:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # a sharded parameter's own shape is (0,)


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[object]:
    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)


def _as_it_is(parameter: nn.Parameter) -> AbstractContextManager[object]:
    return nullcontext()

"""Floating-point operations of a training step, counted from the matrix products."""

from __future__ import annotations

import torch

from pretrain.config import Config, NextLatConfig

PEAK_TFLOPS = {  # dense bfloat16, from the vendors' data sheets
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def flops_per_token(config: Config, vocab_size: int) -> float:
    """FLOPs of one token, forward and backward (3 × forward, 2 per multiply-add).

    Attention counts the causal half of T × T, as if every row were one document: document masks make whole scores
    vanish, not the work of the kernels that are used. The KL terms add one head product per rollout step, whose
    backward pass lacks the product for the head's weight where the head is frozen there.
    """
    model, T = config.model, config.data.sequence_length
    head_width = model.width // model.heads
    projections = 2 * model.width**2 + 2 * model.width * model.key_value_heads * head_width
    layer = projections + 3 * model.width * model.inner_width
    attention = 2 * model.width * (T + 1) / 2  # q·k and p·v over the tokens so far
    head = model.width * vocab_size
    forward = model.layers * (layer + attention) + head
    total = 3 * 2 * forward
    if isinstance(config.objective, NextLatConfig):
        d, hidden = config.objective.horizon, config.objective.dynamics_width
        landings = sum(T - i for i in range(1, d + 1)) / T  # p_ψ runs only where a rollout can land
        transition = 2 * model.width * hidden + hidden**2
        total += 3 * 2 * (model.width * hidden + landings * transition)  # the embeddings' half: once, for every token
        students = d * max(1, round(config.objective.kl_positions * T)) / T
        total += (2 if config.objective.stop_gradient_head else 3) * 2 * students * head
    return float(total)


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one accelerator: `metrics.peak_tflops`, else known by the GPU's name, else None."""
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)

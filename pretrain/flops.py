"""Floating-point operations of a training step, counted from the matrix products."""

from __future__ import annotations

import torch

from pretrain.config import BstConfig, Config, JtpConfig, MtpConfig, NextLatConfig, NextTokenConfig
from pretrain.objectives.bst import pair_inner_width

PEAK_TFLOPS = {  # dense bfloat16, from the vendors' data sheets
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def flops_per_token(config: Config, vocab_size: int) -> float:
    """FLOPs of one token, forward and backward (3 × forward, 2 per multiply-add).

    Attention counts the causal half of T × T, as if every row were one document, whatever document masks leave out; so
    do BST's pairs. NextLat's KL terms add one head product per rollout step and position that they read, whose backward
    pass lacks the product for the head's weight where it is frozen there.
    """
    model, T = config.model, config.data.sequence_length
    head_width = model.width // model.heads
    projections = 2 * model.width**2 + 2 * model.width * model.key_value_heads * head_width
    attention = 2 * model.width * (T + 1) / 2  # q·k and p·v over the tokens so far
    block = projections + 3 * model.width * model.inner_width + attention
    head = model.width * vocab_size
    trunk = model.layers * block
    frozen_head = 0.0
    match config.objective:
        case NextTokenConfig():
            forward = trunk + head
        case NextLatConfig(horizon=d, dynamics_width=hidden) as objective:
            landings = sum(T - i for i in range(1, d + 1)) / T  # p_ψ runs only where a rollout can land
            embeddings_half = model.width * hidden  # once, for every token
            forward = trunk + head + embeddings_half + landings * (2 * model.width * hidden + hidden**2)
            students = d * max(1, round(objective.kl_positions * T)) / T * head
            forward, frozen_head = (forward, students) if objective.stop_gradient_head else (forward + students, 0.0)
        case MtpConfig(horizon=d):
            forward = trunk + d * block + (1 + d) * head
        case JtpConfig(horizon=d):
            slots = d + 1
            forward = trunk + slots * (4 * model.width**2 + 2 * model.width * slots + head)
        case BstConfig(pair_fraction=fraction):
            openings = T - 1  # the pairs whose prefix is the first token are always kept
            pairs = openings + fraction * (T - 1) * (T - 2) / 2
            forward = 2 * trunk + pairs / T * (3 * 2 * model.width * pair_inner_width(model) + 2 * head)
    return float(3 * 2 * forward + 2 * 2 * frozen_head)


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one accelerator: `metrics.peak_tflops`, else known by the GPU's name, else None."""
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)

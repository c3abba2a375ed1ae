"""Models of a size without training: their times are those of trained ones, their texts are noise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.latent_dynamics import LatentDynamics

GPT2 = {"layers": 12, "width": 768, "heads": 12, "mlp_width": 2048, "vocabulary": 50_257, "dynamics_width": 2448}


def random_model(size: dict[str, int], context: int, device: torch.device) -> tuple[Any, LatentDynamics]:
    """A Llama and p_psi of this size (keys as of `GPT2`) in float32 with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size["mlp_width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        max_position_embeddings=context,
    )
    with device:
        return LlamaForCausalLM(config).eval(), LatentDynamics(size["width"], size["dynamics_width"]).eval()

"""How our trunk is called in `LlamaForCausalLM`: its configuration and the names of its weights."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.config import Config

DYNAMICS_PREFIX = "objective.dynamics."


def llama_config(config: Config, vocab_size: int, eos_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a run's trunk, with every value that has a default elsewhere written out.

    BOS is EOS: training documents open with it. The context is the length that was trained.
    """
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.inner_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.width // model.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        # Readers that know only the older key would fall back to 10,000 without a word.
        "rope_theta": model.rope_theta,
        "max_position_embeddings": config.data.sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "pretraining_tp": 1,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def llama_name(name: str) -> str | None:
    """Our parameter's name in LlamaForCausalLM; None for those of the objective."""
    if name.startswith("trunk."):
        return "model." + name.removeprefix("trunk.")
    return name if name == "lm_head.weight" else None

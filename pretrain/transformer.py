"""The trunk: a decoder with exactly Llama's arithmetic and parameter names.

Names map one to one onto `LlamaForCausalLM` (`model.` is the trunk), so a trained trunk is exported
without custom code. Shapes: B sequences, T tokens, D width, H query heads, K key/value heads, C = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig


@dataclass(frozen=True)
class TrunkStates:
    """What one forward pass of the trunk leaves for the objective."""

    hidden: Tensor
    """(B, T, D) final, post-norm hidden states: what the output head reads."""
    embeddings: Tensor
    """(B, T, D) the token embeddings that the trunk looked up."""
    before_last_block: Tensor
    """(B, T, D) the residual stream that enters the last block."""
    rotation: tuple[Tensor, Tensor]
    """Cosines and sines, each (B, 1, T, C), of the tokens' positions."""
    mask: Tensor
    """(B, 1, T, T) bool: which token attends to which."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped-query heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.key_value_heads
        self.head_width = config.width // config.heads
        kv_width = self.kv_heads * self.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask_B1TT: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        B, T, D = x_BTD.shape
        q_BHTC = self.q_proj(x_BTD).view(B, T, self.heads, self.head_width).transpose(1, 2)
        k_BKTC = self.k_proj(x_BTD).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)
        v_BKTC = self.v_proj(x_BTD).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)
        out_BHTC = F.scaled_dot_product_attention(
            rotate(q_BHTC, *rotation),
            rotate(k_BKTC, *rotation),
            v_BKTC,
            attn_mask=mask_B1TT,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(out_BHTC.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner_width, bias=False)
        self.down_proj = nn.Linear(config.inner_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Pre-norm attention, then pre-norm SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask_B1TT: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask_B1TT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Transformer(nn.Module):
    """Token ids to final, post-norm hidden states: the vectors that the output head reads."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.rope_theta = config.rope_theta
        self.head_width = config.width // config.heads
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)

    def forward(self, tokens_BT: Tensor, document_ids_BT: Tensor, positions_BT: Tensor) -> TrunkStates:
        """Hidden states of every token, and what they were made from.

        A token attends to the tokens before it of its own document; positions count from the document's start.
        """
        embeddings_BTD = self.embed_tokens(tokens_BT)
        rotation = rotary(positions_BT, self.head_width, self.rope_theta, embeddings_BTD.dtype)
        mask_B1TT = document_mask(document_ids_BT)
        x_BTD = embeddings_BTD
        for layer in self.layers:
            before_last_block_BTD = x_BTD
            x_BTD = layer(x_BTD, rotation, mask_B1TT)
        return TrunkStates(self.norm(x_BTD), embeddings_BTD, before_last_block_BTD, rotation, mask_B1TT)


def document_mask(document_ids_BT: Tensor) -> Tensor:
    """(B, 1, T, T): may query t see key s? Yes where s ≤ t and both lie in one document."""
    same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def rotary(positions_BT: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, C) of rotary positions (arXiv 2104.09864), in Llama's half-split layout.

    Angles are computed in at least float32 whatever the model's precision.
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_width, 2, device=positions_BT.device, dtype=angle_dtype) / head_width
    angles_BTC = positions_BT.to(angle_dtype)[..., None] * (1.0 / theta**exponents)
    angles_B1TC = torch.cat([angles_BTC, angles_BTC], dim=-1).unsqueeze(1)
    return angles_B1TC.cos().to(dtype), angles_B1TC.sin().to(dtype)


def rotate(x_BHTC: Tensor, cos_B1TC: Tensor, sin_B1TC: Tensor) -> Tensor:
    """Rotates each pair (c, c + C/2) by its position's angle."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return x_BHTC * cos_B1TC + torch.cat([-second, first], dim=-1) * sin_B1TC

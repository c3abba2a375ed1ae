"""MTP and JTP to decode with: a LlamaForCausalLM whose states hold more than the trunk's hidden state.

Decoding takes a state per position from `model`, turns it into the next token's logits by `lm_head`, and starts to
draft from the state of the last token. Each class here chooses its states so that this loop serves as it is:

    MTP   [h ; h¹ ; …; h^d], what the output head reads of head 0 and of each extra head; a draft step drops the first
    JTP   [h_t ; e(x_t)], and a draft step appends the embedding of the token that it is given; Fetch reads all of it

So neither drafts more than d tokens: `longest_draft`. Shapes as in `pretrain.transformer`; "…" is any batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.objectives.jtp import Fetch
from pretrain.objectives.mtp import PredictionHead
from pretrain.transformer import rotary, rotate

HEADS_PREFIX = "objective.heads."
DRAFTING_OBJECTIVES = ("nextlat", "mtp", "jtp")


class _Rival(nn.Module):
    """What both have in common with the LlamaForCausalLM that they hold."""

    def __init__(self, llama: Any, longest_draft: int):
        super().__init__()
        self.llama = llama
        self.longest_draft = longest_draft
        self.config = llama.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.llama.device)


class MultiTokenLlama(_Rival):
    """A Llama with the extra heads of MTP, which read what enters its last block and keep a cache of their own."""

    def __init__(self, llama: Any, heads: nn.ModuleList):
        super().__init__(llama, len(heads))
        self.heads = heads  # of PredictionHead

    def model(self, input_ids: Tensor, past_key_values: Any, **how: Any) -> SimpleNamespace:
        """States (B, T, (d+1)·D) as `last_hidden_state`; arguments as `trunk.CachedTrunk` gives to a LlamaModel."""
        out = self.llama.model(input_ids=input_ids, past_key_values=past_key_values, output_hidden_states=True, **how)
        positions_BT, mask_B1TS = how["position_ids"], how["attention_mask"]
        before_last_BTD = out.hidden_states[-2]
        layers = len(self.llama.model.layers)
        extra = [
            self._head(head, before_last_BTD, positions_BT, mask_B1TS, past_key_values, layers + k)
            for k, head in enumerate(self.heads)
        ]
        return SimpleNamespace(last_hidden_state=torch.cat([out.last_hidden_state, *extra], dim=-1))

    def lm_head(self, state: Tensor) -> Tensor:
        """Logits (…, V) of the first of the states that are left."""
        return self.llama.lm_head(state[..., : self.llama.config.hidden_size])

    def draft_step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next head's logits, whatever the token: the heads do not know of each other."""
        state = state[..., self.llama.config.hidden_size :]
        return state, self.lm_head(state)

    def _head(
        self, head: Any, x_BTD: Tensor, positions_BT: Tensor, mask_B1TS: Tensor, cache: Any, layer: int
    ) -> Tensor:
        """`PredictionHead.forward` with the keys and values of earlier tokens from the cache."""
        block, attention = head.block, head.block.self_attn
        B, T, D = x_BTD.shape
        theta = self.llama.config.rope_parameters["rope_theta"]
        rotation = rotary(positions_BT, attention.head_width, theta, x_BTD.dtype)
        y_BTD = block.input_layernorm(x_BTD)
        q_BHTC, k_BKTC, v_BKTC = (
            projection(y_BTD).view(B, T, -1, attention.head_width).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = cache.update(rotate(k_BKTC, *rotation), v_BKTC, layer)
        mixed_BHTC = F.scaled_dot_product_attention(
            rotate(q_BHTC, *rotation),
            keys,
            values,
            attn_mask=mask_B1TS,
            enable_gqa=attention.heads != attention.kv_heads,
        )
        x_BTD = x_BTD + attention.o_proj(mixed_BHTC.transpose(1, 2).reshape(B, T, D))
        return head.norm(x_BTD + block.mlp(block.post_attention_layernorm(x_BTD)))


class JointLlama(_Rival):
    """A Llama whose next token, too, is read through Fetch."""

    def __init__(self, llama: Any, fetch: Fetch):
        super().__init__(llama, fetch.slot_bias.shape[1] - 1)
        self.fetch = fetch

    def model(self, input_ids: Tensor, **how: Any) -> SimpleNamespace:
        """States (B, T, 2·D) as `last_hidden_state`; arguments as `trunk.CachedTrunk` gives to a LlamaModel."""
        hidden_BTD = self.llama.model(input_ids=input_ids, **how).last_hidden_state
        embeddings_BTD = self.llama.get_input_embeddings()(input_ids)
        return SimpleNamespace(last_hidden_state=torch.cat([hidden_BTD, embeddings_BTD], dim=-1))

    def lm_head(self, state: Tensor) -> Tensor:
        """Logits (…, V) of the token after the last of those whose embeddings the state holds."""
        width = self.llama.config.hidden_size
        state_NSD = state.reshape(-1, state.shape[-1] // width, width)
        slots_NSD = self.fetch(state_NSD[:, 0], state_NSD[:, 1:])
        return self.llama.lm_head(slots_NSD[:, -1]).view(*state.shape[:-1], -1)

    def draft_step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """One slot more, that of `token` (…)."""
        state = torch.cat([state, self.llama.get_input_embeddings().weight[token]], dim=-1)
        return state, self.lm_head(state)


def empty_heads(folder: Path, llama_config: Any) -> nn.ModuleList:
    """The extra heads in the shape of an export's mtp/ folder, their weights on the meta device."""
    horizon = json.loads((folder / "config.json").read_text(encoding="utf-8"))["horizon"]
    shape = ModelConfig(
        layers=1,
        width=llama_config.hidden_size,
        heads=llama_config.num_attention_heads,
        kv_heads=llama_config.num_key_value_heads,
        mlp_width=llama_config.intermediate_size,
        norm_epsilon=llama_config.rms_norm_eps,
    )
    with torch.device("meta"):
        return nn.ModuleList(PredictionHead(shape) for _ in range(horizon))


def load_heads(folder: Path, llama_config: Any, dtype: torch.dtype) -> nn.ModuleList | None:
    """The extra heads from an export's mtp/ folder, in `dtype`; None where there is no such folder."""
    from safetensors.torch import load_file

    if not folder.is_dir():
        return None
    heads = empty_heads(folder, llama_config)
    weights = load_file(folder / "model.safetensors")
    heads.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return heads.eval()

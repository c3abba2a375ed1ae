"""Drafting: one step of the latent dynamics model.

A draft step maps (state, token) to (next state, logits of the token after it), for the B texts of a batch at once;
the state starts as the trunk's own hidden state. Any objective that can draft does so through this interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.decoding.captured import CapturedStep
from pretrain.latent_dynamics import LatentDynamics

DraftStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(states (B, D), token ids (B,)) → (next states (B, D), logits (B, V))."""


def draft_with_latent_dynamics(
    model: Any, dynamics: LatentDynamics, vocabulary: Sequence[int] | None = None
) -> DraftStep:
    """ĥ' = p_ψ(ĥ, x), logits = head · ĥ', with the embedding and the head of `model` (LlamaForCausalLM).

    vocabulary: token ids that may be drafted; None for all. The head's rows of the others are not read, which makes
    the step cheaper, and their logits are −∞. The text's distribution stays as it is: a token that is never drafted
    still comes from the target, by the residual.

    On a GPU the step is captured, so it is worth keeping: `CapturedStep`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if vocabulary is None:

        def step(state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
            state_BD = dynamics.step(state_BD, embedding.weight[token_B])
            return state_BD, head(state_BD)

        return CapturedStep(step, head.weight) if head.weight.is_cuda else step

    ids_N = torch.tensor(sorted(set(vocabulary)), device=head.weight.device)
    head_ND = head.weight.detach()[ids_N].contiguous()

    def trimmed_step(state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        state_BD = dynamics.step(state_BD, embedding.weight[token_B])
        logits_BV = state_BD.new_full((len(state_BD), len(head.weight)), float("-inf"))
        logits_BV[:, ids_N] = F.linear(state_BD, head_ND)
        return state_BD, logits_BV

    return CapturedStep(trimmed_step, head.weight) if head.weight.is_cuda else trimmed_step

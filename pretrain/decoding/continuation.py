"""One call from a loaded model, a prompt and a draft setting to the new tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pretrain.decoding.drafting import AdaptiveLength, DraftLength, FixedLength, draft_with_latent_dynamics
from pretrain.decoding.loading import Export
from pretrain.decoding.rivals import AtMost
from pretrain.decoding.sampling import Sampling
from pretrain.decoding.speculative import DecodingStatistics, generate

DEFAULT_DRAFT = 4
"""Tokens drafted per cycle where nobody says: a little beyond the training horizon, where drafts still pay."""


def continue_text(
    export: Export,
    prompt: list[int],
    max_new_tokens: int,
    draft: int | str,
    sampling: Sampling,
    seed: int | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], DecodingStatistics]:
    """`speculative.generate` with a loaded model; draft: tokens per cycle, "auto", or 0 for plain decoding."""
    generator = None if seed is None else torch.Generator(export.model.device).manual_seed(seed)
    step = draft_with_latent_dynamics(export.model, export.dynamics) if draft and export.dynamics else None
    length: DraftLength = AdaptiveLength() if isinstance(draft, str) else FixedLength(draft)
    if draft and step is None and export.can_draft:
        step, length = export.model.draft_step, AtMost(length, export.model.longest_draft)
    return generate(
        export.model,
        prompt,
        max_new_tokens,
        eos_id=export.eos_id,
        draft_step=step,
        draft_length=length,
        sampling=sampling,
        generator=generator,
        on_tokens=on_tokens,
    )

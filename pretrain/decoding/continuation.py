"""One call from a loaded model, prompts and a draft setting to the new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pretrain.decoding.accounting import DecodingStatistics
from pretrain.decoding.draft_length import DraftLength, FixedLength
from pretrain.decoding.loading import Export
from pretrain.decoding.sampling import Sampling
from pretrain.decoding.speculative import generate_batch

DEFAULT_DRAFT = 4
"""Tokens drafted per cycle where nobody says: a little beyond the training horizon, where drafts still pay."""


def continue_texts(
    export: Export,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft: int | str,
    sampling: Sampling,
    seed: int | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    vocabulary: Sequence[int] | None = None,
) -> tuple[list[list[int]], DecodingStatistics]:
    """`speculative.generate_batch` with a loaded model.

    draft: tokens per cycle, "auto", or 0 for plain decoding. vocabulary: tokens that may be drafted; None for all.
    """
    generator = None if seed is None else torch.Generator(export.model.device).manual_seed(seed)
    length: DraftLength = export.adaptive_length
    if not isinstance(draft, str):
        length = FixedLength(min(draft, getattr(export.model, "longest_draft", draft)))
    return generate_batch(
        export.model,
        prompts,
        max_new_tokens,
        eos_id=export.eos_id,
        draft_step=export.draft_step(vocabulary) if draft else None,
        draft_length=length,
        sampling=sampling,
        generator=generator,
        on_tokens=on_tokens,
    )


def continue_text(
    export: Export, prompt: Sequence[int], max_new_tokens: int, draft: int | str, sampling: Sampling
) -> tuple[list[int], DecodingStatistics]:
    """`continue_texts` with one prompt."""
    texts, statistics = continue_texts(export, [prompt], max_new_tokens, draft, sampling)
    return texts[0], statistics

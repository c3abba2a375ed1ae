"""Generation with a KV cache, one text at a time: plain, or with drafts that one forward pass verifies.

A cycle begins at h, the trunk's true hidden state of the last token, and p, the distribution of the next one:

    1. the next token x is drawn from p: the target's own sample, never counted as drafted
    2. drafts y_1 … y_k: ĥ = p_ψ(h, x) gives q_1, y_1 is drawn from it, ĥ = p_ψ(ĥ, y_1) gives q_2, …
    3. one forward pass over [x, y_1 … y_k] gives the true states and with them p_1 … p_k and the one after
    4. the first a drafts stand (`sampling.verify`); the cache keeps [x, y_1 … y_a]
    5. h is the true state of the last kept token; p is that state's distribution, or after a refusal the residual

so tokens = cycles + accepted, and the text has the distribution of plain sampling (at temperature 0: is the same
text). Plain decoding is the same loop with k = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from data_pipeline import UserError
from pretrain.decoding.drafting import DraftLength, DraftStep, FixedLength
from pretrain.decoding.sampling import Sampling, draw, probabilities, verify


@dataclass
class DecodingStatistics:
    """What a generation did. tokens = cycles + accepted, always; position 0 is the first draft of a cycle."""

    cycles: int = 0
    """Target's own samples, each with one forward pass (but for the last, if the text ends with it)."""
    drafted: int = 0
    """Tokens drafted by the draft model, whether or not they were compared."""
    accepted: int = 0
    """Drafts that stood."""
    alive_by_position: list[int] = field(default_factory=list)
    """In how many cycles a draft at this position was compared: it existed, and all before it stood."""
    accepted_by_position: list[int] = field(default_factory=list)
    """In how many of those it stood."""
    tokens: int = 0
    """Tokens generated."""
    prefill_seconds: float = 0.0
    """Time of the forward pass over the prompt."""
    seconds: float = 0.0
    """Time from then to the last token."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second, the prompt's forward pass left out."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def accepted_per_cycle(self) -> float:
        """Mean number of drafts that stood in a cycle."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the compared drafts that stood, by position."""
        pairs = zip(self.accepted_by_position, self.alive_by_position, strict=True)
        return [accepted / alive for accepted, alive in pairs]

    def count_cycle(self, drafted: int, accepted: int) -> None:
        """Add one cycle's outcome."""
        assert 0 <= accepted <= drafted, f"{accepted} accepted of {drafted} drafted"
        self.cycles += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += 1 + accepted
        for position in range(min(accepted + 1, drafted)):
            if position == len(self.alive_by_position):
                self.alive_by_position.append(0)
                self.accepted_by_position.append(0)
            self.alive_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted

    def add(self, other: DecodingStatistics) -> None:
        """Add another generation's counts and times."""
        for name in ("cycles", "drafted", "accepted", "tokens", "prefill_seconds", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("alive_by_position", "accepted_by_position"):
            mine, theirs = getattr(self, name), getattr(other, name)
            longest = range(max(len(mine), len(theirs)))
            setattr(self, name, [sum(part[i] for part in (mine, theirs) if i < len(part)) for i in longest])


def generate(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    draft_step: DraftStep | None = None,
    draft_length: DraftLength | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> tuple[list[int], DecodingStatistics]:
    """Continue a prompt.

    Args:
        model: a LlamaForCausalLM.
        prompt: token ids, at least one.
        max_new_tokens: the text ends there, or at the first `eos_id`, which is its last token then.
        eos_id: None for no end.
        draft_step, draft_length: None for plain decoding.
        sampling: greedy where None.
        generator: of the random numbers, on the model's device; torch's own where None.
        on_tokens: called with each cycle's new tokens.

    Returns:
        The new tokens (without the prompt), and the statistics.

    Raises UserError for an empty prompt, or where prompt and new tokens exceed the model's context.
    """
    check_room(model, len(prompt), max_new_tokens)
    statistics = DecodingStatistics()
    tokens: list[int] = []
    cycles = _cycles(
        model,
        prompt,
        max_new_tokens,
        eos_id,
        draft_step,
        draft_length if draft_length and draft_step else FixedLength(0),
        sampling or Sampling(),
        generator,
        statistics,
    )
    with torch.inference_mode():
        for new in cycles:
            tokens += new
            if on_tokens:
                on_tokens(new)
    return tokens, statistics


def check_room(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise UserError for an empty prompt, or where prompt and new tokens exceed the model's context."""
    context = model.config.max_position_embeddings
    if not prompt_tokens:
        raise UserError("the prompt has no tokens; give at least one, such as the end-of-text token")
    if prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{context} tokens; shorten the prompt or ask for fewer"
        )


def _cycles(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_id: int | None,
    draft_step: DraftStep | None,
    draft_length: DraftLength,
    sampling: Sampling,
    generator: torch.Generator | None,
    statistics: DecodingStatistics,
) -> Iterator[list[int]]:
    """The new tokens of each cycle; `statistics` is brought up to date before each yield."""
    from transformers import DynamicCache

    start = perf_counter()
    cache = DynamicCache(config=model.config)
    state_D = _hidden_states(model, list(prompt), cache)[-1]
    next_V = probabilities(model.lm_head(state_D), sampling)
    statistics.prefill_seconds = perf_counter() - start
    start = perf_counter()
    while statistics.tokens < max_new_tokens:
        first = draw(next_V, generator)
        room = max_new_tokens - statistics.tokens - 1
        if first == eos_id or room == 0:
            statistics.count_cycle(0, 0)
            statistics.seconds = perf_counter() - start
            yield [first]
            return
        drafts, q_kV = _draft(draft_step, draft_length, state_D, first, room, eos_id, sampling, generator)

        verification = perf_counter()
        states_D = _hidden_states(model, [first, *drafts], cache)  # (1 + k, D)
        p_V = probabilities(model.lm_head(states_D), sampling)  # (1 + k, V)
        accepted, residual_V = verify(p_V[: len(drafts)], q_kV, drafts, generator) if drafts else (0, None)
        draft_length.saw_verification(accepted, len(drafts), perf_counter() - verification)

        if accepted < len(drafts):
            cache.crop(accepted - len(drafts))
        state_D = states_D[accepted]
        next_V = p_V[accepted] if residual_V is None else residual_V
        statistics.count_cycle(len(drafts), accepted)
        statistics.seconds = perf_counter() - start
        new = [first, *drafts[:accepted]]
        yield new
        if new[-1] == eos_id:
            return


def _draft(
    draft_step: DraftStep | None,
    draft_length: DraftLength,
    state_D: Tensor,
    token: int,
    room: int,
    eos_id: int | None,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> tuple[list[int], Tensor]:
    """Draft at most `room` tokens after `token`, the last of them at the first EOS: (tokens, q (k, V))."""
    drafts: list[int] = []
    distributions: list[Tensor] = []
    while (
        draft_step is not None
        and len(drafts) < room
        and (not drafts or drafts[-1] != eos_id)
        # Asked before the draft is drawn: a decision that saw the draft would bias what is sampled.
        and draft_length.wants_another(len(drafts))
    ):
        start = perf_counter()
        state_D, logits_V = draft_step(state_D, token)
        distributions.append(probabilities(logits_V, sampling))
        token = draw(distributions[-1], generator)
        drafts.append(token)
        draft_length.saw_draft(logits_V, perf_counter() - start)
    return drafts, torch.stack(distributions) if distributions else state_D.new_empty(0, 0)


def _hidden_states(model: Any, tokens: list[int], cache: Any) -> Tensor:
    """Final, post-norm hidden states (T, D) of tokens that follow those in the cache, which grows by them."""
    ids_1T = torch.tensor([tokens], device=model.device)
    return model.model(input_ids=ids_1T, past_key_values=cache, use_cache=True).last_hidden_state[0]

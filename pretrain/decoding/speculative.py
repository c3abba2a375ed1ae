"""Generation with a KV cache: plain, or with drafts that one forward pass verifies. Any number of texts at once.

A cycle of a text begins at h, the trunk's true hidden state of its last token, and p, the distribution of the next one:

    1. the next token x is drawn from p: the target's own sample, never counted as drafted
    2. drafts y_1 … y_k: ĥ = p_ψ(h, x) gives q_1, y_1 is drawn from it, ĥ = p_ψ(ĥ, y_1) gives q_2, …
    3. one forward pass over [x, y_1 … y_k] gives the true states and with them p_1 … p_k and the one after
    4. the first a drafts stand (`sampling.verify`); the cache keeps [x, y_1 … y_a]
    5. h is the true state of the last kept token; p is that state's distribution, or after a refusal the residual

so tokens = cycles + accepted, and the text has the distribution of plain sampling (at temperature 0: is the same
text). Plain decoding is the same loop with k = 0.

The texts of a batch go through a cycle together, each at its own position: one of 3 accepted drafts is 4 tokens
further, its neighbour with none only one. A text that ends leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from data_pipeline import UserError
from pretrain.decoding.accounting import DecodingStatistics
from pretrain.decoding.draft_length import DraftLength, FixedLength
from pretrain.decoding.drafting import DraftStep
from pretrain.decoding.sampling import Sampling, distribution, draw, verify, verify_greedy
from pretrain.decoding.trunk import CachedTrunk, Trunk


def generate(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    on_tokens: Callable[[list[int]], None] | None = None,
    **settings: Any,
) -> tuple[list[int], DecodingStatistics]:
    """Continue one prompt: `generate_batch` with a batch of one. on_tokens: called with each cycle's new tokens."""
    watch = (lambda _, new: on_tokens(new)) if on_tokens else None
    texts, statistics = generate_batch(model, [prompt], max_new_tokens, on_tokens=watch, **settings)
    return texts[0], statistics


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    draft_step: DraftStep | None = None,
    draft_length: DraftLength | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    trunk: Callable[[Any], Trunk] = CachedTrunk,
    clock: Callable[[], float] = perf_counter,
) -> tuple[list[list[int]], DecodingStatistics]:
    """Continue prompts of any lengths.

    Args:
        model: a LlamaForCausalLM.
        prompts: token ids, at least one each.
        max_new_tokens: a text ends there, or at the first `eos_id`, which is its last token then.
        eos_id: None for no end.
        draft_step, draft_length: None for plain decoding.
        sampling: greedy where None.
        generator: of the random numbers, on the model's device; torch's own where None.
        on_tokens: called with a prompt's number and its new tokens of a cycle.
        trunk, clock: what reads tokens, and tells seconds; others are of use to measure and to test with.

    Returns:
        The new tokens of each prompt (without the prompt), and the statistics of all together.

    Raises UserError for an empty prompt, or where prompt and new tokens exceed the model's context.
    """
    for prompt in prompts:
        check_room(model, len(prompt), max_new_tokens)
    statistics = DecodingStatistics()
    length = draft_length if draft_length and draft_step else FixedLength(0)
    way = _Way(model, eos_id, draft_step, length, sampling or Sampling(), generator, statistics, clock)
    texts: list[list[int]] = [[] for _ in prompts]
    batch = _prefill(way, trunk(model), prompts)
    start = clock()

    def add(row: int, new: list[int], drafted: int) -> None:
        statistics.count_cycle(drafted, len(new) - 1)
        statistics.seconds = clock() - start
        texts[batch.numbers[row]] += new
        if on_tokens:
            on_tokens(batch.numbers[row], new)

    while batch.numbers:
        first_B = draw(batch.next, generator)
        room = [max_new_tokens - len(texts[number]) - 1 for number in batch.numbers]
        ends = [left == 0 or token == eos_id for left, token in zip(room, first_B.tolist(), strict=True)]
        for row in (row for row, end in enumerate(ends) if end):
            add(row, [int(first_B[row])], 0)
        if all(ends):
            break
        going_on = [row for row, end in enumerate(ends) if not end]
        batch, first_B, room = batch.keep(going_on), first_B[going_on], [room[row] for row in going_on]

        longest = max(len(prompts[number]) + len(texts[number]) for number in batch.numbers)
        tokens_BT, drafted, accepted = _cycle(way, batch, first_B, room, longest)
        kept = [row[: stood + 1] for row, stood in zip(tokens_BT.tolist(), accepted, strict=True)]
        for row, new in enumerate(kept):
            add(row, new, drafted[row])
        full = [len(texts[number]) == max_new_tokens for number in batch.numbers]
        batch = batch.keep([row for row, new in enumerate(kept) if new[-1] != eos_id and not full[row]])
    assert statistics.tokens == statistics.cycles + statistics.accepted == sum(map(len, texts))
    return texts, statistics


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


@dataclass(frozen=True)
class _Way:
    """How a generation decodes: the arguments of `generate_batch`, and where it counts."""

    model: Any
    eos_id: int | None
    draft_step: DraftStep | None
    draft_length: DraftLength
    sampling: Sampling
    generator: torch.Generator | None
    statistics: DecodingStatistics
    clock: Callable[[], float]


@dataclass
class _Batch:
    """Texts that are not at their end yet, between two cycles."""

    trunk: Trunk
    numbers: list[int]
    """Of which prompt each row is."""
    lengths_B: Tensor
    """Tokens that the trunk has read."""
    state_BD: Tensor
    """The true hidden state of the last of them."""
    next: Tensor
    """What the next token is drawn from: `sampling.distribution`."""
    since: float
    """When the last cycle's forward pass was over."""

    def keep(self, rows: list[int]) -> _Batch:
        """The batch with these rows alone."""
        if len(rows) == len(self.numbers):
            return self
        rows_B = torch.tensor(rows, dtype=torch.long, device=self.lengths_B.device)
        self.trunk.keep(rows)
        numbers = [self.numbers[row] for row in rows]
        return _Batch(self.trunk, numbers, self.lengths_B[rows_B], self.state_BD[rows_B], self.next[rows_B], self.since)


def _prefill(way: _Way, trunk: Trunk, prompts: Sequence[Sequence[int]]) -> _Batch:
    """Read the prompts, shorter ones padded behind their end."""
    start, device = way.clock(), way.model.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    states_BTD = trunk.read(tokens_BT, torch.zeros_like(lengths_B))
    state_BD = states_BTD[torch.arange(len(prompts), device=device), lengths_B - 1]
    following = distribution(way.model.lm_head(state_BD), way.sampling)
    end = way.clock()
    way.statistics.prefill_seconds = end - start
    return _Batch(trunk, list(range(len(prompts))), lengths_B, state_BD, following, end)


def _cycle(
    way: _Way, batch: _Batch, first_B: Tensor, room: list[int], longest: int
) -> tuple[Tensor, list[int], list[int]]:
    """Draft after `first_B`, verify, and move the batch on to the last tokens that stand.

    The longest text has `longest` tokens.

    Returns the tokens (B, 1 + K), first and drafts; how many of a row's are drafts; and how many of those stood.
    """
    drafting_start = way.clock()
    drafts_BK, q_BKV, counts, draft_seconds = _draft(way, batch.state_BD, first_B, room, longest)
    drafted = way.clock()
    tokens_BT = torch.cat([first_B[:, None], drafts_BK], dim=1)
    states_BTD = batch.trunk.read(tokens_BT, batch.lengths_B)
    p = distribution(way.model.lm_head(states_BTD), way.sampling)
    if q_BKV is None:
        accepted_B, batch.next = torch.zeros_like(first_B), p[:, 0]
    else:
        counts_B = torch.tensor(counts, device=first_B.device)
        if way.sampling.temperature == 0:
            accepted_B, batch.next = verify_greedy(p, drafts_BK, counts_B)
        else:
            accepted_B, batch.next = verify(p, q_BKV, drafts_BK, counts_B, way.generator)
    batch.state_BD = states_BTD[torch.arange(len(first_B), device=first_B.device), accepted_B]
    batch.lengths_B = batch.lengths_B + 1 + accepted_B
    accepted = accepted_B.tolist()
    start, batch.since = batch.since, way.clock()
    rest = batch.since - start - sum(draft_seconds)  # with all that was done between the cycles
    way.draft_length.saw_cycle(accepted, counts, draft_seconds, rest)
    way.statistics.count_steps(drafts_BK.shape[1], drafted - drafting_start, batch.since - drafted)
    return tokens_BT, counts, accepted


def _draft(
    way: _Way, state_BD: Tensor, token_B: Tensor, room: list[int], longest: int
) -> tuple[Tensor, Tensor | None, list[int], list[float]]:
    """Draft after `token_B`, at most `room` tokens a row, the last of a row at its first EOS.

    Returns the drafts (B, K); what they were drawn from, (B, K, V), or None where K is 0; how many of each row's K are
    drafts: a row at its end goes along, and what it draws is padding; and the seconds of each step.
    """
    drafts: list[Tensor] = []
    distributions: list[Tensor] = []
    seconds: list[float] = []
    counts, left, tokens = [0] * len(room), list(room), token_B.tolist()
    while (
        way.draft_step is not None
        and any(left)
        # Asked before the draft is drawn: a decision that saw the draft would bias what is sampled.
        and way.draft_length.wants_another(len(drafts), tokens, left, longest)
    ):
        start = way.clock()
        state_BD, logits_BV = way.draft_step(state_BD, token_B)
        distributions.append(distribution(logits_BV, way.sampling))
        token_B = draw(distributions[-1], way.generator)
        drafts.append(token_B)
        tokens = token_B.tolist()
        counts = [count + (n > 0) for count, n in zip(counts, left, strict=True)]
        left = [max(n - 1, 0) if t != way.eos_id else 0 for n, t in zip(left, tokens, strict=True)]
        way.draft_length.saw_draft(logits_BV, distributions[-1])
        seconds.append(way.clock() - start)
    if not drafts:
        return token_B.new_empty(len(room), 0), None, counts, seconds
    return torch.stack(drafts, 1), torch.stack(distributions, 1), counts, seconds

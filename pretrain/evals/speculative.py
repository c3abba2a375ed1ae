"""Suite `speculative`: what drafting with the latent dynamics model gains, on prompts from validation documents.

Greedy, with a KV cache, one text at a time; each prompt is decoded plainly and with drafts in turn. Greedy decoding
with drafts gives plain greedy text, so the texts are compared too.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset, UserError
from pretrain.decoding.accounting import DecodingStatistics
from pretrain.decoding.continuation import DEFAULT_DRAFT, continue_text
from pretrain.decoding.loading import Export, fitting_threads
from pretrain.decoding.sampling import Sampling
from pretrain.evals.pictures import ACCENT, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite

PROMPTS = 8
"""Prompts where no limit is given."""
LONGEST_PROMPT, LONGEST_CONTINUATION = 128, 128


def measure(
    subject: Subject, dataset: Dataset, limit: int | None, progress: Progress, draft: int | str = DEFAULT_DRAFT
) -> dict[str, Any]:
    """Decode `limit` prompts both ways.

    Keys of the result: those of `Subject.described`, dataset, prompts, prompt_tokens, draft, tokens, cycles, drafted,
    accepted, accepted_per_cycle, alive_by_position, accepted_by_position, acceptance_by_position (of the drafts
    compared at a position, the share that stood), plain_tokens_per_second, speculative_tokens_per_second,
    speed_ratio, texts_equal, distinct_tokens (of a text's tokens, the share of different ones).
    """
    prompts, new = cut_prompts(subject, dataset, limit or PROMPTS)
    plain, drafting, equal, distinct = decode_both_ways(subject.decoder(), prompts, new, draft, progress)
    return subject.described() | {
        "dataset": str(dataset.path),
        "prompts": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "draft": draft,
        "tokens": drafting.tokens,
        "cycles": drafting.cycles,
        "drafted": drafting.drafted,
        "accepted": drafting.accepted,
        "accepted_per_cycle": drafting.accepted_per_cycle,
        "alive_by_position": drafting.alive_by_position,
        "accepted_by_position": drafting.accepted_by_position,
        "acceptance_by_position": drafting.acceptance_by_position,
        "plain_tokens_per_second": plain.tokens_per_second,
        "speculative_tokens_per_second": drafting.tokens_per_second,
        "speed_ratio": drafting.tokens_per_second / plain.tokens_per_second,
        "texts_equal": equal,
        "distinct_tokens": distinct,
    }


def decode_both_ways(
    decoder: Export, prompts: list[list[int]], new: int, draft: int | str, progress: Progress
) -> tuple[DecodingStatistics, DecodingStatistics, bool, float]:
    """Totals of plain decoding and of decoding with drafts, in turn; whether all texts were equal; distinct tokens."""
    totals = {0: DecodingStatistics(), draft: DecodingStatistics()}
    equal, distinct = True, 0.0
    with fitting_threads(decoder.model):
        for way in totals:  # the first pass over fresh memory is slow; it is not timed
            continue_text(decoder, prompts[0], min(8, new), way, Sampling())
        for number, prompt in enumerate(progress.track(prompts, description="speculative")):
            texts = []
            for way, total in list(totals.items())[:: 1 if number % 2 == 0 else -1]:
                tokens, counted = continue_text(decoder, prompt, new, way, Sampling())
                total.add(counted)
                texts.append(tokens)
            equal &= texts[0] == texts[1]
            distinct += len(set(texts[0])) / len(texts[0]) / len(prompts)
    return totals[0], totals[draft], equal, distinct


def cut_prompts(subject: Subject, dataset: Dataset, count: int) -> tuple[list[list[int]], int]:
    """Up to `count` prompts, the beginnings of validation documents spread over the split, and how many new tokens.

    A prompt is the document's EOS and its first tokens: half of the model's context at most, as is the continuation.
    Raises UserError where no document is long enough.
    """
    split = dataset.split("validation")
    prompt = min(LONGEST_PROMPT, subject.sequence_length // 2)
    new = min(LONGEST_CONTINUATION, subject.sequence_length - prompt)
    starts = [int(start) for start in split.document_starts]
    stops = [*starts[1:], split.tokens]
    long_enough = [a for a, b in zip(starts, stops, strict=True) if b - a >= prompt]
    if not long_enough:
        raise UserError(
            f"{dataset.path}: no validation document has the {prompt} tokens of a prompt; use longer documents"
        )
    count = min(count, len(long_enough))
    chosen = [long_enough[i * len(long_enough) // count] for i in range(count)]
    return [split.read(start, start + prompt).tolist() for start in chosen], new


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="speculative", title_justify="left", show_header=False)
    rows.add_row("prompts × tokens", f"{result['prompts']} × {result['tokens'] / result['prompts']:.0f}")
    rows.add_row("drafted per cycle", str(result["draft"]))
    rows.add_row("accepted per cycle", f"{result['accepted_per_cycle']:.2f}")
    shares = "  ".join(f"{share:.0%}" for share in result["acceptance_by_position"])
    rows.add_row("acceptance by position", shares)
    rows.add_row("plain, tokens/s", f"{result['plain_tokens_per_second']:,.1f}")
    rows.add_row("with drafts, tokens/s", f"{result['speculative_tokens_per_second']:,.1f}")
    rows.add_row("speed ratio", f"{result['speed_ratio']:.2f}")
    rows.add_row("distinct tokens of a text", f"{result['distinct_tokens']:.0%}")
    rows.add_row("texts equal to plain", "yes" if result["texts_equal"] else "NO")
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """Acceptance by draft position."""
    shares = [100 * share for share in result["acceptance_by_position"]]
    positions = list(range(1, len(shares) + 1))
    figure, axes = new_picture(
        f"Drafts accepted: {result['accepted_per_cycle']:.2f} per cycle, {result['speed_ratio']:.2f}× the speed of "
        "plain decoding"
    )
    axes.bar(positions, shares, color=ACCENT, width=0.6)
    for position, share in zip(positions, shares, strict=True):
        axes.annotate(f"{share:.0f}%", (position, share), (0, 3), textcoords="offset points", ha="center", color=INK)
    axes.set_xlabel("position of the draft in its cycle")
    axes.set_ylabel("accepted, where all before it were (%)")
    axes.set_xticks(positions)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs something to draft with, and prompts."""
    if not subject.can_draft:
        raise UserError(
            f"{subject.path}: has no latent dynamics model to draft with; the suite speculative needs a model "
            "trained with objective.name=nextlat, mtp or jtp"
        )
    cut_prompts(subject, dataset, 1)


SPECULATIVE = Suite(measure, table, picture, check)

"""`auto` against fixed draft lengths on a clock without noise: what its decisions are worth, and its own time costs.

    python -m benchmarks.draft_length --export exports/quickstart --out docs/results/draft_length.md

On a shared machine the speed of the same work varies by more than draft lengths differ. So each text is decoded once,
greedily, and what would be drafted from every place of it is recorded. Every way of decoding is then replayed on the
record, by the decoding loop itself, on a clock that charges each forward pass the time that `Costs` states, as many
times as this machine takes longer to decode one text plainly, and the rule the time that it takes on it. Which texts
are decoded is left to chance, and averaged over: some by a rule that has seen few, and as many others by the same rule
after them.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.decoding import PROMPT, check_counts, prompts_by_domain
from benchmarks.decoding_page import geometric_mean
from data_pipeline import UserError, run_command
from pretrain.decoding import (
    AdaptiveLength,
    DecodingStatistics,
    DraftStep,
    FixedLength,
    draft_with_latent_dynamics,
    generate_batch,
)
from pretrain.decoding.draft_length import DraftLength
from pretrain.evals.subject import open_data, open_subject

LENGTHS = (*range(1, 9), 10)
WARM_UP = 6  # texts that auto decodes before it counts
HALVES = ("first", "then")


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the quickstart's model, as measured on one thread of an x86-64 machine, times `times`."""

    cached: bool
    times: float = 1.0

    def read(self, texts: int, tokens: int, longest: int) -> float:
        """The trunk, over so many new tokens of each text, the longest of which then has `longest`."""
        if self.cached:
            return self.times * (1.5 + 0.1 * texts + 0.1 * tokens + 0.03 * texts * tokens)
        return self.times * (1.25 + 0.04 * texts * longest)

    def draft(self, texts: int) -> float:
        """A draft step."""
        return self.times * (0.39 + 0.035 * texts)


def slowness(model: Any, prompt: list[int], tokens: int) -> float:
    """How many times as long as `Costs` states this machine takes to decode a token plainly, one text at a time."""
    seconds = statistics.median(generate_batch(model, [prompt], tokens)[1].seconds for _ in range(5))
    return 1e3 * seconds / (tokens * Costs(cached=True).read(1, 1, 0))


@dataclass(frozen=True)
class Record:
    """Texts as the model goes on with them, and what it would draft: X texts of N tokens, K drafts from each place."""

    tokens_XN: Tensor
    drafts_XNK: Tensor
    """Drafted after token n and the drafts before."""
    chances_XNK: Tensor
    """The draft distribution's largest probability."""
    vocabulary: int


def record(model: Any, step: DraftStep, prompts: list[list[int]], tokens: int, longest: int) -> Record:
    """Decode these prompts (all of one length), and draft `longest` tokens from each place of what follows."""
    texts, _ = generate_batch(model, prompts, tokens)
    prompts_and_texts = torch.tensor([a + b for a, b in zip(prompts, texts, strict=True)], device=model.device)
    states_XSD = model.model(input_ids=prompts_and_texts).last_hidden_state
    start = len(prompts[0])
    state, token = states_XSD[:, start - 1 : -1].flatten(0, 1), prompts_and_texts[:, start:].flatten()
    drafts, chances = [], []
    for _ in range(longest):
        state, logits = step(state, token)
        chance, token = logits.float().softmax(-1).max(-1)
        drafts.append(token)
        chances.append(chance)
    shape = len(prompts), tokens, longest
    return Record(
        torch.tensor(texts),
        torch.stack(drafts, -1).reshape(shape).cpu(),
        torch.stack(chances, -1).reshape(shape).cpu(),
        model.config.vocab_size,
    )


class Replay:
    """A model, its trunk and its draft step, all of which look up the record; and the clock that they move on.

    A hidden state is (text, place, depth): the state that token n of a text is drawn from has place n.
    """

    def __init__(self, of: Record, costs: Costs):
        self._record, self._costs, self._texts_B = of, costs, torch.empty(0)
        self.now = 0.0
        context = PROMPT + of.tokens_XN.shape[1] + 1
        config = SimpleNamespace(max_position_embeddings=context)
        self.model = SimpleNamespace(device=torch.device("cpu"), config=config, lm_head=self._head)

    def decode(self, numbers: list[int], length: DraftLength) -> DecodingStatistics:
        """These texts of the record, as one batch."""
        prompts, tokens = [[number] * PROMPT for number in numbers], self._record.tokens_XN.shape[1]
        texts, counted = generate_batch(
            self.model,
            prompts,
            tokens,
            draft_step=self._draft,
            draft_length=length,
            trunk=lambda _: self,
            clock=lambda: self.now,
        )
        assert texts == self._record.tokens_XN[numbers].tolist()
        return counted

    def read(self, tokens_BT: Tensor, starts_B: Tensor) -> Tensor:
        """See `pretrain.decoding.trunk.Trunk`."""
        if not starts_B.any():  # the prompts, each of which is the text's number, over and over
            self._texts_B = tokens_BT[:, 0]
        texts, tokens = tokens_BT.shape
        self.now += 1e-3 * self._costs.read(texts, tokens, int(starts_B.max()) + tokens)
        places_BT = starts_B[:, None] + torch.arange(tokens) - (PROMPT - 1)
        return torch.stack([self._texts_B[:, None].expand(-1, tokens), places_BT, torch.zeros_like(places_BT)], -1)

    def keep(self, rows: list[int]) -> None:
        """See `pretrain.decoding.trunk.Trunk`."""
        self._texts_B = self._texts_B[rows]

    def _head(self, states: Tensor) -> Tensor:
        text, place, _ = states.unbind(-1)
        last = self._record.tokens_XN.shape[1] - 1
        next_tokens = self._record.tokens_XN[text, place.clamp(0, last)]  # of padding before a prompt, and at an end
        return self._logits(next_tokens, torch.ones_like(next_tokens))

    def _draft(self, state_B3: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        self.now += 1e-3 * self._costs.draft(len(token_B))
        where = tuple(state_B3.unbind(-1))
        logits_BV = self._logits(self._record.drafts_XNK[where], self._record.chances_XNK[where])
        return state_B3 + torch.tensor([0, 0, 1]), logits_BV

    def _logits(self, tokens: Tensor, chances: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, self._record.vocabulary)
        odds = (chances / (1.0 - chances)).clamp(1e-4, 1e6) * self._record.vocabulary
        return logits.scatter_(-1, tokens[..., None], odds.clamp(min=2.0).log()[..., None])


class OnTheClock:
    """A rule whose own time moves the replay's clock on."""

    def __init__(self, rule: AdaptiveLength, replay: Replay):
        self._rule, self._replay, self.seconds = rule, replay, 0.0

    def _timed(self, method: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = method(*arguments)
        taken = min(time.perf_counter() - start, 2e-3)  # more is the machine's, not the rule's
        self.seconds += taken
        self._replay.now += taken
        return answer

    def wants_another(self, drafted: int, tokens: list[int], left: list[int], longest: int) -> bool:
        """See `DraftLength`."""
        return bool(self._timed(self._rule.wants_another, drafted, tokens, left, longest))

    def saw_draft(self, logits_BV: Tensor, q: Tensor) -> None:
        """See `DraftLength`."""
        self._timed(self._rule.saw_draft, logits_BV, q)

    def saw_cycle(self, accepted: list[int], drafted: list[int], draft_seconds: list[float], rest: float) -> None:
        """See `DraftLength`."""
        self._timed(self._rule.saw_cycle, accepted, drafted, draft_seconds, rest)


@dataclass(frozen=True)
class Row:
    """One line of the table: logarithms of tokens a second, by half, way and repetition; and auto's own share."""

    name: str
    speeds: dict[str, dict[int | str, list[float]]]
    own: float

    @property
    def best(self) -> int:
        """The fixed length that is the fastest of all, known only afterwards."""
        return max(LENGTHS, key=lambda way: sum(statistics.fmean(self.speeds[half][way]) for half in HALVES))

    def over_best(self, way: int | str, *halves: str) -> tuple[float, float]:
        """How many times as fast as the best fixed length in these halves, and its standard error."""
        pairs = [zip(self.speeds[half][way], self.speeds[half][self.best], strict=True) for half in halves]
        differences = [statistics.fmean(mine - best for mine, best in both) for both in zip(*pairs, strict=True)]
        return geometric_mean([math.exp(difference) for difference in differences])


def measure(name: str, of: Record, costs: Costs, batch: int, texts: int, repetitions: int) -> Row:
    """Each repetition decodes twice `texts` texts, drawn by its number, in every way.

    Auto begins with nothing learned, and decodes WARM_UP texts before them.
    """
    speeds: dict[str, dict[int | str, list[float]]] = {half: {way: [] for way in (*LENGTHS, "auto")} for half in HALVES}
    own = total = 0.0
    for repetition in range(repetitions):
        numbers = random.Random(repetition).sample(range(len(of.tokens_XN)), WARM_UP + 2 * texts)
        warm_up, *halves = (numbers[:WARM_UP], numbers[WARM_UP:-texts], numbers[-texts:])
        for way in (*LENGTHS, "auto"):
            replay = Replay(of, costs)
            auto = None if isinstance(way, int) else OnTheClock(AdaptiveLength(), replay)
            if auto:
                decode_all(replay, warm_up, batch, auto)
                auto.seconds = 0.0
            for half, some in zip(HALVES, halves, strict=True):
                counted = decode_all(replay, some, batch, auto or FixedLength(int(way)))
                speeds[half][way].append(math.log(counted.tokens_per_second))
                total += counted.seconds if auto else 0.0
            own += auto.seconds if auto else 0.0
    return Row(name, speeds, own / total)


def decode_all(replay: Replay, numbers: list[int], batch: int, length: DraftLength) -> DecodingStatistics:
    """These texts, in batches of so many."""
    counted = DecodingStatistics()
    for start in range(0, len(numbers), batch):
        counted.add(replay.decode(numbers[start : start + batch], length))
    return counted


def page(rows: list[Row], times: float, arguments: argparse.Namespace) -> str:
    """The table, as Markdown."""
    lines = [
        "# auto against fixed draft lengths, replayed",
        "",
        f"    python -m benchmarks.draft_length --export {arguments.export} --prompts {arguments.prompts} "
        f"--texts {arguments.texts} --repetitions {arguments.repetitions} --tokens {arguments.tokens}",
        f"    # {time.strftime('%Y-%m-%d')}, torch {torch.__version__}",
        "",
        "Greedy texts of the trained model, and what it would draft from each of their places, recorded once; then "
        f"decoded in every way on a clock that charges each forward pass a stated time (times {times:.2f}, as this "
        "machine takes so many times as long), and `auto` the time it takes itself. Times as fast as the best fixed "
        "length, which is known only afterwards; ± standard error over "
        f"repetitions, each of which decodes other texts. **First**: {arguments.texts} texts, by a rule that has "
        f"decoded {WARM_UP} before. **Then**: as many others, by the same rule after those.",
        "",
        f"| text | {' | '.join(map(str, LENGTHS))} | best | auto ÷ best, first | then | auto's own time |",
        "|---|" + "---|" * (len(LENGTHS) + 4),
    ]
    for row in rows:
        fixed = " | ".join(f"{row.over_best(length, *HALVES)[0]:.2f}" for length in LENGTHS)
        auto = " | ".join("**{:.3f}** ± {:.3f}".format(*row.over_best("auto", half)) for half in HALVES)
        lines.append(f"| {row.name} | {fixed} | {row.best} | {auto} | {row.own:.1%} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Record, replay, print the table, and write it where told."""
    parser = argparse.ArgumentParser(prog="benchmarks.draft_length")
    parser.add_argument("--export", type=Path, default=Path("exports/quickstart"), help="a trained model with p_psi")
    parser.add_argument("--data", metavar="DIR", help="data set of the prompts; default: the one trained on")
    parser.add_argument("--prompts", type=int, default=64, help="of code, and of prose, that are recorded")
    parser.add_argument("--texts", type=int, default=24, help="of a repetition's halves, drawn from them")
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=144, help="new tokens of a text")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    check_counts(arguments, texts=1, tokens=2, repetitions=2)
    least = WARM_UP + 2 * arguments.texts
    if arguments.prompts < least:
        raise UserError(f"--prompts {arguments.prompts}: give at least {least}, {WARM_UP} more than twice --texts")
    subject = open_subject(arguments.export)
    export = subject.decoder()
    if export.dynamics is None or export.tokenizer is None:
        raise UserError(f"{arguments.export}: give an export that has a latent dynamics model (nextlat/)")
    prompts = prompts_by_domain(export, open_data(subject, arguments.data), arguments.prompts, PROMPT)
    cases = [(cached, batch, domain) for cached in (True, False) for batch in (1, 8) for domain in prompts]
    step = draft_with_latent_dynamics(export.model, export.dynamics)
    rows = []
    with Progress(console=Console(stderr=True)) as progress, torch.inference_mode():
        records = {
            domain: record(export.model, step, prompts[domain], arguments.tokens, AdaptiveLength.LONGEST)
            for domain in progress.track(prompts, description="texts recorded")
        }
        times = slowness(export.model, prompts["code"][0], arguments.tokens)
        for cached, batch, domain in progress.track(cases, description="ways replayed"):
            name = f"{domain}, {'with' if cached else 'without'} a cache, batch {batch}"
            of = records[domain]
            rows.append(measure(name, of, Costs(cached, times), batch, arguments.texts, arguments.repetitions))
    text = page(rows, times, arguments)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    run_command(main)

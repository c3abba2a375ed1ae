"""Drafting with p_psi against plain decoding: every draft length and `auto`, side by side in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.decoding --export exports/quickstart --out docs/results/decoding.md

Prompts are code and prose (docstrings) of the validation documents of the export's data set. A round decodes its own in
every way, one after the other, and backwards in every second round; ratios are formed within a round, their medians
printed, and of `auto` beside the best fixed length the mean with its standard error. No prompt is of two rounds: a
length that is the best for a few texts is so by chance too. Every way decodes other texts before it is timed, `auto`
more of them and three times: it learns, and what it learned serves every text after. Texts run to their full length,
whatever is in them.

With a KV cache is what a user feels. Without one, batch 1 and greedy, is the paper's definition of speed-up: neither
side keeps keys and values, so a verification costs hardly more than a plain step. A cycle's first token is the target's
own: it counts neither as drafted nor as accepted. The paper left it out of accepted tokens, but not of draft lengths,
so its length k + 1 is our k.

A trunk of GPT-2's size (12 layers, width 768) with random weights has no drafts worth verifying. Its draft steps are
computed in full, and then a token is drafted that is right as often as was measured at that position on the trained
model: what is simulated is the acceptance, not the time.

On a CPU seconds are those of one thread's processor time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import ast
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.decoding_page import write_page
from benchmarks.random_model import GPT2, random_model
from data_pipeline import Dataset, UserError, run_command
from pretrain.decoding import (
    AdaptiveLength,
    DecodingStatistics,
    DraftStep,
    Export,
    FixedLength,
    Sampling,
    draft_with_latent_dynamics,
    generate_batch,
)
from pretrain.decoding.trunk import CachedTrunk
from pretrain.evals.subject import open_data, open_subject

WAYS: tuple[int | str, ...] = (0, *range(1, 11), "auto")
TINY = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "vocabulary": 300, "dynamics_width": 32}
PROMPT, WINDOWS = 20, 4  # tokens of a prompt; and prompts of one text, at most
TEXTS = 8  # of a round, decoded together or one by one
FEWER_TEXTS = 2  # of a round, one at a time, where that is slow
WARM_UP, LEARNS = 8, 3  # texts that are not timed, and how often auto decodes them; others the first of them, once


@dataclass
class Row:
    """One line of the table: how it decodes, and what each round gave, by way."""

    trunk: str
    text: str
    batch: int
    cached: bool
    temperature: float
    tokens: int
    rounds: dict[int | str, list[DecodingStatistics]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratios(self, way: int | str) -> list[float]:
        """Speed over plain decoding's, round by round."""
        pairs = zip(self.rounds[way], self.rounds[0], strict=True)
        return [mine.tokens_per_second / plain.tokens_per_second for mine, plain in pairs]

    def speed_up(self, way: int | str) -> float:
        """Median over rounds."""
        return statistics.median(self.ratios(way))

    def total(self, way: int | str) -> DecodingStatistics:
        """All rounds together."""
        total = DecodingStatistics()
        for one in self.rounds[way]:
            total.add(one)
        return total


class UncachedTrunk:
    """Reads every text from its beginning each time: what decoding costs without a KV cache."""

    def __init__(self, model: Any):
        self._model = model
        self._tokens_BS = torch.empty(0, 0, dtype=torch.long)

    def read(self, tokens_BT: Tensor, starts_B: Tensor) -> Tensor:
        """See `pretrain.decoding.trunk.Trunk`."""
        positions_BT = starts_B[:, None] + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rows_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None]
        if not self._tokens_BS.numel():
            self._tokens_BS = tokens_BT.new_zeros(len(tokens_BT), self._model.config.max_position_embeddings)
        self._tokens_BS[rows_B1, positions_BT] = tokens_BT
        read_BS = self._tokens_BS[:, : int(positions_BT.max()) + 1]
        states: Tensor = self._model.model(input_ids=read_BS, use_cache=False).last_hidden_state
        return states[rows_B1, positions_BT]

    def keep(self, rows: list[int]) -> None:
        """See `pretrain.decoding.trunk.Trunk`."""
        self._tokens_BS = self._tokens_BS[rows]


class SetAcceptance:
    """A draft step that computes all that p_psi's does, and then drafts the target's own token with a set chance.

    The luck of a place in a text is the same in every way of decoding it, so that none is the fastest by luck. No draft
    of a place is compared twice. A wrong draft is another token of the text, drawn by chance: none is known by itself.
    """

    def __init__(self, step: DraftStep, chances: list[float]):
        self._step, self._chances = step, chances
        self.texts: list[list[int]] = []  # what the target will say
        self._luck: list[list[tuple[float, int]]] = []  # of each place: a share, and what is drafted above the chance
        self._said: list[int] = []
        self._position = 0

    def begin(self) -> None:
        """A generation begins."""
        self._said, self._position = [0] * len(self.texts), 0
        self._luck = [self._luck_of(text) for text in self.texts]

    def _luck_of(self, text: list[int]) -> list[tuple[float, int]]:
        chance, tokens = random.Random(str(text)), sorted({*text, 0, 1})  # two at least
        return [(chance.random(), chance.choice([token for token in tokens if token != right])) for right in text]

    def saw(self, row: int, tokens: list[int]) -> None:
        """The generation's `on_tokens`."""
        self._said[row] += len(tokens)
        self._position = 0

    def __call__(self, state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `DraftStep`. Rows that have gone wrong in this cycle draft on in vain."""
        state_BD, logits_BV = self._step(state_BD, token_B)
        self._position += 1
        chance = self._chances[min(self._position, len(self._chances)) - 1]
        going_on = [each for each in zip(self.texts, self._luck, self._said, strict=True) if each[2] < len(each[0])]
        for row, (text, luck, said) in enumerate(going_on):
            place = min(said + self._position, len(text) - 1)
            share, wrong = luck[place]
            logits_BV[row, text[place] if share < chance else wrong] = 100.0
        return state_BD, logits_BV


def measure(
    row: Row, model: Any, step: DraftStep, warm_up: list[list[int]], rounds: list[list[list[int]]], clock: Any
) -> Iterator[None]:
    """Decode the prompts of each round in every way, after those to warm up; yields after each way of a batch."""
    auto = AdaptiveLength(clock=clock)

    def decode(way: int | str, group: list[list[int]]) -> DecodingStatistics:
        simulated = step if isinstance(step, SetAcceptance) and way else None
        if simulated:
            simulated.begin()
        texts, counted = generate_batch(
            model,
            group,
            row.tokens,
            draft_step=step if way else None,
            draft_length=auto if isinstance(way, str) else FixedLength(way),
            sampling=Sampling(row.temperature),
            on_tokens=simulated.saw if simulated else None,
            trunk=CachedTrunk if row.cached else UncachedTrunk,
            clock=clock,
        )
        if way == 0 and isinstance(step, SetAcceptance):
            step.texts = texts  # the drafts to come, so plain comes first
        return counted

    def groups_of(prompts: list[list[int]]) -> list[list[list[int]]]:
        return [prompts[start : start + row.batch] for start in range(0, len(prompts), row.batch)]

    for number, group in enumerate(LEARNS * groups_of(warm_up)):
        for way in (0, "auto") if number else WAYS:
            decode(way, group)
            yield
    for number, prompts in enumerate(rounds):
        totals = {way: DecodingStatistics() for way in WAYS}
        for group in groups_of(prompts):
            for way in WAYS if number % 2 == 0 or isinstance(step, SetAcceptance) else WAYS[::-1]:
                totals[way].add(decode(way, group))
                yield
        for way, total in totals.items():
            row.rounds[way].append(total)


def texts_of_a_document(text: str) -> Iterator[tuple[str, str]]:
    """("code", a function without a docstring) and ("prose", a docstring), for each of a Python file's."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield "prose", docstring
            elif isinstance(node, ast.FunctionDef):
                yield "code", ast.get_source_segment(text, node) or ""


def windows(tokens: list[int], length: int, most: int) -> list[list[int]]:
    """The first windows of a text, one after the other, as far as they are full."""
    ends = range(length, min(len(tokens), most * length) + 1, length)
    return [tokens[end - length : end] for end in ends]


def prompts_by_domain(export: Export, dataset: Dataset, count: int, length: int) -> dict[str, list[list[int]]]:
    """`count` prompts of `length` tokens of each domain, spread over the documents.

    Of a text the first tokens, the next ones, and so on. Raises UserError where there are too few.
    """
    split, decode = dataset.split("validation"), export.tokenizer.decode
    starts = [int(start) for start in split.document_starts]
    found: dict[str, list[list[int]]] = {"code": [], "prose": []}
    for start, stop in zip(starts, [*starts[1:], split.tokens], strict=True):
        for domain, text in texts_of_a_document(decode(split.read(start, stop).tolist(), skip_special_tokens=True)):
            tokens = export.tokenizer(text, verbose=False)["input_ids"]
            found[domain] += windows(tokens, length, WINDOWS)
    for domain, prompts in found.items():
        if len(prompts) < count:
            raise UserError(
                f"{dataset.path}: its validation documents have {len(prompts)} texts of {domain} of {length} tokens, "
                f"where {count} are wanted; give --data with more Python files"
            )
    return {domain: prompts[:: len(prompts) // count][:count] for domain, prompts in found.items()}


def run(export: Export, prompts: dict[str, list[list[int]]], arguments: argparse.Namespace, clock: Any) -> list[Row]:
    """All rows, measured."""
    tokens = arguments.tokens
    trained = [
        Row("trained", domain, batch, cached, temperature, tokens if cached else tokens // 2)
        for cached, batch, temperature in (
            (True, 1, 0.0),
            (True, 8, 0.0),
            (True, 1, 1.0),
            (False, 1, 0.0),
            (False, 8, 0.0),
        )
        for domain in prompts
    ]
    simulated = [
        Row("GPT-2 size", "simulated", batch, cached, 0.0, max(tokens // 3, 4))
        for cached, batch in ((True, 1), (True, 8), (False, 1), (False, 8))
    ]
    with Progress(console=Console(stderr=True)) as progress:

        def follow(row: Row, model: Any, step: DraftStep, texts: int, rounds: int) -> None:
            warm_up, timed = prompts[row.text][:WARM_UP], prompts[row.text][WARM_UP:]
            some = [timed[number::rounds][:texts] for number in range(rounds)]
            label = f"{row.trunk}, {row.text}, batch {row.batch}, {'cached' if row.cached else 'uncached'}"
            learns = LEARNS * -(-WARM_UP // row.batch) - 1
            steps = (1 + rounds * -(-texts // row.batch)) * len(WAYS) + 2 * learns
            for _ in progress.track(measure(row, model, step, warm_up, some, clock), total=steps, description=label):
                pass

        step = draft_with_latent_dynamics(export.model, export.dynamics)  # type: ignore[arg-type]  # checked in main
        for row in trained:
            follow(row, export.model, step, TEXTS, arguments.rounds)
        if arguments.trained:
            return trained
        shares = trained[0].total(10).acceptance_by_position
        prompts = prompts | {"simulated": [[token % 300 for token in prompt] for prompt in prompts["code"]]}
        model, dynamics = random_model(TINY if arguments.tiny else GPT2, PROMPT + tokens, export.model.device)
        for row in simulated:
            oracle = SetAcceptance(draft_with_latent_dynamics(model, dynamics), shares)
            texts = TEXTS if row.batch > 1 else FEWER_TEXTS
            follow(row, model, oracle, texts, fewer_rounds(arguments.rounds))
    return [*trained, *simulated]


def fewer_rounds(rounds: int) -> int:
    """Half as many: of rows that take ten times as long."""
    return -(-rounds // 2)


def check_counts(arguments: argparse.Namespace, **least: int) -> None:
    """Raise UserError where an argument is less than its least."""
    for name, number in least.items():
        if getattr(arguments, name) < number:
            raise UserError(f"--{name} {getattr(arguments, name)}: give at least {number}")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the page, and write it where told."""
    parser = argparse.ArgumentParser(prog="benchmarks.decoding")
    parser.add_argument("--export", type=Path, default=Path("exports/quickstart"), help="a trained model with p_psi")
    parser.add_argument("--data", metavar="DIR", help="data set of the prompts; default: the one trained on")
    parser.add_argument("--rounds", type=int, default=8, help="half as many with the slow trunk of GPT-2's size")
    parser.add_argument("--tokens", type=int, default=144, help="new tokens of a text; fewer in slow rows")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny trunk in place of GPT-2's size: to see that it runs"
    )
    parser.add_argument("--trained", action="store_true", help="the trained model alone: a third of the time")
    arguments = parser.parse_args(argv)
    check_counts(arguments, rounds=1, tokens=4)
    subject = open_subject(arguments.export)
    export = subject.decoder()
    if export.dynamics is None or export.tokenizer is None:
        raise UserError(f"{arguments.export}: give an export that has a latent dynamics model (nextlat/)")
    length = min(PROMPT, export.model.config.max_position_embeddings - arguments.tokens)
    count = WARM_UP + arguments.rounds * TEXTS
    prompts = prompts_by_domain(export, open_data(subject, arguments.data), count, length)
    on_cpu = export.model.device.type == "cpu"
    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)
    clock: Callable[[], float] = time.process_time if on_cpu else time.perf_counter
    try:
        rows = run(export, prompts, arguments, clock)
    finally:
        torch.set_num_threads(threads)
    write_page(rows, export, arguments, arguments.out)


if __name__ == "__main__":
    run_command(main)

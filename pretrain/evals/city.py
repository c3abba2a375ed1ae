"""Suite `city`: is there a map inside? Five measures after Vafa et al. (arXiv 2406.03689), and the map itself.

legal           after each true beginning of test walks, the likeliest next token is a legal turn, or the end where the
                walk has arrived
valid           greedy walks for held-out pairs (shortest way at most half of the training length) arrive legally
compression     two different walks to one crossing with one destination: each of `SUFFIXES` continuations sampled after
                the first (tokens above ε alone) has every token above ε after the second too, and the other way round
rank            exp(entropy of σ / Σσ) of the uncentred matrix of hidden states of test walks
detours         at each step, with probability 0.75, another legal turn than the model's, from which the destination can
                still be reached, is taken; the walk must still arrive
map             edges that greedy walks imply and the city does not have (see city_reconstruction.py)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset
from data_pipeline.tasks.city import City
from pretrain.evals.city_reconstruction import draw, reconstruct
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import (
    SEED,
    choose,
    effective_rank,
    hidden_states,
    next_logits,
    percent,
    share,
    test_task,
)

TRIALS = 1000
SUFFIXES, EPSILON = 30, 0.01
DETOUR = 0.75
RANK_TOKENS = 256 * 256
BLOCK = 200


def measure(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """All measures, each with `limit` trials (compression: a fifth of them).

    Keys: as above, and task, trials, spectrum, edges, false_edges, true_edges, unexplained_walks, reconstruction.
    """
    task, trials = test_task(dataset, City), limit or TRIALS
    bar = progress.add_task("city", total=5)
    numbers: dict[str, Any] = {"task": task.spec, "trials": trials}
    numbers["legal"] = legal_turns(subject, task, trials)
    progress.advance(bar)
    chance = np.random.Generator(np.random.PCG64(SEED))
    pairs = draw_pairs(task, trials, chance)
    walks = walk_greedily(subject, task, pairs)
    arrived = [ended and task.is_valid(walk) for walk, ended in walks]
    numbers["valid"] = share(sum(arrived), len(arrived))
    progress.advance(bar)
    detoured = walk_greedily(subject, task, pairs, chance, DETOUR)
    numbers["detours"] = share(sum(ended and task.is_valid(walk) for walk, ended in detoured), len(detoured))
    progress.advance(bar)
    numbers["compression"] = compression(subject, task, max(1, trials // 5), chance)
    progress.advance(bar)
    numbers["rank"], numbers["spectrum"] = rank_of_states(subject, task)
    progress.advance(bar)
    found = reconstruct(task, [walk for walk, ended in walks if ended])
    return subject.described() | numbers | found | {"edges": int((task.city.neighbours >= 0).sum())}


def legal_turns(subject: Subject, task: City, trials: int) -> dict[str, float]:
    """Over every position of `trials` test walks from the third token on."""
    made, right, total = task.samples(0, trials), 0, 0
    walks = [made.tokens_of(number).tolist() for number in range(trials)]
    for rows, lengths in padded(walks, task):
        with torch.inference_mode():
            likeliest = (hidden_states(subject, rows) @ subject.head_VD.T).argmax(-1).cpu().numpy()
        for row, length, answers in zip(rows.tolist(), lengths, likeliest, strict=True):
            for place in range(2, length):
                right += is_legal(task, row[1 : place + 1], int(answers[place]))
                total += 1
    return share(right, total)


def is_legal(task: City, walk: list[int], token: int) -> bool:
    """Whether a token may follow a legal walk: a turn that leads somewhere, or EOS at the destination."""
    if token == task.vocabulary.eos_id:
        return task.is_valid(walk)
    return task.walk([*walk, token]) is not None


def draw_pairs(task: City, count: int, chance: np.random.Generator) -> NDArray[np.int64]:
    """(count, 2): held-out pairs whose shortest way is at most half of the longest training walk."""
    distance, size = task.city.distances, len(task.city.names)
    origins, ends = np.divmod(np.arange(size * size), size)
    near = (distance[origins, ends] >= 1) & (distance[origins, ends] <= task.longest // 2)
    allowed = np.flatnonzero(near & task.is_held_out(origins, ends))
    chosen = allowed[chance.integers(0, len(allowed), count)]
    return np.stack([origins[chosen], ends[chosen]], 1)


def walk_greedily(
    subject: Subject,
    task: City,
    pairs_N2: NDArray[np.int64],
    chance: np.random.Generator | None = None,
    detour: float = 0.0,
) -> list[tuple[list[int], bool]]:
    """For each pair the walk that the model writes, and whether it ended it before the context did."""
    done: list[tuple[list[int], bool]] = []
    for start in range(0, len(pairs_N2), BLOCK):
        pairs = pairs_N2[start : start + BLOCK]
        rows = np.concatenate([np.full((len(pairs), 1), task.vocabulary.eos_id), pairs], 1)
        open_, ends = np.ones(len(rows), np.bool_), np.full(len(rows), 0)
        for _ in range(task.longest + 1):
            tokens = choose(next_logits(subject, rows[open_]), None)
            if chance is not None:
                turned = zip(rows[open_].tolist(), tokens.tolist(), strict=True)
                tokens = np.array([other_turn(task, row[1:], token, chance, detour) for row, token in turned])
            column = np.zeros(len(rows), np.int64)
            column[open_] = tokens
            rows = np.concatenate([rows, column[:, None]], 1)
            stopped = open_ & (rows[:, -1] == task.vocabulary.eos_id)
            ends[stopped] = rows.shape[1] - 1
            open_ &= ~stopped
            if not open_.any():
                break
        done += [(row[1 : end or None], bool(end)) for row, end in zip(rows.tolist(), ends.tolist(), strict=True)]
    return done


def other_turn(task: City, walk: list[int], token: int, chance: np.random.Generator, probability: float) -> int:
    """The model's token, or with a probability another legal turn: one from which the walk can still arrive in time."""
    place = task.walk(walk)
    if place is None or place == walk[1] or chance.random() >= probability:
        return token
    city, left = task.city, task.longest - (len(walk) - 2) - 1
    turns = [
        len(city.names) + heading
        for heading, to in enumerate(city.neighbours[place].tolist())
        if to >= 0 and city.distances[to, walk[1]] < left
    ]
    others = [turn for turn in turns if turn != token]
    return int(chance.choice(others)) if others else token


def compression(subject: Subject, task: City, trials: int, chance: np.random.Generator) -> dict[str, float]:
    """The share of pairs of walks into one state after which the model goes on alike."""
    alike, generator = 0, torch.Generator().manual_seed(SEED)
    for _ in range(trials):
        first, second, budget = two_walks(task, chance)
        alike += goes_on_alike(subject, task, first, second, budget, generator) and goes_on_alike(
            subject, task, second, first, budget, generator
        )
    return share(alike, trials)


def two_walks(task: City, chance: np.random.Generator) -> tuple[list[int], list[int], int]:
    """Two walks of one length that meet at one crossing, on their way to one destination; and the turns left."""
    city = task.city
    while True:
        here, end = chance.integers(0, len(city.names), 2).tolist()
        if here == end or city.distances[here, end] >= task.longest - 2:
            continue
        steps = int(chance.integers(1, task.longest - city.distances[here, end]))
        walks = [walk_backwards(task, here, end, steps, chance) for _ in range(2)]
        if walks[0] is not None and walks[1] is not None and walks[0] != walks[1]:
            return walks[0], walks[1], task.longest - steps


def walk_backwards(task: City, here: int, end: int, steps: int, chance: np.random.Generator) -> list[int] | None:
    """A walk of so many turns that comes to `here`, its origin wherever that leads; None where there is none."""
    turns: list[int] = []
    for _ in range(steps):
        origins, headings = np.nonzero(task.city.neighbours == here)
        if not len(origins):
            return None
        chosen = int(chance.integers(0, len(origins)))
        here = int(origins[chosen])
        turns.append(len(task.city.names) + int(headings[chosen]))
    return [here, end, *turns[::-1]]


def goes_on_alike(
    subject: Subject, task: City, first: list[int], second: list[int], budget: int, generator: torch.Generator
) -> bool:
    """Whether every token of continuations sampled after `first` has a probability above ε after `second`."""
    eos = task.vocabulary.eos_id
    rows = np.tile([eos, *first], (SUFFIXES, 1))
    open_ = np.ones(SUFFIXES, np.bool_)
    for _ in range(budget + 1):
        logits = next_logits(subject, rows)
        chances = logits.float().softmax(-1)
        likely = torch.where(chances > EPSILON, logits, -torch.inf)
        likely = torch.where((chances > EPSILON).any(-1, keepdim=True), likely, logits)
        column = np.where(open_, choose(likely, generator), eos)
        rows = np.concatenate([rows, column[:, None]], 1)
        open_ &= column != eos
        if not open_.any():
            break
    after = rows[:, 1 + len(first) :]
    again = np.concatenate([np.tile([eos, *second], (SUFFIXES, 1)), after], 1)
    with torch.inference_mode():
        states = hidden_states(subject, again)[:, len(second) : -1]
        again_chances = (states @ subject.head_VD.T).float().softmax(-1).cpu().numpy()
    given = np.take_along_axis(again_chances, after[:, :, None], 2)[:, :, 0]
    counts = np.cumsum(after == eos, 1) - (after == eos) == 0  # up to the first EOS and no further
    return bool((given > EPSILON)[counts].all())


def rank_of_states(subject: Subject, task: City) -> tuple[float, list[float]]:
    """The effective rank of the hidden states of about 256 × 256 tokens of test walks."""
    made = task.samples(0, RANK_TOKENS // (task.shortest + task.longest) * 2)
    walks = [made.tokens_of(number).tolist() for number in range(len(made.starts))]
    parts, tokens = [], 0
    for rows, lengths in padded(walks, task):
        states = hidden_states(subject, rows)
        parts += [states[number, : length + 1] for number, length in enumerate(lengths)]
        tokens += sum(length + 1 for length in lengths)
        if tokens >= RANK_TOKENS:
            break
    return effective_rank(torch.cat(parts)[:RANK_TOKENS])


def padded(walks: list[list[int]], task: City) -> list[tuple[NDArray[np.int64], list[int]]]:
    """Walks with EOS before and behind, in blocks of one width; and their lengths without."""
    blocks = []
    for start in range(0, len(walks), BLOCK):
        block = walks[start : start + BLOCK]
        rows = np.full((len(block), 1 + max(map(len, block))), task.vocabulary.eos_id)
        for row, walk in zip(rows, block, strict=True):
            row[1 : 1 + len(walk)] = walk
        blocks.append((rows, [len(walk) for walk in block]))
    return blocks


def headline(result: dict[str, Any]) -> dict[str, float]:
    """The five measures and the false edges."""
    shares = {name: result[name]["value"] for name in ("legal", "valid", "compression")}
    return shares | {
        "effective rank": result["rank"],
        "detours": result["detours"]["value"],
        "false edges": result["false_edges"],
    }


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title="city", title_justify="left", show_header=False)
    for name, text in {
        "legal": "legal next tokens",
        "valid": "valid walks, held-out pairs",
        "compression": "two walks, one state",
        "detours": "arrives after detours",
    }.items():
        rows.add_row(text, percent(result[name]))
    rows.add_row("effective rank", f"{result['rank']:.1f}")
    rows.add_row("false edges of the map", f"{result['false_edges']:,} beside {result['true_edges']:,} true ones")
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """The reconstructed city, false edges in red."""
    return draw(result["reconstruction"], result["false_edges"], result["true_edges"])


def check(subject: Subject, dataset: Dataset, limit: int | None) -> None:
    """Needs a data set of walks through a city."""
    test_task(dataset, City)


CITY = Suite(measure, table, picture, check, headline)

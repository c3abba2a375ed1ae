"""The benchmarks' suites on oracles, whose measures are known, and on oracles that err in a known way."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.progress import Progress

from data_pipeline import UserError
from data_pipeline.tasks import open_task
from pretrain.evals import SUITES, city
from pretrain.evals.city_reconstruction import reconstruct
from pretrain.evals.subject import Subject
from pretrain.evals.task_subject import effective_rank, share


def oracle(vocabulary: int, logits, dynamics=None) -> Subject:
    """A model whose hidden states are the logits (B, T, V) that a function gives for tokens (B, T)."""
    eye = torch.eye(vocabulary) if vocabulary < 1000 else torch.empty(0)
    embeddings = SimpleNamespace(weight=eye)
    decoder = SimpleNamespace(dynamics=dynamics, model=SimpleNamespace(get_input_embeddings=lambda: embeddings))
    return Subject(
        path=Path("oracle"),
        kind="checkpoint",
        step=1,
        tokens=1,
        sequence_length=8,
        dataset={},
        hidden_states=lambda batch: logits(batch.tokens[:, :-1]).float(),
        trunk_states=lambda batch: logits(batch.tokens[:, :-1]).float(),
        head_VD=eye,
        decoder=lambda: decoder,  # type: ignore[arg-type, return-value]
        transformers_tokenizer=lambda: None,
        can_draft=dynamics is not None,
        device=torch.device("cpu"),
    )


def measured(suite: str, subject: Subject, spec: str, limit: int) -> dict:
    dataset = SimpleNamespace(path=Path("data"), manifest={"task": spec})
    SUITES[suite].check(subject, dataset, limit)
    with Progress(disable=True) as bar:
        result = SUITES[suite].measure(subject, dataset, limit, bar)
    SUITES[suite].picture(result).savefig(io.BytesIO())
    assert SUITES[suite].table(result).row_count > 2
    assert all(isinstance(value, float | int) for value in SUITES[suite].headline(result).values())
    return result


def one_hot(tokens, size: int) -> torch.Tensor:
    return 9.0 * torch.nn.functional.one_hot(torch.as_tensor(np.asarray(tokens)), size)


# ---- word problem


def test_word_problem_tells_a_trunk_that_forgets_from_dynamics_that_do_not():
    spec = "word_problem,group=S3,length=4"
    task = open_task(spec)
    size = task.vocabulary.size

    def trunk(tokens):
        products = task.running_products(tokens[:, 1:].numpy())
        products[:, 5:] = (products[:, 5:] + 1) % 6  # wrong at every position beyond the training length
        return one_hot(products, size)

    def step(state, embedding):
        products = task.products[state.argmax(-1).numpy(), embedding.argmax(-1).numpy()]
        return one_hot(products, size)

    result = measured("word_problem", oracle(size, trunk, SimpleNamespace(step=step)), spec, 100)
    assert [point["value"] for point in result["trunk"]["accuracy"]] == [1.0] * 5 + [0.0] * 8
    assert [point["value"] for point in result["trunk"]["all_correct"]] == [1.0] * 5 + [0.0] * 8
    assert [point["value"] for point in result["dynamics"]["accuracy"]] == [1.0] * 13
    assert "length=12" in result["task"] and "split=test" in result["task"]
    assert "dynamics" not in measured("word_problem", oracle(size, trunk), spec, 10)


# ---- Path-Star


def test_path_star_separates_whole_ways_from_tokens():
    spec = "path_star,arms=2,length=4,nodes=10,separators=false"
    task = open_task(spec)
    size = task.vocabulary.size
    test = open_task(f"{spec},split=test").samples(0, 40).rows()
    following = {tuple(row[:end]): row[end] for row in test.tolist() for end in range(1, len(row))}

    def logits(tokens, errs=lambda row, end: False):
        out = np.zeros(tokens.shape, np.int64)
        for b, row in enumerate(tokens.tolist()):
            for end in range(task.prompt_length + 1, len(row) + 1):
                right = following.get(tuple(row[:end]), 0)
                out[b, end - 1] = (right + 1) % 10 if errs(row, end) else right
        return one_hot(out, size)

    perfect = measured("path_star", oracle(size, logits), spec, 40)
    assert perfect["greedy"]["value"] == 1.0 and perfect["sampled"]["value"] > 0.5

    def errs(row, end):
        return end == task.prompt_length + 2 and row[1] % 2 == 0  # the decision, in some of the graphs

    result = measured("path_star", oracle(size, lambda tokens: logits(tokens, errs)), spec, 40)
    right = np.mean([row[1] % 2 == 1 for row in test.tolist()])
    assert result["greedy"]["value"] == pytest.approx(right)
    assert [one["value"] for one in result["forced_by_token"]] == pytest.approx([1.0, right, 1.0, 1.0])
    assert result["greedy_by_token"][0]["value"] == 1.0 and result["greedy"]["trials"] == 40


# ---- Countdown


def test_countdown_counts_strictly_and_as_released():
    spec = "countdown"
    task = open_task(f"{spec},split=test")
    size, rows = task.vocabulary.size, task.samples(0, 20).rows()
    answers = {tuple(row[1:6]): row[14:] for row in rows.tolist()}
    wrong = [task.vocabulary.ids[word] for word in ("1 + 1 = 2 |" * 3).replace("|", " | ").split()[:17]]
    codes = 2.0 * torch.randn(size, 64, generator=torch.Generator().manual_seed(0))  # apart from each other

    def hidden(tokens):
        out = torch.zeros(*tokens.shape, 64)
        for b, row in enumerate(tokens.tolist()):
            answer = wrong if row[5] % 2 else answers[tuple(row[1:6])]
            out[b, -1] = codes[answer[len(row) - 14]]
        return out

    subject = oracle(size, hidden)
    object.__setattr__(subject, "head_VD", codes)
    result = measured("countdown", subject, spec, 20)
    even = np.mean([row[5] % 2 == 0 for row in rows.tolist()])
    for kind in ("greedy", "sampled", "greedy_lax", "sampled_lax", "same_as_search"):
        assert result[kind]["value"] == pytest.approx(even)


# ---- belief


@pytest.mark.parametrize("process", ["mess3", "random"])
def test_belief_of_an_oracle_that_holds_posteriors_or_nothing(process):
    spec = f"belief,process={process},length=12"
    task = open_task(spec)
    size = task.vocabulary.size

    def posteriors(tokens):
        return torch.from_numpy(task.posteriors(tokens[:, 1:].numpy()))

    def predicts(tokens):
        """What a perfect model says: log p(next symbol | posterior), in front of the posterior itself."""
        beliefs = posteriors(tokens)
        chances = torch.einsum("nts,osr->nto", beliefs, torch.from_numpy(task.transitions))
        eos = torch.full((*chances.shape[:2], 1), -30.0, dtype=torch.double)
        return torch.cat([chances.log(), eos, beliefs], 2)

    states = len(task.stationary)
    subject = oracle(size, predicts)
    object.__setattr__(subject, "head_VD", torch.eye(size + states)[:size])
    result = measured("belief", subject, spec, 200)
    assert result["r2"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert result["near_pairs"] > 50 and result["near"] < 0.1 * result["apart"]
    assert result["excess_loss"] == pytest.approx(0.0, abs=0.03)
    generator = torch.Generator().manual_seed(0)
    noise = oracle(size, lambda tokens: torch.randn(*tokens.shape, size, generator=generator))
    result = measured("belief", noise, spec, 200)
    assert abs(result["r2"]["value"]) < 0.05 and result["near"] > 0.8 * result["apart"]
    assert result["effective_rank"] > 0.98 * size


def test_effective_rank_is_that_of_equal_directions():
    assert effective_rank(torch.eye(7))[0] == pytest.approx(7.0)
    assert effective_rank(torch.ones(5, 3))[0] == pytest.approx(1.0)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0])))[0] == pytest.approx(4 / 3**0.75)


# ---- city

CITY = "city,width=6,height=6,longest=24"


def guide(task):
    """Logits of a model that knows the map: a step of a shortest way is likeliest, every legal turn likely."""
    streets, size = task.city, task.vocabulary.size
    crossings = len(streets.names)

    def logits(tokens):
        out = torch.full((*tokens.shape, size), -20.0)
        for b, row in enumerate(tokens.tolist()):
            place = row[1]
            for t in range(2, len(row)):
                place = place if t == 2 else task.walk([place, 0, row[t]])
                if place is None:
                    break
                for heading in np.flatnonzero(streets.neighbours[place] >= 0):
                    out[b, t, crossings + heading] = 0.0
                if place == row[2]:
                    out[b, t, task.vocabulary.eos_id] = 2.0
                else:
                    out[b, t, crossings + streets.first_steps[place, row[2]]] = 1.0
        return out

    return logits


@pytest.fixture
def few_states(monkeypatch):
    monkeypatch.setattr(city, "RANK_TOKENS", 1000)
    monkeypatch.setattr(city, "SUFFIXES", 5)


def test_city_of_a_model_that_knows_the_map(few_states):
    task = open_task(f"{CITY},split=test")
    result = measured("city", oracle(task.vocabulary.size, guide(task)), CITY, 20)
    for name in ("legal", "valid", "compression", "detours"):
        assert result[name]["value"] == 1.0, name
    assert result["false_edges"] == 0 and result["true_edges"] > 5


def test_city_of_a_model_that_always_goes_north(few_states):
    task = open_task(f"{CITY},split=test")
    north = len(task.city.names)
    result = measured(
        "city", oracle(task.vocabulary.size, lambda tokens: one_hot(tokens * 0 + north, north + 9)), CITY, 20
    )
    assert result["valid"]["value"] == 0.0 and result["legal"]["value"] < 0.6
    assert result["compression"]["value"] == 1.0  # it goes on alike after any two walks: no proof of a map


def test_reconstruction_adds_a_false_street_only_where_none_explains_the_walk():
    task = open_task(CITY)
    walks = [task.samples(0, 30).tokens_of(n).tolist() for n in range(30)]
    assert reconstruct(task, walks)["false_edges"] == 0
    streets, crossings = task.city, len(task.city.names)
    walk = walks[0]
    closed = int(np.flatnonzero(streets.neighbours[walk[1]] < 0)[0])
    # From the end of a true walk by a heading that is closed there, to a near crossing.
    near = next(b for b in range(crossings) if 0 < np.linalg.norm(streets.places[b] - streets.places[walk[1]]) < 3)
    lie = [walk[0], near, *walk[2:], crossings + closed]
    found = reconstruct(task, [lie, lie])
    assert found["false_edges"] == 1 and found["unexplained_walks"] == 0
    assert found["reconstruction"]["false"] == [[walk[1], near]]
    assert reconstruct(task, [[walk[0], near, crossings + 8]])["unexplained_walks"] == 1


# ---- what they share


def test_wilsons_interval():
    half = share(50, 100)
    assert (
        half["value"] == 0.5
        and half["low"] == pytest.approx(0.4038, abs=1e-4)
        and half["high"] == pytest.approx(0.5962, abs=1e-4)
    )
    assert share(0, 10)["low"] == 0.0 and share(0, 10)["high"] == pytest.approx(0.2775, abs=1e-4)
    assert share(10, 10)["high"] == pytest.approx(1.0)


def test_a_data_set_of_another_task_is_refused():
    dataset = SimpleNamespace(path=Path("data"), manifest={"task": "countdown"})
    for suite in ("path_star", "city", "belief", "word_problem"):
        with pytest.raises(UserError, match=f"made of task:countdown; the suite {suite} needs --source task:{suite}"):
            SUITES[suite].check(oracle(3, None), dataset, None)
    with pytest.raises(UserError, match="made of no task"):
        SUITES["countdown"].check(oracle(3, None), SimpleNamespace(path=Path("data"), manifest={}), None)

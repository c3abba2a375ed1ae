"""Every task's samples against what brute force makes of them."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest

from data_pipeline import UserError
from data_pipeline.tasks import TASKS, open_task
from data_pipeline.tasks.word_problem import is_even

SPECS = [
    "path_star,arms=3,length=4,nodes=20",
    "path_star,arms=2,length=4,nodes=10,separators=false",
    "countdown",
    "city,width=8,height=8",
    "city,width=8,height=8,walks=shortest",
    "word_problem,group=A4,length=5",
    "word_problem,group=A5,generators=4,length=6",
    "belief,length=9",
    "belief,process=random,length=9",
    "belief,process=city,length=9",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_sample_depends_on_its_number_alone(spec):
    task = open_task(spec)
    whole, part = task.samples(0, 40), task.samples(17, 23)
    for number in range(6):
        assert part.tokens_of(number).tolist() == whole.tokens_of(17 + number).tolist()
    one_by_one = [task.numbered(np.array([place])).tokens_of(0).tolist() for place in (31, 2)]
    assert one_by_one == [whole.tokens_of(31).tolist(), whole.tokens_of(2).tolist()]
    texts = {tuple(whole.tokens_of(number).tolist()) for number in range(40)}
    assert len(texts) > 30
    other_seed = open_task(f"{spec},seed=1").samples(0, 40)
    assert len(texts & {tuple(other_seed.tokens_of(number).tolist()) for number in range(40)}) < 6


@pytest.mark.parametrize("spec", SPECS)
def test_samples_are_documents_in_the_vocabulary(spec):
    task = open_task(spec)
    made, eos = task.samples(0, 200), task.vocabulary.eos_id
    assert np.flatnonzero(made.tokens == eos).tolist() == made.starts.tolist()
    assert made.tokens.min() >= 0 and made.tokens.max() < task.vocabulary.size
    lengths = np.diff(made.starts, append=len(made.tokens))
    if task.document_length:
        assert set(lengths.tolist()) == {task.document_length}
    assert (made.prompt_lengths < lengths).all()
    assert len(set(task.vocabulary.names)) == task.vocabulary.size
    assert open_task(task.spec) == task


# ---- Path-Star


@pytest.mark.parametrize("separators", ["true", "false"])
def test_path_star_writes_the_only_way_to_the_goal(separators):
    task = open_task(f"path_star,arms=3,length=4,nodes=15,separators={separators}")
    made, names = task.samples(0, 300), task.vocabulary.names
    first_edges = set()
    for number in range(300):
        words = [names[token] for token in made.tokens_of(number)]
        given, way = words[: task.prompt_length], [int(word) for word in words[task.prompt_length :]]
        assert given[-1] == "=" and given[-4] == "/"
        centre, goal = int(given[-3]), int(given[-2])
        written = [word for word in given[:-4] if word != "|"]
        assert given[:-4].count("|") == (8 if separators == "true" else 0)
        edges = [(int(u), int(v)) for u, v in zip(written[::2], written[1::2], strict=True)]
        assert len(set(edges)) == 9 and len({v for _, v in edges}) == 9 and centre not in {v for _, v in edges}
        assert sum(u == centre for u, _ in edges) == 3
        assert way[0] == centre and way[-1] == goal and len(way) == 4
        assert all(edge in edges for edge in pairwise(way))
        assert goal not in {u for u, _ in edges}
        first_edges.add(edges.index((way[0], way[1])))
    assert len(first_edges) == 9  # the order of the edges says nothing about the way


@pytest.mark.parametrize(("arms", "length", "tokens"), [(2, 10, 68), (5, 5, 69), (7, 7, 137)])
def test_path_star_has_the_papers_lengths(arms, length, tokens):
    task = open_task(f"path_star,arms={arms},length={length}")
    assert task.document_length == tokens
    assert task.prompt_length == 3 * arms * (length - 1) + 3
    assert task.vocabulary.size == 105 and task.vocabulary.ids["|"] == 100 and task.vocabulary.eos_id == 104


# ---- Countdown


def first_solution(numbers: list[int], target: int) -> list[tuple[int, str, int, int]] | None:
    """The depth-first search as it is written down, one branch after the other."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for i, j in combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        larger, smaller = max(a, b), min(a, b)
        ways = [(a, "+", b, a + b)] if a + b < 10_000 else []
        ways += [(a, "*", b, a * b)] if a * b < 10_000 else []
        ways += [(larger, "-", smaller, larger - smaller)]
        ways += [(larger, "/", smaller, larger // smaller)] if smaller and larger % smaller == 0 else []
        for way in ways:
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)] + [way[3]]
            if (found := first_solution(rest, target)) is not None:
                return [way, *found]
    return None


def test_countdown_labels_are_the_first_solutions_of_the_search():
    task = open_task("countdown")
    made, names = task.samples(0, 150), task.vocabulary.names
    assert task.document_length == 31 and task.vocabulary.size == 10_007
    for number in range(150):
        words = [names[token] for token in made.tokens_of(number)]
        given, target = [int(word) for word in words[:4]], int(words[4])
        assert all(1 <= n <= 99 for n in given) and words[5:13] == ["|"] * 8
        solution = first_solution(given, target)
        assert solution is not None
        assert " ".join(words[13:]) == " | ".join(f"{x} {o} {y} = {z}" for x, o, y, z in solution)


def test_countdown_holds_a_tenth_of_the_targets_out():
    train, test = open_task("countdown"), open_task("countdown,split=test")
    assert sorted({*train.targets, *test.targets}) == list(range(10, 101))
    assert len(train.targets) == 82 and len(test.targets) == 9
    assert set(test.samples(0, 100).rows()[:, 5]) <= set(test.targets.tolist())
    assert set(train.samples(0, 400).rows()[:, 5]) <= set(train.targets.tolist())


# ---- word problem


@pytest.mark.parametrize(("group", "size"), [("A5", 60), ("S4", 24), ("A4", 12), ("S3", 6), ("C5", 5)])
def test_word_problem_labels_are_products_of_permutations(group, size):
    task = open_task(f"word_problem,group={group},length=7")
    made = task.samples(0, 50)
    elements = [tuple(p) for p in task.elements.tolist()]
    assert len(set(elements)) == size and elements[0] == tuple(range(task.points))
    if group[0] == "A":
        assert set(elements) == {p for p in permutations(range(task.points)) if is_even(p)}
    labels = made.labels.reshape(50, 8)
    for word, answers in zip(made.rows()[:, 1:].tolist(), labels.tolist(), strict=True):
        running = tuple(range(task.points))
        assert answers[0] == 0
        for token, answer in zip(word, answers[1:], strict=True):
            running = tuple(running[i] for i in elements[token])  # (p · q)(i) = p(q(i))
            assert elements[answer] == running
    assert len(set(made.rows()[:, 1:].reshape(-1).tolist())) == size


def test_parity_is_that_of_inversions_and_generators_generate():
    assert not is_even((1, 0, 2)) and is_even((1, 2, 0)) and is_even((1, 0, 3, 2))
    task = open_task("word_problem,group=A5,generators=4,length=40")
    made = task.samples(0, 400)
    assert sorted(set(made.rows()[:, 1:].reshape(-1).tolist())) == task.alphabet.tolist()
    assert len(task.alphabet) == 4 and set(made.labels.tolist()) == set(range(60))
    with pytest.raises(UserError, match="no 1 elements that generate A5"):
        open_task("word_problem,group=A5,generators=1")
    named = open_task("word_problem,letters=(243)+(012)+(01)(23)")
    letters = set(named.samples(0, 400).rows()[:, 1:].reshape(-1).tolist())
    assert {named.vocabulary.names[letter] for letter in letters} == {"(012)", "(243)", "(01)(23)"}


# ---- belief


@pytest.mark.parametrize("process", ["mess3", "random,states=3,symbols=2", "city,width=2"])
def test_posteriors_are_those_of_an_enumeration_of_all_state_sequences(process):
    task = open_task(f"belief,process={process},length=4")
    T, start = task.transitions, task.stationary
    states = range(len(start))
    symbols = task.samples(0, 6).rows()[:, 1:]
    posteriors = task.posteriors(symbols)
    for word, beliefs in zip(symbols.tolist(), posteriors, strict=True):
        for t in range(5):
            mass = np.zeros(len(start))
            for walk in product(states, repeat=t + 1):
                chance = start[walk[0]]
                for symbol, a, b in zip(word, walk, walk[1:], strict=False):
                    chance *= T[symbol, a, b]
                mass[walk[-1]] += chance
            np.testing.assert_allclose(beliefs[t], mass / mass.sum(), atol=1e-12)


@pytest.mark.parametrize("process", ["mess3", "random", "city"])
def test_symbols_follow_the_process(process):
    task = open_task(f"belief,process={process},length=3")
    T, start = task.transitions, task.stationary
    np.testing.assert_allclose(T.sum((0, 2)), 1.0)
    np.testing.assert_allclose(start @ T.sum(0), start, atol=1e-12)
    symbols = task.samples(0, 40_000).rows()[:, 1:]
    expected = np.einsum("s,asr,brq,cqz->abc", start, T, T, T)
    counted = np.zeros(expected.shape)
    np.add.at(counted, tuple(symbols.T), 1 / len(symbols))
    assert np.abs(counted - expected).max() < 5 * np.sqrt(expected.max() / len(symbols))


def test_mess3_is_the_published_process():
    T = open_task("belief").transitions
    np.testing.assert_allclose(T[0], [[0.765, 0.00375, 0.00375], [0.0425, 0.0675, 0.00375], [0.0425, 0.00375, 0.0675]])
    assert open_task("belief,process=random,states=5").transitions.shape == (4, 5, 5)


# ---- city


@pytest.mark.parametrize("walks", ["random", "shortest"])
def test_city_walks_are_legal_and_end_at_their_destination(walks):
    task = open_task(f"city,width=9,height=9,walks={walks},longest=20")
    city, made = task.city, task.samples(0, 300)
    lengths = set()
    for number in range(300):
        origin, destination, *turns = made.tokens_of(number).tolist()
        place = origin
        for turn in turns:
            place = city.neighbours[place, turn - len(city.names)]
            assert place >= 0
        assert place == destination != origin and 2 <= len(turns) <= 20
        assert not task.is_held_out(origin, destination)
        if walks == "shortest":
            assert len(turns) == breadth_first(city.neighbours, origin)[destination]
        lengths.add(len(turns))
    assert len(lengths) > 8
    test = open_task(f"city,width=9,height=9,walks={walks},longest=20,split=test").samples(0, 50)
    assert all(task.is_held_out(*test.tokens_of(number)[:2]) for number in range(50))


def breadth_first(neighbours: np.ndarray, start: int) -> dict[int, int]:
    distance, queue = {start: 0}, [start]
    for node in queue:
        for other in neighbours[node]:
            if other >= 0 and int(other) not in distance:
                distance[int(other)] = distance[node] + 1
                queue.append(int(other))
    return distance


def test_every_crossing_can_be_reached_and_the_city_has_its_features():
    city = open_task("city").city
    for start in (0, 100, 400):
        found = breadth_first(city.neighbours, start)
        assert [found[node] for node in range(len(city.names))] == city.distances[start].tolist()
    headings = (city.neighbours >= 0).sum(0)
    assert (headings >= 5).all()  # diagonals too
    back = np.array([[city.neighbours[b, (h + 4) % 8] == a if b >= 0 else False for h, b in enumerate(row)]
                     for a, row in enumerate(city.neighbours)])  # fmt: skip
    one_way = (city.neighbours >= 0) & ~back
    assert 0.3 < one_way.sum() / (city.neighbours >= 0).sum() < 0.95
    dead_ends = [a for a in range(len(city.names)) if city.degrees[a] == 1 and (city.neighbours == a).sum() == 1]
    assert any(back[a].any() for a in dead_ends)


# ---- options


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pathstar", "task 'pathstar': no such task; there are belief, city, countdown, path_star, word_problem"),
        ("path_star,arm=5", "unknown option 'arm=5'; the options are seed, samples, split, arms, length, nodes"),
        ("path_star,arms", "unknown option 'arms'"),
        ("path_star,arms=x", "arms=x: give a whole number"),
        ("path_star,arms=5,arms=6", "arms is given twice"),
        ("path_star,separators=1", "separators=1: give true or false"),
        ("path_star,nodes=20", "nodes=20: a graph has 21 nodes"),
        ("path_star,split=valid", "split=valid: give train or test"),
        ("countdown,samples=0", "samples=0"),
        ("word_problem,group=A9", "group=A9: give A, S or C"),
        ("word_problem,group=A3,generators=4", "A3 has 3 elements"),
        ("word_problem,letters=(012)+(01)", "(01) is not an element of A5; names are like (234), smallest"),
        ("word_problem,letters=(012)+(012)+(234)", "one is named twice"),
        ("word_problem,letters=(012)+(021)", "they do not generate A5"),
        ("word_problem,letters=(012)+(234),generators=2", "generators=2 chooses them; leave one of the two out"),
        ("belief,process=mess", "process=mess: give mess3 or random or city"),
        ("belief,noise=2", "noise below 1"),
        ("city,map=x.pkl", "map and walks_file belong together"),
        ("city,longest=1", "give 1 ≤ shortest ≤ longest"),
    ],
)
def test_mistakes_in_a_spec_are_one_line(spec, message):
    with pytest.raises(UserError) as caught:
        open_task(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert set(TASKS) == {"belief", "city", "countdown", "path_star", "word_problem"}

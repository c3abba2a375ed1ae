"""Scorers against answers made by hand: right ones, wrong ones, and those that only a lax checker lets through."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.tasks import open_task
from data_pipeline.tasks.word_problem import correct_positions


def tokens(task, text: str) -> list[int]:
    return [task.vocabulary.ids[word] for word in text.split()]


@pytest.mark.parametrize(
    ("answer", "strict", "lax"),
    [
        ("22 * 91 = 2002 | 2002 - 7 = 1995 | 1995 / 57 = 35", True, True),
        ("91 * 22 = 2002 | 2002 - 7 = 1995 | 1995 / 57 = 35", True, True),  # another order of the same
        ("57 - 22 = 35 | 35 * 7 = 245 | 245 / 7 = 35", False, True),  # takes 7 twice
        ("57 - 22 = 35 | 57 - 22 = 35 | 57 - 22 = 35", False, True),  # takes everything three times
        ("22 * 91 = 2002 | 2002 - 7 = 1995 | 1995 / 57 = 36", False, False),  # not true
        ("22 * 91 = 2002 | 2002 - 7 = 1995 | 1995 - 57 = 1938", False, False),  # not the target
        ("22 * 91 = 2002 | 2002 - 8 = 1994 | 1995 / 57 = 35", False, False),  # 8 is not there
        ("7 - 22 = 15 | 57 - 22 = 35 | 57 - 22 = 35", False, False),  # smaller less larger
        ("91 / 22 = 4 | 57 - 22 = 35 | 57 - 22 = 35", False, False),  # not exact
        ("22 * 91 = 2002 | 2002 - 7 = 1995 = 1995 / 57 = 35", False, False),  # no separator
        ("22 * 91 + 2002 | 2002 - 7 = 1995 | 1995 / 57 = 35", False, False),  # no equation
        ("22 | 91 = 2002 | 2002 - 7 = 1995 | 1995 / 57 = 35", False, False),  # no operator
    ],
)
def test_countdown_answers(answer, strict, lax):
    task = open_task("countdown")
    assert task.is_solution([22, 7, 57, 91], 35, tokens(task, answer)) is strict
    assert task.is_solution([22, 7, 57, 91], 35, tokens(task, answer), lax=True) is lax


def test_every_countdown_label_is_strictly_a_solution():
    task = open_task("countdown,split=test")
    for row in task.samples(0, 200).rows().tolist():
        assert task.is_solution(row[1:5], row[5], row[14:])
        assert not task.is_solution(row[1:5], row[5] + 1, row[14:])
        assert not task.is_solution(row[1:5], row[5], row[14:-1])


def test_path_star_needs_every_token():
    task = open_task("path_star,arms=2,length=4,nodes=10")
    ways = np.array([[6, 2, 1, 5], [6, 2, 1, 5], [6, 2, 1, 5]])
    answers = np.array([[6, 2, 1, 5], [6, 5, 1, 2], [6, 2, 1, 4]])
    right = task.correct(answers, ways)
    assert right.all(1).tolist() == [True, False, False]
    assert right.sum(0).tolist() == [3, 2, 3, 1]


def test_word_problem_counts_positions_and_prefixes():
    right, all_right = correct_positions(np.array([[0, 1, 9, 3], [0, 1, 2, 3]]), np.array([[0, 1, 2, 3], [0, 1, 2, 3]]))
    assert right.tolist() == [[True, True, False, True], [True] * 4]
    assert all_right.tolist() == [[True, True, False, False], [True] * 4]


def test_word_problem_in_words():
    task = open_task("word_problem,group=S3,length=2")
    assert task.as_text(tokens(task, "(01) (12)")) == "(01)=(01) (12)=(012)"  # p(q(i)): 0→1, 1→2, 2→0


def test_city_walks_that_are_illegal_or_arrive_elsewhere():
    task = open_task("city,width=8,height=8")
    walk = task.samples(0, 1).tokens_of(0).tolist()
    crossings = len(task.city.names)
    assert task.is_valid(walk) and task.walk(walk) == walk[1]
    assert not task.is_valid([walk[0], (walk[1] + 1) % crossings, *walk[2:]])  # arrives elsewhere
    assert not task.is_valid(walk[:-1])  # stops too early
    assert not task.is_valid([*walk, walk[0]]) and not task.is_valid([*walk, task.vocabulary.eos_id])  # no turn
    closed = int(np.flatnonzero(task.city.neighbours[walk[0]] < 0)[0])
    assert not task.is_valid([walk[0], walk[0], crossings + closed])
    assert not task.is_valid([crossings, walk[1]]) and not task.is_valid([walk[0]])
    assert task.is_valid([walk[0], walk[0]])  # no way to go


def test_the_original_citys_files_are_read(tmp_path):
    import pickle

    from data_pipeline import UserError

    leads = {("5", "N"): "17", (17, "SE"): "5", ("17", "S"): "8", ("8", "end"): "end"}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(leads))
    (tmp_path / "walks.txt").write_text("5 8 N S end\n17 17 SE N end\n")
    spec = f"city,map={tmp_path}/map.pkl,walks_file={tmp_path}/walks.txt,samples=2"
    task = open_task(spec)
    assert task.city.names == ("5", "8", "17")
    made = task.samples(0, 2)
    assert [task.as_text(made.tokens_of(n)) for n in (0, 1)] == ["5 8 N S", "17 17 SE N"]
    assert all(task.is_valid(made.tokens_of(n).tolist()) for n in (0, 1))
    with pytest.raises(UserError, match="has 2 walks"):
        open_task(spec.replace("samples=2", "samples=3"))
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(np.float64(1.0)))
    with pytest.raises(UserError, match="it holds a numpy"):
        open_task(spec).vocabulary  # noqa: B018

"""What is wrong with a node, and which node is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.preflight import Report, accelerator_problems, judge, node_problems, read_reports

NODES = ["a", "b", "c"]


def well(rank: int, **changes: object) -> Report:
    values = {"rank": rank, "node": NODES[rank], "met": True, "gib_per_second": 10.0, "needed_gib_per_second": 1.0}
    return Report(**(values | changes))  # type: ignore[arg-type]


def test_a_sound_node_has_no_problems() -> None:
    assert node_problems({"PREFLIGHT_MIN_MEMORY_GIB": "0", "PREFLIGHT_MIN_DISK_GIB": "0"}) == []
    assert accelerator_problems(0) == []


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("PREFLIGHT_MIN_MEMORY_GIB", "1e9", "GiB of memory are free, 1e+09 are needed"),
        ("PREFLIGHT_MIN_DISK_GIB", "1e9", "1e+09 are needed"),
        ("PREFLIGHT_COMMAND", "echo too hot; exit 3", "PREFLIGHT_COMMAND ended with 3: too hot"),
    ],
)
def test_a_node_that_lacks_something_says_what(variable: str, value: str, part: str) -> None:
    enough = {"PREFLIGHT_MIN_MEMORY_GIB": "0", "PREFLIGHT_MIN_DISK_GIB": "0"}
    problems = node_problems(enough | {variable: value})
    assert len(problems) == 1 and part in problems[0]


def test_reports_are_read_back(tmp_path: Path) -> None:
    report = well(1, problems=["hot"], links={"a": 0.5})
    report.write(tmp_path)
    assert read_reports(tmp_path) == [report]


CASES = {
    "all well": ([well(0), well(1), well(2)], "", set()),
    "a problem of its own": ([well(0, met=False), well(1, problems=["hot"]), well(2)], "b: hot", {"b"}),
    "silent": ([well(0, met=False), well(2, met=False)], "b: no rank of it answered", {"b"}),
    "wrong clock": ([well(0), well(1), well(2, clock_offset_seconds=-60.0)], "c: its clock is off by -60.0 s", {"c"}),
    "a slow link": ([well(0, links={"b": 5.0, "c": 0.2}), well(1), well(2)], "c: all-reduce with it gives 0.2", {"c"}),
    "a wrong sum": ([well(0, links={"b": 0.0, "c": 5.0}), well(1), well(2)], "b: all-reduce with it gives 0 ", {"b"}),
    "all links slow: the first node": ([well(0, links={"b": 0.1, "c": 0.2}), well(1), well(2)], "a: all-reduce", {"a"}),
    "every node ill": ([well(n, problems=["hot"]) for n in range(3)], "every node fails: a: hot", set()),
    "hung": ([well(0, met=False), well(1), well(2)], "ranks [0] did not come through the all-reduce", set()),
    "slow, well in pairs": ([well(0, links={"b": 5.0, "c": 5.0}), well(1), well(2)], "no node's link is", set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_right_node_is_blamed(case: str) -> None:
    reports, part, blamed = CASES[case]
    verdict, bad = judge(reports, NODES, 3)
    assert bool(verdict) == bool(part) and part in verdict
    assert set(bad) == blamed


def test_a_single_bad_node_is_left_out_although_it_is_all_there_is() -> None:
    assert set(judge([well(0, problems=["hot"])], ["a"], 1)[1]) == {"a"}

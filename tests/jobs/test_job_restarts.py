"""Which starts of a job are followed by another, and the page that says why none follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.jobs.restarts import RankExit, Start, fruitless_starts, judge, main, rank_exits

KILLED = [RankExit(1, 137, "node2", 10.0), RankExit(0, 143, "node1", 11.0)]
MISTAKEN = [RankExit(0, 2, "node1", 10.0), RankExit(1, 143, "node2", 11.0)]


@pytest.mark.parametrize(
    ("outcome", "code", "exits", "verdict", "why"),
    [
        ("finished at step 20", 0, [], "finished", "finished at step 20"),
        ("finished at step 20", 143, KILLED, "finished", "finished at step 20"),
        ("paused at step 6", 0, [], "finished", "paused at step 6"),
        ("stopped at step 6", 143, [], "restart", "stopped at step 6"),
        ("hung at step 6: rank 1", 143, MISTAKEN, "restart", "hung at step 6: rank 1"),
        ("", 0, [RankExit(0, 75, "node1", 1.0)], "restart", "stopped"),
        ("", 143, [RankExit(1, 143, "node1", 1.0), RankExit(0, 76, "node1", 2.0)], "restart", "stopped"),
        ("", 143, KILLED, "restart", "rank 1 on node2 ended with 137 (SIGKILL)"),
        ("", 143, MISTAKEN, "failed", "rank 0 on node1 ended with 2"),
        ("", 2, [], "failed", "no rank left word of its end; srun ended with 2"),
        ("", 143, [*KILLED, *MISTAKEN], "restart", "rank 1 on node2 ended with 137 (SIGKILL)"),
        ("", 1, [], "restart", "no rank left word of its end; srun ended with 1"),
    ],
)
def test_what_follows_a_start(outcome: str, code: int, exits: list[RankExit], verdict: str, why: str) -> None:
    assert judge(outcome, code, exits) == (verdict, why)


@pytest.mark.parametrize(
    ("steps", "count"), [([], 0), ([0], 0), ([0, 0], 1), ([0, 5], 0), ([0, 5, 5, 5], 2), ([5, 5, 5, 8], 0)]
)
def test_only_starts_without_progress_count(steps: list[int], count: int) -> None:
    assert fruitless_starts(steps) == count


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "run" / "jobs" / "7").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    return tmp_path / "run" / "jobs" / "7"


def start(job: Path, number: int, cap: int = 3) -> Start:
    return Start(job, number, "node[1-2]", job.parents[1] / "logs" / f"7-{number}", cap)


def save(job: Path, step: int) -> None:
    (job.parents[1] / "checkpoints" / "latest").write_text(f"step_{step:08}")


def note_exit(at: Start, rank: int, code: int, when: float) -> None:
    (at.logs / f"rank-{rank}.exit").write_text(f"{code} node{rank + 1} {when}\n")


def test_the_cap_counts_starts_without_a_newer_checkpoint_alone(job: Path) -> None:
    for number in range(8):
        assert start(job, number).begin() == "restart"
        save(job, 10 * (number + 1))
        assert start(job, number).end(1) == "restart", "each gets further"
    assert [start(job, 8).begin(), start(job, 8).end(1)] == ["restart", "restart"]
    assert [start(job, 9).begin(), start(job, 9).end(1)] == ["restart", "restart"]
    assert [start(job, 10).begin(), start(job, 10).end(1)] == ["restart", "failed"]
    assert "3 starts in a row got no further than step 80" in (job.parents[1] / "failure.md").read_text()


def test_starts_that_come_to_no_end_of_their_own_count_too(job: Path) -> None:
    """A lost node takes the batch script along: nobody judged those starts."""
    assert [start(job, number).begin() for number in range(4)] == ["restart", "restart", "restart", "failed"]
    page = (job.parents[1] / "failure.md").read_text()
    assert page.count("its node was lost, or it was requeued from outside") == 3


def test_a_failure_leaves_a_page_with_reason_node_steps_and_the_end_of_the_log(job: Path) -> None:
    save(job, 16)
    (job.parents[1] / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 19)))
    now = start(job, 0)
    now.begin()
    note_exit(now, 1, 143, 12.0)
    note_exit(now, 0, 2, 11.0)
    lines = [f"line {n}" for n in range(100)] + ["error: step 19: the loss is nan"]
    (now.logs / "rank-0.log").write_text("\n".join(lines))
    assert now.end(143) == "failed"
    page = (job.parents[1] / "failure.md").read_text()
    assert "- reason: step 19: the loss is nan" in page
    assert "- node: node1" in page and "rank 0 on node1 ended with 2" in page
    assert "last step saved: 16; last step in metrics.jsonl: 18" in page
    assert "| 0 | node[1-2] | 16 | 16 |" in page
    assert "    line 61\n" in page and "line 60\n" not in page, "one page, not the whole log"


def test_a_new_start_takes_the_old_word_and_page_away(job: Path) -> None:
    run = job.parents[1]
    (run / "outcome").write_text("stopped at step 3\n")
    (run / "failure.md").write_text("old")
    start(job, 0).begin()
    assert not (run / "outcome").exists() and not (run / "failure.md").exists()


def test_the_first_rank_to_end_comes_first(job: Path) -> None:
    now = start(job, 0)
    now.begin()
    note_exit(now, 0, 143, 12.5)
    note_exit(now, 10, 137, 12.25)
    assert [e.rank for e in rank_exits(now.logs)] == [10, 0]


def test_the_command_prints_the_verdict(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = job.parents[1] / "logs" / "7-0"
    common = [str(job), "--start=0", "--nodes=node1", f"--logs={logs}", "--cap=1"]
    with pytest.raises(SystemExit) as ended:
        main(["begin", *common])
    assert ended.value.code == 0
    (job.parents[1] / "outcome").write_text("finished at step 20\n")
    with pytest.raises(SystemExit) as ended:
        main(["end", *common, "--code=0"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "finished\n")
    (job.parents[1] / "outcome").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["end", *common, "--code=1", "--why=preflight: node2 is ill"])
    assert (ended.value.code, capsys.readouterr().out) == (1, "failed\n")
    assert "preflight: node2 is ill" in (job.parents[1] / "failure.md").read_text()


def test_the_command_says_nothing_to_a_script_that_was_killed(job: Path) -> None:
    start(job, 0).begin()
    command = [sys.executable, "-m", "pretrain.jobs.restarts", "end", str(job), "--start=0", "--nodes=node1"]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*command, f"--logs={job}"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "no rank left word" in (job / "starts.jsonl").read_text()

"""Whether a job's next start is worth it: each start leaves a record, and the one after it is judged by them.

    python -m pretrain.jobs.restarts begin RUN/jobs/ID --start N --nodes LIST --logs DIR [--cap N]
    python -m pretrain.jobs.restarts end RUN/jobs/ID … --code CODE [--why TEXT]

`end` prints `finished`, `restart` or `failed`. Both exit with 1 on a final failure, having written RUN/failure.md.
Only Python's standard library is used here: the batch script runs this outside of any container.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CODE_MISTAKE, CODES_TO_RESTART = 2, (75, 76)
"""pretrain.train's own exit codes: a user's mistake; stopped by a signal, and a hang found (see pretrain/faults.py)."""
SHOWN_LINES = 40

Verdict = Literal["finished", "restart", "failed"]


@dataclass(frozen=True)
class RankExit:
    """How one rank ended, as slurm/task.sh noted it."""

    rank: int
    code: int
    node: str
    time: float

    def __str__(self) -> str:
        killed = f" ({signal.Signals(self.code - 128).name})" if self.code - 128 in set(signal.Signals) else ""
        return f"rank {self.rank} on {self.node} ended with {self.code}{killed}"


def rank_exits(logs: Path) -> list[RankExit]:
    """The ranks that ended, the first to do so first: the others often died of it."""
    exits = []
    for path in logs.glob("rank-*.exit"):
        code, node, when = path.read_text(encoding="utf-8").split()
        exits.append(RankExit(int(path.stem.removeprefix("rank-")), int(code), node, float(when)))
    return sorted(exits, key=lambda e: e.time)


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one. Where a next start begins is what counts as progress."""
    try:
        latest = (run / "checkpoints" / "latest").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"\d+", latest)
    return int(found.group()) if found else 0


def fruitless_starts(steps: list[int]) -> int:
    """How many of the latest starts got no further. `steps`: where each start began, and where the run is now."""
    count = 0
    while count + 1 < len(steps) and steps[-1 - count] == steps[-2 - count]:
        count += 1
    return count


def judge(outcome: str, code: int, exits: list[RankExit]) -> tuple[Verdict, str]:
    """What to do after a start, and why.

    `outcome`: the run's own last word, empty if it left none. `code`: srun's, which is that of whichever rank was the
    last to be killed. `exits`: those of the ranks, in the order of their ends.
    """
    if outcome.startswith(("finished", "paused")):
        return "finished", outcome
    own_codes = any(ended.code in CODES_TO_RESTART for ended in exits) or code in CODES_TO_RESTART
    if outcome.startswith(("stopped", "hung")) or own_codes:
        return "restart", outcome or "stopped"
    failed = [e for e in exits if e.code]
    first = str(failed[0]) if failed else f"no rank left word of its end; srun ended with {code}"
    if (failed[0].code if failed else code) == CODE_MISTAKE:
        return "failed", first
    return "restart", first


@dataclass(frozen=True)
class Start:
    """One start of a job, and the files it has to do with."""

    job: Path
    number: int
    nodes: str
    logs: Path
    cap: int

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.job.parents[1]

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record per start that began, an `end` key in those that came to one."""
        path = self.job / "starts.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records: dict[int, dict[str, Any]] = {}
        for line in lines:
            record = json.loads(line)
            records.setdefault(record["start"], {}).update(record)
        return list(records.values())

    def note(self, **record: Any) -> None:
        """Append to the job's record of this start."""
        line = json.dumps({"start": self.number, **record})
        with (self.job / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begin(self) -> Verdict:
        """Note where this start begins; `failed` if the cap is reached.

        It may be reached by starts that came to no end of their own: a lost node takes the batch script with it.
        """
        step = saved_step(self.run)
        fruitless = fruitless_starts([record["step"] for record in self.records] + [step])
        if fruitless >= self.cap:
            return self.fail(f"{fruitless} starts in a row got no further than step {step}")
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.run / "outcome").unlink(missing_ok=True)
        (self.run / "failure.md").unlink(missing_ok=True)
        self.note(step=step, nodes=self.nodes, began=time.time())
        return "restart"

    def end(self, code: int, reason: str | None = None) -> Verdict:
        """Note how this start ended, and say whether there is to be another. `reason`: why no rank was started."""
        word = self.run / "outcome"
        outcome = word.read_text(encoding="utf-8").strip() if word.exists() else ""
        verdict, why = judge(outcome, code, rank_exits(self.logs))
        why = reason or why
        step = saved_step(self.run)
        self.note(end=why, ended=time.time(), reached=step)
        fruitless = fruitless_starts([record["step"] for record in self.records] + [step])
        if verdict == "restart" and fruitless >= self.cap:
            verdict, why = "failed", f"{why}; {fruitless} starts in a row got no further than step {step}"
        return self.fail(why) if verdict == "failed" else verdict

    def fail(self, why: str) -> Verdict:
        """Leave a page that says what a person needs to know first."""
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "failure.md").write_text(self.summary(why), encoding="utf-8")
        print(f"failed: {why}; see {self.run}/failure.md", file=sys.stderr)
        return "failed"

    def summary(self, why: str) -> str:
        """RUN/failure.md: reason, node, last step, the starts so far, and the end of the log that matters."""
        logs = self.logs if self.logs.exists() else _previous_logs(self.logs)
        failed = [e for e in rank_exits(logs) if e.code]
        log = logs / f"rank-{failed[0].rank if failed else 0}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else "(there is none)"
        rows = [
            f"| {record['start']} | {record.get('nodes', '')} | {record.get('step', '')} | {record.get('reached', '')} "
            f"| {record.get('end', 'no word: its node was lost, or it was requeued from outside')} |"
            for record in self.records
        ]
        return "\n".join(
            [
                f"# {self.run.name} failed",
                "",
                f"- reason: {_error_line(text) or why}",
                f"- how it ended: {why}",
                f"- node: {failed[0].node if failed else self.nodes}",
                f"- last step saved: {saved_step(self.run)}; last step in metrics.jsonl: {_last_step(self.run)}",
                f"- job: {self.job.name}, start {self.number}; its code and config: {self.job}",
                "",
                "| start | nodes | from step | to step | how it ended |",
                "|---|---|---|---|---|",
                *rows,
                "",
                f"The end of {log}:",
                "",
                *(f"    {line}" for line in text.splitlines()[-SHOWN_LINES:]),
                "",
            ]
        )


def _previous_logs(logs: Path) -> Path:
    """The logs of the newest start of the same job, where this one made none."""
    job = logs.name.rpartition("-")[0]
    return max(logs.parent.glob(f"{job}-*"), key=lambda path: path.stat().st_mtime, default=logs)


def _error_line(log: str) -> str:
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""


def _last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.restarts", description="Judge the starts of a job.")
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("job", type=Path, metavar="RUN/jobs/ID", help="the job's folder in the run's")
    parser.add_argument("--start", type=int, required=True, metavar="N", help="how often the job was restarted")
    parser.add_argument("--nodes", required=True, metavar="LIST", help="nodes of this start")
    parser.add_argument("--logs", type=Path, required=True, metavar="DIR", help="where this start's ranks log")
    parser.add_argument("--cap", type=int, default=5, metavar="N", help="starts in a row that may get no further")
    parser.add_argument("--code", type=int, default=0, help="srun's exit code (end)")
    parser.add_argument("--why", help="why no rank was started (end)")
    arguments = parser.parse_args(argv)
    start = Start(arguments.job.resolve(), arguments.start, arguments.nodes, arguments.logs, arguments.cap)
    verdict = start.begin() if arguments.moment == "begin" else start.end(arguments.code, arguments.why)
    if arguments.moment == "end":
        tell(verdict)
    sys.exit(verdict == "failed")


def tell(verdict: Verdict) -> None:
    """Print it, if somebody is there to read: SLURM may have killed the script that asked."""
    try:
        print(verdict, flush=True)
    except BrokenPipeError:
        # What could not be written is still in the buffer, and Python would complain of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

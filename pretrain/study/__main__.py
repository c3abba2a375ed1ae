"""Command: train and evaluate every config of a study on every seed, and write docs/results/<study>.md.

    python -m pretrain.study FILE [--runs DIR] [--out DIR]

The same command again goes on where it stopped: finished runs and evaluations are kept. Each run is a process of its
own, one rank with one thread, so that on CPUs a study that is run twice gives the same tables, to the digit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from data_pipeline import UserError, run_command
from data_pipeline.prepare import prepare
from pretrain.config import dump_config
from pretrain.study.page import Result, write_page
from pretrain.study.plan import PlannedRun, Study, plan_runs, read_study

THREADS = "1"


def run_study(path: Path, runs: Path, out: Path, console: Console) -> Path:
    """Do all that is not done yet, and write the page; returns its path.

    Raises UserError before anything starts for a file or config that does not fit, and when a run fails.
    """
    study = read_study(path)
    planned = plan_runs(study, path.stem, runs)
    for source in study.data:
        prepare(source.source, None, source.out, console=console)
    for number, run in enumerate(planned, 1):
        console.print(f"[bold]{number}/{len(planned)}[/] {run.folder}", highlight=False)
        if not is_finished(run):
            _call(train_command(run), run, "training")
        if not result_file(study, run).exists():
            _call(evaluate_command(study, run), run, "evaluation")
    results = [Result(run, json.loads(result_file(study, run).read_text(encoding="utf-8"))) for run in planned]
    commands = [f"python -m pretrain.study {path}"]
    commands += [shlex.join(["python", *command[1:]]) for command in (train_command(planned[0]),)]
    commands += [shlex.join(["python", *command[1:]]) for command in (evaluate_command(study, planned[0]),)]
    return write_page(study, path.stem, results, commands, out)


def is_finished(run: PlannedRun) -> bool:
    """Whether this very run has been trained to its end. Raises UserError where another one lies in its folder."""
    outcome, config = run.folder / "outcome", run.folder / "config.yaml"
    if not (outcome.exists() and config.exists() and outcome.read_text(encoding="utf-8").startswith("finished")):
        return False
    if config.read_text(encoding="utf-8") != dump_config(run.config):
        raise UserError(f"{run.folder}: was trained with another config: remove the folder, or give another --runs")
    return True


def result_file(study: Study, run: PlannedRun) -> Path:
    """Where the evaluation of a run lies."""
    return run.folder / "evaluation" / f"{study.suite}.json"


def train_command(run: PlannedRun) -> list[str]:
    """What trains a run."""
    return [sys.executable, "-m", "pretrain.train", "--config", run.entry.config, *run.overrides]


def evaluate_command(study: Study, run: PlannedRun) -> list[str]:
    """What evaluates a run."""
    command = [sys.executable, "-m", "pretrain.evaluate", str(run.folder), "--suite", study.suite]
    limit = [] if study.limit is None else ["--limit", str(study.limit)]
    return [*command, *limit, "--out", str(run.folder / "evaluation")]


def _call(command: list[str], run: PlannedRun, what: str) -> None:
    """Run a command to its end, its output in the run's log. Raises UserError where it fails."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "study.log"
    with log.open("a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": THREADS}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{run.folder}: {what} failed with exit code {code} ({' '.join(last)}); see {log}")


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.study", description="Run a study and write its page.")
    parser.add_argument("file", type=Path, metavar="FILE", help="the study's YAML file")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (default: runs)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/results"),
        metavar="DIR",
        help="where the page goes (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    page = run_study(arguments.file, arguments.runs, arguments.out, Console())
    print(f"wrote {page}")


if __name__ == "__main__":
    run_command(main)

"""Command: train and evaluate every config of a study on every seed, and write docs/results/<study>.md.

    python -m pretrain.study FILE [--runs DIR] [--out DIR] [--slurm [sbatch options]]

The same command again goes on where it stopped: finished runs and evaluations are kept. Each run is a process of its
own, one rank with one thread, so that on CPUs a study that is run twice gives the same tables, to the digit.

With --slurm, the last option, the runs that are not finished become one job array, a task for each config and seed;
once all are finished, the same command writes the page.
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

from data_pipeline import UserError, open_dataset, run_command
from data_pipeline.best_fit import is_packed, pack_split
from data_pipeline.prepare import prepare
from pretrain.config import dump_config
from pretrain.faults import EXIT_STOPPED
from pretrain.faults.signals import STOP_SIGNALS, StopRequests
from pretrain.study.page import Result, write_page
from pretrain.study.plan import PlannedRun, Study, plan_runs, read_study

THREADS = "1"
ARRAY_SCRIPT = "slurm/study.sh"


def run_study(path: Path, runs: Path, out: Path, console: Console) -> Path:
    """Do all that is not done yet, and write the page; returns its path.

    Raises UserError before anything starts for a file or config that does not fit, and when a run fails.
    """
    study = read_study(path)
    planned = plan_runs(study, path.stem, runs)
    prepare_data(study, planned, console)
    for number, run in enumerate(planned, 1):
        console.print(f"[bold]{number}/{len(planned)}[/] {run.folder}", highlight=False, soft_wrap=True)
        complete(study, run)
    return gather(study, planned, path, out)


def submit_study(path: Path, runs: Path, out: Path, console: Console, options: list[str]) -> Path | None:
    """Submit what is not done yet as a job array, and return None; where all is done, as `run_study`.

    Raises UserError before anything is submitted for a file or config that does not fit, and where sbatch refuses.
    """
    study = read_study(path)
    planned = plan_runs(study, path.stem, runs)
    prepare_data(study, planned, console)
    missing = [number for number, run in enumerate(planned) if not is_complete(study, run)]
    if not missing:
        return gather(study, planned, path, out)
    for number in missing:
        console.print(f"{number} {planned[number].folder}", highlight=False, soft_wrap=True)
    array = [f"--job-name=study_{path.stem}", f"--array={','.join(map(str, missing))}"]
    command = [ARRAY_SCRIPT, *array, *options, ARRAY_SCRIPT, str(path), "--runs", str(runs)]
    if not Path(ARRAY_SCRIPT).exists():
        raise UserError(f"no {ARRAY_SCRIPT} in {Path.cwd()}: submit from the repository")
    if code := subprocess.run(command).returncode:
        raise UserError(f"{path}: not submitted ({ARRAY_SCRIPT} ended with exit code {code}, and says why above)")
    return None


def prepare_data(study: Study, planned: list[PlannedRun], console: Console) -> None:
    """Make the study's data sets, and the packings that its configs read, where they are missing."""
    for source in study.data:
        prepare(source.source, source.tokenizer, source.out, console=console)
    ours = {source.out for source in study.data}
    packed = [run.config.data for run in planned if run.config.data.packing == "best_fit"]
    for path, length in sorted({(data.path, data.sequence_length) for data in packed if data.path in ours}):
        if not is_packed(dataset := open_dataset(Path(path)), "train", length):
            record = pack_split(dataset, "train", length)
            console.print(f"{path}: packed into {record['rows']:,} rows of {length} tokens", highlight=False)


def complete(study: Study, run: PlannedRun) -> None:
    """Train and evaluate a run, as far as that is not done yet. Raises UserError where it fails."""
    if not is_finished(run):
        _call(train_command(run), run, "training")
    if not result_file(study, run).exists():
        _call(evaluate_command(study, run), run, "evaluation")


def gather(study: Study, planned: list[PlannedRun], path: Path, out: Path) -> Path:
    """Write the page of a study whose runs are all complete; returns its path."""
    results = [Result(run, json.loads(result_file(study, run).read_text(encoding="utf-8"))) for run in planned]
    commands = [f"python -m pretrain.study {path}"]
    commands += [
        shlex.join(["python", *command[1:]])
        for command in (train_command(planned[0]), evaluate_command(study, planned[0]))
    ]
    return write_page(study, path.stem, results, commands, out)


def is_complete(study: Study, run: PlannedRun) -> bool:
    """Whether this very run has been trained and evaluated. Raises UserError as `is_finished`."""
    return is_finished(run) and result_file(study, run).exists()


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
    """Run a command to its end, its output in the run's log. Raises UserError where it fails.

    Where it was told to stop, this process ends with the same exit code as a run does.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "study.log"
    with log.open("a", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": THREADS}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code == EXIT_STOPPED or -code in STOP_SIGNALS:
        print(f"{run.folder}: {what} was told to stop: the same command goes on", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{run.folder}: {what} failed with exit code {code} ({' '.join(last)}); see {log}")


def complete_one(path: Path, runs: Path, number: int) -> None:
    """What a task of the array does: train and evaluate one run, numbered from 0. Outlives being told to stop."""
    study = read_study(path)
    planned = plan_runs(study, path.stem, runs)
    if not 0 <= number < len(planned):
        raise UserError(f"{path}: --number {number}: its runs are numbered from 0 to {len(planned) - 1}")
    StopRequests()  # the run gets the signal too, and says how it ended
    complete(study, planned[number])


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.study", description="Run a study and write its page.")
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the study's YAML file")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (%(default)s)")
    add("--out", type=Path, default=Path("docs/results"), metavar="DIR", help="where the page goes (%(default)s)")
    add("--number", type=int, metavar="K", help="train and evaluate run K alone, from 0, and write no page")
    add("--slurm", nargs=argparse.REMAINDER, metavar="OPTION", help="submit a job array; what follows is for sbatch")
    arguments = parser.parse_args(argv)
    where = (arguments.file, arguments.runs)
    if arguments.number is not None:
        return complete_one(*where, arguments.number)
    if arguments.slurm is None:
        page: Path | None = run_study(*where, arguments.out, Console())
    else:
        page = submit_study(*where, arguments.out, Console(), arguments.slurm)
    if page is not None:
        print(f"wrote {page}")


if __name__ == "__main__":
    run_command(main)

"""Look at the jobs that were submitted from this repository: `python -m pretrain.jobs.watch [SECONDS]`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline import UserError, run_command
from pretrain.config import load_config
from pretrain.metrics import METRICS_FILE

JOBS = Path("slurm/jobs")
"""A link to the job's folder in its run's, for every job (slurm/pretrain.sh)."""


def queued() -> dict[str, list[str]]:
    """The queue's jobs by id: state, time, nodes or the reason for waiting."""
    command = ["squeue", "--noheader", "--format=%A|%T|%M|%R"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"squeue does not answer ({error}): is this a machine of the cluster?") from None
    return {job: rest for job, *rest in (line.split("|") for line in lines)}


def table(jobs: dict[str, list[str]], now: float) -> Table:
    """One row per job of this repository: where it is, how far its run is, and for how long it has been silent."""
    result = Table("job", "run", "state", "time", "nodes", "starts", "step", "loss", "tokens/s", "last step")
    for job, about in jobs.items():
        if not (JOBS / job).exists():
            continue
        folder = (JOBS / job).resolve()
        run = folder.parents[1]
        result.add_row(job, run.name, *about, str(starts(folder)), *progress(folder, run / METRICS_FILE, now))
    return result


def starts(folder: Path) -> int:
    """How often a job has started."""
    path = folder / "starts.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return len({json.loads(line)["start"] for line in lines})


def progress(folder: Path, metrics: Path, now: float) -> list[str]:
    """Step, loss, speed and silence of a run, from the last line that is whole."""
    total = load_config(folder / "config.yaml").total_steps
    try:
        age = now - metrics.stat().st_mtime
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return [f"0/{total}", "", "", ""]
    whole = [line for line in lines[-2:] if line.endswith("\n")]
    if not whole:
        return [f"0/{total}", "", "", ""]
    last = json.loads(whole[-1])
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    return [f"{last['step']}/{total}", loss, f"{last['tokens_per_second']:,.0f}", f"{age:.0f} s ago"]


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.watch", description="Look at this repository's jobs.")
    parser.add_argument("seconds", type=float, nargs="?", metavar="SECONDS", help="look again every SECONDS")
    arguments = parser.parse_args(argv)
    # Into a file or a pipe, as wide as it is; and `node[a-b]` is no markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    while True:
        console.print(table(queued(), time.time()))
        if arguments.seconds is None:
            return
        time.sleep(arguments.seconds)


if __name__ == "__main__":
    run_command(main)

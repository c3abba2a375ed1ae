"""What a SLURM job runs: checked before it is queued, and kept beside its run as it was then.

    python -m pretrain.jobs.submission CONFIG [section.key=value …] [--tasks N] [--job ID]

prints the run's folder; or with --job that of the job, RUN/jobs/ID, which then holds `config.yaml` (resolved, so that
overrides and included files are part of it) and `code/`. However often the job is requeued, it runs these.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from data_pipeline import run_command
from pretrain.config import Config, dump_config, load_config
from pretrain.run_data import open_data

REPOSITORY = Path(__file__).parents[2]
CODE = ("pretrain", "data_pipeline", "slurm", "configs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "site.env", "jobs", "exclude")
"""Of those folders: site.env may hold a secret, and `slurm/jobs` and `slurm/exclude` are the site's, not a run's."""


def check(config: Config, tasks: int | None) -> None:
    """UserError for what would end the job as soon as it starts."""
    open_data(config)
    if tasks is not None:
        config.batch.accumulation_steps(tasks)


def keep(config: Config, job: str) -> Path:
    """Make RUN/jobs/JOB, whole or not at all; one that is there is left as it is."""
    folder = config.run.folder / "jobs" / job
    if folder.exists():
        return folder
    unfinished = folder.with_name(f".{job}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in CODE:
        # slurm/jobs is the list of jobs; pretrain/jobs is this package.
        ignore = LEFT_OUT if name == "slurm" else shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, unfinished / "code" / name, ignore=ignore)
    (unfinished / "code" / "COMMIT").write_text(commit() + "\n", encoding="utf-8")
    (unfinished / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    unfinished.rename(folder)
    return folder


def commit() -> str:
    """The repository's commit, with `-dirty` where files differ from it; `unknown` outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.submission", description="Check and keep what a job runs.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to set differently")
    parser.add_argument("--tasks", type=int, metavar="N", help="ranks that the batch must fit")
    parser.add_argument("--job", metavar="ID", help="keep code and config in the run's jobs/ID")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    check(config, arguments.tasks)
    print(keep(config, arguments.job) if arguments.job else config.run.folder)


if __name__ == "__main__":
    run_command(main)

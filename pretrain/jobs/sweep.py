"""The runs of a sweep: every combination of the values given as `key=a,b,c`.

    python -m pretrain.jobs.sweep CONFIG key=a,b,c … [key=value …] [--number K]

prints the runs' folders, one a line, having checked each config; with --number the overrides of one, one a line.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from data_pipeline import UserError, run_command
from pretrain.config import load_config


def combinations(name: str, arguments: list[str]) -> list[list[str]]:
    """The overrides of each run, the last key varying fastest; `run.name` is `name` and the values that vary.

    A comma within brackets or braces is part of a value. UserError where nothing varies.
    """
    choices = []
    for argument in arguments:
        key, _, values = argument.partition("=")
        choices.append([f"{key}={value}" for value in re.split(r",(?![^\[{]*[\]}])", values)])
    if all(len(values) == 1 for values in choices):
        raise UserError("nothing varies: give at least one key=a,b,c, or submit a single run with slurm/submit.sh")
    runs = []
    for overrides in itertools.product(*choices):
        varied = [text for text, values in zip(overrides, choices, strict=True) if len(values) > 1]
        label = "-".join(map(_label, varied))
        runs.append([*overrides, f"run.name={name}-{label}"])
    return runs


def _label(override: str) -> str:
    """`optimizer.learning_rate=1e-3` → `learning_rate_1e-3`, fit for the name of a folder."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}_" + re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("_")


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.sweep", description="The runs of a sweep.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file that all runs share")
    parser.add_argument("keys", nargs="+", metavar="key=a,b,c", help="values to combine; one value is the same for all")
    parser.add_argument("--number", type=int, metavar="K", help="print the overrides of run K alone, from 0")
    arguments = parser.parse_intermixed_args(argv)
    fixed = [key for key in arguments.keys if "," not in key]
    runs = combinations(load_config(arguments.config, fixed).run.name, arguments.keys)
    if arguments.number is not None:
        print("\n".join(runs[arguments.number]))
        return
    folders = [load_config(arguments.config, overrides).run.folder for overrides in runs]
    if len(set(folders)) < len(folders):
        raise UserError("two runs of the sweep would share a folder: a value is given twice")
    print("\n".join(map(str, folders)))


if __name__ == "__main__":
    run_command(main)

"""Check a config and print the run's folder: `python -m pretrain.config FILE [section.key=value …]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline import run_command
from pretrain.config import load_config


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.config", description="Check a config; print the run's folder.")
    parser.add_argument("config", type=Path, metavar="FILE", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to set differently")
    arguments = parser.parse_args(argv)
    print(load_config(arguments.config, arguments.overrides).run.folder)


if __name__ == "__main__":
    run_command(main)

"""Command: evaluate a checkpoint or an exported model; a JSON file, a table and a picture for each suite."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline import UserError, run_command
from pretrain.evals import SUITES
from pretrain.evals.subject import open_data, open_subject


def evaluate(
    source: str | Path,
    suites: list[str],
    out: str | Path,
    data: str | None = None,
    limit: int | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Run suites on a run, checkpoint or export; write out/<suite>.json and .png; the results by suite.

    Args:
        source: what is evaluated.
        suites: names of SUITES.
        out: a folder; earlier results of the same suites in it are replaced.
        data: a data set, or the name of one that the model was trained on; where None, the one of them with the
            largest share of the training.
        limit: sequences for `perplexity`, prompts for `speculative`.
        console: where tables and the progress bar go.

    Raises UserError for unknown suites, a source or data set that does not serve, or another tokenizer.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise UserError(f"--suite {','.join(unknown)}: no such suite; there are {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be at least 1; leave it out to evaluate everything")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for --out")
    subject = open_subject(source)
    dataset = open_data(subject, data)
    for name in suites:
        SUITES[name].check(subject, dataset, limit)
    console = console or Console()
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    for name in suites:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            results[name] = SUITES[name].measure(subject, dataset, limit, bar)
        out.mkdir(parents=True, exist_ok=True)
        SUITES[name].picture(results[name]).savefig(out / f"{name}.png")
        _write_json(out / f"{name}.json", results[name])
        console.print(SUITES[name].table(results[name]))
    return results


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or absent."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate",
        description="Evaluate a run, a checkpoint or an exported model. Writes DIR/<suite>.json and DIR/<suite>.png.",
    )
    parser.add_argument("source", metavar="EXPORT_OR_CHECKPOINT", help="an exported folder, a run or a checkpoint")
    parser.add_argument("--suite", required=True, metavar="NAME[,NAME…]", help=", ".join(SUITES))
    parser.add_argument("--data", metavar="DATASET", help="default: what the model was trained on most")
    parser.add_argument("--out", required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="sequences (perplexity), prompts (speculative); default: all, and 8"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    names = [name.strip() for name in arguments.suite.split(",") if name.strip()]
    evaluate(arguments.source, names, arguments.out, arguments.data, arguments.limit, console)
    console.print(f"results in {arguments.out}", highlight=False)


if __name__ == "__main__":
    run_command(main)

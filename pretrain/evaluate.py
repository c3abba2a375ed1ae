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
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Run suites on a run, checkpoint or export; write out/<suite>.json and .png; the results by suite.

    Args:
        source: what is evaluated.
        suites: names of SUITES.
        out: a folder; earlier results of the same suites in it are replaced.
        data: a data set, or the name of one that the model was trained on, or several with commas between; where
            None, those that it was trained on. A suite that reads a single one takes the first, or the one with the
            largest share of the training.
        limit: how much is evaluated, in what the suite counts; None for its own default.
        console: where tables and the progress bar go.
        options: of single suites, as each says in `Suite.options`; None where not given.

    Raises UserError for unknown suites, a source or data set that does not serve, another tokenizer, or an option that
    no suite takes.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise UserError(f"--suite {','.join(unknown)}: no such suite; there are {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be at least 1; leave it out to evaluate everything")
    given = {"data": data} | {key: value for key, value in options.items() if value is not None}
    own = {name: {key: given[key] for key in SUITES[name].options if key in given} for name in suites}
    for key in given.keys() - {"data"}:
        if not any(key in taken for taken in own.values()):
            raise UserError(f"--{key.replace('_', '-')}: no option of {', '.join(suites)}; leave it out")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for --out")
    subject = open_subject(source)
    dataset = open_data(subject, data) if any(SUITES[name].reads_data for name in suites) else None
    for name in suites:
        SUITES[name].check(subject, dataset, limit, **own[name])
    console = console or Console()
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    for name in suites:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            results[name] = SUITES[name].measure(subject, dataset, limit, bar, **own[name])
        out.mkdir(parents=True, exist_ok=True)
        SUITES[name].picture(results[name]).savefig(out / f"{name}.png")
        _write_json(out / f"{name}.json", results[name])
        console.print(SUITES[name].table(results[name]))
    return results


def parse_suites(text: str) -> tuple[list[str], tuple[str, ...] | None]:
    """Suites, and the tasks of `lm_eval:TASK,…`: what follows it up to the next suite. None where it is not there.

    A task that has the name of a suite is written with an `lm_eval:` of its own.
    """
    suites: list[str] = []
    tasks: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, task = part.partition(":") if part.startswith("lm_eval:") else (part, "", "")
        if suites[-1:] == ["lm_eval"] and part not in SUITES and not task:
            tasks.append(part)
        else:
            suites, tasks = [*(suite for suite in suites if suite != name), name], [*tasks, task]
    return suites, tuple(filter(None, tasks)) or None


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
    parser.add_argument(
        "--suite",
        required=True,
        metavar="NAME[,NAME…]",
        help=f"{', '.join(SUITES)}; lm_eval with its tasks, as in lm_eval:piqa,sciq or lm_eval:paper",
    )
    parser.add_argument(
        "--data", metavar="DATASET[,DATASET…]", help="data sets or names of the run's sources; default: the run's own"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where results go")
    parser.add_argument("--limit", type=int, metavar="N", help="how much is evaluated, in what the suite counts")
    parser.add_argument("--few-shot", type=int, metavar="N", help="lm_eval: examples before each sample")
    parser.add_argument("--tasks-folder", metavar="DIR", help="lm_eval: a folder that describes further tasks")
    parser.add_argument("--horizon", type=int, metavar="N", help="probes, latent: tokens ahead (default: 20)")
    parser.add_argument("--against", metavar="DIR", help="probes: the --out of another model's, to subtract")
    arguments = parser.parse_args(argv)
    console = Console()
    suites, tasks = parse_suites(arguments.suite)
    evaluate(
        arguments.source,
        suites,
        arguments.out,
        arguments.data,
        arguments.limit,
        console,
        tasks=tasks,
        few_shot=arguments.few_shot,
        tasks_folder=arguments.tasks_folder,
        horizon=arguments.horizon,
        against=arguments.against,
    )
    console.print(f"results in {arguments.out}", highlight=False)


if __name__ == "__main__":
    run_command(main)

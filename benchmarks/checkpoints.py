"""What saving costs a run, and whether going on takes longer the further a run has come.

    python -m benchmarks.checkpoints [--out docs/results/checkpoints.md]

Saves a model of some tens of megabytes every second step, in the background and with the training waiting, in turn; and
goes on from checkpoints that say they are of ever later steps. One rank, ZeRO-3.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console

from benchmarks.elastic import Shape, make_data, write_config

STEPS, EVERY = 16, 2
POSITIONS = [16, 1_000, 100_000, 10_000_000]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description="What saving costs.")
    parser.add_argument("--width", type=int, default=256, help="of the model (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("--out", type=Path, help="write the tables there too, below the text that is there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        data = make_data(Path(work))
        tables = [stalls(Path(work), data, options.width, options.repeats), resumes(Path(work), data, options.repeats)]
    text = "\n".join(tables)
    Console(soft_wrap=True).print(text, markup=False)
    if options.out is not None:
        before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(f"{before.partition('| saving')[0]}{text}", encoding="utf-8")


def stalls(work: Path, data: Path, width: int, repeats: int) -> str:
    """How long training waits for a save, beside the steps that it waits between."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    steps: dict[bool, list[float]] = {True: [], False: []}
    for number in range(repeats):
        for in_background in waits:
            name = f"stalls_{number}_{in_background}"
            keys = {"checkpoint": {"every": EVERY, "in_background": in_background}, "model": _model(width)}
            train(config(work, data, name, keys))
            lines = (work / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines][2:]  # the first steps warm up
            found = [line.get("checkpoint_stall_seconds") for line in records]
            waits[in_background] += [stall for stall in found if stall is not None]
            steps[in_background] += [line["step_seconds"] for line in records]
    size = sum(file.stat().st_size for file in (work / "runs" / name).glob(f"checkpoints/step_{STEPS:08d}/*"))
    table = [f"| saving {size / 1e6:.0f} MB | stall, ms | step, ms | stall ÷ step |", "|---|---|---|---|"]
    for in_background, label in [(True, "in the background"), (False, "while training waits")]:
        stall, step = (1e3 * statistics.median(times[in_background]) for times in (waits, steps))
        table.append(f"| {label} | {stall:.0f} | {step:.0f} | {stall / step:.2f} |")
    return "\n".join(table) + "\n"


def resumes(work: Path, data: Path, repeats: int) -> str:
    """Seconds from the start of a run to its end one step later, by the step that it goes on from."""
    from pretrain.checkpoints.manifest import MANIFEST, flush_and_hash, write_manifest
    from pretrain.checkpoints.retention import name_of

    train(config(work, data, "source", {}))
    source = work / "runs" / "source" / "checkpoints" / name_of(STEPS)
    seconds: dict[int, list[float]] = {position: [] for position in POSITIONS}
    for number in range(repeats):
        for position in POSITIONS:
            run = work / "runs" / f"resumed_{number}_{position}"
            path = Path(shutil.copytree(source, run / "checkpoints" / name_of(position)))
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            (path / "state.json").write_text(json.dumps(state | {"step": position, "metrics_bytes": 0}))
            (path / MANIFEST).unlink()
            write_manifest(path, {"step": position}, flush_and_hash(path, path.iterdir()))
            start = time.perf_counter()
            schedule = {"name": "constant", "steps": 2 * max(POSITIONS)}
            train(config(work, data, run.name, {"schedule": schedule, "run": {"stop_after": 1}}))
            seconds[position].append(time.perf_counter() - start)
    table = ["| goes on from step | seconds to one step more, saved |", "|---|---|"]
    table += [f"| {position:,} | {statistics.median(times):.2f} |" for position, times in seconds.items()]
    return "\n".join(table) + "\n"


def config(work: Path, data: Path, name: str, keys: dict[str, dict[str, object]]) -> Path:
    """The elastic benchmark's run for one rank, with some keys set differently."""
    path = write_config(work, data, Shape(1, 3), name)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["schedule"] = {"name": "constant", "steps": STEPS}
    for section, changes in keys.items():
        values[section] = {**values.get(section, {}), **changes} if section != "schedule" else changes
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train(path: Path) -> None:
    """Train in this process."""
    from pretrain.config import load_config
    from pretrain.train import train as train_run

    train_run(load_config(path))


def _model(width: int) -> dict[str, object]:
    return {"layers": 4, "width": width, "heads": 4, "kv_heads": 4}


if __name__ == "__main__":
    main()

"""Runs that go on in another shape: other ranks, another ZeRO stage, beside the same runs left alone.

    python -m benchmarks.elastic [--out docs/results/elastic.md]

Every run is saved after 4 steps and goes on for 20 in each other shape; the global batch stays. Prints, for each pair,
the first loss after the change and the largest relative difference of the loss from the run that never changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console

from benchmarks.small_run import write_run_config

STEPS_BEFORE, STEPS_AFTER = 4, 20


@dataclass(frozen=True)
class Shape:
    """How a run is spread."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO-{self.stage}"


def shape_pairs() -> list[tuple[Shape, Shape]]:
    """Each pair of world sizes under ZeRO-3, and stage changes with and without a change of ranks."""
    pairs = [(Shape(a, 3), Shape(b, 3)) for a, b in product((1, 2, 3), repeat=2) if a != b]
    stages = [(Shape(2, 3), Shape(2, stage)) for stage in (0, 1, 2)]
    back = [(Shape(2, stage), Shape(2, 3)) for stage in (0, 1, 2)]
    return [*pairs, *stages, *back, (Shape(3, 2), Shape(1, 0)), (Shape(1, 0), Shape(2, 1)), (Shape(2, 1), Shape(3, 2))]


def measure(work: Path, pairs: list[tuple[Shape, Shape]]) -> list[list[str]]:
    """The table's rows, one for each pair."""
    data = make_data(work)
    sources = sorted({before for before, _ in pairs}, key=str)

    def config(shape: Shape, name: str) -> Path:
        return write_config(work, data, shape, name)

    for ranks in sorted({shape.ranks for shape in sources}):
        runs = []
        for shape in (shape for shape in sources if shape.ranks == ranks):
            runs += [str(config(shape, f"whole_{ranks}_{shape.stage}"))]
            runs += [f"{config(shape, f'start_{ranks}_{shape.stage}')}|run.stop_after={STEPS_BEFORE}"]
        start(ranks, runs)
    for ranks in sorted({after.ranks for _, after in pairs}):
        runs = []
        for before, after in ((before, after) for before, after in pairs if after.ranks == ranks):
            name = _name(before, after)
            shutil.copytree(work / "runs" / f"start_{before.ranks}_{before.stage}", work / "runs" / name)
            runs.append(str(config(after, name)))
        start(ranks, runs)
    return [row(work / "runs", before, after) for before, after in pairs]


def row(runs: Path, before: Shape, after: Shape) -> list[str]:
    """One pair's line."""
    whole = losses(runs / f"whole_{before.ranks}_{before.stage}")[STEPS_BEFORE:]
    changed = losses(runs / _name(before, after))[STEPS_BEFORE:]
    assert len(whole) == len(changed) == STEPS_AFTER
    largest = max(abs(a - b) / a for a, b in zip(whole, changed, strict=True))
    return [str(before), str(after), f"{whole[0]:.6f}", f"{changed[0]:.6f}", f"{largest:.1e}"]


def losses(run: Path) -> list[float]:
    """A run's loss at each step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def make_data(work: Path) -> Path:
    """A small data set of some of the standard library's files, in bytes."""
    from data_pipeline.prepare import main as prepare

    source, data = work / "source", work / "data"
    source.mkdir()
    for path in Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"):
        shutil.copyfile(path, source / f"{path.stem}.txt")
    prepare(["--source", str(source), "--tokenizer", "bytes", "--validation", "0.2", "--out", str(data)])
    return data


def write_config(work: Path, data: Path, shape: Shape, name: str) -> Path:
    """A small NextLat run; 12 sequences a step fit one, two and three ranks."""
    changes = {
        "batch": {"global_sequences": 12, "micro_sequences": 12 // shape.ranks if shape.ranks < 3 else 2},
        "optimizer.learning_rate": 1e-3,
        "schedule": {"name": "cosine", "steps": STEPS_BEFORE + STEPS_AFTER, "warmup_steps": 2},
        "validation": {"sequences": 6},
        "deepspeed.zero_optimization.stage": shape.stage,
    }
    return write_run_config(work, data, name, changes)


def start(ranks: int, runs: list[str]) -> None:
    """Train runs, one after the other, in one start of the ranks; `path|section.key=value` sets keys."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.elastic", "--train", *runs]
    children = [
        subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.DEVNULL)
        for r in range(ranks)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"training on {ranks} ranks ended with {codes}")


def train_all(runs: list[str]) -> None:
    """What each rank does."""
    import torch.distributed as dist

    from pretrain.config import load_config
    from pretrain.train import train

    for run in runs:
        path, *overrides = run.split("|")
        train(load_config(path, overrides))
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description="Runs that change their shape.")
    parser.add_argument("--out", type=Path, help="write the table there too, below the text that is there")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        train_all(options.train)
        return
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work), shape_pairs())
    head = [
        "saved by",
        "goes on with",
        "next loss, unchanged",
        "next loss, changed",
        "largest difference, 20 steps",
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    Console(soft_wrap=True).print(table, markup=False)
    if options.out is not None:
        text = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(f"{text.partition('| saved by')[0]}{table}", encoding="utf-8")


def _name(before: Shape, after: Shape) -> str:
    return f"from_{before.ranks}_{before.stage}_to_{after.ranks}_{after.stage}"


if __name__ == "__main__":
    main()

"""What an export takes: memory, against its bound, and time, from a checkpoint of the paper's size.

    python -m benchmarks.export --scratch DIR [--out docs/results/export.md]

Makes a ZeRO-3 checkpoint of 8 ranks with random weights under DIR, 17 GB at the paper's size, and exports it in float32
and bfloat16, each in a process of its own, whose peak of resident memory the kernel tells: libraries, mapped files and
verification included. Everything under DIR that this made is removed afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from data_pipeline import Tokenizer, UserError, load_tokenizer, run_command
from pretrain.config import Config, load_config

RANKS = 8
SIZES: dict[str, tuple[list[str], int]] = {
    # Changes to the paper's config, and rows of the embedding. No parameter of "small" but the head's divides by 8.
    "1.3b": ([], 50_257),
    "small": (["model.layers=2", "model.width=36", "model.heads=3", "objective.dynamics_width=50"], 1_001),
}
CONFIG = Path(__file__).parents[1] / "configs" / "fineweb_edu_1b" / "nextlat_d1.yaml"
MOST_SCRATCH_BYTES = 25 * 10**9


def bound(largest_tensor_bytes: int) -> int:
    """The memory that an export may take: twice the largest tensor in float32, and 1 GB."""
    return 2 * largest_tensor_bytes + 10**9


def measure(work: Path, size: str, dtypes: list[str], console: Console) -> tuple[str, list[dict[str, Any]]]:
    """Make the checkpoint under `work` and export it in each precision; what it is, and what each export took."""
    from benchmarks.synthetic_checkpoint import parameter_groups, write_checkpoint

    overrides, vocab_size = SIZES[size]
    config = load_config(CONFIG, overrides)
    values = [shape.numel() for group in parameter_groups(config, vocab_size) for shape in group.values()]
    _check_room(work, 16 * sum(values))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing ranks", total=RANKS)
        checkpoint = write_checkpoint(
            work / "run" / "checkpoints" / "step_00000001",
            config,
            vocab_size,
            RANKS,
            _tokenizer(work),
            lambda: progress.update(task, advance=1),
        )
    rows = []
    for dtype in dtypes:
        out = work / f"export_{dtype}"
        found = _in_own_process(checkpoint, out, dtype)
        found["bound"] = bound(4 * max(values))
        found["bytes"] = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
        found["files"] = len(list(out.rglob("*.safetensors")))
        found["verified"] = json.loads((out / "nextlat_manifest.json").read_text(encoding="utf-8"))["verified"]
        rows.append(found)
        shutil.rmtree(out)
    size_on_disk = sum(path.stat().st_size for path in checkpoint.iterdir())
    described = (
        f"{sum(values) / 1e6:,.1f} million parameters ({_shape(config)}), ZeRO-3 on {RANKS} ranks, checkpoint of "
        f"{size_on_disk / 1e9:.2f} GB, largest tensor {4 * max(values) / 1e6:,.1f} MB in float32."
    )
    return described, rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; MB is 10⁶ bytes."""
    head = ["precision", "peak memory, MB", "bound, MB", "before, MB", "opening, s", "writing, s", "export, s", "MB/s"]
    head += ["safetensors, GB", "values equal", "greedy tokens equal", "largest logit difference"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["dtype"], *(f"{row[key] / 1e6:,.0f}" for key in ("peak", "bound", "before"))]
        cells += [f"{row[key]:,.1f}" for key in ("opening", "writing", "exporting")]
        cells += [f"{row['bytes'] / 1e6 / row['writing']:,.0f}", f"{row['bytes'] / 1e9:.2f} in {row['files']}"]
        verified = row["verified"]
        cells += [f"{verified['values_equal']:,}", str(verified["greedy_tokens_equal"])]
        lines.append([*cells, f"{verified['logit_difference']:.1e}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(described: str, rows: list[dict[str, Any]], command: str) -> str:
    """The text of docs/results/export.md."""
    return f"""# What an export takes

`{command}`, {datetime.date.today()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}. Load average of
the last 15 minutes: {os.getloadavg()[2]:.0f} on {os.cpu_count()} cores; times are only as good as that.

{described} Random weights.

{table(rows)}
Peak memory is the process's resident memory as the kernel counts it (VmHWM): libraries, touched pages of mapped files
and the verification included. "Before" is what it was with the libraries loaded and nothing read. The bound is
twice the largest tensor and 1 GB. Opening reads the checkpoint to compare its sha256; MB/s is of the files written
while writing; "export" is writing, reading back bit by bit, running both models one weight at a time, and sha256 of the
result.
"""


def _tokenizer(work: Path) -> Tokenizer:
    from data_pipeline.tokenizers import train_sentencepiece

    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-b]*.py"))]
    path = work / "tokenizer.model"
    path.write_bytes(train_sentencepiece(texts, 600))
    return load_tokenizer(path)


def _shape(config: Config) -> str:
    return f"{config.model.layers} layers, width {config.model.width}, {config.objective.name}"


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > MOST_SCRATCH_BYTES or free < needed:
        raise UserError(
            f"--scratch {work}: {needed / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB are free; give another folder"
        )


def _in_own_process(checkpoint: Path, out: Path, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.export", "--scratch", str(out), "--one", str(checkpoint), dtype]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _export_one(checkpoint: Path, out: Path, dtype: str) -> dict[str, Any]:
    """What the child process does."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # counts as before

    from pretrain.checkpoints import open_checkpoint
    from pretrain.export import export

    before, start, clock = _peak(), time.perf_counter(), time.time()
    opened = open_checkpoint(checkpoint)
    opening = time.perf_counter() - start
    clock += opening
    export(opened, out, dtype)
    return {
        "dtype": dtype,
        "before": before,
        "peak": _peak(),
        "opening": opening,
        "writing": max(path.stat().st_mtime for path in out.rglob("*.safetensors")) - clock,
        "exporting": time.perf_counter() - start - opening,
    }


def _peak() -> int:
    """Bytes of resident memory at the most. Not getrusage's, which counts the parent's before this program began."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description="What an export takes.")
    parser.add_argument(
        "--scratch", type=Path, required=True, metavar="DIR", help="where up to 25 GB may lie meanwhile"
    )
    parser.add_argument("--size", choices=SIZES, default="1.3b", help="(default: the paper's)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE", help="(default: both)")
    parser.add_argument("--out", type=Path, help="write the page there too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        print(json.dumps(_export_one(Path(options.one[0]), options.scratch, options.one[1])))
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as work:
        described, rows = measure(Path(work), options.size, options.dtypes, Console(stderr=True))
    text = page(described, rows, f"python -m benchmarks.export --size {options.size}")
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)

"""The time of a whole training step, objective by objective, on one trunk: forward, backward and AdamW's step.

    python -m benchmarks.step [--repeats 5] [--out docs/results/step.md]
    python -m benchmarks.step --device cuda --size 1.3b         # the paper's shape, bfloat16, on one GPU

Plain torch, without DeepSpeed: one rank has nothing to share, and what is compared is the objectives. Each repeat
measures every objective once, each with a model of its own after a short step that warms it up; ratios to GPT are
formed within a repeat, and their medians printed. On a CPU, seconds are those of one thread's processor time, which
other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from pretrain.config import Config
from pretrain.flops import flops_per_token
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch

# BST keeps as many pairs a token as make its step cost about what the paper's does; the paper names no fraction.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "width": 32, "heads": 2, "vocabulary": 128, "T": 32, "rows": 1, "pairs": 0.1},
    "small": {"layers": 8, "width": 512, "heads": 8, "vocabulary": 8192, "T": 256, "rows": 2, "pairs": 0.02},
    "1.3b": {"layers": 22, "width": 2048, "heads": 16, "vocabulary": 50_257, "T": 1024, "rows": 32, "pairs": 0.01},
}
DYNAMICS_RATIO = 6528 / 2048  # p_psi's hidden width, in widths of the trunk, of the paper's 1.3B model
PAPER = {  # training steps per second at d = 1, 2, 8: 1.3B, one B200, batches of 33k tokens
    "bst": [0.89],
    "mtp": [2.80, 2.58, 1.70],
    "jtp": [3.15, 2.92, 2.02],
    "nextlat": [3.09, 2.79, 1.73],
}
PAPER_GPT = 3.09
HORIZONS = (1, 2, 8)


def objectives(size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every contender's objective section, by its label."""
    dynamics_width = round(DYNAMICS_RATIO * size["width"])
    found: dict[str, dict[str, Any]] = {"gpt": {"name": "next_token"}}
    found["bst"] = {"name": "bst", "pair_fraction": size["pairs"]}
    for d in HORIZONS:
        found[f"mtp {d}"] = {"name": "mtp", "horizon": d, "multi_token_weight": 1.0}
    for d in HORIZONS:
        found[f"jtp {d}"] = {"name": "jtp", "horizon": d, "joint_token_weight": 1.0}
    weights = {"next_latent_weight": 1.0, "kl_weight": 1.0, "dynamics_width": dynamics_width}
    for d in HORIZONS:
        found[f"nextlat {d}"] = {"name": "nextlat", "horizon": d, **weights}
    return found


def config_of(objective: dict[str, Any], size: dict[str, Any]) -> Config:
    """A run's config with this objective."""
    return Config.model_validate(
        {
            "run": {"name": "step"},
            "model": {key: size[key] for key in ("layers", "width", "heads")},
            "objective": objective,
            "data": {"path": "none", "sequence_length": size["T"]},
            "batch": {"global_sequences": size["rows"], "micro_sequences": size["rows"]},
            "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )


def one_document_rows(rows: int, length: int, vocabulary: int, device: torch.device) -> TokenBatch:
    """Random tokens, each row one document."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
    columns = torch.arange(length + 1).expand(rows, -1)
    everything = torch.ones(rows, length + 1, dtype=torch.bool)
    return TokenBatch(*(x.to(device) for x in (tokens, torch.zeros_like(tokens), columns, everything)))


def seconds_of_a_step(config: Config, size: dict[str, Any], device: torch.device, steps: int) -> float:
    """Mean seconds of a training step of a fresh model, after a step on a few tokens."""
    on_gpu = device.type == "cuda"
    with device:
        model = PretrainingModel(config, size["vocabulary"])
    initialise(model, seed=0, std=0.02)
    model.to(torch.bfloat16 if on_gpu else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=on_gpu)

    def step(batch: TokenBatch) -> None:
        model(batch, model.objective.valid_counts(batch))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = one_document_rows(size["rows"], size["T"], size["vocabulary"], device)
    step(whole if on_gpu else one_document_rows(1, max(HORIZONS) + 2, size["vocabulary"], device))
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(steps):
        step(whole)
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / steps


def measure(size: dict[str, Any], device: torch.device, repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step, by contender, one entry a repeat; every other repeat goes through them backwards."""
    configs = {label: config_of(objective, size) for label, objective in objectives(size).items()}
    seconds: dict[str, list[float]] = {label: [] for label in configs}
    jobs = [label for repeat in range(repeats) for label in list(configs)[:: 1 if repeat % 2 == 0 else -1]]
    for label in track(jobs, description="measuring", console=Console(stderr=True)):
        seconds[label].append(seconds_of_a_step(configs[label], size, device, steps))
    return seconds


def rows_of(seconds: dict[str, list[float]], size: dict[str, Any]) -> list[list[str]]:
    """The table: objective, seconds, ratio to GPT, that of counted FLOPs, the quotient of both, the paper's ratio."""
    flops = {
        label: flops_per_token(config_of(objective, size), size["vocabulary"])
        for label, objective in objectives(size).items()
    }
    rows = []
    for label, measured in seconds.items():
        name, _, d = label.partition(" ")
        published = PAPER.get(name, [PAPER_GPT])[HORIZONS.index(int(d)) if d else 0]
        ratio = statistics.median(mine / gpt for mine, gpt in zip(measured, seconds["gpt"], strict=True))
        allowed = flops[label] / flops["gpt"]
        numbers = (statistics.median(measured), ratio, allowed, ratio / allowed, PAPER_GPT / published)
        rows.append([label, *(f"{number:.2f}" for number in numbers)])
    return rows


def page(rows: list[list[str]], size: dict[str, Any], device: torch.device, repeats: int) -> str:
    """The results as Markdown."""
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else "one thread of a shared CPU, processor seconds"
    lines = [
        "# A training step, objective by objective",
        "",
        f"`python -m benchmarks.step`, {datetime.date.today()}, {where}, torch {torch.__version__}, "
        f"{'bfloat16' if on_gpu else 'float32'}.",
        "",
        f"{size['layers']} layers, width {size['width']}, V = {size['vocabulary']:,}, T = {size['T']}, "
        f"{size['rows']} rows of one document; BST trains on {size['pairs']:.0%} of its pairs. Forward, backward and "
        f"AdamW. Medians of {repeats}, ratios formed within a repeat.",
        "",
        "| objective, d | seconds | ÷ GPT | FLOPs ÷ GPT | time ÷ FLOPs | paper's time ÷ GPT |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "FLOPs are those that `pretrain.flops` counts. The paper's: 1.3B parameters, one B200, batches of 33k tokens.",
        "In a small trunk the head and p_psi are a larger share, so ratios to GPT are larger than there.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, print the page, and write it where told."""
    parser = argparse.ArgumentParser(prog="benchmarks.step")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="sequences of a batch; default: the size's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="timed at a stretch; default: 1, on a GPU 10")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    size = SIZES[arguments.size] | ({"rows": arguments.rows} if arguments.rows else {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = measure(size, device, arguments.repeats, arguments.steps or (10 if device.type == "cuda" else 1))
    finally:
        torch.set_num_threads(threads)
    text = page(rows_of(seconds, size), size, device, arguments.repeats)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

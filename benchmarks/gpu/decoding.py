"""Drafting on a GPU: the draft step launched kernel by kernel and as one captured graph, beside what surrounds it.

    python -m benchmarks.gpu.decoding            # trunks of GPT-2's size and of 1.3B, bfloat16, one text and eight
    python -m benchmarks.gpu.decoding --small    # a shape for CPUs, to see that it runs: nothing is captured there

Prints, for each trunk and batch, medians in milliseconds: a plain cycle; a draft step of either kind, and captured over
launched; for each number of drafts a whole cycle with captured steps, over one with launched ones, and the speed-up
over plain decoding where each draft stands with chance 0.8 (1 + 0.8 + 0.8² + … tokens a cycle). Weights are random, as
times do not depend on them; that is why acceptance is stated and not measured: for a trained model's see
`benchmarks.decoding`. Fails where a captured step's logits are not those of the launched one, bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.random_model import GPT2, random_model
from pretrain.decoding import DraftStep, FixedLength, draft_with_latent_dynamics, generate_batch
from pretrain.decoding.captured import CapturedStep

TRUNKS = {
    "GPT-2": GPT2,
    "1.3B": {"layers": 24, "width": 2048, "heads": 16, "mlp_width": 5504, "vocabulary": 50_257, "dynamics_width": 6528},
}
SMALL = {"small": {"layers": 2, "width": 32, "heads": 2, "mlp_width": 64, "vocabulary": 300, "dynamics_width": 64}}
STANDS = 0.8
PROMPT = 64


def waits(device: torch.device) -> None:
    """Until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_seconds(steps: list[DraftStep], inputs: tuple[Tensor, Tensor], repeats: int) -> list[float]:
    """Median seconds of each draft step, taken in turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(-CapturedStep.EAGER - 1, repeats):
        for mine, step in zip(seconds, steps, strict=True):
            waits(inputs[0].device)
            start = time.perf_counter()
            step(*inputs)
            waits(inputs[0].device)
            if number >= 0:
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in seconds]


def check_equal(steps: list[DraftStep], inputs: tuple[Tensor, Tensor]) -> None:
    """Raise SystemExit where the steps do not give the same, bit by bit."""
    first, *others = (step(*inputs) for step in steps)
    for other in others:
        if not all(map(torch.equal, first, other)):
            raise SystemExit("a captured step gives other logits than the step that was captured")


def cycle_seconds(
    decode: Callable[[DraftStep, int], float], steps: list[DraftStep], k: int, repeats: int
) -> list[float]:
    """Median seconds of a cycle of k drafts with each draft step, taken in turn after a run of each to warm up."""
    runs = [[decode(step, k) for step in steps] for _ in range(1 + repeats)][1:]
    return [statistics.median(mine) for mine in zip(*runs, strict=True)]


def measure(name: str, size: dict[str, int], batch: int, arguments: argparse.Namespace, device: torch.device) -> str:
    """One line of the table."""
    model, dynamics = (module.to(torch.bfloat16) for module in random_model(size, PROMPT + arguments.tokens, device))
    captured = draft_with_latent_dynamics(model, dynamics)
    steps = [captured.launched, captured] if isinstance(captured, CapturedStep) else [captured]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(size["vocabulary"], (batch, PROMPT), generator=generator).tolist()

    def decode(step: DraftStep, k: int) -> float:
        length = FixedLength(k)
        _, counted = generate_batch(model, prompts, arguments.tokens, draft_step=step, draft_length=length)
        return batch * counted.seconds / counted.cycles

    with torch.inference_mode():
        inputs = (
            torch.randn(batch, size["width"], dtype=torch.bfloat16, device=device),
            torch.randint(size["vocabulary"], (batch,), device=device),
        )
        draft = step_seconds(steps, inputs, 20 * arguments.repeats)
        check_equal(steps, inputs)
    plain = cycle_seconds(decode, steps[:1], 0, arguments.repeats)[0]
    cells = [
        f"{1e3 * plain:.2f}",
        *(f"{1e3 * seconds:.3f}" for seconds in draft),
        *["–"] * (2 - len(draft)),
        ratio(draft),
    ]
    for k in arguments.drafts:
        cycles = cycle_seconds(decode, steps, k, arguments.repeats)
        tokens = sum(STANDS**i for i in range(k + 1))
        cells += [f"{1e3 * cycles[-1]:.2f}", ratio(cycles), f"{tokens * plain / cycles[-1]:.2f}"]
    return f"{name:>6} {batch:>6} " + " ".join(f"{cell:>9}" for cell in cells)


def ratio(seconds: list[float]) -> str:
    """Captured over launched, where there are both."""
    return f"{seconds[1] / seconds[0]:.2f}" if len(seconds) > 1 else "–"


def main(argv: list[str] | None = None) -> None:
    """Measure every trunk and batch and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.decoding")
    parser.add_argument("--small", action="store_true", help="a shape that a CPU does in seconds")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a text")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        parser.error("no GPU here; run it on one, or with --small")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: bfloat16, ms, speed-up where each draft stands with chance {STANDS}")
    columns = ["plain", "draft", "captured", "ratio"]
    for k in arguments.drafts:
        columns += [f"k={k}", "ratio", "speed-up"]
    print(f"{'trunk':>6} {'batch':>6} " + " ".join(f"{column:>9}" for column in columns))
    for trunk, size in (SMALL if arguments.small else TRUNKS).items():
        for batch in arguments.batches:
            print(measure(trunk, size, batch, arguments, device))


if __name__ == "__main__":
    main()

"""Cross-entropy with d KL terms: our fused loss against the plain formulation with whole logits.

    python -m benchmarks.loss [--vocabulary 50257 --width 512 --positions 2048 --repeats 5]

Each case runs forward and backward in a process of its own, so that its peak memory is its own; the two
formulations alternate, so that a noisy machine hits both. Prints medians, and of the ratios of each pair the median:
of seconds by the clock, and of seconds that the process was computing, which tell more where a machine is shared.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pretrain.objectives.fused_loss import fused_cross_entropy_kl


def plain(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, rollouts_dND: Tensor) -> Tensor:
    """The paper's formulation: every logit exists at once."""
    teacher_NV = hidden_ND @ head_VD.T
    loss = F.cross_entropy(teacher_NV, targets_N)
    log_p_NV = teacher_NV.detach().log_softmax(-1)
    for rollout_ND in rollouts_dND:
        log_q_NV = (rollout_ND @ head_VD.detach().T).log_softmax(-1)
        kl = F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="none").sum(-1).mean()
        loss = loss + kl / len(rollouts_dND)
    return loss


def fused(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, rollouts_dND: Tensor) -> Tensor:
    """Ours."""
    steps, positions = rollouts_dND.shape[:2]
    weights_N = torch.full((positions,), 1 / positions)
    cross_entropy, kl_d = fused_cross_entropy_kl(
        hidden_ND, head_VD, targets_N, weights_N, rollouts_dND, weights_N.expand(steps, positions)
    )
    return cross_entropy + kl_d.mean()


def measure(name: str, vocabulary: int, width: int, positions: int, horizon: int) -> dict[str, float]:
    """Seconds and peak extra bytes of one forward and backward, after a small one that warms up."""
    torch.manual_seed(0)
    loss_of = {"plain": plain, "fused": fused}[name]
    head_VD = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    hidden_ND = torch.randn(positions, width, requires_grad=True)
    rollouts_dND = torch.randn(horizon, positions, width, requires_grad=True)
    targets_N = torch.randint(0, vocabulary, (positions,))
    loss_of(hidden_ND[:8], head_VD[:64], targets_N[:8] % 64, rollouts_dND[:, :8]).backward()
    head_VD.grad = hidden_ND.grad = rollouts_dND.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, computing = time.perf_counter(), time.process_time()
    loss = loss_of(hidden_ND, head_VD, targets_N, rollouts_dND)
    loss.backward()
    seconds, computing = time.perf_counter() - start, time.process_time() - computing
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "computing": computing, "bytes": 1024.0 * peak, "loss": float(loss.detach())}


def row(plain_runs: list[dict[str, float]], fused_runs: list[dict[str, float]]) -> list[str]:
    """A horizon's cells: medians of both, and the median of the ratios of its pairs."""

    def medians(key: str) -> list[float]:
        return [statistics.median(run[key] for run in runs) for runs in (plain_runs, fused_runs)]

    def ratio(key: str) -> str:
        pairs = zip(plain_runs, fused_runs, strict=True)
        return f"{statistics.median(fused[key] / plain[key] for plain, fused in pairs):.2f}"

    plain_bytes, fused_bytes = medians("bytes")
    return [
        *(f"{seconds:.2f}" for seconds in medians("seconds")),
        ratio("seconds"),
        ratio("computing"),
        f"{plain_bytes / 1e6:,.0f}",
        f"{fused_bytes / 1e6:,.0f}",
        f"1/{plain_bytes / max(fused_bytes, 1e3):.1f}",
    ]


def main(argv: list[str] | None = None) -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.loss")
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--positions", type=int, default=2_048)
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", nargs=2, metavar=("NAME", "HORIZON"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    shape = (arguments.vocabulary, arguments.width, arguments.positions)
    if arguments.case:
        name, horizon = arguments.case
        print(json.dumps(measure(name, *shape, int(horizon))))
        return
    table = Table(title=f"V={shape[0]:,} D={shape[1]} positions={shape[2]:,}, {torch.get_num_threads()} threads, fp32")
    columns = ("horizon", "plain s", "fused s", "time ratio", "computing ratio", "plain MB", "fused MB", "memory ratio")
    for column in columns:
        table.add_column(column, justify="right")
    jobs = [(d, repeat) for d in arguments.horizons for repeat in range(arguments.repeats)]
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    sizes = ["--vocabulary", str(shape[0]), "--width", str(shape[1]), "--positions", str(shape[2])]
    for horizon, _ in track(jobs, description="measuring"):
        for name in ("plain", "fused"):
            command = [sys.executable, "-m", "benchmarks.loss", *sizes, "--case", name, str(horizon)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.setdefault((name, horizon), []).append(json.loads(output))
    for horizon in arguments.horizons:
        table.add_row(str(horizon), *row(results["plain", horizon], results["fused", horizon]))
    Console().print(table)


if __name__ == "__main__":
    main()

"""Cross-entropy with d KL terms on a GPU, at the paper's 1.3B shape: our fused loss against the plain formulation.

    python -m benchmarks.gpu.loss            # D = 2,048, V = 50,257, 32,768 tokens, bfloat16, d = 1, 2, 8
    python -m benchmarks.gpu.loss --small    # a shape for CPUs, to see that it runs

Prints, for each d, peak memory beyond the inputs, median time of forward and backward, and ours over plain. The
plain formulation keeps 2 + d tensors of (tokens × vocabulary) at once, more than a GPU has at this batch. So it gets
its batch in equal parts, as few as fit, with gradients accumulated, as gradient accumulation would run it: its time
is that of all parts, its memory that of one part times their number, which is what one pass would need.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.fused_loss import fused_cross_entropy_kl

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def plain(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, rollouts_dND: Tensor, positions: int) -> Tensor:
    """The paper's formulation: every logit exists at once. Sums over positions, divided by `positions`."""
    teacher_NV = hidden_ND @ head_VD.T
    loss = F.cross_entropy(teacher_NV.float(), targets_N, reduction="sum")
    log_p_NV = teacher_NV.detach().float().log_softmax(-1)
    for rollout_ND in rollouts_dND:
        log_q_NV = (rollout_ND @ head_VD.detach().T).float().log_softmax(-1)
        loss = loss + F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum") / len(rollouts_dND)
    return loss / positions


def fused(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, rollouts_dND: Tensor, positions: int) -> Tensor:
    """Ours, the same number."""
    steps, here = rollouts_dND.shape[:2]
    weights_N = torch.full((here,), 1 / positions, device=hidden_ND.device)
    cross_entropy, kl_d = fused_cross_entropy_kl(
        hidden_ND, head_VD, targets_N, weights_N, rollouts_dND, weights_N.expand(steps, here)
    )
    return cross_entropy + kl_d.mean()


class Case:
    """One shape's tensors, and the two ways to a loss and its gradients."""

    def __init__(self, width: int, vocabulary: int, positions: int, horizon: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.device, self.positions = device, positions
        self.head_VD = (0.02 * normal(vocabulary, width)).requires_grad_()
        self.hidden_ND = normal(positions, width).requires_grad_()
        self.rollouts_dND = normal(horizon, positions, width).requires_grad_()
        self.targets_N = torch.randint(vocabulary, (positions,), generator=generator, device=device)

    def run(self, loss_of: Loss, parts: int) -> tuple[float, float, int]:
        """(loss, seconds, peak bytes beyond what was there) of a forward and backward pass over all positions."""
        for leaf in (self.head_VD, self.hidden_ND, self.rollouts_dND):
            leaf.grad = None
        before = self._start_peak()
        start = time.perf_counter()
        total = 0.0
        for part in torch.arange(self.positions).chunk(parts):
            here = slice(int(part[0]), int(part[-1]) + 1)
            rollouts = self.rollouts_dND[:, here]
            loss = loss_of(self.hidden_ND[here], self.head_VD, self.targets_N[here], rollouts, self.positions)
            loss.backward()
            total += float(loss.detach())  # waits for the GPU
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return total, seconds, self._peak() - before

    def _start_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def parts_that_fit(positions: int, vocabulary: int, horizon: int, device: torch.device) -> int:
    """Into how many parts the plain formulation's batch must fall: about 14 bytes a logit, one of 1 + d rows each."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info()
    needed, parts = 14 * positions * vocabulary * (1 + horizon), 1
    while needed / parts > 0.7 * free:
        parts *= 2
    return parts


def compare(case: Case, parts: int, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Losses, median seconds and peak bytes of (plain, fused), run in turn after a run that warms up."""
    ways: tuple[tuple[Loss, int], ...] = ((plain, parts), (fused, 1))
    runs: list[list[tuple[float, float, int]]] = [[], []]
    for _ in range(1 + repeats):
        for mine, (loss_of, its_parts) in zip(runs, ways, strict=True):
            mine.append(case.run(loss_of, its_parts))
    losses = [mine[-1][0] for mine in runs]
    seconds = [statistics.median(run[1] for run in mine[1:]) for mine in runs]
    # Gradients of the head and the states are the same for both and stay whole, whatever the parts.
    gradients = sum(leaf.nbytes for leaf in (case.head_VD, case.hidden_ND, case.rollouts_dND))
    peaks = [max(run[2] for run in mine) for mine in runs]
    whole = gradients + (peaks[0] - gradients) * parts
    return losses, seconds, [float(whole), float(peaks[1])]


def main(argv: list[str] | None = None) -> None:
    """Measure every horizon and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.loss")
    parser.add_argument("--small", action="store_true", help="a shape that a CPU does in seconds")
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.small:
        parser.error("no GPU here; run it on one, or with --small")
    width, vocabulary, positions = (64, 500, 256) if arguments.small else (2_048, 50_257, 32_768)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: D={width:,} V={vocabulary:,} tokens={positions:,} bfloat16")
    columns = ("parts", "plain ms", "fused ms", "time", "plain MB", "fused MB", "memory")
    print(f"{'d':>2} {columns[0]:>6} " + " ".join(f"{column:>10}" for column in columns[1:]))
    for horizon in arguments.horizons:
        parts = parts_that_fit(positions, vocabulary, horizon, device)
        losses, seconds, peaks = compare(Case(width, vocabulary, positions, horizon, device), parts, arguments.repeats)
        memory = f"1/{peaks[0] / peaks[1]:.1f}" if peaks[1] else "–"
        print(
            f"{horizon:>2} {parts:>6} {1e3 * seconds[0]:>10.1f} {1e3 * seconds[1]:>10.1f} "
            f"{seconds[1] / seconds[0]:>10.2f} {peaks[0] / 1e6:>10,.0f} {peaks[1] / 1e6:>10,.0f} {memory:>10}"
        )
        if abs(losses[0] - losses[1]) > 2e-2 * abs(losses[0]):
            raise SystemExit(f"the two formulations disagree at d={horizon}: {losses[0]} and {losses[1]}")


if __name__ == "__main__":
    main()

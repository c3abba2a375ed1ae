"""Suite `probes`: how much of the tokens further ahead can be read off the trunk's states by linear maps.

    probe k      softmax(W_k · h_t) for x_{t+k}, k = 1 … horizon (20): a matrix (V, D) each, without bias
    loss         mean of −log softmax(W_k · h_t)[x_{t+k}] over the validation sequences' positions, in nats
    difference   loss minus another model's on the same positions (--against)

The states are frozen. All probes are trained together, from zero, on the training split's sequences in one order for
every model: AdamW without decay, a learning rate that falls in a straight line to zero. The problem is convex, so what
remains between models is in their states. A position counts where x_{t+k} is a target and the tokens between lie in the
document of x_t.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from data_pipeline import Dataset, Stream, UserError, mix
from pretrain.evals.ahead import HORIZON, SEQUENCES, check_horizon, first_batches, rows_per_batch
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import SEED
from pretrain.objectives import TokenBatch
from pretrain.objectives.base import ahead_masks, ahead_targets

STEPS = 1000
LEARNING_RATE = 1e-3
LOGIT_POSITIONS = 2048
"""Positions whose logits are in memory at a time."""


def measure(
    subject: Subject,
    dataset: Dataset,
    limit: int | None,
    progress: Progress,
    horizon: int | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """Train probes for `limit` steps and judge them.

    Keys of the result: those of `Subject.described`, dataset, data_fingerprint, steps, horizon, positions (judged, of
    each offset), loss (of each offset), next_token_loss (of the model's own head where offset 1 is judged), and with
    `against`: against, against_loss, difference.
    """
    horizon, steps = horizon or HORIZON, limit or STEPS
    probes = train(subject, _training_stream(subject, dataset), steps, horizon, progress)
    nats, counts, next_token_nats = judge(subject, dataset, probes, progress)
    result = subject.described() | {
        "dataset": str(dataset.path),
        "data_fingerprint": dataset.fingerprint,
        "steps": steps,
        "horizon": horizon,
        "positions": counts.tolist(),
        "loss": (nats / counts).tolist(),
        "next_token_loss": next_token_nats / int(counts[0]),
    }
    if against is not None:
        other = _read_other(against, result)
        difference = [mine - its for mine, its in zip(result["loss"], other["loss"], strict=True)]
        result |= {"against": other["source"], "against_loss": other["loss"], "difference": difference}
    return result


def _training_stream(subject: Subject, dataset: Dataset) -> Stream:
    """The training split's sequences, in an order that depends on the data alone."""
    return mix(
        [dataset],
        [{"weight": 1.0}],
        seed=SEED,
        sequence_length=subject.sequence_length,
        global_sequences=rows_per_batch(subject),
    )


def train(subject: Subject, stream: Stream, steps: int, horizon: int, progress: Progress) -> nn.ParameterList:
    """The probes' matrices, (V, D) for each of `horizon` offsets."""
    shape = subject.head_VD.shape
    probes = nn.ParameterList(torch.zeros(shape, device=subject.device) for _ in range(horizon))
    optimizer = torch.optim.AdamW(probes.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batches = stream.batches(0, steps)
    for step, numpy_batch in enumerate(progress.track(batches, total=steps, description="training probes")):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        batch = TokenBatch.from_numpy(numpy_batch, subject.device)
        counts = ahead_masks(batch, horizon - 1).sum((1, 2)).clamp(min=1)
        for offset, nats in _nats(subject, batch, probes):
            (nats / counts[offset]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return probes


@torch.no_grad()
def judge(
    subject: Subject, dataset: Dataset, probes: nn.ParameterList, progress: Progress
) -> tuple[Tensor, Tensor, float]:
    """(nats (K,) float64, positions (K,), nats of the model's own head at offset 1) on the validation sequences."""
    nats, counts = torch.zeros(len(probes), dtype=torch.double), torch.zeros(len(probes), dtype=torch.long)
    next_token_nats = 0.0
    for numpy_batch in progress.track(first_batches(subject, dataset, SEQUENCES), description="judging probes"):
        batch = TokenBatch.from_numpy(numpy_batch, subject.device)
        masks = ahead_masks(batch, len(probes) - 1)
        counts += masks.sum((1, 2)).cpu()
        for offset, part in _nats(subject, batch, probes):
            nats[offset] += part.double().cpu()
        logits_PV = F.linear(subject.hidden_states(batch)[masks[0]], subject.head_VD)
        next_token_nats += float(F.cross_entropy(logits_PV.float(), batch.tokens[:, 1:][masks[0]], reduction="sum"))
    return nats, counts, next_token_nats


def _nats(subject: Subject, batch: TokenBatch, probes: nn.ParameterList) -> Iterator[tuple[int, Tensor]]:
    """(offset − 1, Σ −log p) of a bounded number of positions at a time, over all offsets."""
    with torch.no_grad():
        states_BTD = subject.trunk_states(batch).float()
    masks, targets = ahead_masks(batch, len(probes) - 1), ahead_targets(batch, len(probes) - 1)
    for offset, probe_VD in enumerate(probes):
        states_PD, targets_P = states_BTD[masks[offset]], targets[offset][masks[offset]]
        for part_PD, part_P in zip(states_PD.split(LOGIT_POSITIONS), targets_P.split(LOGIT_POSITIONS), strict=True):
            yield offset, F.cross_entropy(F.linear(part_PD, probe_VD), part_P, reduction="sum")


def _read_other(path: str, mine: dict[str, Any]) -> dict[str, Any]:
    """Another model's result. Raises UserError unless it is of the same positions and as much training."""
    file = Path(path) / "probes.json" if Path(path).is_dir() else Path(path)
    try:
        other: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        compared = {key: other[key] for key in ("data_fingerprint", "horizon", "steps", "positions", "source", "loss")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--against {path}: no result of the suite probes there ({error!r}); give the --out of its evaluation"
        ) from None
    for key in ("data_fingerprint", "horizon", "steps", "positions"):
        if key in mine and compared[key] != mine[key]:
            raise UserError(
                f"--against {path}: its {key} is not the one here, so the losses cannot be compared; evaluate both "
                "with the same --data, --horizon and --limit, at one sequence length"
            )
    return compared


def headline(result: dict[str, Any]) -> dict[str, float]:
    """The loss at some offsets."""
    offsets = [offset for offset in (1, 2, 5, 10, 20) if offset <= result["horizon"]]
    return {f"probe {offset}": result["loss"][offset - 1] for offset in offsets}


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    rows = Table(title=f"probes: nats (the model's own head: {result['next_token_loss']:.4f})", title_justify="left")
    rows.add_column("tokens ahead", justify="right")
    rows.add_column("loss", justify="right")
    if "difference" in result:
        rows.add_column("difference", justify="right")
    for offset, loss in enumerate(result["loss"], start=1):
        more = [f"{result['difference'][offset - 1]:+.4f}"] if "difference" in result else []
        rows.add_row(str(offset), f"{loss:.4f}", *more)
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """The loss of each offset; with another model, what it is above or below."""
    offsets = list(range(1, result["horizon"] + 1))
    if "difference" in result:
        figure, axes = new_picture(f"Linear probes, loss minus that of {Path(result['against']).name}")
        axes.axhline(0, color=GREY, linewidth=1)
        axes.plot(offsets, result["difference"], color=ACCENT, marker="o", markersize=4)
        axes.set_ylabel("difference, nats (less is better)")
    else:
        figure, axes = new_picture("Linear probes on frozen states")
        axes.plot(offsets, result["loss"], color=ACCENT, marker="o", markersize=4)
        axes.plot([1], [result["next_token_loss"]], "o", color=INK, markersize=5, label="the model's own head")
        axes.set_ylabel("loss, nats (less is better)")
        axes.legend(frameon=False)
    axes.set_xlabel("tokens ahead")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def check(
    subject: Subject, dataset: Dataset, limit: int | None, horizon: int | None = None, against: str | None = None
) -> None:
    """Needs documents that reach as far as the last probe, something to train on, and a comparable other result."""
    horizon = HORIZON if horizon is None else horizon
    batches = first_batches(subject, dataset, SEQUENCES)
    check_horizon(subject, dataset, batches, horizon, lambda batch, steps: ahead_masks(batch, steps - 1))
    _training_stream(subject, dataset).batch(0)
    if against is not None:
        steps, fingerprint = limit or STEPS, dataset.fingerprint
        _read_other(against, {"data_fingerprint": fingerprint, "horizon": horizon, "steps": steps})


PROBES = Suite(measure, table, picture, check, headline, options=("horizon", "against"))

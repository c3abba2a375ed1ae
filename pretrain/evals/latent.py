"""Suite `latent`: the states themselves, how far p_ψ's rollout drifts from them, and how calibrated both are.

On the first validation sequences (256), h the trunk's states, ĥ_{t+i} the rollout over i steps from h_t:

    effective_rank      exp(entropy of σ / Σσ) of the uncentred matrix of all h (the paper's measure of compactness)
    relative_error      mean of |ĥ_{t+i} − h_{t+i}| / |h_{t+i}|;   `copied`: of |h_t − h_{t+i}| / |h_{t+i}|, no model
    cosine              mean cosine of ĥ_{t+i} and h_{t+i}
    kl                  mean of KL(p(· | h_{t+i}) ‖ p(· | ĥ_{t+i})), nats
    loss                mean of −log p(x_{t+i+1} | ĥ_{t+i}), nats; the trunk's, of −log p(x_{t+1} | h_t)
    calibration_error   Σ_b n_b / N · |right_b − confidence_b|, over 15 equal bins of the confidence, which is the
                        probability of the likeliest token (expected calibration error, Guo et al., arXiv 1706.04599)

A rollout counts where it stays inside one document; kl, loss and calibration where besides the token that is predicted
is a target. A model without p_ψ has the rank and the trunk's calibration alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from data_pipeline import Dataset
from pretrain.evals.ahead import HORIZON, SEQUENCES, check_horizon, first_batches
from pretrain.evals.latent_pictures import picture
from pretrain.evals.subject import Subject
from pretrain.evals.suite import Suite
from pretrain.evals.task_subject import latent_dynamics, rank_of
from pretrain.objectives import TokenBatch
from pretrain.objectives.base import next_token_mask
from pretrain.objectives.nextlat import rollout_mask

BINS = 15
LOGIT_POSITIONS = 1024
"""Positions whose logits are in memory at a time."""


@dataclass
class Predictions:
    """How well distributions foretold tokens: sums over positions."""

    nats: float = 0.0
    count: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.double))
    """(BINS,) positions by confidence, and below of these the right ones, and the sum of confidences."""
    right: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.double))
    confidence: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.double))

    def add(self, log_p_PV: Tensor, targets_P: Tensor) -> None:
        """Count P positions."""
        self.nats += float(F.nll_loss(log_p_PV, targets_P, reduction="sum"))
        best = log_p_PV.max(-1)
        confidence_P = best.values.exp().double().cpu()
        bins_P = (confidence_P * BINS).long().clamp(max=BINS - 1)
        for sums, values in (
            (self.count, torch.ones_like(confidence_P)),
            (self.right, (best.indices == targets_P).double().cpu()),
            (self.confidence, confidence_P),
        ):
            sums.index_add_(0, bins_P, values)

    def summary(self) -> dict[str, Any]:
        """Keys: loss, accuracy, calibration_error, and bins, each of which has confidence, right and positions."""
        total = float(self.count.sum())
        bins = [
            {"confidence": confidence / count, "right": right / count, "positions": int(count)}
            for confidence, right, count in zip(
                self.confidence.tolist(), self.right.tolist(), self.count.tolist(), strict=True
            )
            if count
        ]
        return {
            "loss": self.nats / total,
            "accuracy": float(self.right.sum()) / total,
            "calibration_error": float((self.right - self.confidence).abs().sum()) / total,
            "bins": bins,
        }


@dataclass
class Drift:
    """A rollout over so many steps beside the true states: sums over positions."""

    positions: int = 0
    relative_error: float = 0.0
    copied: float = 0.0
    cosine: float = 0.0
    kl: float = 0.0
    predictions: Predictions = field(default_factory=Predictions)

    def add_states(self, rolled_PD: Tensor, true_PD: Tensor, start_PD: Tensor) -> None:
        """Compare P landings with the true states there, and with those that the rollouts started from."""
        size_P = true_PD.norm(dim=-1)
        self.positions += len(true_PD)
        self.relative_error += float(((rolled_PD - true_PD).norm(dim=-1) / size_P).sum())
        self.copied += float(((start_PD - true_PD).norm(dim=-1) / size_P).sum())
        self.cosine += float(F.cosine_similarity(rolled_PD, true_PD, dim=-1).sum())

    def add_distributions(self, rolled_PD: Tensor, true_PD: Tensor, targets_P: Tensor, head_VD: Tensor) -> None:
        """Compare what the head makes of them, and of the tokens that follow."""
        for parts in zip(*(x.split(LOGIT_POSITIONS) for x in (rolled_PD, true_PD, targets_P)), strict=True):
            log_q_PV, log_p_PV = (F.linear(x, head_VD).log_softmax(-1) for x in parts[:2])
            self.kl += float(F.kl_div(log_q_PV, log_p_PV, reduction="sum", log_target=True))
            self.predictions.add(log_q_PV, parts[2])

    def summary(self) -> dict[str, Any]:
        """Means, by the names in the module's docstring."""
        found = self.predictions.summary()
        means = {key: getattr(self, key) / self.positions for key in ("relative_error", "copied", "cosine")}
        return {"positions": self.positions} | means | {"kl": self.kl / float(self.predictions.count.sum())} | found


@torch.inference_mode()
def measure(
    subject: Subject, dataset: Dataset, limit: int | None, progress: Progress, horizon: int | None = None
) -> dict[str, Any]:
    """Measure the first `limit` validation sequences.

    Keys of the result: those of `Subject.described`, dataset, sequences, states, effective_rank, spectrum, trunk (a
    summary of `Predictions`), and dynamics: a list of `Drift` summaries for i = 1 … horizon; None without p_ψ.
    """
    found = latent_dynamics(subject)
    steps = horizon or HORIZON if found else 0
    trunk, drifts, gram_DD, states = Predictions(), [Drift() for _ in range(steps)], torch.zeros(()), 0
    batches = first_batches(subject, dataset, limit or SEQUENCES)
    for numpy_batch in progress.track(batches, description="latent"):
        batch = TokenBatch.from_numpy(numpy_batch, subject.device)
        hidden_BTD, head_VD = subject.hidden_states(batch), subject.head_VD
        states_ND = subject.trunk_states(batch)[batch.document_ids[:, :-1] >= 0].double()
        gram_DD, states = gram_DD.to(states_ND) + states_ND.T @ states_ND, states + len(states_ND)
        mask_BT = next_token_mask(batch)
        for part_PD, part_P in zip(
            hidden_BTD[mask_BT].split(LOGIT_POSITIONS), batch.targets[mask_BT].split(LOGIT_POSITIONS), strict=True
        ):
            trunk.add(F.linear(part_PD, head_VD).float().log_softmax(-1), part_P)
        if found:
            dynamics, embedding_VD = found
            rollouts_dBTD = dynamics(hidden_BTD, embedding_VD[batch.tokens[:, :-1]], steps)
            _compare(drifts, rollouts_dBTD.float(), hidden_BTD.float(), batch, head_VD.float())
    # σ of the matrix are the roots of the eigenvalues of its Gram matrix, which needs no memory for the states.
    rank, spectrum = rank_of(torch.linalg.eigvalsh(gram_DD.cpu()).flip(0).clamp(min=0).sqrt())
    return subject.described() | {
        "dataset": str(dataset.path),
        "sequences": limit or SEQUENCES,
        "states": states,
        "effective_rank": rank,
        "spectrum": spectrum,
        "trunk": trunk.summary(),
        "dynamics": [drift.summary() for drift in drifts] if found else None,
    }


def _compare(
    drifts: list[Drift], rollouts_dBTD: Tensor, hidden_BTD: Tensor, batch: TokenBatch, head_VD: Tensor
) -> None:
    """Add a batch's rollouts."""
    mask_dBT, targets_BT = rollout_mask(batch, len(drifts)), next_token_mask(batch)
    for step, (drift, rollout_BTD, mask_BT) in enumerate(zip(drifts, rollouts_dBTD, mask_dBT, strict=True), start=1):
        start_BTD = hidden_BTD.roll(step, 1)  # what wraps around is masked
        drift.add_states(rollout_BTD[mask_BT], hidden_BTD[mask_BT], start_BTD[mask_BT])
        told_BT = mask_BT & targets_BT
        drift.add_distributions(rollout_BTD[told_BT], hidden_BTD[told_BT], batch.targets[told_BT], head_VD)


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Rank, calibration, and drift after one step and after all."""
    numbers = {"effective rank": result["effective_rank"], "calibration error": result["trunk"]["calibration_error"]}
    steps = result["dynamics"] or []
    for step in sorted({1, len(steps)} if steps else ()):
        numbers[f"KL after {step}"] = steps[step - 1]["kl"]
    return numbers


def table(result: dict[str, Any]) -> Table:
    """For the console."""
    steps = result["dynamics"]
    drawn = "" if steps else "; no p_ψ in this model: its trunk alone"
    rows = Table(title=f"latent: effective rank {result['effective_rank']:.1f}{drawn}", title_justify="left")
    for column in ("", "relative error", "copied", "cosine", "KL, nats", "loss, nats", "calibration error"):
        rows.add_column(column, justify="right")
    trunk = result["trunk"]
    rows.add_row("trunk", *[""] * 4, f"{trunk['loss']:.4f}", f"{trunk['calibration_error']:.4f}")
    keys = ("relative_error", "copied", "cosine", "kl", "loss", "calibration_error")
    for number, step in enumerate(steps or [], start=1):
        rows.add_row(f"p_ψ, {number}", *(f"{step[key]:.4f}" for key in keys))
    return rows


def check(subject: Subject, dataset: Dataset, limit: int | None, horizon: int | None = None) -> None:
    """Needs validation text, and where there is a p_ψ, documents as long as its rollout."""
    batches = first_batches(subject, dataset, limit or SEQUENCES)
    if latent_dynamics(subject):
        check_horizon(subject, dataset, batches, HORIZON if horizon is None else horizon, told_mask)
    else:
        check_horizon(subject, dataset, batches, 1, lambda batch, _: next_token_mask(batch)[None])


def told_mask(batch: TokenBatch, steps: int) -> Tensor:
    """(steps, B, T) bool: landings whose next token is a target."""
    return rollout_mask(batch, steps) & next_token_mask(batch)


LATENT = Suite(measure, table, picture, check, headline, options=("horizon",))

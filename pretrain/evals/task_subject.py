"""What the benchmarks' suites share: a data set's task, hidden states of rows, continuations, and intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline import Dataset, UserError
from data_pipeline.tasks import Task, open_task
from pretrain.evals.subject import Subject
from pretrain.latent_dynamics import LatentDynamics
from pretrain.objectives import TokenBatch

TOKENS_PER_PASS = 1 << 15
SEED = 0
"""Of everything that is drawn in an evaluation."""

AnyTask = TypeVar("AnyTask", bound=Task)


def test_task(dataset: Dataset, kind: type[AnyTask], **changes: Any) -> AnyTask:
    """The test split of the task that a data set was made of, some options changed. Raises UserError."""
    spec = dataset.manifest.get("task", "")
    if spec.partition(",")[0] != kind.name:
        made_of = f"task:{spec}" if spec else "no task"
        raise UserError(f"{dataset.path}: made of {made_of}; the suite {kind.name} needs --source task:{kind.name},…")
    task = open_task(spec)
    assert isinstance(task, kind)
    return replace(task, **{"split": "test", **changes})


test_task.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's


def latent_dynamics(subject: Subject) -> tuple[LatentDynamics, Tensor] | None:
    """p_ψ and the token embeddings (V, D) that it reads; None where the objective has no p_ψ."""
    if not subject.can_draft:
        return None
    decoder = subject.decoder()
    if decoder.dynamics is None:  # MTP and JTP draft otherwise
        return None
    return decoder.dynamics, decoder.model.get_input_embeddings().weight


@torch.inference_mode()
def hidden_states(subject: Subject, rows_NL: NDArray[np.int64]) -> Tensor:
    """(N, L, D): the hidden state of every token of rows that each hold one document, in passes of bounded size."""
    parts = []
    for rows in np.array_split(rows_NL, -(-rows_NL.size // TOKENS_PER_PASS)):
        parts.append(subject.hidden_states(one_document_each(torch.from_numpy(rows).to(subject.device))))
    return torch.cat(parts)


def one_document_each(tokens_BL: Tensor) -> TokenBatch:
    """Rows of L tokens, each a document from its start, all of which the model reads."""
    tokens = torch.cat([tokens_BL, tokens_BL[:, :1]], 1)  # the model reads all but the last
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TokenBatch(tokens, torch.zeros_like(tokens), positions, torch.ones_like(tokens, dtype=torch.bool))


@torch.inference_mode()
def next_logits(subject: Subject, rows_NL: NDArray[np.int64]) -> Tensor:
    """(N, V): logits of the token after each row."""
    parts = np.array_split(rows_NL, -(-rows_NL.size // TOKENS_PER_PASS))
    return torch.cat([hidden_states(subject, rows)[:, -1] @ subject.head_VD.T for rows in parts])


def continue_rows(
    subject: Subject, prompts_NP: NDArray[np.int64], new: int, generator: torch.Generator | None = None
) -> NDArray[np.int64]:
    """(N, new): what the model writes after each prompt; greedily, or sampled at temperature 1 with a generator."""
    rows = prompts_NP
    for _ in range(new):
        rows = np.concatenate([rows, choose(next_logits(subject, rows), generator)[:, None]], 1)
    return rows[:, prompts_NP.shape[1] :]


def choose(logits_NV: Tensor, generator: torch.Generator | None) -> NDArray[np.int64]:
    """(N,): the likeliest token, or one drawn at temperature 1."""
    if generator is None:
        return logits_NV.argmax(-1).cpu().numpy()
    return torch.multinomial(logits_NV.float().softmax(-1).cpu(), 1, generator=generator)[:, 0].numpy()


def share(right: int, trials: int) -> dict[str, float]:
    """A share with Wilson's 95% interval: keys value, low, high, trials."""
    z, p = 1.959963984540054, right / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return {"value": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "trials": trials}


def shares(right_NT: NDArray[np.bool_]) -> list[dict[str, float]]:
    """`share` of each column."""
    return [share(int(column.sum()), len(column)) for column in np.asarray(right_NT).T]


def percent(one: dict[str, float]) -> str:
    """A share for a table: `97.1%  (95.9 – 98.0)`."""
    return f"{100 * one['value']:.1f}%  ({100 * one['low']:.1f} – {100 * one['high']:.1f})"


def effective_rank(states_ND: Tensor) -> tuple[float, list[float]]:
    """exp(entropy of σ / Σσ) of the uncentred matrix, and its singular values as shares of their sum."""
    return rank_of(torch.linalg.svdvals(states_ND.double().cpu()))


def rank_of(singular_values: Tensor) -> tuple[float, list[float]]:
    """`effective_rank` of a matrix with these singular values."""
    weights = singular_values / singular_values.sum()
    return float(torch.special.entr(weights).sum().exp()), weights.tolist()

"""What the suites that look several tokens ahead share: validation sequences, and how far their documents reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline import Batch, Dataset, UserError, validation_batches
from pretrain.evals.subject import Subject
from pretrain.objectives import TokenBatch

HORIZON = 20
"""Tokens ahead where no horizon is given: the paper's."""
SEQUENCES = 256
"""Validation sequences that are measured: 65,536 tokens at the paper's 256 a sequence."""
TOKENS_PER_BATCH = 4096


def rows_per_batch(subject: Subject) -> int:
    """Sequences of the subject's length that make about TOKENS_PER_BATCH tokens."""
    return max(1, TOKENS_PER_BATCH // subject.sequence_length)


def first_batches(subject: Subject, dataset: Dataset, sequences: int) -> Sequence[Batch]:
    """The validation split's first sequences. Raises UserError where it is empty."""
    return validation_batches(
        dataset.split("validation"),
        sequence_length=subject.sequence_length,
        micro_sequences=rows_per_batch(subject),
        limit=sequences,
    )


def check_horizon(
    subject: Subject,
    dataset: Dataset,
    batches: Sequence[Batch],
    horizon: int,
    masks: Callable[[TokenBatch, int], Tensor],
) -> None:
    """UserError unless something is measured at each of `horizon` steps.

    masks: from a batch and a number of steps to what is measured at each of them, (steps, B, T) bool.
    """
    if horizon < 1:
        raise UserError(f"--horizon {horizon} must be at least 1")
    possible = max(1, min(horizon, subject.sequence_length - 1))
    counts = torch.stack([masks(TokenBatch.from_numpy(batch), possible).sum((1, 2)) for batch in batches]).sum(0)
    reach = int((counts > 0).sum())
    if reach < horizon:
        remedy = f"use longer documents, or --horizon {reach}" if reach else "use longer documents"
        raise UserError(
            f"{dataset.path}: none of its validation documents, in sequences of {subject.sequence_length} tokens, "
            f"reaches {horizon} tokens ahead; {remedy}"
        )

"""nextlat/tokens_by_frequency.json: token ids of the training data, the most frequent first, to draft from a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import UserError, open_dataset
from pretrain.decoding.loading import TOKEN_RANKS

MOST_TOKENS = 20_000_000
"""Tokens that are counted, in windows spread evenly over the training split; enough to rank the frequent ones."""
WINDOW = 1 << 20


def write_token_ranks(folder: Path, dataset: dict[str, Any]) -> None:
    """Count and write; nothing where the data set is not here any more, or has become another one."""
    try:
        opened = open_dataset(dataset["path"])
        same = opened.fingerprint == dataset["fingerprint"]
        split = opened.split("train")
    except (UserError, OSError):
        return
    if not same or split.tokens == 0:
        return
    counts = np.zeros(opened.vocab_size, np.int64)
    windows = -(-min(split.tokens, MOST_TOKENS) // WINDOW)
    for start in np.linspace(0, max(0, split.tokens - WINDOW), windows).astype(np.int64).tolist():
        tokens = split.read(start, min(start + WINDOW, split.tokens))
        counts += np.bincount(tokens, minlength=opened.vocab_size)
    order = np.argsort(-counts, kind="stable")
    ranks = [int(token) for token in order if counts[token]]
    (folder / TOKEN_RANKS).write_text(json.dumps(ranks) + "\n", encoding="utf-8")

"""Text to prepare, documents that are only a list of starts, and a console that shows nothing."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "über",
    "naïve",
    "东京",
    "🙂",
    "def",
    "return\n",
    "",
    "",
    "",
    "pass\n",
]


def quiet() -> Console:
    return Console(file=io.StringIO())


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, words))) + f" {n}" for n in range(count)]


@dataclass
class DocumentList:
    """Documents of a stream by where they start, as packing asks for them."""

    starts: NDArray[np.int64]
    prompts: NDArray[np.int64] | None = None

    def document_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.starts, places, side="right") - 1

    def document_start(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.starts[documents]

    def prompt_length(self, documents: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.prompts is None else self.prompts[documents]

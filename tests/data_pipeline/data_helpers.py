"""Text to prepare, and a console that shows nothing."""

from __future__ import annotations

import io
import random

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

"""Does an exported tokenizer give exactly the ids and texts of the one that made the training data?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from data_pipeline import Tokenizer, UserError

FRAGMENTS = (
    *("def f(x):\n", "    return x", "if __name__ == '__main__':\n", "import os, sys\n", "class A(B):", "self.", "# "),
    *("the ", "quick ", "brown ", "fox", "Hello, world!", "3.14159", "0x1F", "1234567890", "don't", '"""'),
    *(" ", "  ", "   ", "        ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", "\x00", "\x0b", "\u00a0", "\u3000"),
    *("é", "e\u0301", "ß", "ñ", "Ω", "Привет", "שלום", "नमस्ते", "東京", "한국어", "🙂", "👩‍👩‍👧", "\u200b", "\ufeff"),
    *("\ufffd", "\u2581", "\u2581\u2581", "</s>", "<s>", "<unk>", "<|endoftext|>", "<0xE2>", "<0x0A>", "ﬁ", "①", "½"),
    *("aaaa", "====", "----", "....", "____", "((()))", "{}[]", "\\n", "->", "!=", "//", "𝔘𝔫𝔦", "\U0010ffff", "\x7f"),
)


def fuzz_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of every awkward sort: code, scripts, runs of one character, runs of spaces, decoded random bytes."""
    chance = random.Random(seed)
    yield from ("", *FRAGMENTS)
    for number in range(count - 1 - len(FRAGMENTS)):
        match number % 4:
            case 0:
                yield "".join(chance.choices(FRAGMENTS, k=chance.randint(2, 24)))
            case 1:
                yield chance.randbytes(chance.randint(1, 60)).decode(errors="replace")
            case 2:
                runs = (chance.choice(FRAGMENTS)[:1] * chance.randint(1, 40) for _ in range(chance.randint(1, 5)))
                yield "".join(runs)
            case _:
                letters = chance.choice(("abcde ", "etaoin shrdlu\n", "01 \t", "(){}[]:,.=\n    "))
                yield "".join(chance.choices(letters, k=chance.randint(1, 120)))


def check_tokenizer(source: Tokenizer, exported: Any, eos_id: int, count: int) -> int:
    """Compare ids and decoded texts over `count` texts; the number compared. Raises UserError at a difference."""
    texts = list(fuzz_texts(count))
    expected = source.encode_batch(texts)
    found = exported(texts, add_special_tokens=False, verbose=False)["input_ids"]
    opened = exported(texts, add_special_tokens=True, verbose=False)["input_ids"]
    for text, ids, same_ids, with_eos in zip(texts, expected, found, opened, strict=True):
        if list(ids) != same_ids or [eos_id, *ids] != with_eos:
            raise UserError(
                f"the exported tokenizer encodes {text[:60]!r} as {same_ids[:12]}, the training data's as "
                f"{list(ids)[:12]}; nothing was exported, use a tokenizer that can be exported exactly"
            )
        decoded = exported.decode(ids, skip_special_tokens=True)
        if decoded != source.decode(ids):
            raise UserError(
                f"the exported tokenizer decodes {list(ids)[:12]} as {decoded[:60]!r}, the training data's as "
                f"{source.decode(ids)[:60]!r}; nothing was exported, use a tokenizer that can be exported exactly"
            )
    return len(texts)

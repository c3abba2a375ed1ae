"""Documents that break pipelines: nothing is lost, and decoding gives them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import decoded, jsonl, make_texts, make_whole, quiet

from data_pipeline.verify import verify

NASTY = [
    "",
    " ",
    "\n\n\n",
    "\x00",
    "a\x00b\x00",
    "\ufeffbom",
    "\ufffd\uffff\U0010ffff",
    "שלום עולם \u202eright to left\u202c مرحبا",
    "e\u0301\u0323 " + "a" + "\u0300" * 500,
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪",
    "\r\n\r \t\x0b\x0c\x1c\x85\u2028\u2029",
    "\u2581\u2581 </s> <unk> <0x00> <|endoftext|>",
    "x" * 300_000,
]


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sentencepiece:400"])
def test_nasty_documents_come_back_exactly(tmp_path: Path, tokenizer: str) -> None:
    texts = [*NASTY, *make_texts(200), *NASTY]
    source = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    dataset = make_whole(source, tmp_path / "o", tokenizer, workers=2, shard_bytes=50_000)
    assert decoded(dataset) == [text for text in texts if text]
    assert dataset.manifest["skipped"] == {"empty": 2}
    verify(dataset.path, quiet())


def test_a_million_tiny_documents(tmp_path: Path) -> None:
    texts = [str(number % 97) for number in range(1_000_000)]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    dataset = make_whole(tmp_path / "x.jsonl", tmp_path / "o", shard_bytes=1 << 18)
    split = dataset.split("train")
    assert split.documents == 1_000_000
    tokens = split.read(0, split.tokens)
    text = tokens.astype(np.uint16)
    assert bytes(np.where(text == 256, ord("\n"), text).astype(np.uint8)).decode().split("\n")[1:] == texts


def test_one_enormous_document(tmp_path: Path) -> None:
    """100 MB in one document. What bounds an encoder's memory is the test of pieces below."""
    text = "".join(f"line {number} of a very long document, naïve 🙂\n" for number in range(200_000)) * 11
    content = text.encode()
    assert len(content) > 100_000_000
    (tmp_path / "x.txt").write_bytes(content)
    dataset = make_whole(tmp_path / "x.txt", tmp_path / "o")
    split = dataset.split("train")
    assert split.documents == 1 and split.text_bytes == len(content)
    assert split.read(1, split.tokens).astype(np.uint8).tobytes() == content

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline import Tokenizer, UserError, load_tokenizer
from data_pipeline.documents import open_source
from data_pipeline.tokenizers import train_sentencepiece

NASTY = [
    "",
    "\n",
    "\tif x:\n\t\ty = 1\n",
    "    leading and trailing   \n\n",
    "a\r\nb\r\n\rc",
    "😀 \u200d👩‍👩‍👧 e\u0301 é שלום",
    "\x00\x01\x07\x1b[0m\x7f\x80",
    "\ufeffbom and \ufffd and \U0010ffff",
    "the mark \u2581 itself, \u2581\u2581 twice \u2581",
    "</s><unk><0x41> \u2585 \u2047",
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    """Every thirtieth file of the standard library."""
    return [document.text for document in islice(open_source("stdlib").read(Counter()), 0, None, 30)]


@pytest.fixture(scope="module")
def trained(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_sentencepiece(library[::2], 1024))
    return load_tokenizer(path)


def test_sentencepiece_round_trip(trained: Tokenizer, library: list[str]) -> None:
    texts = library + NASTY
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(ids) == text
        assert ids == trained.encode(text)
        assert trained.eos_id not in ids and (not ids or max(ids) < trained.vocab_size == 1024)


def test_bytes_round_trip(library: list[str]) -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("bytes", 257, 256)
    for text in library[:3] + NASTY:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode([256, *tokenizer.encode(text), 256]) == text


def test_special_tokens_decode_to_nothing(trained: Tokenizer) -> None:
    assert trained.decode([trained.eos_id, *trained.encode("x y"), trained.eos_id]) == "x y"


def test_newlines_join_with_their_neighbours(trained: Tokenizer) -> None:
    ids = trained.encode("def f(x):\n    return None\n\n\n")
    assert len(ids) <= 12 and sum(trained.decode([i]).count("\n") > 0 for i in ids) < 4


def test_training_is_deterministic(trained: Tokenizer, library: list[str]) -> None:
    assert trained.path is not None
    again = train_sentencepiece(iter(library[::2]), 1024)
    assert again == trained.path.read_bytes()
    assert trained.fingerprint == hashlib.sha256(again).hexdigest() != load_tokenizer("bytes").fingerprint


def test_a_document_longer_than_a_training_chunk_is_not_lost() -> None:
    """SentencePiece drops sentences that are too long; one endless line must still be learnt from."""
    model = train_sentencepiece(["abcdefgh" * 5_000, "字" * 9_000], 275)
    assert b"abcdefgh" in model and "字字".encode() in model


@pytest.mark.parametrize(("texts", "size"), [(["abc"], 4096), (["abc"], 100), ([], 300)])
def test_impossible_vocabulary_is_one_line(texts: list[str], size: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary of {size:,} pieces") as caught:
        train_sentencepiece(texts, size)
    assert "\n" not in str(caught.value)


def fast_tokenizer(path: Path, end: str = "<|endoftext|>") -> Path:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    fast.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(["some text of words " * 50], trainer)
    fast.save(str(path))
    return path


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(fast_tokenizer(tmp_path / "tokenizer.json"))
    assert (tokenizer.kind, tokenizer.eos_id) == ("tokenizer.json", 0)
    for text in ["some words\n\t of <|endoftext|> text 🙂", *NASTY]:
        ids = tokenizer.encode(text)
        assert 0 not in ids and tokenizer.decode(ids) == text
        assert not ids or max(ids) < tokenizer.vocab_size


def test_tokenizer_json_end_of_text(tmp_path: Path) -> None:
    path = fast_tokenizer(tmp_path / "tokenizer.json", end="<stop>")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(path).eos_id == 0
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(path, eos_id=0).eos_id == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.model", "cannot be read"),
        ("bad.model", "not a SentencePiece model"),
        ("bad.json", "not a Hugging Face tokenizer"),
        ("words.vocab", "give a .model or .json file"),
    ],
)
def test_bad_tokenizers(tmp_path: Path, name: str, message: str) -> None:
    if name.startswith("bad"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / name)

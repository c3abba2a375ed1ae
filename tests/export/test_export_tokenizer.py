from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from export_helpers import bytes_tokenizer, library_text, sentencepiece_model, sentencepiece_tokenizer
from transformers import AutoTokenizer

from data_pipeline import Tokenizer, UserError, load_tokenizer
from pretrain.export import tokenizer_files
from pretrain.export.fuzz import check_tokenizer, fuzz_texts
from pretrain.export.tokenizer_files import write_tokenizer


def hub_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer.json as found on the hub, with its own idea of what opens a text."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(library_text(), trainer)
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    fast.enable_truncation(8)
    fast.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(params=["sentencepiece", "bytes", "tokenizer.json"])
def pair(request, tmp_path):
    """A source tokenizer, and the same as AutoTokenizer loads it from an export."""
    makers = {"sentencepiece": sentencepiece_tokenizer, "bytes": lambda _: bytes_tokenizer()}
    source = makers.get(request.param, hub_tokenizer)(tmp_path)
    assert source.kind == request.param
    (tmp_path / "out").mkdir()
    write_tokenizer(source, source.eos_id, 64, tmp_path / "out")
    return source, AutoTokenizer.from_pretrained(tmp_path / "out")


def test_ids_and_texts_are_those_of_the_source(pair):
    source, exported = pair
    assert check_tokenizer(source, exported, source.eos_id, 3000) == 3000


def test_whole_files_of_code_are_encoded_alike(pair):
    source, exported = pair
    for text in library_text()[:3]:
        ids = exported(text, verbose=False)["input_ids"]
        assert ids == [source.eos_id, *source.encode(text)]
        assert exported.decode(ids, skip_special_tokens=True) == source.decode(ids) == text


def test_bos_is_eos_and_text_that_looks_special_is_text(pair):
    source, exported = pair
    assert exported.bos_token_id == exported.eos_token_id == source.eos_id
    assert exported("")["input_ids"] == [source.eos_id]
    ids = exported(exported.eos_token, add_special_tokens=False)["input_ids"]
    assert source.eos_id not in ids and exported.decode(ids) == exported.eos_token


def test_damaged_utf8_of_bytes_decodes_as_in_python(tmp_path):
    write_tokenizer(bytes_tokenizer(), 256, 64, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for raw in (b"ok \xe2\x96", b"\xff\xfe", b"a\xe2\x96b\x81c", "é".encode() + b"\xc3"):
        assert exported.decode(list(raw)) == raw.decode(errors="replace")


@pytest.mark.parametrize("mistake", ["merges", "normalizer", "byte_fallback"])
def test_the_fuzz_finds_mistakes(mistake, tmp_path, monkeypatch):
    source = sentencepiece_tokenizer(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    if mistake == "merges":
        right = tokenizer_files.merges
        monkeypatch.setattr(tokenizer_files, "merges", lambda scores: right(scores)[::-1])
    write_tokenizer(source, source.eos_id, 64, out)
    content = json.loads((out / "tokenizer.json").read_text())
    if mistake == "normalizer":
        content["normalizer"] = {"type": "NFKC"}
    if mistake == "byte_fallback":
        content["model"]["byte_fallback"] = False
    (out / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="exported tokenizer encodes"):
        check_tokenizer(source, AutoTokenizer.from_pretrained(out), source.eos_id, 2000)


def test_fuzz_texts_are_many_different_and_repeatable():
    texts = list(fuzz_texts(2400))
    assert len(texts) == 2400 and texts == list(fuzz_texts(2400))
    assert len(set(texts)) > 2000
    assert "" in texts and any("\u2581" in text for text in texts) and any("\t" in text for text in texts)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"add_dummy_prefix": True}, "it adds a space in front of a text"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"user_defined_symbols": ["<tool>"]}, "it has user-defined pieces"),
    ],
)
def test_models_that_cannot_be_written_exactly_are_refused_with_the_reason(options, reason, tmp_path):
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2} | {
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
    }  # fmt: skip
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentences = iter(line for line in library_text()[0].splitlines() if line)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=file, **(settings | options))
    source = load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=reason):
        write_tokenizer(source, source.eos_id, 64, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_trained_model_of_the_tests_has_long_pieces():
    """The exactness above is not that of a trivial vocabulary."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    assert sum(len(piece) > 3 for piece in pieces if not piece.startswith("<0x")) > 50

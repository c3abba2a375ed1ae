"""What a prepared data set holds, whatever prepares it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ROOT, contents, decoded, jsonl, make, make_texts, make_whole
from rich.console import Console

from data_pipeline import Dataset, UserError, load_tokenizer, open_dataset
from data_pipeline.claim import WORK


def test_every_document_is_kept_in_order_and_split_by_its_hash(corpus: Path, dataset: Dataset) -> None:
    texts = [path.read_bytes().decode() for path in sorted(corpus.rglob("*.txt"))]
    chosen = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.2 * 2**64 for t in texts]
    assert decoded(dataset, "train") == [t for t, c in zip(texts, chosen, strict=True) if not c]
    assert decoded(dataset, "validation") == [t for t, c in zip(texts, chosen, strict=True) if c]
    assert dataset.split("train").text_bytes + dataset.split("validation").text_bytes == sum(
        len(t.encode()) for t in texts
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sentencepiece:300"])
def test_bytes_do_not_depend_on_workers(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    for workers in (1, 2):
        make(corpus, tmp_path / str(workers), tokenizer, workers=workers, shard_bytes=9_000)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len([name for name in one if name.startswith("train/")]) >= 6
    assert not any(name.startswith(WORK) or name.endswith(".partial") for name in one)


def test_standard_library_comes_back_as_it_is(tmp_path: Path) -> None:
    dataset = make("stdlib", tmp_path / "set", "train:sentencepiece:512", limit=60, workers=2, shard_bytes=200_000)
    import sysconfig
    import tokenize

    library = Path(sysconfig.get_path("stdlib"))
    texts = set()
    for name in ("__future__.py", "abc.py", "argparse.py", "ast.py"):
        with tokenize.open(library / name) as file:
            texts.add(file.read())
    kept = decoded(dataset, "train") + decoded(dataset, "validation")
    assert len(kept) == 60 and texts <= set(kept)


def test_prepare_runs_in_a_program_without_a_main_guard(corpus: Path, tmp_path: Path) -> None:
    call = f"prepare({str(corpus)!r}, 'bytes', {str(tmp_path / 'o')!r}, workers=2)"
    program = f"from data_pipeline.prepare import prepare\n{call}\n"
    done = subprocess.run([sys.executable, "-"], input=program, text=True, capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert open_dataset(tmp_path / "o").split("train").tokens


def test_the_tokenizer_is_kept_with_the_data(corpus: Path, tmp_path: Path) -> None:
    first = make(corpus, tmp_path / "a", "train:sentencepiece:300")
    second = make(corpus, tmp_path / "b", str(tmp_path / "a" / "tokenizer.model"))
    assert first.fingerprint == second.fingerprint and second.vocab_size == 300
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()
    (tmp_path / "b" / "tokenizer.model").write_bytes((tmp_path / "a" / "tokenizer.model").read_bytes() + b"\x00")
    with pytest.raises(UserError):
        second.tokenizer()


def test_the_vocabulary_is_trained_on_training_documents_alone(tmp_path: Path) -> None:
    texts = make_texts(300)
    held = [t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.2 * 2**64]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts if t not in held))
    a = make(tmp_path / "a.jsonl", tmp_path / "x", "train:sentencepiece:300")
    b = make(tmp_path / "b.jsonl", tmp_path / "y", "train:sentencepiece:300")
    assert held and a.tokenizer_fingerprint == b.tokenizer_fingerprint
    assert b.split("validation").documents == 0


def test_gpt2_files(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    texts = ["some text of words and more words\n", *make_texts(100)]
    trained.train_from_iterator(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path / "gpt2"
    folder.mkdir()
    trained.save_model(str(folder))
    assert {path.name for path in folder.iterdir()} == {"vocab.json", "merges.txt"}
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(texts[0]) == trained.encode(texts[0]).ids and tokenizer.eos_id == 0
    assert 0 not in tokenizer.encode("a <|endoftext|> in the text")
    source = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    dataset = make_whole(source, tmp_path / "o", folder, workers=2)
    assert decoded(dataset) == texts and dataset.tokenizer().fingerprint == tokenizer.fingerprint
    make_whole(source, tmp_path / "o", folder)  # known again
    (folder / "merges.txt").write_text("no merges\nat all here\n")
    with pytest.raises(UserError, match="not GPT-2's files"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_pieces_of_a_long_text_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.tokenizers import train_sentencepiece

    texts = make_texts(60)
    (tmp_path / "t.model").write_bytes(train_sentencepiece(texts, 300))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    long = "\n".join(texts) + "🙂" * 500
    whole = tokenizer.encode(long)
    monkeypatch.setattr("data_pipeline.tokenizers.PIECE", 100)
    pieces = tokenizer.encode(long)
    assert pieces != whole and tokenizer.decode(pieces) == long and len(pieces) < 1.2 * len(whole)


def test_types_on_disk_hold_a_large_vocabulary() -> None:
    from dataclasses import replace

    from data_pipeline.workers import encode_documents

    wide = replace(load_tokenizer("bytes"), vocab_size=70_000, encode_batch=lambda texts: [[69_999] for _ in texts])
    encoded = encode_documents(wide, ["x", "y"])
    assert encoded.tokens.dtype == np.uint32 and encoded.tokens.tolist() == [256, 69_999, 256, 69_999]
    assert encoded.document_starts.tolist() == [0, 2]


def test_the_package_needs_neither_torch_nor_the_trainer() -> None:
    code = "import sys, data_pipeline.prepare; assert not {'torch', 'pretrain'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_progress_shows_rates_and_what_is_left(corpus: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    make(corpus, tmp_path / "o", shard_bytes=9_000, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("documents/s", "Mtok/s", "B/s", "0:00:00", "bytes/token"):
        assert part in shown

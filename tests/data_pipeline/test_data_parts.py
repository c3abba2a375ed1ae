"""Preparation over machines, from other kinds of source, with filters, and killed at any instant."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import make_texts, quiet

from data_pipeline import Dataset, UserError, load_tokenizer, open_dataset
from data_pipeline.documents import Fields, open_source
from data_pipeline.filters import Filters
from data_pipeline.merge import MERGING, merge
from data_pipeline.merge import main as merge_main
from data_pipeline.prepare import PART, WORK, prepare
from data_pipeline.verify import verify

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def make(source: Path | str, out: Path, tokenizer: str | Path = "bytes", **options: Any) -> Dataset:
    usual = {"workers": 1, "validation": 0.0, "console": quiet()}
    made = prepare(str(source), str(tokenizer), out, **(usual | options))
    return made if made is not None else open_dataset(out)


def part(source: Path, out: Path, number: str, **options: Any) -> Path:
    usual = {"tokenizer": "bytes", "workers": 1, "validation": 0.2, "shard_bytes": 4_000}
    assert prepare(str(source), out=out, part=number, console=quiet(), **(usual | options)) is None
    return out


def decoded(dataset: Dataset, name: str = "train") -> list[str]:
    split, tokenizer = dataset.split(name), dataset.tokenizer()
    borders = [*split.document_starts.tolist(), split.tokens]
    return [tokenizer.decode(split.read(a, b)) for a, b in pairwise(borders)]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- parts


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sentencepiece:300"])
@pytest.mark.parametrize("parts", [1, 3])
def test_merged_parts_are_what_one_machine_makes(corpus: Path, tmp_path: Path, tokenizer: str, parts: int) -> None:
    whole = make(corpus, tmp_path / "whole", tokenizer, validation=0.2, shard_bytes=4_000)
    folders = [part(corpus, tmp_path / f"p{n}", f"{n}/{parts}", tokenizer=tokenizer) for n in range(1, parts + 1)]
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(folders[0])
    merge(reversed(folders), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    shards = [len(json.loads((folder / PART).read_text())["records"]) for folder in folders]
    assert sum(shards) >= len(whole.split("train").shards) and min(shards) > 0
    verify(tmp_path / "merged", quiet())


def test_parts_that_do_not_make_a_whole(corpus: Path, tmp_path: Path) -> None:
    one, two = part(corpus, tmp_path / "1", "1/2"), part(corpus, tmp_path / "2", "2/2")
    other = part(corpus, tmp_path / "3", "2/2", validation=0.3)
    for folders, message in [
        ([one], "part 2/2 is missing"),
        ([one, other], "a part of another data set"),
        ([one, two, two], "3 folders for 2 parts"),
        ([one, tmp_path], "not a finished part"),
        ([], "no parts"),
    ]:
        with pytest.raises(UserError, match=message):
            merge(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    file = next((two / "train").glob("*.tokens"))
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name}: damaged between"):
        merge([one, two], tmp_path / "out")
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(tmp_path / "out")
    content[7] ^= 1
    file.write_bytes(content)
    assert merge([one, two], tmp_path / "out").split("train").tokens  # goes on where it stopped
    assert not (tmp_path / "out" / MERGING).exists()
    with pytest.raises(UserError, match="not empty"):
        merge([one, two], tmp_path / "out")


def test_a_finished_part_is_left_alone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = part(corpus, tmp_path / "1", "1/2")
    before = contents(folder)
    part(corpus, folder, "1/2")
    assert contents(folder) == before
    with pytest.raises(UserError, match="holds part 1/2 of a data set made with other options"):
        part(corpus, folder, "2/2")
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="write i/n"):
            part(corpus, tmp_path / "x", wrong)
    merge_main([str(folder), str(part(corpus, tmp_path / "2", "2/2")), "--out", str(tmp_path / "out")])
    assert "training tokens" in capsys.readouterr().out


def test_thirty_kills_at_random_instants(tmp_path: Path) -> None:
    """Shards that were finished stay as they are, and in the end so do all bytes."""
    texts = make_texts(3000, words=100)
    source = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    out, chance = tmp_path / "out", random.Random(1)
    program = "from data_pipeline.prepare import main; import sys; print('go', flush=True); main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--source", str(source), "--tokenizer", "train:sentencepiece:300"]
    command += ["--workers", "2", "--shard-bytes", "15000", "--validation", "0.1", "--out", str(out)]
    kept: dict[Path, int] = {}
    unfinished = 0

    def finished_shards() -> int:
        return len(list((out / WORK).glob("0*.json")))

    for _ in range(30):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout and process.stdout.readline() == "go\n", process.communicate()[1]
        # Up to five shards further, so that every start but the earliest kills gets on, however slow the machine.
        goal = finished_shards() + chance.randint(0, 5)
        while finished_shards() < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
        if (out / "manifest.json").exists():
            break
        unfinished += 1
        records = [json.loads(path.read_text()) for path in (out / WORK).glob("0*.json")]
        entries = [entry for record in records for entry in record["shards"].values()]
        kept = {out / f["file"]: (out / f["file"]).stat().st_mtime_ns for e in entries for f in e["files"].values()}
    assert unfinished >= 10 and len(kept) >= 10
    again = make(source, out, "train:sentencepiece:300", workers=2, shard_bytes=15_000, validation=0.1)
    make(source, tmp_path / "whole", "train:sentencepiece:300", shard_bytes=15_000, validation=0.1)
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(decoded(again) + decoded(again, "validation")) == sorted(texts)


# ---- sources, provenance, filters


def test_arrow_files_and_folders_of_datasets(tmp_path: Path) -> None:
    import datasets

    texts = make_texts(40)
    table = pa.table({"text": texts, "id": list(range(40))})
    for name, opened in {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}.items():
        with opened(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        assert decoded(make(tmp_path / f"{name}.arrow", tmp_path / name)) == texts
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    assert decoded(make(tmp_path / "saved", tmp_path / "from_saved")) == texts
    folder = tmp_path / "hub"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    assert decoded(make(f"hub:{folder}", tmp_path / "from_hub")) == texts
    (tmp_path / "bad.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(UserError, match=r"bad\.arrow: not an Arrow file"):
        make(tmp_path / "bad.arrow", tmp_path / "o")


def test_memory_and_glob_urls(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/texts/a.txt", b"one")
    fs.pipe_file("/texts/b/c.txt", b"two")
    try:
        assert decoded(make("memory://texts", tmp_path / "o")) == ["one", "two"]
        assert decoded(make("memory://texts/*.txt", tmp_path / "p")) == ["one"]
    finally:
        fs.rm("/texts", recursive=True)


def test_where_each_document_comes_from(corpus: Path, tmp_path: Path) -> None:
    dataset = make(corpus, tmp_path / "o", validation=0.2, shard_bytes=15_000)
    for name in ("train", "validation"):
        files = [dataset.path / shard["files"]["names"]["file"] for shard in dataset.split(name).shards]
        names = [line for file in files for line in file.read_text().splitlines()]
        assert [(corpus / line).read_bytes().decode() for line in names] == decoded(dataset, name)
    lines = jsonl(tmp_path / "x.jsonl", [{"text": t} for t in ("a", "", "b")])
    made = make(lines, tmp_path / "p")
    assert (made.path / "train/00000.names").read_text() == "x.jsonl:1\nx.jsonl:3\n"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "two\nlines.txt").write_text("x")
    verify(make(tmp_path / "odd", tmp_path / "q").path, quiet())


def test_filters_leave_out_and_count(tmp_path: Path) -> None:
    records = [
        {"text": "short", "lang": "en"},
        {"text": "long enough for it", "lang": "en"},
        {"text": "long enough for it", "lang": "en"},
        {"text": "lang genug ist es auch", "lang": "de"},
        {"text": "x" * 99, "lang": "en"},
        {"text": "no language at all", "lang": None},
    ]
    source = jsonl(tmp_path / "x.jsonl", records)
    filters = Filters(min_characters=6, max_characters=50, languages=("en",), language_field="lang", deduplicate=True)
    dataset = make(source, tmp_path / "o", filters=filters)
    assert decoded(dataset) == ["long enough for it"]
    expected = {"too short": 1, "too long": 1, "other language": 2, "repeated": 1}
    assert dataset.manifest["skipped"] == expected
    assert dataset.manifest["settings"]["filters"] == {
        "min_characters": 6,
        "max_characters": 50,
        "languages": ["en"],
        "language_field": "lang",
        "deduplicate": True,
    }
    with pytest.raises(UserError, match="made from another source or with other options"):
        make(source, tmp_path / "o")
    make(source, tmp_path / "o", filters=filters)  # the same again
    with pytest.raises(UserError, match="the filters"):
        make(source, tmp_path / "p", filters=Filters(min_characters=1000))
    for wrong in (Filters(min_characters=5, max_characters=4), Filters(language_field="lang")):
        with pytest.raises(UserError):
            make(source, tmp_path / "p", filters=wrong)
    with pytest.raises(UserError, match="no field 'tongue'"):
        make(source, tmp_path / "p", filters=Filters(languages=("en",), language_field="tongue"))


def test_language_is_told_from_the_text(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    english = "The quick brown fox jumps over the lazy dog and then goes home to sleep for the night."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und geht dann nach Hause, um zu schlafen."
    source = jsonl(tmp_path / "x.jsonl", [{"text": english}, {"text": german}])
    assert decoded(make(source, tmp_path / "o", filters=Filters(languages=("de",)))) == [german]


def test_filter_options_of_the_command(tmp_path: Path) -> None:
    from data_pipeline.prepare import main

    source = jsonl(tmp_path / "x.jsonl", [{"t": "some text"}, {"t": "some text"}, {"t": "x"}])
    main(
        [
            *("--source", str(source), "--tokenizer", "bytes", "--out", str(tmp_path / "o"), "--workers", "1"),
            *("--field", "t", "--validation", "0", "--deduplicate", "--min-characters", "2"),
        ]
    )
    assert decoded(open_dataset(tmp_path / "o")) == ["some text"]


def test_records_that_are_no_text_may_be_skipped(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}', b"{broken", b'{"text": 5}', b"[1]"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "two"}']))
    dataset = make(tmp_path / "x.jsonl", tmp_path / "o", invalid="skip")
    assert decoded(dataset) == ["one", "two"] and dataset.manifest["skipped"] == {"invalid": 5}
    with pytest.raises(UserError, match=r"x\.jsonl: not UTF-8 at byte"):
        make(tmp_path / "x.jsonl", tmp_path / "p")
    with pytest.raises(UserError, match="--invalid"):
        make(tmp_path / "x.jsonl", tmp_path / "p", invalid="ignore")


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
    dataset = make(source, tmp_path / "o", folder, workers=2)
    assert decoded(dataset) == texts and dataset.tokenizer().fingerprint == tokenizer.fingerprint
    make(source, tmp_path / "o", folder)  # known again
    (folder / "merges.txt").write_text("no merges\nat all here\n")
    with pytest.raises(UserError, match="not GPT-2's files"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


# ---- nasty documents

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
    dataset = make(source, tmp_path / "o", tokenizer, workers=2, shard_bytes=50_000)
    assert decoded(dataset) == [text for text in texts if text]
    assert dataset.manifest["skipped"] == {"empty": 2}
    verify(dataset.path, quiet())


def test_a_million_tiny_documents(tmp_path: Path) -> None:
    texts = [str(number % 97) for number in range(1_000_000)]
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    dataset = make(tmp_path / "x.jsonl", tmp_path / "o", shard_bytes=1 << 18)
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
    dataset = make(tmp_path / "x.txt", tmp_path / "o")
    split = dataset.split("train")
    assert split.documents == 1 and split.text_bytes == len(content)
    assert split.read(1, split.tokens).astype(np.uint8).tobytes() == content


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


def test_a_source_opened_twice_is_the_same(corpus: Path) -> None:
    fields = Fields(skip_invalid=True)
    assert open_source(str(corpus)).identity == open_source(str(corpus)).identity
    assert open_source(str(corpus)).identity != open_source(str(corpus), fields).identity


def test_leftovers_of_a_kill_after_the_manifest_are_removed(corpus: Path, tmp_path: Path) -> None:
    dataset = make(corpus, tmp_path / "o")
    shutil.copytree(corpus, dataset.path / WORK)
    make(corpus, tmp_path / "o")
    assert not (dataset.path / WORK).exists()

"""Which documents are left out, and that they are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import decoded, jsonl, make, make_whole

from data_pipeline import UserError, open_dataset
from data_pipeline.filters import Filters
from data_pipeline.seen import SeenTexts


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
    dataset = make_whole(source, tmp_path / "o", filters=filters)
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
        make_whole(source, tmp_path / "o")
    make_whole(source, tmp_path / "o", filters=filters)  # the same again
    with pytest.raises(UserError, match="the filters"):
        make_whole(source, tmp_path / "p", filters=Filters(min_characters=1000))
    for wrong in (Filters(min_characters=5, max_characters=4), Filters(language_field="lang")):
        with pytest.raises(UserError):
            make_whole(source, tmp_path / "p", filters=wrong)
    with pytest.raises(UserError, match="no field 'tongue'"):
        make_whole(source, tmp_path / "p", filters=Filters(languages=("en",), language_field="tongue"))


def test_language_is_told_from_the_text(tmp_path: Path) -> None:
    english = "The quick brown fox jumps over the lazy dog and then goes home to sleep for the night."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und geht dann nach Hause, um zu schlafen."
    source = jsonl(tmp_path / "x.jsonl", [{"text": english}, {"text": german}])
    assert decoded(make_whole(source, tmp_path / "o", filters=Filters(languages=("de",)))) == [german]


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
    dataset = make_whole(tmp_path / "x.jsonl", tmp_path / "o", invalid="skip")
    assert decoded(dataset) == ["one", "two"] and dataset.manifest["skipped"] == {"invalid": 5}
    with pytest.raises(UserError, match=r"x\.jsonl: not UTF-8 at byte"):
        make_whole(tmp_path / "x.jsonl", tmp_path / "p")
    with pytest.raises(UserError, match="--invalid"):
        make_whole(tmp_path / "x.jsonl", tmp_path / "p", invalid="ignore")


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    for name, text in {"a": "", "b": "text", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    dataset = make(tmp_path, tmp_path / "o", validation=0.0)
    assert dataset.manifest["skipped"] == {"empty": 2} and decoded(dataset, "train") == ["text"]


def test_a_text_is_seen_once_however_many_there_are() -> None:
    """Past several growths of the table, and with digests whose places collide."""
    seen, known = SeenTexts(), set[str]()
    for number in range(30_000):
        text = str(number * 7919 % 20_011)
        assert seen.add(text) == (text not in known)
        known.add(text)
    assert seen.count == len(known) == 20_011 and len(seen._table) <= 36 * seen.count

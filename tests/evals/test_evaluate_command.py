from __future__ import annotations

import dataclasses

import pytest

from data_pipeline import UserError
from pretrain.evals import SUITES
from pretrain.evaluate import main


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a suite starts to measure."""

    def measure(*_):
        pytest.fail("measured before all was checked")

    for name, suite in SUITES.items():
        monkeypatch.setitem(SUITES, name, dataclasses.replace(suite, measure=measure))


def test_writes_two_files_for_each_suite_and_shows_tables(exported, tmp_path, capsys):
    main([str(exported), "--suite", "perplexity,speculative", "--out", str(tmp_path / "out"), "--limit", "1"])
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"perplexity.json", "perplexity.png", "speculative.json", "speculative.png"}
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "accepted per cycle" in shown and "texts equal to plain" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--suite": "perplexity,nonsense"}, "--suite nonsense: no such suite; there are perplexity, speculative"),
        ({"--limit": "0"}, "--limit 0 must be at least 1"),
        ({"--data": "nowhere"}, "nowhere: no such data set"),
        ({"source": "nowhere"}, "nowhere: no such folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(change, message, exported, tmp_path, no_work):
    values = {"source": str(exported), "--suite": "perplexity", "--out": str(tmp_path / "out")} | change
    source = values.pop("source")
    with pytest.raises(UserError, match=message):
        main([source, *(part for pair in values.items() for part in pair)])
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_draft_is_found_before_the_first_suite_runs(gpt, tmp_path, no_work):
    with pytest.raises(UserError, match="has no latent dynamics model to draft with"):
        main([str(gpt), "--suite", "perplexity,speculative", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_documents_too_short_for_a_prompt(exported, make_data, tmp_path, no_work):
    short = make_data(["tiny", "texts"])
    with pytest.raises(UserError, match="no validation document has the 24 tokens of a prompt"):
        main([str(exported), "--suite", "speculative", "--data", str(short.path), "--out", str(tmp_path / "out")])


def test_another_tokenizer_is_refused(exported, tiny_data, tmp_path, no_work):
    with pytest.raises(UserError, match=r"made with another tokenizer .* prepare the text with that one"):
        main([str(exported), "--suite", "perplexity", "--data", str(tiny_data), "--out", str(tmp_path / "out")])


def test_out_that_is_a_file(exported, tmp_path, no_work):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main([str(exported), "--suite", "perplexity", "--out", str(tmp_path / "file")])

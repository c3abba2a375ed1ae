"""A small study, done twice: the same tables, nothing done again, and mistakes in one line."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from data_pipeline import UserError
from pretrain.study.__main__ import main, run_study
from pretrain.study.page import mean_with_interval
from pretrain.study.plan import read_study

SMALL = ["model.layers=1", "model.width=16", "batch.global_sequences=16", "batch.micro_sequences=16"]
SMALL += ["schedule={name: constant, steps: 3}", "data.sequence_length=8"]


def write_study(folder: Path, **changes: object) -> Path:
    source = {"source": "task:belief,length=7,samples=600", "out": str(folder / "data")}
    config = {"config": "configs/belief/small/gpt.yaml", "overrides": [*SMALL, f"data.path={folder / 'data'}"]}
    nextlat = config | {"config": "configs/belief/small/nextlat.yaml", "label": "NextLat"}
    study = {
        "title": "A study",
        "question": "Is it the same?",
        "suite": "belief",
        "limit": 40,
        "seeds": [3],
        "data": [source],
    }
    study |= {"runs": {"gpt": config | {"label": "GPT"}, "nextlat": nextlat}} | changes
    path = folder / "twice.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def without_date(page: Path) -> str:
    return re.sub(r"Written on .*", "", page.read_text(encoding="utf-8"))


def test_a_study_twice_gives_the_same_tables_and_does_nothing_again(tmp_path, monkeypatch):
    path, quiet = write_study(tmp_path), Console(file=io.StringIO())
    first = run_study(path, tmp_path / "runs", tmp_path / "out", quiet)
    metrics = tmp_path / "runs/twice/gpt_seed3/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    text = without_date(first)
    assert without_date(run_study(path, tmp_path / "runs", tmp_path / "out", quiet)) == text
    assert metrics.stat().st_mtime_ns == before
    tables = [line for line in text.splitlines() if line.startswith("|")]
    runs = yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]
    alone = write_study(tmp_path, runs={"gpt": runs["gpt"]})
    afresh = run_study(alone, tmp_path / "other", tmp_path / "again", quiet).read_text(encoding="utf-8")
    rows = [line for line in tables if line.startswith("| GPT | 3 | ")]
    assert len(rows) == 1 and rows[0] in afresh
    assert any(line.startswith("| NextLat | 3 | ") for line in tables)
    assert "| objective.name |" in text and "next_token" in text and "nextlat" in text
    assert "OMP_NUM_THREADS" not in text and "python -m pretrain.study" in text and "torch 2" in text
    for picture in re.findall(r"\]\((.*?\.png)\)", text):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="was trained with another config"):
        changed = write_study(tmp_path)
        content = changed.read_text(encoding="utf-8").replace("model.width=16", "model.width=32")
        changed.write_text(content, encoding="utf-8")
        run_study(changed, tmp_path / "runs", tmp_path / "out", quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "beliefs"}, "suite=beliefs: no such suite; there are perplexity"),
        ({"seed": [1]}, "seed: Extra inputs are not permitted; keys: title"),
        ({"seeds": [1, 1]}, "seeds=.1, 1.: one is given twice"),
        ({"runs": {"a": {"label": "A", "config": "nowhere.yaml"}}}, "nowhere.yaml: cannot read the config"),
        ({"runs": {"a": {"label": "A", "config": "configs/quickstart.yaml", "overrides": ["model.widht=1"]}}}, "widht"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(changes, message, tmp_path):
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        main([str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"twice.yaml"}


def test_a_study_that_is_no_file():
    with pytest.raises(UserError, match=r"cannot be read"):
        read_study(Path("nowhere.yaml"))


def test_intervals_are_students():
    assert mean_with_interval([1.0, 2.0, 3.0]) == "2 ± 2.5"  # 4.303 · 1 / √3
    assert mean_with_interval([0.5]) == "0.5" and mean_with_interval([]) == "–"

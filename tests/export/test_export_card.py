"""The model card: what the run's own files say, and what to do where they say nothing."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from export_helpers import MemoryCheckpoint, bytes_tokenizer
from matplotlib.image import imread
from rich.console import Console

from pretrain.export import curves, export
from pretrain.export.curves import write_curves

SPECULATIVE = {"acceptance_by_position": [0.8, 0.5], "prompts": 8, "step": 7, "speed_ratio": 1.2}


def in_a_run(folder: Path, objective: dict[str, Any] | None = None) -> MemoryCheckpoint:
    """A checkpoint whose run has metrics of ten steps; three of them come after it."""
    checkpoint = MemoryCheckpoint(bytes_tokenizer(), objective)
    checkpoint.path = folder / "run" / "checkpoints" / "step_00000007"
    checkpoint.path.mkdir(parents=True)
    lines = [
        {"step": step, "tokens": 256 * step, "loss": 9 / step, "loss_next_token": 6 / step} for step in range(11)[1:]
    ]
    for line in lines[::2]:
        line["val_loss_next_token"] = 7 / line["step"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "run" / "metrics.jsonl").write_text(text)
    return checkpoint


def card(checkpoint: MemoryCheckpoint, out: Path) -> str:
    return (export(checkpoint, out, console=Console(file=io.StringIO())) / "README.md").read_text(encoding="utf-8")


def test_it_says_data_tokens_tokenizer_bos_objective_curves_drafts_checks_and_limits(tmp_path: Path) -> None:
    checkpoint = in_a_run(tmp_path)
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "speculative.json").write_text(json.dumps(SPECULATIVE))
    text = card(checkpoint, tmp_path / "model")
    for part in [
        "horizon 2, next-latent weight 1, KL weight 0.5",
        "| trained | 7 steps, 1,792 tokens |",
        "| data | nowhere (fingerprint 000000000000) |",
        f"| tokenizer | bytes, fingerprint {checkpoint.dataset['tokenizer_fingerprint'][:12]} |",
        "**BOS is EOS.** Every training document began with token 256",
        "![losses over tokens](curves.png)",
        "on 8 prompts of the validation data, at step 7:",
        "| 1 | 80% | 0.80 | 1.80 |",
        "| 2 | 50% | 1.20 | 2.20 |",
        "64 tokens of transformers' greedy `generate`",
        "2,400 texts are encoded and decoded as in training",
        "## Limits",
        "no text beyond 48 tokens of context",
    ]:
        assert part in text, part
    manifest = json.loads((tmp_path / "model" / "nextlat_manifest.json").read_text())
    assert {"README.md", "curves.png"} < manifest["files"].keys()
    assert manifest["versions"].keys() == {"torch", "transformers", "exporter"}


@pytest.mark.parametrize("found", [None, "{", json.dumps({"draft": "auto"})], ids=["none", "broken", "other keys"])
def test_it_says_how_draft_lengths_are_measured_where_they_were_not(found: str | None, tmp_path: Path) -> None:
    checkpoint = in_a_run(tmp_path)
    if found is not None:
        (tmp_path / "run" / "evaluation").mkdir()
        (tmp_path / "run" / "evaluation" / "speculative.json").write_text(found)
    assert "python -m pretrain.evaluate RUN --suite speculative --out RUN/evaluation" in card(
        checkpoint, tmp_path / "model"
    )


def test_a_model_that_cannot_draft_says_nothing_of_drafts_and_a_lone_checkpoint_has_no_curves(tmp_path: Path) -> None:
    text = card(MemoryCheckpoint(bytes_tokenizer(), {"name": "next_token"}), tmp_path / "model")
    assert "next-token prediction" in text and "Drafting" not in text
    assert "No metrics.jsonl lay beside the exported checkpoint" in text
    assert not (tmp_path / "model" / "curves.png").exists()


def test_the_picture_shows_the_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = in_a_run(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert [line["step"] for line in curves._read(metrics, 7)] == list(range(1, 8))
    assert write_curves(tmp_path, checkpoint)
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (640, 1100) and picture.min() < 0.3
    with metrics.open("a") as file:
        file.write('{"step": 11, "tok')  # a run is writing
    assert [line["step"] for line in curves._read(metrics, 20)] == list(range(1, 11))


def test_a_long_run_is_thinned_evenly_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_POINTS", 10)
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": s} | ({"val_loss_next_token": 1.0} if s % 100 == 0 else {}) for s in range(1, 1001)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves._read(metrics, 1000)
    validated = [line["step"] for line in found if "val_loss_next_token" in line]
    steps = [line["step"] for line in found if "val_loss_next_token" not in line]
    assert validated == list(range(100, 1001, 100))
    assert 10 <= len(steps) <= 20 and steps == sorted(steps) and steps[0] == 1 and steps[-1] > 900
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= min(gaps) + 1

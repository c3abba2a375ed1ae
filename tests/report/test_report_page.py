"""The report: one page with its pictures inside, and one line for what cannot be reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import UserError
from pretrain.config import dump_config, load_config
from pretrain.report import smoothed, write_report


def fake_run(folder: Path, name: str, objective: str, steps: int = 30) -> Path:
    """A run's folder as training leaves it, with numbers made up here."""
    run = folder / name
    (run / "evaluation").mkdir(parents=True)
    overrides = [f"run.name={name}"]
    if objective == "next_token":
        overrides.append("objective={name: next_token}")
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.yaml", overrides)
    (run / "config.yaml").write_text(dump_config(config))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "tokens": 2048 * step, "loss": 8 / step, "loss_next_token": 7 / step}
            record |= {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 3000.0, "step_seconds": 0.7}
            if objective == "nextlat":
                record |= {"loss_next_latent": 0.1, "loss_kl": 0.2}
            if step % 10 == 0:
                record |= {"val_loss": 9 / step, "val_loss_next_token": 8 / step}
            file.write(json.dumps(record) + "\n")
    (run / "evaluation" / "perplexity.json").write_text(json.dumps({"bits_per_byte": 1.875, "xz_bits_per_byte": 1.442}))
    if objective == "nextlat":
        speculative = {"accepted_per_cycle": 2.31, "acceptance_by_position": [0.8, 0.6, 0.5, 0.4]}
        (run / "evaluation" / "speculative.json").write_text(json.dumps(speculative))
    return run


def test_the_page_holds_its_pictures_and_the_numbers(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, "ours", "nextlat"), fake_run(tmp_path, "baseline", "next_token")]
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    for text in ("ours", "baseline", "Next latent", "KL of rollout", "1.875", "1.442", "2.31", "position in the draft"):
        assert text in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("http://purl.org", "").replace("https://matplotlib.org", ""), "the page must not load anything"


def test_a_baseline_alone_has_one_loss_and_no_drafts(tmp_path: Path) -> None:
    write_report([fake_run(tmp_path, "baseline", "next_token")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Next latent" not in page and "Draft acceptance" not in page and page.count("<svg") == 3


def test_diagnostics_are_drawn_where_a_run_has_them(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path, "ours", "nextlat"), fake_run(tmp_path, "baseline", "next_token")]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        record = {"step": 31, "tokens": 63488, "loss": 1.0, "loss_next_token": 1.0, "step_seconds": 1.0}
        record |= {"hidden_norm": 4.0, "hidden_effective_rank": 20.0, "draft_acceptance": 0.5}
        file.write(json.dumps(record) + "\n")
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "Effective rank of h" in page and "Drafts accepted, of 5" in page and "Variance of h" not in page


def test_names_are_escaped(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "ours", "nextlat")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("path: data/quickstart", "path: '<script>alert(1)</script>'"))
    write_report([run], tmp_path / "report.html")
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics.jsonl here; give the folder of a run"):
        write_report([tmp_path], tmp_path / "report.html")
    run = fake_run(tmp_path, "empty", "nextlat", steps=0)
    with pytest.raises(UserError, match="no step yet"):
        write_report([run], tmp_path / "report.html")
    (run / "metrics.jsonl").write_text('{"step": 1\n')
    with pytest.raises(UserError, match="a line is not JSON"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smoothed([8.0, 2.0])[0] == 8.0

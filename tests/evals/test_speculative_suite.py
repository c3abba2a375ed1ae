from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pretrain.decoding.loading import load_export
from pretrain.decoding.sampling import Sampling
from pretrain.decoding.speculative import generate
from pretrain.evals import speculative
from pretrain.evals.subject import open_subject
from pretrain.evaluate import evaluate


def run(source, out, **options) -> dict:
    return evaluate(source, ["speculative"], out, console=Console(file=io.StringIO()), **options)["speculative"]


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_counts_add_up_and_texts_are_equal(kind, run_folder, exported, tmp_path):
    result = run(exported if kind == "export" else run_folder, tmp_path / "out", limit=3)
    assert result["kind"] == kind and result["prompts"] == 3 and result["draft"] == 4
    assert result["texts_equal"] is True
    assert 0 <= result["accepted"] <= result["drafted"]
    assert 0 < result["distinct_tokens"] <= 1
    assert result["tokens"] == result["cycles"] + result["accepted"] > 0
    assert sum(result["accepted_by_position"]) == result["accepted"]
    assert result["accepted_per_cycle"] == pytest.approx(result["accepted"] / result["cycles"])
    pairs = zip(result["accepted_by_position"], result["alive_by_position"], strict=True)
    assert result["acceptance_by_position"] == [pytest.approx(a / b) for a, b in pairs]
    ratio = result["speculative_tokens_per_second"] / result["plain_tokens_per_second"]
    assert result["speed_ratio"] == pytest.approx(ratio) and ratio > 0
    assert json.loads((tmp_path / "out" / "speculative.json").read_text()) == result
    assert (tmp_path / "out" / "speculative.png").read_bytes().startswith(b"\x89PNG")


def test_unequal_texts_are_reported(exported, tmp_path, monkeypatch):
    def wrong_with_drafts(decoder, prompt, new, draft, sampling):
        tokens, statistics = generate(decoder.model, prompt, new, sampling=Sampling())
        return (tokens[:-1] if draft else tokens), statistics

    monkeypatch.setattr(speculative, "continue_text", wrong_with_drafts)
    assert run(exported, tmp_path, limit=1)["texts_equal"] is False


def test_prompts_are_beginnings_of_validation_documents(exported, data):
    subject = open_subject(exported)
    prompts, new = speculative.cut_prompts(subject, data, 2)
    assert new == 24 and [len(prompt) for prompt in prompts] == [24, 24]
    split = data.split("validation")
    starts = {tuple(split.read(int(s), int(s) + 24).tolist()) for s in split.document_starts[:3]}
    assert set(map(tuple, prompts)) < starts
    assert all(prompt[0] == data.eos_id for prompt in prompts)
    every, _ = speculative.cut_prompts(subject, data, 50)
    assert len(every) == 3  # the fourth document is too short


def test_picture_has_a_bar_for_each_position():
    result = {"acceptance_by_position": [0.9, 0.5], "accepted_per_cycle": 1.35, "speed_ratio": 1.4}
    axes = speculative.picture(result).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [90.0, 50.0]
    assert axes.get_xlabel() and axes.get_ylabel()


def test_load_export_gives_the_dynamics_in_the_models_precision(exported):
    loaded = load_export(exported)
    assert loaded.dynamics is not None and loaded.dynamics.norm.eps == 1e-5
    assert not loaded.dynamics.training and not loaded.model.training

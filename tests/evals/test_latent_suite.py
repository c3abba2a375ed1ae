"""The suite `latent` beside the same numbers, written out position by position in float64."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from data_pipeline import UserError
from pretrain.evals import latent
from pretrain.evaluate import evaluate

HORIZON, LENGTH, SEQUENCES = 5, 48, 4


def run(source, out, **options) -> dict:
    options = {"limit": SEQUENCES, "console": Console(file=io.StringIO())} | options
    return evaluate(source, ["latent"], out, **options)["latent"]


@pytest.fixture(scope="module")
@torch.no_grad()
def pieces(checkpoint, data) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens, the next tokens, states) of each document's part in each window."""
    split = data.split("validation")
    stream = torch.from_numpy(split.read(0, split.tokens).astype("int64"))
    found = []
    for start in range(0, SEQUENCES * LENGTH, LENGTH):
        cuts = [start, *(int(d) for d in split.document_starts if start < d < start + LENGTH), start + LENGTH]
        for a, b in pairwise(cuts):
            tokens = stream[a:b]
            place = torch.arange(b - a)[None]
            hidden = checkpoint.model.trunk(tokens[None], torch.zeros_like(place), place).hidden[0]
            found.append((tokens, stream[a + 1 : b + 1], hidden))
    return found


def calibration(probabilities: list[torch.Tensor], targets: list[int]) -> tuple[float, float]:
    """(calibration error over 15 bins, accuracy)."""
    confidence = np.array([float(p.max()) for p in probabilities])
    right = np.array([float(int(p.argmax()) == x) for p, x in zip(probabilities, targets, strict=True)])
    error = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error, right.mean()


@torch.no_grad()
def test_drift_equals_rollouts_written_out(checkpoint, exported, pieces, tmp_path):
    dynamics, model = checkpoint.model.objective.dynamics, checkpoint.model
    head = model.lm_head.weight.double()
    result = run(exported, tmp_path, horizon=HORIZON)
    assert len(result["dynamics"]) == HORIZON
    for steps, found in enumerate(result["dynamics"], start=1):
        errors, copied, cosines, divergences, nats, told, after = [], [], [], [], [], [], []
        for tokens, targets, hidden in pieces:
            for t in range(len(tokens) - steps):
                state = hidden[t]
                for token in tokens[t + 1 : t + 1 + steps]:
                    state = dynamics.step(state, model.trunk.embed_tokens.weight[token])
                rolled, true = state.double(), hidden[t + steps].double()
                errors.append(float((rolled - true).norm() / true.norm()))
                copied.append(float((hidden[t].double() - true).norm() / true.norm()))
                cosines.append(float(rolled @ true / rolled.norm() / true.norm()))
                log_p, log_q = (head @ true).log_softmax(-1), (head @ rolled).log_softmax(-1)
                divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
                nats.append(-float(log_q[targets[t + steps]]))
                told.append(log_q.exp())
                after.append(int(targets[t + steps]))
        assert found["positions"] == len(errors)
        error, accuracy = calibration(told, after)
        expected = {"relative_error": errors, "copied": copied, "cosine": cosines, "kl": divergences, "loss": nats}
        for key, values in expected.items():
            assert found[key] == pytest.approx(np.mean(values), rel=1e-4), key
        assert found["calibration_error"] == pytest.approx(error, rel=1e-4)
        assert found["accuracy"] == pytest.approx(accuracy)
        assert sum(bin["positions"] for bin in found["bins"]) == len(errors)


@torch.no_grad()
def test_rank_and_the_trunks_calibration_equal_those_written_out(checkpoint, exported, run_folder, pieces, tmp_path):
    states = torch.cat([hidden for _, _, hidden in pieces]).double()
    sigma = torch.linalg.svdvals(states)
    share = sigma / sigma.sum()
    told = [p for _, _, hidden in pieces for p in (hidden @ checkpoint.model.lm_head.weight.T).double().softmax(-1)]
    targets = [int(x) for _, following, _ in pieces for x in following]
    error, accuracy = calibration(told, targets)
    for source in (exported, run_folder):
        result = run(source, tmp_path / "out", horizon=1)
        assert result["states"] == len(states) == SEQUENCES * LENGTH
        assert result["effective_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-4)
        assert result["spectrum"] == pytest.approx(share.tolist(), abs=1e-6)
        assert result["trunk"]["calibration_error"] == pytest.approx(error, rel=1e-4)
        assert result["trunk"]["accuracy"] == pytest.approx(accuracy)


def test_an_honest_forecast_is_calibrated_and_a_boast_is_not():
    p = torch.tensor([0.7, 0.2, 0.1])
    targets = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    honest, boast = latent.Predictions(), latent.Predictions()
    honest.add(p.log().expand(100, 3), targets)
    boast.add(torch.tensor([0.98, 0.01, 0.01]).log().expand(100, 3), targets)
    assert honest.summary()["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert boast.summary()["calibration_error"] == pytest.approx(0.28, abs=1e-6)
    assert boast.summary()["bins"] == [{"confidence": pytest.approx(0.98), "right": 0.7, "positions": 100}]
    # Too little confidence elsewhere does not make up for too much here.
    boast.add(torch.tensor([0.42, 0.3, 0.28]).log().expand(100, 3), targets)
    assert boast.summary()["calibration_error"] == pytest.approx(0.28, abs=1e-6)


def test_a_model_without_dynamics_has_its_trunk_alone_and_says_so(gpt, tmp_path):
    shown = Console(file=io.StringIO(), width=120)
    result = run(gpt, tmp_path, console=shown)
    assert result["dynamics"] is None and result["effective_rank"] > 1 and result["trunk"]["loss"] > 0
    assert "no p_ψ in this model: its trunk alone" in shown.file.getvalue()
    assert len(latent.picture(result).axes) == 2
    assert latent.headline(result).keys() == {"effective rank", "calibration error"}


def test_files_a_table_and_a_picture(exported, tmp_path):
    shown = Console(file=io.StringIO(), width=120)
    result = run(exported, tmp_path, horizon=3, console=shown)
    assert json.loads((tmp_path / "latent.json").read_text()) == result
    assert (tmp_path / "latent.png").read_bytes().startswith(b"\x89PNG")
    assert "p_ψ, 3" in shown.file.getvalue() and f"{result['dynamics'][2]['kl']:.4f}" in shown.file.getvalue()
    spectrum, drift, reliability = latent.picture(result).axes
    assert f"{result['effective_rank']:.1f}" in spectrum.get_title(loc="left")
    lines = {line.get_label(): list(line.get_ydata()) for line in drift.lines}
    assert lines["KL, nats"] == [step["kl"] for step in result["dynamics"]]
    assert len(reliability.lines) == 4  # the diagonal, the trunk, p_ψ after one step and after all


def test_a_rollout_longer_than_documents_is_refused_before_anything_runs(exported, make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(latent, "rank_of", lambda *_: pytest.fail("measured"))
    short = make_data(["twelve chars", "short"])
    with pytest.raises(UserError, match=r"reaches 20 tokens ahead; use longer documents, or --horizon 12"):
        run(exported, tmp_path / "out", data=str(short.path))
    assert not (tmp_path / "out").exists()

"""Linear probes: trained ones on states of known content, their losses written out, and comparisons between models."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from data_pipeline import UserError
from pretrain.evals import probes
from pretrain.evals.subject import open_subject
from pretrain.evaluate import evaluate, main

CYCLE = "abcdefg"


@pytest.fixture(scope="module")
def cyclic(make_data):
    """Documents of one repeated cycle, begun at different letters: what comes k ahead is known from the last letter."""
    texts = [(CYCLE[i:] + CYCLE[:i]) * 6 for i in range(7)]
    return make_data(texts, train=texts)


def run(source, out, data, limit=3, horizon=4, **options) -> dict:
    options |= {"data": str(data.path), "limit": limit, "horizon": horizon, "console": Console(file=io.StringIO())}
    return evaluate(source, ["probes"], out, **options)["probes"]


def named_by_tokens(subject):
    """The subject with states that say which token was read last, and nothing else."""
    eye_VV = 8 * torch.eye(len(subject.head_VD))
    return replace(subject, trunk_states=lambda batch: eye_VV[batch.tokens[:, :-1]], head_VD=eye_VV)


def test_probe_k_learns_the_token_k_ahead(exported, cyclic):
    subject = named_by_tokens(open_subject(exported))
    trained = probes.train(subject, probes._training_stream(subject, cyclic), 8, 3, Progress(disable=True))
    letters = [ord(letter) for letter in CYCLE]
    for offset, probe_VD in enumerate(trained, start=1):
        assert probe_VD[letters][:, letters].argmax(0).tolist() == [(place + offset) % 7 for place in range(7)]


@torch.no_grad()
def direct(checkpoint, data, matrices: list[torch.Tensor], length: int) -> tuple[list[float], list[int]]:
    """−Σ log softmax(W_k h_t)[x_{t+k}] and the number of terms, window by window, document by document."""
    split = data.split("validation")
    stream = torch.from_numpy(split.read(0, split.tokens).astype("int64"))
    starts = split.document_starts.tolist()
    document = torch.tensor([sum(start <= place for start in starts) for place in range(len(stream))])
    lengths = split.prompt_lengths if split.prompt_lengths is not None else [0] * len(starts)
    prompt = {s + 1 + i for s, n in zip(starts, lengths, strict=True) for i in range(int(n))}
    nats, counts = [0.0] * len(matrices), [0] * len(matrices)
    for start in range(0, len(stream) - 1, length):
        stop = min(start + length, len(stream) - 1)
        for t in range(start, stop):
            first = max(start, max(s for s in starts if s <= t))
            tokens = stream[None, first : t + 1]
            hidden = checkpoint.model.trunk(tokens, torch.zeros_like(tokens), torch.arange(t + 1 - first)[None]).hidden
            for k, matrix in enumerate(matrices, start=1):
                if t + k <= stop and document[t + k - 1] == document[t] and t + k not in prompt:
                    nats[k - 1] -= float((matrix.double() @ hidden[0, -1].double()).log_softmax(-1)[stream[t + k]])
                    counts[k - 1] += 1
    return nats, counts


@pytest.mark.parametrize("prompts", [None, [9, 30]])
def test_losses_are_means_over_the_positions_whose_target_can_be_seen(prompts, checkpoint, exported, make_data):
    texts = ["question: an answer, then the end", "def f(x):\n    return x + 1\n" * 3]
    data, subject = make_data(texts, prompts), open_subject(exported)
    matrices = [torch.randn(subject.head_VD.shape, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    nats, counts, next_token = probes.judge(subject, data, nn.ParameterList(matrices), Progress(disable=True))
    expected_nats, expected_counts = direct(checkpoint, data, matrices, length=48)
    assert counts.tolist() == expected_counts
    assert nats.tolist() == pytest.approx(expected_nats, rel=1e-5)
    head = direct(checkpoint, data, [subject.head_VD.detach()], length=48)[0]
    assert next_token == pytest.approx(head[0], rel=1e-5)


def test_two_models_are_compared_on_the_same_positions(exported, gpt, cyclic, tmp_path):
    first = run(exported, tmp_path / "first", cyclic)
    assert first["horizon"] == 4 and first["steps"] == 3 and "difference" not in first
    assert first["positions"] == sorted(first["positions"], reverse=True)
    assert (tmp_path / "first" / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert run(exported, tmp_path / "again", cyclic) == first
    result = run(gpt, tmp_path / "second", cyclic, against=str(tmp_path / "first"))
    assert json.loads((tmp_path / "second" / "probes.json").read_text()) == result
    assert result["against"] == str(exported) and result["against_loss"] == first["loss"] != result["loss"]
    losses = zip(result["loss"], first["loss"], strict=True)
    assert result["difference"] == pytest.approx([mine - its for mine, its in losses])
    [line] = [line for line in probes.picture(result).axes[0].lines if len(line.get_ydata()) == 4]
    assert list(line.get_ydata()) == result["difference"]
    assert probes.headline(result) == {"probe 1": result["loss"][0], "probe 2": result["loss"][1]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 45}, r"none of its validation documents.* reaches 45 tokens ahead; .* or --horizon 43"),
        ({"horizon": 60}, r"in sequences of 48 tokens, reaches 60 tokens ahead; .* or --horizon 43"),
        ({"horizon": 0}, "--horizon 0 must be at least 1"),
        ({"against": "nowhere"}, "--against nowhere: no result of the suite probes there"),
        ({"against": "first", "horizon": 3}, "--against first: its horizon is not the one here"),
        ({"against": "first", "limit": 2}, "--against first: its steps is not the one here"),
    ],
    ids=["long", "longer", "none", "nothing there", "horizon", "steps"],
)
def test_mistakes_are_one_line_before_anything_runs(options, message, exported, cyclic, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(exported, tmp_path / "first", cyclic)
    monkeypatch.setattr(probes, "train", lambda *_: pytest.fail("began to train"))
    with pytest.raises(UserError, match=message) as caught:
        run(exported, tmp_path / "out", cyclic, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_option_of_another_suite_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="--horizon: no option of perplexity, speculative; leave it out"):
        main([str(exported), "--suite", "perplexity,speculative", "--horizon", "3", "--out", str(tmp_path)])

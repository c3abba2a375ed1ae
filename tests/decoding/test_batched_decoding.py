"""Texts of different lengths in one batch: each must be the text that it is alone, decoded plainly."""

from __future__ import annotations

import random

import pytest
import torch
from decoding_helpers import EOS, AtSetCosts, make_llama

from data_pipeline import UserError
from pretrain.decoding import AdaptiveLength, FixedLength, draft_with_latent_dynamics, generate, generate_batch
from pretrain.decoding.trunk import CachedTrunk

NEW = 7


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decoder():
    """A float64 model, in which no two logits are equal to rounding, and its draft step."""
    model, dynamics = make_llama(num_hidden_layers=1)
    return model.double(), draft_with_latent_dynamics(model, dynamics.double())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(7) for _ in range(chance.randint(1, 12))] for _ in range(200)]


@pytest.fixture(scope="module")
def plain(decoder, prompts) -> list[list[int]]:
    return [generate(decoder[0], prompt, NEW, eos_id=EOS)[0] for prompt in prompts]


def decode(decoder, prompts, length, batch, new=NEW, eos_id=EOS):
    """Texts in batches, every text's and the total's accounting asserted; also how many cycles each text took."""
    model, step = decoder
    texts, cycles_of_each, total = [], [], None
    for start in range(0, len(prompts), batch):
        cycles: list[list[list[int]]] = [[] for _ in prompts[start : start + batch]]
        some, statistics = generate_batch(
            model, prompts[start : start + batch], new, eos_id=eos_id, draft_step=step if length else None,
            draft_length=length, on_tokens=lambda number, tokens, cycles=cycles: cycles[number].append(tokens),
        )  # fmt: skip
        assert some == [[token for new in text for token in new] for text in cycles]
        assert statistics.cycles == sum(map(len, cycles))
        assert statistics.accepted == sum(len(new) - 1 for text in cycles for new in text) <= statistics.drafted
        assert all(len(new) - 1 <= getattr(length, "length", AdaptiveLength.LONGEST) for text in cycles for new in text)
        assert all(eos_id not in new[:-1] for text in cycles for new in text)
        assert statistics.tokens == statistics.cycles + statistics.accepted == sum(map(len, some))
        texts += some
        cycles_of_each += map(len, cycles)
        total = total.add(statistics) or total if total else statistics
    return texts, cycles_of_each, total


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("length", [*range(1, 11), "auto"])
def test_greedy_texts_equal_plain_ones(length, batch, decoder, prompts, plain):
    rule = AtSetCosts() if length == "auto" else FixedLength(length)
    texts, cycles, statistics = decode(decoder, prompts, rule, batch)
    assert texts == plain
    assert statistics.accepted > 100 and len(set(cycles)) > 3
    assert sum(text[-1] == EOS for text in texts) > 20


def test_a_batch_decodes_plainly_as_its_texts_do_alone(decoder, prompts, plain):
    texts, _, statistics = decode(decoder, prompts, None, batch=16)
    assert texts == plain and statistics.drafted == 0


def test_texts_end_inside_drafts_and_leave_the_batch_one_by_one(decoder, prompts):
    for eos_id in range(7):
        expected = [generate(decoder[0], prompt, 30, eos_id=eos_id)[0] for prompt in prompts[:8]]
        assert len({len(text) for text in expected}) > 1
        assert decode(decoder, prompts[:8], FixedLength(4), batch=8, new=30, eos_id=eos_id)[0] == expected


def test_a_trimmed_draft_vocabulary_drafts_its_tokens_alone_and_changes_no_text(decoder, prompts, plain):
    model, dynamics = make_llama(num_hidden_layers=1)
    step = draft_with_latent_dynamics(model.double(), dynamics.double(), vocabulary=[5, 2, 2])
    _, logits = step(torch.randn(3, 32, dtype=torch.float64), torch.tensor([1, 2, 3]))
    assert (logits > float("-inf")).nonzero()[:, 1].unique().tolist() == [2, 5]
    _, full = decoder[1](torch.ones(1, 32, dtype=torch.float64), torch.tensor([4]))
    _, few = step(torch.ones(1, 32, dtype=torch.float64), torch.tensor([4]))
    torch.testing.assert_close(few[:, [2, 5]], full[:, [2, 5]])
    texts, _, statistics = decode((model, step), prompts, FixedLength(3), batch=50)
    assert texts == plain and 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("mistake", ["mask", "keep", "positions"])
def test_mistakes_with_the_rows_are_seen(mistake, decoder, prompts, plain, monkeypatch):
    right = CachedTrunk.read
    if mistake == "mask":  # each row sees as far as the longest

        def read(self, tokens, starts):
            model, self._model = self._model, Unmasked(self._model)
            states = right(self, tokens, starts)
            self._model = model
            return states

        monkeypatch.setattr(CachedTrunk, "read", read)
    elif mistake == "keep":
        monkeypatch.setattr(CachedTrunk, "keep", lambda self, rows: None if len(rows) == 0 else shorten(self, rows))
    else:
        monkeypatch.setattr(CachedTrunk, "read", lambda self, t, s: right(self, t, torch.full_like(s, int(s.max()))))
    assert decode(decoder, prompts[:64], FixedLength(3), batch=8)[0] != plain[:64]


class Unmasked:
    """A model whose causal mask reaches to the last slot that is in use."""

    def __init__(self, model):
        self._model = model

    def model(self, attention_mask, **rest):
        if attention_mask.shape[-1] > attention_mask.shape[-2]:  # not the prompts
            attention_mask = attention_mask | attention_mask.any(0, keepdim=True)
        return self._model.model(attention_mask=attention_mask, **rest)


def shorten(trunk, rows):
    """Keep the first rows, whichever were asked for."""
    trunk._keys = [keys[: len(rows)] for keys in trunk._keys]
    trunk._values = [values[: len(rows)] for values in trunk._values]


def test_one_prompt_beyond_the_context_stops_all_before_any_work(decoder, monkeypatch):
    monkeypatch.setattr(CachedTrunk, "read", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(UserError, match="a prompt of 250 tokens and 7 new ones exceed the model's context of 256"):
        generate_batch(decoder[0], [[1], [2] * 250], NEW)

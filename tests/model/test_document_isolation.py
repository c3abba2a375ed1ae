from __future__ import annotations

import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.transformer import Transformer

VOCAB, LENGTHS = 23, [1, 4, 6, 1]
T = sum(LENGTHS)
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[None, 1], ids=["a key head each", "shared key head"])
def trunk(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(layers=3, width=16, heads=2, kv_heads=request.param, mlp_width=24, rope_theta=100.0)
    trunk = Transformer(config, VOCAB).double()
    for parameter in trunk.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.4)
    return trunk.requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (1, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changed", range(T))
def test_a_changed_token_changes_itself_and_what_follows_in_its_document_and_nothing_else(
    trunk: Transformer, tokens: torch.Tensor, changed: int
):
    before = trunk(tokens, DOCUMENTS, POSITIONS).hidden
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    after = trunk(other, DOCUMENTS, POSITIONS).hidden
    same_document = DOCUMENTS[0] == DOCUMENTS[0, changed]
    may_change = same_document & (torch.arange(T) >= changed)
    moved = (after - before).abs().amax(-1)[0]
    assert (moved[~may_change] == 0).all()
    assert (moved[may_change] > 1e-6).all()


def test_a_packed_row_gives_each_document_the_states_it_has_alone(trunk: Transformer, tokens: torch.Tensor):
    packed = trunk(tokens, DOCUMENTS, POSITIONS).hidden
    for piece, states in zip(tokens.split(LENGTHS, 1), packed.split(LENGTHS, 1), strict=True):
        alone = trunk(piece, torch.zeros_like(piece), torch.arange(piece.shape[1])[None]).hidden
        torch.testing.assert_close(states, alone, rtol=1e-12, atol=1e-12)


def test_a_row_does_not_depend_on_the_other_rows_or_on_the_name_of_its_documents(
    trunk: Transformer, tokens: torch.Tensor
):
    alone = trunk(tokens, DOCUMENTS, POSITIONS).hidden
    reverse = tokens.flip(1)
    both = trunk(
        torch.cat([reverse, tokens]),
        torch.cat([torch.zeros_like(DOCUMENTS), DOCUMENTS + 7]),
        torch.cat([torch.arange(T)[None], POSITIONS]),
    ).hidden
    torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)


def test_no_gradient_flows_between_documents_or_backwards_in_time(trunk: Transformer, tokens: torch.Tensor):
    """Token k reaches the hidden state at t only where both lie in one document and k <= t."""

    def states(embeddings: torch.Tensor) -> torch.Tensor:
        handle = trunk.embed_tokens.register_forward_hook(lambda *_: embeddings)
        try:
            return trunk(tokens, DOCUMENTS, POSITIONS).hidden.sum((0, 2))
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(states, trunk.embed_tokens(tokens).detach())
    reach = jacobian[:, 0].abs().amax(-1)
    allowed = (DOCUMENTS[0][:, None] == DOCUMENTS[0][None, :]).tril()
    assert (reach[~allowed] == 0).all()
    assert (reach[allowed] > 0).all()


def test_padding_on_either_side_changes_no_document_and_gives_no_nan(trunk: Transformer, tokens: torch.Tensor):
    expected = trunk(tokens, DOCUMENTS, POSITIONS).hidden
    padded = trunk(
        torch.nn.functional.pad(tokens, (2, 3)),
        torch.nn.functional.pad(DOCUMENTS, (2, 3), value=-1),
        torch.nn.functional.pad(POSITIONS, (2, 3)),
    ).hidden
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, 2 : 2 + T], expected, rtol=1e-12, atol=1e-12)


def test_order_and_distance_matter_and_absolute_position_does_not(trunk: Transformer, tokens: torch.Tensor):
    """Rotary attention sees differences of positions: a shift of all changes nothing, a gap does."""
    one = torch.zeros_like(tokens)
    positions = torch.arange(T)[None]
    states = trunk(tokens, one, positions).hidden
    shifted = trunk(tokens, one, positions + 5).hidden
    spread = trunk(tokens, one, positions * 2).hidden
    torch.testing.assert_close(shifted, states, rtol=1e-9, atol=1e-9)
    assert (spread - states).abs().max() > 1e-3

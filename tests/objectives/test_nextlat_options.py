"""Every option of NextLat, and the fused loss under it, against the reference: random shapes, masks and chunk sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_probabilities, make_batch, nextlat
from torch import Tensor, nn

from pretrain.config import NextLatConfig
from pretrain.objectives import LanguageModelHead, NextLat, TokenBatch, fused_loss, row_seeds
from pretrain.objectives.fused_loss import fused_cross_entropy_kl
from pretrain.objectives.nextlat import chosen_positions
from pretrain.transformer import TrunkStates

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
slow = settings(max_examples=15, deadline=None, derandomize=True, database=None)

OPTIONS = {
    "latent_loss": st.sampled_from(["smooth_l1", "mse"]),
    "rollout_loss": st.sampled_from(["kl", "cross_entropy"]),
    "stop_gradient_target": st.booleans(),
    "stop_gradient_head": st.booleans(),
}
# Error of values and gradients, relative to the largest of each; bfloat16 has 8 bits.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str, roundings: int = 1) -> None:
    if not expected.numel():
        return
    error = (actual.detach().double() - expected.detach()).abs().max() / expected.abs().max().clamp(min=1e-3)
    allowed = TOLERANCE[dtype] * (roundings if dtype == torch.bfloat16 else 1)
    assert error.item() <= allowed, f"{name}: {error.item()}"


def plain_losses(
    hidden: Tensor, head: Tensor, targets: Tensor, rollouts: Tensor, rollout_loss: str, freeze_head: bool
) -> tuple[Tensor, Tensor]:
    """Unweighted: cross-entropy (N,) and rollout losses (d, M), position by position."""
    ce = torch.stack([-log_probabilities(h, head)[t] for h, t in zip(hidden, targets, strict=True)])
    frozen = head.detach() if freeze_head else head
    rows = []
    for rollout in rollouts:
        row = [torch.zeros((), dtype=hidden.dtype)]
        for n, state in enumerate(rollout):
            teacher, student = log_probabilities(hidden[n].detach(), head.detach()), log_probabilities(state, frozen)
            kl = (teacher.exp() * (teacher - student)).sum()
            row.append(kl if rollout_loss == "kl" else -student[targets[n]])
        rows.append(torch.stack(row)[1:])
    return ce, torch.stack(rows) if rows else hidden.new_zeros(0, rollouts.shape[1])


@quick
@given(
    seed=st.integers(0, 10**6),
    positions=st.integers(1, 9),
    share=st.floats(0, 1),
    width=st.integers(1, 7),
    vocab=st.integers(2, 40),
    steps=st.integers(0, 8),
    chunk_bytes=st.integers(1, 20_000),
    block_bytes=st.integers(1, 4_000),
    rollout_loss=OPTIONS["rollout_loss"],
    freeze_head=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_fused_values_and_gradients_equal_the_reference(
    seed, positions, share, width, vocab, steps, chunk_bytes, block_bytes, rollout_loss, freeze_head, dtype
):
    generator = torch.Generator().manual_seed(seed)
    landings = int(share * positions)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def weights(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.7)

    inputs = [normal(positions, width), normal(vocab, width), normal(steps, landings, width)]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    targets = torch.randint(vocab, (positions,), generator=generator)
    ce_weights, kl_weights = weights(positions), weights(steps, landings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "BLOCK_BYTES", {"cpu": block_bytes})
        ce, kl_d = fused_cross_entropy_kl(
            ours[0], ours[1], targets, ce_weights, ours[2], kl_weights,
            rollout_loss=rollout_loss, freeze_head=freeze_head, memory_budget_bytes=chunk_bytes,
        )  # fmt: skip
    ce_N, kl_dM = plain_losses(exact[0], exact[1], targets, exact[2], rollout_loss, freeze_head)
    expected_ce, expected_kl_d = (ce_N * ce_weights).sum(), (kl_dM * kl_weights).sum(-1)
    assert_close(ce, expected_ce, dtype, "cross-entropy")
    assert_close(kl_d, expected_kl_d, dtype, rollout_loss)
    (1.5 * ce - 0.7 * kl_d.sum()).backward()
    (1.5 * expected_ce - 0.7 * expected_kl_d.sum()).backward()
    for name, mine, theirs in zip(("hidden", "head", "rollouts"), ours, exact, strict=True):
        assert_close(mine.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad, dtype, name)


@slow
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=2),
    prompt=st.integers(0, 3),
    horizon=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([1.0, 0.1, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    **OPTIONS,
)
def test_the_objective_equals_the_reference_under_every_option(rows, prompt, horizon, seed, share, dtype, **options):
    columns = 1 + max(horizon + 1, *(sum(row) for row in rows))
    batch = make_batch(rows, columns, 13, [[prompt] * len(row) for row in rows], seed)
    batch = replace(batch, row_seeds=row_seeds(seed, range(len(rows))))
    config = NextLatConfig(
        name="nextlat", horizon=horizon, next_latent_weight=0.7, kl_weight=1.3, dynamics_width=5,
        kl_positions=share, **options,
    )  # fmt: skip
    case = Case(config, batch, seed, dtype)
    losses, gradients = case.ours()
    expected, expected_gradients = case.reference()
    roundings = 2 + horizon  # bfloat16 loses a bit in each step of a rollout, and in each of p_ψ's layers
    kl_name = "loss_kl" if options["rollout_loss"] == "kl" else "loss_rollout_cross_entropy"
    for name, value in expected.items():
        assert_close(losses[name.replace("loss_kl", kl_name)], value, dtype, name, roundings)
    assert len(losses) == len(expected)
    largest = max(gradient.abs().max().clamp(min=1e-3) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name] / largest, gradient / largest, dtype, name, roundings)


class Case:
    """A NextLat objective on made-up states, and the reference on the same numbers."""

    def __init__(self, config: NextLatConfig, batch: TokenBatch, seed: int, dtype: torch.dtype):
        self.config, self.batch, self.dtype = config, batch, dtype
        generator = torch.Generator().manual_seed(seed)
        self.objective, self.head = NextLat(config, width=4), LanguageModelHead(4, 13)
        for parameter in [*self.objective.parameters(), *self.head.parameters()]:
            nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
        B, T = len(batch.tokens), batch.tokens.shape[1] - 1
        self.hidden, self.embeddings = (
            torch.randn(B, T, 4, generator=generator).to(dtype).requires_grad_() for _ in range(2)
        )
        self.objective.to(dtype)
        self.head.to(dtype)

    def leaves(self) -> dict[str, Tensor]:
        psi = dict(self.objective.dynamics.named_parameters())
        return {"hidden": self.hidden, "embeddings": self.embeddings, "head": self.head.weight, **psi}

    def ours(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        nothing = torch.empty(0)
        states = TrunkStates(self.hidden, self.embeddings, nothing, (nothing, nothing), nothing)
        losses = self.objective(states, self.batch, self.head, self.objective.valid_counts(self.batch))
        losses["loss"].backward()
        return losses, {name: leaf.grad for name, leaf in self.leaves().items()}

    def reference(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves().items()}
        config, T = self.config, self.hidden.shape[1]
        factors = torch.ones(len(self.batch.tokens), T)
        if config.kl_positions < 1:
            chosen = chosen_positions(self.batch.row_seeds, T, config.kl_positions)
            factors = chosen * T / chosen[0].sum()
        losses = nextlat(
            leaves["hidden"], leaves["embeddings"], leaves["head"], leaves, self.batch, config.horizon,
            config.next_latent_weight, config.kl_weight,
            latent_loss=config.latent_loss, rollout_loss=config.rollout_loss,
            stop_gradient_target=config.stop_gradient_target, stop_gradient_head=config.stop_gradient_head,
            kl_factors=factors,
        )  # fmt: skip
        losses.loss.backward() if losses.loss.requires_grad else None
        zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return losses.named(), {name: zero[name] if x.grad is None else x.grad for name, x in leaves.items()}


def test_chosen_positions_are_the_rows_own_and_each_position_is_as_likely():
    seeds = row_seeds(7, range(3000))
    chosen = chosen_positions(seeds, 20, 0.25)
    assert (chosen.sum(1) == 5).all()
    assert (chosen.double().mean(0) - 0.25).abs().max() < 0.03  # standard deviation 0.008
    assert torch.equal(chosen_positions(seeds[40:50], 20, 0.25), chosen[40:50])
    assert not torch.equal(chosen_positions(row_seeds(8, range(3000)), 20, 0.25), chosen)


def test_a_share_of_positions_saves_its_head_products_and_keeps_every_validation_position():
    batch = replace(make_batch([[13]], 13, 13), row_seeds=(1,))
    calls: list[int] = []

    class Counting(LanguageModelHead):
        def forward(self, hidden, *arguments, **options):
            calls.append(arguments[2].numel() // hidden.shape[-1])
            return super().forward(hidden, *arguments, **options)

    for share, seeds in ((1.0, (1,)), (0.5, (1,)), (0.5, None)):
        config = NextLatConfig(
            name="nextlat", horizon=3, next_latent_weight=1.0, kl_weight=1.0, dynamics_width=5, kl_positions=share
        )
        case = Case(config, replace(batch, row_seeds=seeds), 0, torch.float32)
        case.head.__class__ = Counting
        case.ours()
    assert calls == [3 * 12, 3 * 6, 3 * 12]


def test_gradients_of_a_loss_can_be_taken_once():
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ce, _ = fused_cross_entropy_kl(hidden, head, torch.zeros(3, dtype=torch.long), torch.ones(3))
    ce.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        ce.backward()


def test_autocast_gives_the_losses_and_gradients_of_bfloat16_to_float32_weights():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((6, 8), (30, 8), (2, 6, 8))]
    targets, weights = torch.randint(30, (6,), generator=generator), torch.full((6,), 1 / 6)
    results = []
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        hidden, head, rollouts = (leaf.clone().to(dtype).requires_grad_() for leaf in leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ce, kl_d = fused_cross_entropy_kl(hidden, head, targets, weights, rollouts, weights.expand(2, 6))
        (ce + kl_d.sum()).backward()
        assert hidden.grad.dtype == dtype and ce.dtype == torch.float32
        results.append([ce.detach(), kl_d.detach(), *(x.grad.float() for x in (hidden, head, rollouts))])
    for with_autocast, in_bfloat16 in zip(*results, strict=True):
        torch.testing.assert_close(with_autocast, in_bfloat16, rtol=0, atol=0)

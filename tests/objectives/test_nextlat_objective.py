from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from reference import Losses, losses_and_gradients, make_batch, rows_of
from torch import Tensor

from pretrain.config import Config
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch, fused_loss

VOCAB, COLUMNS = 11, 13  # T = 12

# Documents of one token, one document in a row, borders after the first column, before and after the last
# input column, right padding, and a row of nothing but padding.
ROWS = [[4, 1, 3, 5], [13], [1, 11, 1], [12, 1], [5, 4], [], [1, 1, 1, 2, 8]]
PROMPTS = [[2, 0, 0, 3], [6], [0, 4, 0], [0, 0], [1, 2], [], [0, 0, 0, 1, 7]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(
    horizon: int = 2, tied: bool = False, next_latent_weight: float = 0.7, kl_weight: float = 1.3
) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {
                "layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "mlp_width": 12,
                "tie_embeddings": tied, "rope_theta": 100.0,
            },
            "objective": {
                "name": "nextlat", "horizon": horizon, "next_latent_weight": next_latent_weight,
                "kl_weight": kl_weight, "dynamics_width": 10,
            },
            "data": {"path": "nowhere", "sequence_length": COLUMNS - 1},
            "batch": {"global_sequences": 7, "micro_sequences": 1},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )  # fmt: skip


def make_model(config: Config, dtype: torch.dtype = torch.float64, std: float = 0.5) -> PretrainingModel:
    """Weights large enough for peaked softmaxes and both branches of SmoothL1; norms away from one."""
    model = PretrainingModel(config, VOCAB)
    initialise(model, seed=3, std=std)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype)


def packed_batch() -> TokenBatch:
    return make_batch(ROWS, COLUMNS, VOCAB, PROMPTS)


def run(
    model: PretrainingModel, parts: list[TokenBatch]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Losses summed over micro-batches, gradients accumulated over them, and each part's losses."""
    counts = sum((model.objective.valid_counts(part) for part in parts), torch.zeros(()))
    model.zero_grad()
    outputs = []
    for part in parts:
        output = model(part, counts)
        output["loss"].backward()
        outputs.append(output)
    total = {name: sum(output[name].detach() for output in outputs) for name in outputs[0]}
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }
    return total, gradients, outputs


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: off by {error}"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_values_and_all_gradients_equal_the_reference_in_float64(horizon: int, tied: bool):
    config = make_config(horizon, tied)
    model, batch = make_model(config), packed_batch()
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected_gradients.values())
    values, gradients, _ = run(model, [batch])
    assert_equal(values, expected.named())
    assert_equal(gradients, expected_gradients)


@pytest.mark.parametrize("seed", range(4))
def test_random_packings_equal_the_reference(seed: int):
    generator = torch.Generator().manual_seed(seed)
    rows, prompts = [], []
    for _ in range(4):
        lengths: list[int] = []
        while sum(lengths) < COLUMNS:
            length = int(torch.randint(1, 6, (), generator=generator))
            lengths.append(min(length, COLUMNS - sum(lengths)))
        rows.append(lengths if torch.rand((), generator=generator) < 0.7 else lengths[:-1])
        prompts.append([int(torch.randint(0, 4, (), generator=generator)) for _ in lengths])
    config = make_config(horizon=3)
    model, batch = make_model(config), make_batch(rows, COLUMNS, VOCAB, prompts, seed)
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    values, gradients, _ = run(model, [batch])
    assert_equal(values, expected.named())
    assert_equal(gradients, expected_gradients)


def test_a_horizon_that_fills_the_row_equals_the_reference():
    config = make_config(horizon=COLUMNS - 2)  # from position 0 to T-1, the longest that exists
    model, batch = make_model(config), make_batch([[13], [6, 7]], COLUMNS, VOCAB)
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    assert expected.next_latent_counts[-1] == 1
    values, gradients, _ = run(model, [batch])
    assert_equal(values, expected.named())
    assert_equal(gradients, expected_gradients)


def test_valid_counts_equal_a_count_by_hand():
    # columns:   0 1 2 3 | 4 | 5 6 7 | 8 9 10 11 12(label)     prompt of 2 in the first, of 3 in the last
    batch = make_batch([[4, 1, 3, 5]], COLUMNS, VOCAB, [[2, 0, 0, 3]])
    objective = make_model(make_config(horizon=3)).objective
    # next token: targets among columns 1..12: 3, 4, 5, 6, 7, 8, 12 (prompt: 1, 2 and 9, 10, 11)
    # 1 step lands on 1 2 3, 6 7, 9 10 11; KL needs column s+1 a target: 2 3, 6 7, 11
    # 2 steps land on 2 3, 7, 10 11 -> KL 2 3, 7, 11;  3 steps land on 3, 11 -> both KL
    assert objective.valid_counts(batch).tolist() == [7, 8, 5, 2, 5, 4, 2]


def test_a_rollout_may_start_at_eos_and_may_not_consume_one():
    """Document borders between t and t+i mask a rollout even where it lands well inside the next document."""
    objective = make_model(make_config(horizon=2)).objective
    one = make_batch([[3, 10]], COLUMNS, VOCAB)
    # 1 step: 2 of 3 tokens, 8 of 9 inputs (column 12 is a label only); 2 steps: 1 and 7
    assert objective.valid_counts(one).tolist() == [12, 10, 8, 10, 8]


def test_micro_batches_of_unequal_validity_add_up_to_the_whole_batch():
    config = make_config(horizon=2)
    model, batch = make_model(config), packed_batch()
    parts = [rows_of(batch, slice(0, 3)), rows_of(batch, slice(3, 4)), rows_of(batch, slice(4, 7))]
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    values, gradients, outputs = run(model, parts)
    shares = [output["loss_next_token"].item() for output in outputs]
    assert max(shares) > 1.5 * min(shares)  # a mean over each micro-batch alone would be another number
    assert_equal(values, expected.named())
    assert_equal(gradients, expected_gradients)


def test_a_padding_row_adds_nothing_and_its_tokens_do_not_matter():
    model = make_model(make_config(horizon=2))
    batch = packed_batch()
    without = TokenBatch(*(torch.cat([x[:5], x[6:]]) for x in vars(batch).values() if x is not None))
    values, gradients, _ = run(model, [without])
    padding = batch.document_ids < 0
    other_tokens = torch.where(padding, (batch.tokens + 5) % VOCAB, batch.tokens)
    for tokens in (batch.tokens, other_tokens):
        same = TokenBatch(tokens, batch.document_ids, batch.positions, batch.target_mask)
        padded_values, padded_gradients, _ = run(model, [same])
        assert_equal(padded_values, values, 1e-12)
        assert_equal(padded_gradients, gradients, 1e-12)


@pytest.mark.parametrize("positions", [1, 5, 10**6], ids=["one", "uneven last", "all"])
def test_chunk_size_changes_no_loss_and_no_gradient(positions: int, monkeypatch: pytest.MonkeyPatch):
    config = make_config(horizon=2)
    model, batch = make_model(config), packed_batch()
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    original = fused_loss.fused_cross_entropy_kl
    calls = []

    def with_budget(*arguments, **options):
        calls.append(positions)
        return original(*arguments, **options, memory_budget_bytes=positions * VOCAB * 3 * 8)

    assert fused_loss.positions_per_chunk(VOCAB, 2, 8, positions * VOCAB * 3 * 8) == positions
    assert (12 * len(ROWS)) % 5, "the last chunk of 5 must be uneven"
    monkeypatch.setattr("pretrain.objectives.base.fused_cross_entropy_kl", with_budget)
    values, gradients, _ = run(model, [batch])
    assert calls
    assert_equal(values, expected.named())
    assert_equal(gradients, expected_gradients)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 1e-1)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("horizon", [1, 4])
def test_lower_precision_stays_near_the_reference(
    dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float, horizon: int
):
    config = make_config(horizon)
    # Milder weights: with the large ones the trunk's own rounding, which no loss can mend, hides the loss's.
    model, batch = make_model(config, dtype, std=0.2), packed_batch()
    expected, expected_gradients = losses_and_gradients(model, config, batch)  # of the rounded weights
    values, gradients, _ = run(model, [batch])
    for name, value in expected.named().items():
        assert values[name].dtype == torch.float32, f"{name} is accumulated in {values[name].dtype}"
        assert relative_error(values[name], value) < value_tolerance, name
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < gradient_tolerance, name


def difference(with_term: dict[str, Tensor], without: dict[str, Tensor]) -> dict[str, float]:
    return {name: (with_term[name] - without[name]).abs().max().item() for name in without}


@pytest.mark.parametrize("horizon", [1, 2])
def test_kl_moves_dynamics_and_trunk_and_leaves_the_head_alone(horizon: int):
    batch = packed_batch()
    _, without, _ = run(make_model(make_config(horizon, next_latent_weight=0.0, kl_weight=0.0)), [batch])
    _, with_kl, _ = run(make_model(make_config(horizon, next_latent_weight=0.0, kl_weight=5.0)), [batch])
    change = difference(with_kl, without)
    assert change.pop("lm_head.weight") == 0.0
    assert min(change.values()) > 1e-4, change


def test_next_latent_alone_moves_dynamics_and_trunk_and_leaves_the_head_alone():
    batch = packed_batch()
    nothing_to_predict = TokenBatch(
        batch.tokens, batch.document_ids, batch.positions, torch.zeros_like(batch.target_mask)
    )
    values, gradients, _ = run(make_model(make_config(horizon=2)), [nothing_to_predict])
    assert values["loss_next_token"] == 0 and values["loss_kl"] == 0 and values["loss_next_latent"] > 0
    assert gradients.pop("lm_head.weight").abs().max() == 0
    assert min(gradient.abs().max().item() for gradient in gradients.values()) > 1e-4


def gradients_at_states(next_latent_weight: float, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Gradients at hidden states and embeddings, (B, T, D) each: documents of 2 and of 4 tokens, d = 1."""
    batch = make_batch([[2, 4, 7]], COLUMNS, VOCAB)
    model = make_model(make_config(1, next_latent_weight=next_latent_weight, kl_weight=kl_weight))
    states = model.trunk_states(batch)
    hidden, embeddings = (x.detach().requires_grad_() for x in (states.hidden, states.embeddings))
    states = replace(states, hidden=hidden, embeddings=embeddings)
    losses = model.objective(states, batch, model.lm_head, model.objective.valid_counts(batch))
    losses["loss"].backward()
    zeros = torch.zeros_like(embeddings)
    return hidden.grad, zeros if embeddings.grad is None else embeddings.grad


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["next latent", "KL"])
def test_targets_get_no_gradient_and_starts_and_consumed_embeddings_do(weights: tuple[float, float]):
    plain_hidden, plain_embeddings = gradients_at_states(0.0, 0.0)
    hidden, embeddings = gradients_at_states(*weights)
    at_hidden = (hidden - plain_hidden).abs().amax(-1)[0]
    at_embedding = (embeddings - plain_embeddings).abs().amax(-1)[0]
    only_landed_on = [1, 5, 11]  # the last input of each document starts no rollout
    starts = [t for t in range(12) if t not in only_landed_on]
    opens = [0, 2, 6]
    assert at_hidden[only_landed_on].max() < 1e-14
    assert at_hidden[starts].min() > 1e-5
    assert at_embedding[opens].max() == 0
    assert at_embedding[[t for t in range(12) if t not in opens]].min() > 1e-5


def test_the_comparison_with_the_reference_sees_a_missing_stop_gradient():
    config = make_config(horizon=2)
    model, batch = make_model(config), packed_batch()
    right, right_gradients = losses_and_gradients(model, config, batch)
    wrong, wrong_gradients = losses_and_gradients(model, config, batch, stop_gradients=False)
    _, gradients, _ = run(model, [batch])
    assert_equal(wrong.named(), right.named(), 1e-14)
    for name in ("lm_head.weight", "trunk.norm.weight"):
        assert (gradients[name] - wrong_gradients[name]).abs().max() > 1e-2, name
        assert (gradients[name] - right_gradients[name]).abs().max() < 1e-10, name


def test_terms_with_no_valid_position_are_zero_and_give_no_nan():
    model = make_model(make_config(horizon=2))
    lone_tokens = make_batch([[1] * COLUMNS] * 2, COLUMNS, VOCAB)
    counts = model.objective.valid_counts(lone_tokens).tolist()
    assert counts == [24, 0, 0, 0, 0]
    values, gradients, _ = run(model, [lone_tokens])
    assert values["loss_next_latent"] == 0 and values["loss_kl"] == 0
    assert values["loss"] == values["loss_next_token"] > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["objective.dynamics.output.weight"].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_batch_of_padding_alone_is_zero_and_gives_no_nan(dtype: torch.dtype):
    values, gradients, _ = run(make_model(make_config(horizon=2), dtype), [make_batch([[], []], COLUMNS, VOCAB)])
    assert all(value == 0 for value in values.values())
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_only_the_loss_carries_a_gradient():
    model, batch = make_model(make_config(horizon=2)), packed_batch()
    output = model(batch, model.objective.valid_counts(batch))
    assert [name for name, value in output.items() if value.requires_grad] == ["loss"]


def test_terms_are_not_negative_and_the_reference_meets_both_branches_of_smooth_l1():
    config = make_config(horizon=4)
    model, batch = make_model(config), packed_batch()
    expected: Losses = losses_and_gradients(model, config, batch)[0]
    assert all(kl >= 0 for kl in expected.kl_steps)
    states = model.trunk_states(batch)
    hidden = states.hidden
    rollouts = model.objective.dynamics(hidden, states.embeddings, 4)
    errors = (rollouts - hidden)[0, :, 1:].abs()
    assert 0.1 < (errors < 1).double().mean() < 0.9
    values, _, _ = run(model, [batch])
    assert all(value >= 0 and math.isfinite(value) for value in values.values())

"""MTP, JTP and BST against written-out formulas: values, gradients of every parameter, masks and means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import make_batch, rows_of
from rival_reference import all_pairs, losses_and_gradients
from torch import Tensor

from pretrain.config import Config
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch, chunked_loss
from pretrain.objectives.pairs import kept_pairs

VOCAB, COLUMNS = 11, 13
ROWS = [[4, 1, 3, 5], [13], [1, 11, 1], [12, 1], [5, 4], [], [1, 1, 1, 2, 8]]
PROMPTS = [[2, 0, 0, 3], [6], [0, 4, 0], [0, 0], [1, 2], [], [0, 0, 0, 1, 7]]

MTP = {"name": "mtp", "horizon": 2, "multi_token_weight": 0.7}
JTP = {"name": "jtp", "horizon": 2, "joint_token_weight": 0.7}
BST = {"name": "bst"}
EACH = pytest.mark.parametrize("objective", [MTP, JTP, BST], ids=["mtp", "jtp", "bst"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(objective: dict[str, Any], **model: Any) -> Config:
    shape = {"layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "mlp_width": 12, "rope_theta": 100.0}
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": shape | model,
            "objective": objective,
            "data": {"path": "nowhere", "sequence_length": COLUMNS - 1},
            "batch": {"global_sequences": 7, "micro_sequences": 1},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )


def make_model(config: Config, dtype: torch.dtype = torch.float64, std: float = 0.5) -> PretrainingModel:
    """Large weights for peaked softmaxes; norms, gamma and the slots' bias away from where they start."""
    model = PretrainingModel(config, VOCAB)
    initialise(model, seed=3, std=std)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("slot_bias"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype)


def packed_batch() -> TokenBatch:
    """Its last row begins inside a document, and the second piece of another row does as well."""
    batch = make_batch(ROWS, COLUMNS, VOCAB, PROMPTS)
    batch.tokens[6, 0] = 5
    batch.tokens[4, 5], batch.target_mask[4, 5] = 7, False  # as best-fit packing lays out a later piece
    return batch


def random_batch(seed: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    rows, prompts = [], []
    for _ in range(3):
        lengths: list[int] = []
        while sum(lengths) < COLUMNS:
            lengths.append(min(int(torch.randint(1, 7, (), generator=generator)), COLUMNS - sum(lengths)))
        rows.append(lengths if torch.rand((), generator=generator) < 0.7 else lengths[:-1])
        prompts.append([int(torch.randint(0, 4, (), generator=generator)) for _ in lengths])
    return make_batch(rows, COLUMNS, VOCAB, prompts, seed)


def run(model: PretrainingModel, parts: list[TokenBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses summed over micro-batches, and gradients accumulated over them."""
    counts = sum((model.objective.valid_counts(part) for part in parts), torch.zeros(()))
    model.zero_grad()
    outputs = [model(part, counts) for part in parts]
    sum(output["loss"] for output in outputs).backward()
    total = {name: sum(output[name].detach() for output in outputs) for name in outputs[0]}
    return total, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: off by {error}"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "objective",
    [*({**rival, "horizon": d} for rival in (MTP, JTP) for d in (1, 2, 4)), BST],
    ids=lambda objective: f"{objective['name']} {objective.get('horizon', '')}",
)
def test_values_and_all_gradients_equal_the_formulas_in_float64(objective: dict[str, Any], tied: bool):
    config = make_config(objective, tie_embeddings=tied)
    model, batch = make_model(config), packed_batch()
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected_gradients.values())
    values, gradients = run(model, [batch])
    assert_equal(values, expected)
    assert_equal(gradients, expected_gradients)


@EACH
@pytest.mark.parametrize(
    ("seed", "shape"),
    [(0, {"layers": 1}), (1, {"heads": 1, "kv_heads": 1}), (2, {"width": 12, "heads": 6, "kv_heads": 3}), (3, {})],
    ids=["one layer", "one head", "six heads", "base"],
)
def test_random_packings_and_shapes_equal_the_formulas(objective: dict[str, Any], seed: int, shape: dict[str, int]):
    config = make_config(objective, **shape)
    model, batch = make_model(config), random_batch(seed)
    expected, expected_gradients = losses_and_gradients(model, config, batch)
    values, gradients = run(model, [batch])
    assert_equal(values, expected)
    assert_equal(gradients, expected_gradients)


@EACH
@pytest.mark.parametrize("positions", [1, 5, 10**6], ids=["one", "uneven last", "all"])
def test_chunk_size_changes_no_loss_and_no_gradient(
    objective: dict[str, Any], positions: int, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(objective)
    model, batch = make_model(config), packed_batch()
    expected, expected_gradients = run(model, [batch])
    asked = []
    monkeypatch.setattr(chunked_loss, "positions_per_chunk", lambda *shape: asked.append(shape) or positions)
    values, gradients = run(model, [batch])
    assert asked
    assert_equal(values, expected)
    assert_equal(gradients, expected_gradients)


@EACH
def test_a_chunk_keeps_within_the_budget_of_logits(objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model, batch = make_model(make_config(objective)), packed_batch()
    streams, budget = len(model.objective.valid_counts(batch)) if objective is not BST else 2, 4096
    monkeypatch.setattr(chunked_loss, "LEAST_BUDGET_BYTES", budget)
    monkeypatch.setattr(chunked_loss, "HEADS_PER_CHUNK", 0)
    rows, original = [], torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, **given: rows.append(x.numel()) or original(x, **given))
    run(model, [batch])
    positions = len(kept_pairs(batch, 1.0, 0)) if objective is BST else batch.tokens[:, 1:].numel()
    assert sum(rows) == streams * positions * VOCAB
    assert max(rows) * 8 * 2 <= budget and len(rows) > 3


@EACH
def test_micro_batches_of_unequal_validity_add_up_to_the_whole_batch(objective: dict[str, Any]):
    model, batch = make_model(make_config(objective)), packed_batch()
    expected, expected_gradients = run(model, [batch])
    parts = [rows_of(batch, slice(0, 3)), rows_of(batch, slice(3, 4)), rows_of(batch, slice(4, 7))]
    values, gradients = run(model, parts)
    assert_equal(values, expected, 1e-12)
    assert_equal(gradients, expected_gradients, 1e-12)


@EACH
def test_padding_and_its_tokens_add_nothing(objective: dict[str, Any]):
    model, batch = make_model(make_config(objective)), packed_batch()
    without = TokenBatch(*(torch.cat([x[:5], x[6:]]) for x in vars(batch).values() if x is not None))
    expected, expected_gradients = run(model, [without])
    other_tokens = torch.where(batch.document_ids < 0, (batch.tokens + 5) % VOCAB, batch.tokens)
    values, gradients = run(model, [TokenBatch(other_tokens, batch.document_ids, batch.positions, batch.target_mask)])
    assert_equal(values, expected, 1e-12)
    assert_equal(gradients, expected_gradients, 1e-12)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_batch_with_nothing_to_predict_is_zero_and_gives_no_nan(objective: dict[str, Any], dtype: torch.dtype):
    model, batch = make_model(make_config(objective), dtype), packed_batch()
    prompts_alone = TokenBatch(batch.tokens, batch.document_ids, batch.positions, batch.target_mask & False)
    for nothing in (make_batch([[], []], COLUMNS, VOCAB), prompts_alone):
        values, gradients = run(model, [nothing])
        assert all(value == 0 for value in values.values())
        assert all((gradient == 0).all() for gradient in gradients.values())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@EACH
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 1e-1)],
    ids=["float32", "bfloat16"],
)
def test_lower_precision_stays_near_the_formulas(
    objective: dict[str, Any], dtype: torch.dtype, value_tolerance: float, gradient_tolerance: float
):
    config = make_config(objective)
    model, batch = make_model(config, dtype, std=0.2), packed_batch()
    expected, expected_gradients = losses_and_gradients(model, config, batch)  # of the rounded weights
    values, gradients = run(model, [batch])
    for name, value in expected.items():
        assert values[name].dtype == torch.float32, f"{name} is accumulated in {values[name].dtype}"
        assert relative_error(values[name], value) < value_tolerance, name
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < gradient_tolerance, name


@EACH
def test_only_the_loss_carries_a_gradient_and_an_evaluation_forms_none(objective: dict[str, Any]):
    model, batch = make_model(make_config(objective)), packed_batch()
    counts = model.objective.valid_counts(batch)
    output = model(batch, counts)
    assert [name for name, value in output.items() if value.requires_grad] == ["loss"]
    with torch.no_grad():
        assert_equal(model(batch, counts), {name: value.detach() for name, value in output.items()}, 1e-12)


def test_counts_of_tokens_ahead_equal_a_count_by_hand():
    # columns:   0 1 2 3 | 4 | 5 6 7 | 8 9 10 11 12(label)     prompt of 2 in the first, of 3 in the last
    batch = make_batch([[4, 1, 3, 5]], COLUMNS, VOCAB, [[2, 0, 0, 3]])
    # next token: targets 3, 4, 5, 6, 7, 8, 12.  One further: from t the target t + 2, with x_{t+1} of t's document:
    # 1→3, 2→4 (the EOS that ends the document), 5→7, 6→8, 10→12.  Two further: 0→3, 1→4, 5→8, 9→12
    for rival in (MTP, JTP):
        assert make_model(make_config(rival)).objective.valid_counts(batch).tolist() == [7, 5, 4]


def test_pairs_equal_every_prefix_with_every_suffix():
    # columns:   0 1 2 | 3 4 5 6 7 8 9 10 11 12(not read)       prompt of 6 in the second
    batch = make_batch([[3, 10]], COLUMNS, VOCAB, [[0, 6]])
    pairs = {tuple(pair) for pair in kept_pairs(batch, 1.0, 0).tolist()}
    first = {(0, t, s) for t, s in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]}  # 3 is the EOS that closes it
    second = {(0, t, s) for t, s in [(9, 10), (9, 11), (10, 11)]}  # x_{t+1} is a target from 10 on
    assert pairs == first | second
    for seed in range(20):
        batch = random_batch(seed)
        assert kept_pairs(batch, 1.0, 0).tolist() == [list(pair) for pair in all_pairs(batch)]
    assert kept_pairs(packed_batch(), 1.0, 0).tolist() == [list(pair) for pair in all_pairs(packed_batch())]


def test_a_fraction_of_the_pairs_is_unbiased_seeded_and_the_same_wherever_the_row_lies():
    batch = make_batch([[200, 57]] * 8, 257, 1000)
    everything = {tuple(pair) for pair in kept_pairs(batch, 1.0, 1).tolist()}
    kept = {tuple(pair) for pair in kept_pairs(batch, 0.1, 1).tolist()}
    always = {(b, t, s) for b, t, s in everything if t in (0, 200) or (t < 200 <= s)}
    assert always < kept < everything
    chance, spread = 0.1, 5 * (0.1 * 0.9 / (len(everything) - len(always))) ** 0.5
    assert abs(len(kept - always) / len(everything - always) - chance) < spread
    gaps, kept_gaps = ([s - t for _, t, s in pairs - always] for pairs in (everything, kept))
    assert sum(kept_gaps) / len(kept_gaps) == pytest.approx(sum(gaps) / len(gaps), rel=0.02)
    rows = [{(t, s) for b, t, s in kept if b == row} for row in range(8)]
    assert len({frozenset(row) for row in rows}) == 8  # rows of different tokens keep different pairs
    moved = kept_pairs(rows_of(batch, slice(3, 5)), 0.1, 1).tolist()
    assert {(t, s) for b, t, s in moved if b == 0} == rows[3] and {(t, s) for b, t, s in moved if b == 1} == rows[4]
    assert {tuple(pair) for pair in kept_pairs(batch, 0.1, 2).tolist()} != kept


def test_bst_with_a_fraction_of_the_pairs_equals_the_formula_over_those():
    config = make_config({"name": "bst", "pair_fraction": 0.3})
    model, batch = make_model(config), packed_batch()
    pairs = [tuple(pair) for pair in kept_pairs(batch, 0.3, config.run.seed).tolist()]
    assert len(pairs) < len(all_pairs(batch))
    expected, expected_gradients = losses_and_gradients(model, config, batch, pairs=pairs)
    values, gradients = run(model, [batch])
    assert model.objective.valid_counts(batch).tolist() == [len(pairs)]
    assert_equal(values, expected)
    assert_equal(gradients, expected_gradients)


@EACH
def test_the_next_token_at_inference_is_what_the_objective_trained(objective: dict[str, Any]):
    """For BST: that of pairs whose suffix is EOS alone."""
    config = make_config(objective)
    model, batch = make_model(config), make_batch([[5, 8]], COLUMNS, VOCAB)
    with torch.no_grad():
        log_p = model.lm_head(model.next_token_states(batch, eos_id=0)).log_softmax(-1)
    if objective is not BST:
        picked = log_p[0].gather(1, batch.tokens[0, 1:, None])
        assert run(model, [batch])[0]["loss_next_token"].item() == pytest.approx(-picked.mean().item(), rel=1e-12)
        return
    pairs = [(0, t, 5) for t in range(5)]  # column 5 is the EOS that closes the first document
    expected, _ = losses_and_gradients(model, config, batch, pairs=pairs)
    picked = log_p[0, :5].gather(1, batch.tokens[0, 1:6, None])
    assert expected["loss_next_token"].item() == pytest.approx(-picked.mean().item(), rel=1e-10)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import log_probabilities
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.objectives.fused_loss import fused_cross_entropy_kl, positions_per_chunk

N, D, V = 10, 6, 9


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(
    steps: int, positions: int = N, width: int = D, vocab: int = V, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def weights(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.7)

    return {
        "hidden_ND": normal(positions, width).requires_grad_(),
        "head_VD": normal(vocab, width).requires_grad_(),
        "targets_N": torch.randint(vocab, (positions,), generator=generator),
        "ce_weights_N": weights(positions).to(torch.float64),
        "rollouts_dMD": normal(steps, positions, width).requires_grad_(),
        "kl_weights_dM": weights(steps, positions).to(torch.float64),
    }


def reference(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hidden, head, rollouts = inputs["hidden_ND"], inputs["head_VD"], inputs["rollouts_dMD"]
    ce = torch.zeros((), dtype=torch.float64)
    kl = [torch.zeros((), dtype=torch.float64) for _ in rollouts]
    for n in range(len(hidden)):
        target = inputs["targets_N"][n]
        ce = ce - inputs["ce_weights_N"][n] * log_probabilities(hidden[n], head)[target]
        teacher = log_probabilities(hidden[n].detach(), head.detach())
        for i in range(len(rollouts)):
            student = log_probabilities(rollouts[i, n], head.detach())
            kl[i] = kl[i] + inputs["kl_weights_dM"][i, n] * (teacher.exp() * (teacher - student)).sum()
    return ce, torch.stack(kl)


LEAVES = ("hidden_ND", "head_VD", "rollouts_dMD")


@pytest.mark.parametrize("positions", [1, 3, 1000], ids=["one", "uneven last", "all"])
@pytest.mark.parametrize("steps", [1, 3])
def test_values_and_gradients_equal_the_reference_for_any_chunk_and_any_upstream_gradient(steps: int, positions: int):
    inputs = make_inputs(steps)
    budget = positions * V * (1 + steps) * 8
    assert positions_per_chunk(V, steps, 8, budget) == positions
    upstream = torch.linspace(0.5, -2.0, steps, dtype=torch.float64)

    def gradients(ce: Tensor, kl_d: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(-1.7 * ce + (kl_d * upstream).sum(), [inputs[name] for name in LEAVES])

    ce, kl_d = fused_cross_entropy_kl(**inputs, memory_budget_bytes=budget)
    expected_ce, expected_kl_d = reference(inputs)
    torch.testing.assert_close(ce, expected_ce, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl_d, expected_kl_d, rtol=1e-12, atol=1e-12)
    for name, actual, expected in zip(LEAVES, gradients(ce, kl_d), gradients(expected_ce, expected_kl_d), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, msg=name)


def test_a_budget_below_one_position_still_does_one_at_a_time():
    inputs = make_inputs(1)
    assert positions_per_chunk(V, 1, 8, 1) == 1
    ce, _ = fused_cross_entropy_kl(**inputs, memory_budget_bytes=1)
    torch.testing.assert_close(ce, reference(inputs)[0], rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences():
    inputs = make_inputs(2)
    ce, kl_d = fused_cross_entropy_kl(**inputs)
    ce_gradients = torch.autograd.grad(ce, [inputs["hidden_ND"], inputs["head_VD"]], retain_graph=True)
    kl_gradient = torch.autograd.grad(kl_d.sum(), inputs["rollouts_dMD"])
    for name, gradient in zip(LEAVES, (*ce_gradients, *kl_gradient), strict=True):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def moved(step: float, name: str = name, direction: Tensor = direction) -> float:
            with torch.no_grad():
                ce, kl_d = fused_cross_entropy_kl(**(inputs | {name: inputs[name] + step * direction}))
            return (kl_d.sum() if name == "rollouts_dMD" else ce).item()

        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6), name


def test_kl_alone_gives_head_and_teacher_exactly_no_gradient():
    inputs = make_inputs(2)
    _, kl_d = fused_cross_entropy_kl(**inputs)
    hidden, head, rollouts = torch.autograd.grad(kl_d.sum(), [inputs[name] for name in LEAVES])
    assert (hidden == 0).all() and (head == 0).all() and rollouts.abs().max() > 0.1


def test_cross_entropy_alone_gives_rollouts_no_gradient():
    inputs = make_inputs(2)
    ce, _ = fused_cross_entropy_kl(**inputs)
    hidden, head, rollouts = torch.autograd.grad(ce, [inputs[name] for name in LEAVES])
    assert (rollouts == 0).all() and hidden.abs().max() > 0.1 and head.abs().max() > 0.1


def test_cross_entropy_without_rollouts_equals_torch_in_value_and_gradient():
    inputs = make_inputs(0)
    hidden, head = inputs["hidden_ND"], inputs["head_VD"]
    ce, kl_d = fused_cross_entropy_kl(hidden, head, inputs["targets_N"], torch.full((N,), 1 / N).double())
    expected = F.cross_entropy(hidden @ head.T, inputs["targets_N"])
    assert kl_d.shape == (0,)
    torch.testing.assert_close(ce, expected, rtol=1e-7, atol=0)
    for actual, wanted in zip(
        torch.autograd.grad(ce, [hidden, head]), torch.autograd.grad(expected, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-8)


def test_kl_is_zero_with_zero_gradient_where_student_is_teacher_and_positive_elsewhere():
    inputs = make_inputs(2)
    same, near = inputs["hidden_ND"].detach(), inputs["hidden_ND"].detach() + 0.05
    inputs["rollouts_dMD"] = torch.stack([same, near]).requires_grad_()
    inputs["kl_weights_dM"] = torch.ones(2, N)
    _, kl_d = fused_cross_entropy_kl(**inputs)
    gradient = torch.autograd.grad(kl_d.sum(), inputs["rollouts_dMD"])[0]
    assert abs(kl_d[0].item()) < 1e-14 and gradient[0].abs().max() < 1e-14
    assert kl_d[1] > 1e-4 and gradient[1].abs().max() > 1e-4


def test_kl_is_not_negative_at_any_single_position():
    for n in range(N):
        inputs = make_inputs(3)
        inputs["kl_weights_dM"] = F.one_hot(torch.tensor([n] * 3), N).double()
        _, kl_d = fused_cross_entropy_kl(**inputs)
        assert (kl_d > 0).all()


def test_weight_zero_masks_targets_and_states_whatever_they_hold():
    inputs = make_inputs(2)
    inputs["ce_weights_N"][4] = 0
    inputs["kl_weights_dM"][:, 4] = 0
    other = {name: value.detach().clone() for name, value in inputs.items()}
    other["hidden_ND"][4] = 50.0
    other["rollouts_dMD"][:, 4] = -50.0
    other["targets_N"][4] = (other["targets_N"][4] + 1) % V
    for actual, expected in zip(fused_cross_entropy_kl(**other), fused_cross_entropy_kl(**inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_huge_logits_give_finite_values_and_gradients():
    inputs = make_inputs(2, dtype=torch.float32)
    inputs["hidden_ND"] = (inputs["hidden_ND"].detach() * 1e4).requires_grad_()
    inputs["rollouts_dMD"] = (inputs["rollouts_dMD"].detach() * -1e4).requires_grad_()
    ce, kl_d = fused_cross_entropy_kl(**inputs)
    gradients = torch.autograd.grad(ce + kl_d.sum(), [inputs[name] for name in LEAVES])
    assert ce.isfinite() and kl_d.isfinite().all() and kl_d.min() > 1e3
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_grad_gives_the_same_values_and_no_graph(dtype: torch.dtype):
    inputs = make_inputs(2, dtype=dtype)
    ce, kl_d = fused_cross_entropy_kl(**inputs)
    assert ce.requires_grad and kl_d.requires_grad
    with torch.no_grad():
        silent_ce, silent_kl_d = fused_cross_entropy_kl(**inputs)
    assert not silent_ce.requires_grad and not silent_kl_d.requires_grad
    assert torch.equal(ce, silent_ce) and torch.equal(kl_d, silent_kl_d)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_one_head_product_serves_cross_entropy_and_every_teacher(steps: int):
    """Products with the head: teacher and students forward; two gradients for CE, one for each student."""
    # In bfloat16, whose head gradient is a plain product; the counter does not know addmm_ in place.
    inputs, product = make_inputs(steps, dtype=torch.bfloat16), 2 * N * V * D
    with FlopCounterMode(display=False) as counter:
        fused_cross_entropy_kl(**inputs)
    assert counter.get_total_flops() == product * (1 + steps) + product * (2 + steps)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused_cross_entropy_kl(**inputs)
    assert counter.get_total_flops() == product * (1 + steps), "a gradient was formed under no_grad"


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def test_no_tensor_of_positions_times_vocabulary_exists():
    positions, vocab, steps = 64, 500, 2
    inputs = make_inputs(steps, positions, 4, vocab)
    with LargestTensor() as largest:
        ce, kl_d = fused_cross_entropy_kl(**inputs, memory_budget_bytes=4 * vocab * (1 + steps) * 8)
        (ce + kl_d.sum()).backward()
    assert largest.numel == 4 * (1 + steps) * vocab


def test_the_default_budget_bounds_logits_whatever_the_number_of_positions():
    positions, vocab = 12_000, 500
    inputs = make_inputs(0, positions, 2, vocab, torch.float32)
    with LargestTensor() as largest:
        fused_cross_entropy_kl(**inputs)
    assert largest.numel < positions * vocab / 2


def test_bfloat16_sums_many_positions_without_losing_them():
    """3001 equal terms of log V: in bfloat16 the running sum would stop growing after some hundreds."""
    positions = 3001
    hidden = torch.zeros(positions, D, dtype=torch.bfloat16)
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(positions, dtype=torch.long)
    weights = torch.full((positions,), 1 / positions)
    budget = 7 * V * 2
    ce, _ = fused_cross_entropy_kl(hidden, head, targets, weights, memory_budget_bytes=budget)
    assert ce.dtype == torch.float32
    assert ce.item() == pytest.approx(math.log(V), rel=1e-5)


def test_bfloat16_accumulates_the_head_gradient_over_chunks_in_float32():
    """With one position per chunk, 3001 equal gradients must add up to their number."""
    positions = 3001
    hidden = torch.ones(positions, D, dtype=torch.bfloat16)
    head = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(positions, dtype=torch.long)
    ce, _ = fused_cross_entropy_kl(hidden, head, targets, torch.ones(positions), memory_budget_bytes=1)
    ce.backward()
    assert head.grad[0, 0].item() == pytest.approx(positions * (1 / V - 1), rel=1e-2)

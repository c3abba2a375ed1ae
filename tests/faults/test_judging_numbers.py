"""Which losses and gradients are refused, and what follows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Stream, UserError, open_dataset
from pretrain.config import FaultsConfig, load_config
from pretrain.faults.numbers import Fault, UpdateGate, judge_gradient, judge_loss, policy

WINDOW = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.1, 3.0]  # median 3.0, MAD 0.1
SPIKES = FaultsConfig(spike="skip", spike_window=8, spike_z=10.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_whatever_the_window(loss: float) -> None:
    for config in (SPIKES, FaultsConfig()):
        fault = judge_loss(loss, [], config)
        assert fault is not None and fault.kind == "non_finite"


def test_a_loss_is_a_spike_just_above_z_deviations_and_not_just_below() -> None:
    edge = 3.0 + 10 * 1.4826 * 0.1
    assert judge_loss(edge - 1e-6, WINDOW, SPIKES) is None
    fault = judge_loss(edge + 1e-6, WINDOW, SPIKES)
    assert fault is not None and fault.kind == "spike" and "above its recent median 3" in fault.words


def test_a_fall_is_no_spike() -> None:
    assert judge_loss(0.1, WINDOW, SPIKES) is None


def test_nothing_is_a_spike_before_the_window_is_full_or_where_spikes_are_ignored() -> None:
    assert judge_loss(1e6, WINDOW[:-1], SPIKES) is None
    assert judge_loss(1e6, WINDOW, FaultsConfig(spike_window=8)) is None


def test_earlier_spikes_in_the_window_do_not_hide_the_next() -> None:
    assert judge_loss(50.0, [*WINDOW[:-2], 60.0, 70.0], SPIKES) is not None


def test_rounding_on_a_flat_curve_is_no_spike() -> None:
    assert judge_loss(2.0 + 1e-6, [2.0] * 8, SPIKES) is None
    assert judge_loss(2.1, [2.0] * 8, SPIKES) is not None


def test_a_gradient_is_judged_by_its_norm_and_by_what_deepspeed_says() -> None:
    assert judge_gradient(1.0, applied=True) is None
    assert judge_gradient(math.inf, applied=True) is not None
    assert judge_gradient(1.0, applied=False) is not None


def test_a_closed_gate_keeps_the_update_back_and_opens_again_after_an_error() -> None:
    class Optimizer:
        updates = 0

        def step(self) -> None:
            self.updates += 1

    class Engine:
        basic_optimizer = Optimizer()

    gate, optimizer = UpdateGate(Engine()), Engine.basic_optimizer  # type: ignore[arg-type]
    with gate.closed_if(True):
        optimizer.step()
    assert optimizer.updates == 0
    with pytest.raises(ZeroDivisionError), gate.closed_if(True):
        raise ZeroDivisionError
    optimizer.step()
    with gate.closed_if(False):
        optimizer.step()
    assert optimizer.updates == 2


@pytest.fixture
def stream(tiny_data: Path) -> Stream:
    return Stream(open_dataset(tiny_data).split("train"), seed=1, sequence_length=48, global_sequences=8)


def test_the_policy_of_each_kind_is_its_own_key(write_config, stream: Stream) -> None:  # type: ignore[no-untyped-def]
    path = write_config("p", {"faults.non_finite": "skip", "faults.spike": "rollback", "checkpoint.every": 5})
    config = load_config(path)
    assert policy(Fault("non_finite", ""), 3, 1, config, stream) == "skip"
    assert policy(Fault("spike", ""), 3, 5, config, stream) == "rollback"
    with pytest.raises(UserError, match=r"step 4: bad, after 5 steps in a row .* training documents .* set faults"):
        policy(Fault("spike", "bad"), 3, 6, config, stream)
    with pytest.raises(UserError, match="step 4: bad; the step was not applied"):
        policy(Fault("non_finite", "bad"), 3, 1, load_config(write_config("q")), stream)


def test_rollback_without_scheduled_checkpoints_is_refused_by_the_config(write_config) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"rollback goes back to .* set checkpoint\.every"):
        load_config(write_config("r", {"faults.spike": "rollback"}))


def test_the_documents_named_are_those_of_the_batch(write_config, stream: Stream) -> None:  # type: ignore[no-untyped-def]
    expected = ", ".join(map(str, stream.documents(3)[:8]))
    assert not np.array_equal(stream.documents(3), stream.documents(4))
    with pytest.raises(UserError, match=f"training documents {expected}"):
        policy(Fault("non_finite", "bad"), 3, 1, load_config(write_config("s")), stream)

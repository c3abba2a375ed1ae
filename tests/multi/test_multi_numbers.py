"""NaN and spikes planted on one of two ranks: no rank applies the step, and the run is the one that it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch, read_metrics, without_times

from benchmarks.small_run import write_run_config
from pretrain.checkpoints import open_checkpoint

STAGE = "deepspeed.zero_optimization.stage"
TINY: dict[str, object] = {
    "model": {"layers": 1, "width": 32, "heads": 2},
    "objective.dynamics_width": 32,
    "schedule": {"name": "constant", "steps": 8},
    "validation": {"sequences": 4},
    "checkpoint.every": 3,
}
SPIKES = {"schedule.steps": 12, "faults.spike": "skip", "faults.spike_window": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of all runs below, of two ranks and in one start."""
    folder = tmp_path_factory.mktemp("planted")

    def run(name: str, plan: dict[str, Any], changes: dict[str, object] | None = None, **again: Any) -> list[str]:
        config = str(write_run_config(folder, tiny_data, name, TINY | (changes or {})))
        starts = [{"config": config, **plan, "overrides": ["run.stop_after=4"]}] if again else []
        return [json.dumps(start) for start in [*starts, {"config": config, **plan}]]

    skip, rollback = {"faults.non_finite": "skip"}, {"faults.non_finite": "rollback"}
    loss, gradient = {"nan_loss": [1, [4]]}, {"nan_gradient": [0, [4]]}
    launch(
        2,
        str(Path(__file__).with_name("planted_runs.py")),
        *run("without_update", {"without_update": [4]}),
        *run("nan_loss", loss, skip),
        *run("nan_loss_accumulating", loss, skip | {"batch.micro_sequences": 2}),
        *run("nan_gradient", gradient, skip),
        *run("stage_2", gradient, skip | {STAGE: 2}),
        *run("stage_1", gradient, skip | {STAGE: 1}),
        *run("stage_0", gradient, skip | {STAGE: 0}),
        *run("bfloat16", gradient, skip | {"run.precision": "bfloat16"}),
        *run("bfloat16_stage_2", gradient, skip | {"run.precision": "bfloat16", STAGE: 2}),
        *run("without_three_updates", {"without_update": [3, 4, 5]}),
        *run("rolled_back", {"nan_loss": [1, [5]]}, rollback),
        *run("rolled_back_stopped", {"nan_loss": [1, [5]]}, rollback, again=True),
        *run("without_spike", {"without_update": [9]}, SPIKES),
        *run("spike", {"spike": [1, [9]]}, SPIKES),
        *run("spike_stopped", {"spike": [1, [9]]}, SPIKES, again=True),
        *run("told_to_stop", gradient, {"faults.non_finite": "stop"}),
        *run("too_many", {"nan_loss": [1, [3, 4, 5]]}, skip | {"faults.in_a_row": 2}),
    )
    return folder / "runs"


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(run)
    return {name: checkpoint.weight(name) for name in checkpoint.weight_names}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("nan_loss", "without_update"),
        ("nan_gradient", "without_update"),
        ("rolled_back", "without_three_updates"),
        ("spike", "without_spike"),
    ],
)
def test_what_follows_is_as_if_the_step_had_made_no_update(runs: Path, name: str, reference: str) -> None:
    ours, theirs = weights(runs / name), weights(runs / reference)
    for parameter, values in theirs.items():
        assert torch.isfinite(ours[parameter]).all()
        torch.testing.assert_close(ours[parameter], values, rtol=0, atol=0)
    planted = next(number for number, record in enumerate(read_metrics(runs / name)) if "fault" in record)
    for mine, other in zip(*(without_times(read_metrics(runs / run)) for run in (name, reference)), strict=True):
        if mine["step"] > planted + 1:
            assert mine | {"skipped_steps": 0} == other | {"skipped_steps": 0}


@pytest.mark.parametrize("name", ["nan_loss_accumulating", "stage_2", "stage_1", "stage_0"])
def test_every_stage_and_accumulation_leave_the_step_out_alike(runs: Path, name: str) -> None:
    ours, theirs = weights(runs / name), weights(runs / "without_update")
    for parameter, values in theirs.items():
        torch.testing.assert_close(ours[parameter], values, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16_stage_2"])
def test_weights_in_bfloat16_stay_finite(runs: Path, name: str) -> None:
    last = read_metrics(runs / name)[-1]
    assert last["skipped_steps"] == 1
    assert math.isfinite(last["val_loss"] or math.nan), "the validation of weights that are not finite is null"


@pytest.mark.parametrize("name", ["rolled_back", "spike"])
def test_stopped_and_resumed_the_run_decides_the_same(runs: Path, name: str) -> None:
    whole, stopped = (without_times(read_metrics(runs / run)) for run in (name, f"{name}_stopped"))
    assert stopped == whole


def test_the_line_of_a_skipped_step_tells_its_documents_and_is_counted(runs: Path) -> None:
    records = read_metrics(runs / "nan_loss")
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [record["step"] for record in records if "fault" in record] == [5]
    line = records[4]
    assert line["fault"] == "non_finite" and line["loss"] is None and line["tokens"] == 5 * 8 * 48
    assert len(line["samples"]) == 8 and line["documents"]
    assert read_metrics(runs / "spike")[9]["fault"] == "spike"


def test_rolling_back_tells_where_to_and_counts_the_steps_that_were_lost(runs: Path) -> None:
    line = read_metrics(runs / "rolled_back")[5]
    assert (line["rolled_back_to"], line["skipped_steps"]) == (3, 3)


def test_stop_is_one_line_that_names_step_documents_and_remedy(runs: Path) -> None:
    errors = {(runs / "told_to_stop" / f"error_{rank}").read_text() for rank in range(2)}
    assert len(errors) == 1, "every rank came to the same verdict"
    (message,) = errors
    said = [(runs / "told_to_stop" / f"said_{rank}").read_text() for rank in range(2)]
    assert sorted(said) == ["False", "True"], "and one of them says so"
    assert message.startswith("step 5: the gradient's norm is")
    assert "the step was not applied" in message and "training documents" in message
    assert len(read_metrics(runs / "told_to_stop")) == 4


def test_more_skipped_steps_in_a_row_than_allowed_stop_the_run(runs: Path) -> None:
    assert "step 6: the loss is nan, after 2 steps in a row" in (runs / "too_many" / "error_0").read_text()
    assert len(read_metrics(runs / "too_many")) == 5

"""NextLat's options, Muon and diagnostics on real ranks: sharding changes nothing, and looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import HERE, launch, read_metrics, run_many, without_times

from benchmarks.small_run import write_run_config
from pretrain.checkpoints import open_checkpoint

ZERO = "deepspeed.zero_optimization.stage"
SHORT: dict[str, object] = {
    "schedule": {"name": "constant", "steps": 4},
    "validation": {"sequences": 8},
    "metrics.diagnostics_every": None,
}
OPTIONS: dict[str, object] = {
    "objective.latent_loss": "mse",
    "objective.rollout_loss": "cross_entropy",
    "objective.stop_gradient_target": False,
    "objective.stop_gradient_head": False,
    "objective.kl_positions": 0.5,
    "objective.dynamics_learning_rate_multiple": 2.0,
    "objective.dynamics_weight_decay_multiple": 0.5,
    "optimizer.epsilon": 1e-4,  # Adam would blow up the rounding of gradients that are nearly nothing
}
SOME_POSITIONS: dict[str, object] = {"objective.kl_positions": 0.25, "objective.horizon": 4}
MUON: dict[str, object] = {
    "optimizer": {
        "name": "muon", "learning_rate": 3e-3, "muon_learning_rate": 0.02, "weight_decay": 0.1, "gradient_clip": None,
    }
}  # fmt: skip
FIXED_GAIN: dict[str, object] = {"model.fix_final_gain": True, "optimizer.weight_decay": 1.0}
ALONE: dict[str, object] = {ZERO: 0, "batch.micro_sequences": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of all runs below: two starts, many runs."""
    folder = tmp_path_factory.mktemp("objectives")

    def config(name: str, *changes: dict[str, Any]) -> str:
        merged: dict[str, object] = dict(SHORT)
        for change in changes:
            merged |= change
        return str(write_run_config(folder, tiny_data, name, merged))

    watched = {"metrics.diagnostics_every": 2}
    frozen = {"objective.dynamics_only_steps": 4, "optimizer.weight_decay": 0.5}
    stopped = config("stopped", SOME_POSITIONS, {"checkpoint.every": 2})
    muon_stopped = config("muon_stopped", MUON, {"checkpoint.every": 2})
    run_many(
        2,
        config("options", OPTIONS, {"batch.micro_sequences": 2}),
        config("some_positions", SOME_POSITIONS),
        f"{stopped}|run.stop_after=2",
        stopped,
        config("watched", watched),
        config("unwatched"),
        config("frozen", frozen),
        config("frozen_zero1", frozen, {ZERO: 1}),
        config("thawed", {"objective.dynamics_only_steps": 2}),
        config("fixed_gain", FIXED_GAIN),
        config("muon", MUON),
        config("muon_zero1", MUON, {ZERO: 1}),
        config("muon_zero2", MUON, {ZERO: 2}),
        f"{muon_stopped}|run.stop_after=2",
        muon_stopped,
    )
    run_many(
        1,
        config("options_alone", OPTIONS, ALONE),
        config("some_positions_alone", SOME_POSITIONS, ALONE),
        config("watched_alone", watched, ALONE),
        config("start", ALONE, {"optimizer.learning_rate": 1e-30}),
        config("thawed_alone", {"objective.dynamics_only_steps": 2}, ALONE),
        config("fixed_gain_alone", FIXED_GAIN, ALONE),
        config("muon_alone", MUON, ALONE),
    )
    return folder / "runs"


@pytest.mark.parametrize("name", ["options", "some_positions", "watched", "thawed", "fixed_gain", "muon"])
def test_two_ranks_under_zero3_train_as_one_rank_alone(runs: Path, name: str) -> None:
    ours, theirs = read_metrics(runs / name), read_metrics(runs / f"{name}_alone")
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        for key in other:
            if "loss" in key or (key == "grad_norm" and "muon" not in name):
                assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), f"step {mine['step']}: {key}"


def test_stopped_and_resumed_equals_uninterrupted_to_the_last_digit(runs: Path) -> None:
    for stopped, whole in (("stopped", "some_positions"), ("muon_stopped", "muon")):
        assert without_times(read_metrics(runs / stopped)) == without_times(read_metrics(runs / whole))


@pytest.mark.parametrize("name", ["fixed_gain", "fixed_gain_alone"])
def test_a_fixed_final_gain_stays_one_and_nothing_else_does(runs: Path, name: str) -> None:
    after = open_checkpoint(runs / name)
    ones = [weight for weight in after.weight_names if bool((after.weight(weight) == 1).all())]
    assert ones == ["trunk.norm.weight"]


@pytest.mark.parametrize("name", ["muon_zero1", "muon_zero2"])
def test_muon_moves_the_matrices_alike_at_each_stage(runs: Path, name: str) -> None:
    ours, theirs = read_metrics(runs / name), read_metrics(runs / "muon")
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.mark.parametrize("name", ["frozen", "frozen_zero1"])
def test_while_p_psi_is_trained_alone_trunk_and_head_stay_to_the_last_digit(runs: Path, name: str) -> None:
    start, after = open_checkpoint(runs / "start"), open_checkpoint(runs / name)
    for weight in start.weight_names:
        same = torch.equal(after.weight(weight), start.weight(weight))
        assert same == (not weight.startswith("objective.dynamics.")), weight


def test_moments_of_trunk_and_head_start_when_p_psi_is_no_longer_alone(runs: Path) -> None:
    files = sorted(open_checkpoint(runs / "frozen").path.glob("*optim_states.pt"))
    assert len(files) == 2
    for file in files:
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
        for group in state["param_groups"]:
            for number in group["params"]:
                moments = [state["state"][number][key].abs().max().item() for key in ("exp_avg", "exp_avg_sq")]
                assert (max(moments) == 0) == (not group["is_dynamics"])


def test_diagnostics_change_no_other_number(runs: Path) -> None:
    watched, unwatched = (without_times(read_metrics(runs / name)) for name in ("watched", "unwatched"))
    found = {key for record in watched for key in record} - {key for record in unwatched for key in record}
    assert {"hidden_norm", "hidden_effective_rank", "latent_cosine", "draft_acceptance"} <= found
    assert [set(record) & found for record in watched] == [set(), found] * 2
    assert [{key: record[key] for key in record if key not in found} for record in watched] == unwatched


def test_diagnostics_do_not_depend_on_the_ranks(runs: Path) -> None:
    ours, theirs = (read_metrics(runs / name)[-1] for name in ("watched", "watched_alone"))
    for key in set(theirs) - set(read_metrics(runs / "unwatched")[-1]):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_p_psi_is_gathered_once_per_pass_whatever_the_horizon(tmp_path: Path, tiny_data: Path) -> None:
    config = write_run_config(tmp_path, tiny_data, "counted", SHORT)
    output = launch(2, str(HERE / "count_gathers.py"), str(config)).stdout
    line = next(line for line in output.splitlines() if line.startswith("gathers "))
    weights = ["dynamics.norm.weight", "dynamics.input.weight", "dynamics.hidden.weight", "dynamics.output.weight"]
    for counts in json.loads(line.removeprefix("gathers ")):
        assert counts["forward"] == dict.fromkeys(weights, 1)
        assert counts["both"] == dict.fromkeys(weights, 2)

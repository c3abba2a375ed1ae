"""Runs that change their ranks, ZeRO stage or micro-batch at every start, beside the same runs left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import read_metrics, run_many

from benchmarks.small_run import write_run_config
from pretrain.checkpoints import open_checkpoint

STEPS = 20
WORLDS = [2, 1, 2, 3, 2]
CHAINS: dict[str, tuple[dict[str, object], list[int]]] = {
    "zero3": ({}, [3, 3, 3, 3, 3]),
    "stages": ({}, [3, 0, 1, 2, 3]),
    "tied": ({"model.tie_embeddings": True}, [2, 3, 0, 3, 1]),
    "bfloat16": ({"run.precision": "bfloat16"}, [3, 3, 1, 2, 3]),
}
"""Name → changes to the config, and the ZeRO stage at each start."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Each chain goes four steps in each start; one start of each number of ranks serves all chains."""
    folder = tmp_path_factory.mktemp("elastic")
    for start, world in enumerate(WORLDS):
        configs = []
        for name, (changes, stages) in CHAINS.items():
            common = {"batch.global_sequences": 12, "batch.micro_sequences": 6, "checkpoint.keep": 9, **changes}
            if start == 0:
                configs.append(str(write_run_config(folder, tiny_data, f"{name}_alone", common)))
            common |= {"batch.micro_sequences": 2 if world == 3 else 6 // (1 + start % 2)}
            common |= {"deepspeed.zero_optimization.stage": stages[start], "run.stop_after": 4}
            configs.append(str(write_run_config(folder, tiny_data, name, common)))
        run_many(world, *configs)
    return folder / "runs"


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_changes_shape_at_every_start_follows_the_one_left_alone(runs: Path, name: str) -> None:
    changed, alone = read_metrics(runs / name), read_metrics(runs / f"{name}_alone")
    assert [record["step"] for record in changed] == list(range(1, STEPS + 1))
    in_bfloat16 = name == "bfloat16"
    for ours, theirs in zip(changed, alone, strict=True):
        assert ours["tokens"] == theirs["tokens"] and ours["learning_rate"] == theirs["learning_rate"]
        for key in ("loss", "loss_next_token"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3 if in_bfloat16 else 1e-5), f"{ours['step']}: {key}"
        if not in_bfloat16:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-4), f"step {ours['step']}"


@pytest.mark.parametrize("name", ["zero3", "stages", "tied"])
def test_its_last_weights_are_the_others(runs: Path, name: str) -> None:
    changed, alone = open_checkpoint(runs / name), open_checkpoint(runs / f"{name}_alone")
    assert sorted(changed.weight_names) == sorted(alone.weight_names)
    for weight in alone.weight_names:
        torch.testing.assert_close(changed.weight(weight), alone.weight(weight), rtol=1e-3, atol=2e-4)


def test_every_shape_was_really_used(runs: Path) -> None:
    for name, (_, stages) in CHAINS.items():
        states = [json.loads(path.read_text()) for path in sorted((runs / name).glob("checkpoints/step_*/state.json"))]
        assert [(state["ranks"], state["zero_stage"]) for state in states] == list(zip(WORLDS, stages, strict=True))

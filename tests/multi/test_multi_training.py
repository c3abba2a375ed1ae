"""Real ranks: every way to spread a run gives the same run, and a stopped one goes on to the last digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import read_metrics, run_many, without_times

from benchmarks.small_run import write_run_config
from data_pipeline import UserError
from data_pipeline.prepare import main as prepare
from pretrain.checkpoints import check_same_run, open_checkpoint
from pretrain.config import load_config
from pretrain.distributed import Ranks
from pretrain.run_data import open_data

OFFLOAD = Path(__file__).parents[2] / "configs" / "deepspeed" / "offload_cpu.yaml"
LOSSES = ["loss", "loss_next_token", "loss_next_latent", "loss_kl", "grad_norm"]
RIVALS: dict[str, dict[str, object]] = {
    "mtp": {"name": "mtp", "horizon": 2, "multi_token_weight": 1.0},
    "jtp": {"name": "jtp", "horizon": 2, "joint_token_weight": 1.0},
    "bst": {"name": "bst", "pair_fraction": 0.3},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of all runs below: two starts, many runs."""
    folder = tmp_path_factory.mktemp("multi")
    zero = "deepspeed.zero_optimization.stage"

    def config(name: str, changes: dict[str, object] | None = None) -> str:
        return str(write_run_config(folder, tiny_data, name, changes or {}))

    accumulating: dict[str, object] = {"batch.micro_sequences": 2}
    tied: dict[str, object] = {"model.tie_embeddings": True}
    rival = {
        name: {"objective": objective, "schedule.steps": 8, "schedule.warmup_steps": 2, "schedule.decay_steps": 3}
        for name, objective in RIVALS.items()
    }
    stopped = config("stopped", {"checkpoint.every": 4})
    run_many(
        2,
        config("zero3"),
        config("zero3_accumulating", accumulating),
        config("zero2", {zero: 2}),
        config("zero1", {zero: 1}),
        config("zero3_tied", tied),
        f"{config('offloaded')}|deepspeed=@{OFFLOAD}",
        f"{stopped}|run.stop_after=6",
        stopped,
        *(config(f"zero3_{name}", {**changes, **accumulating}) for name, changes in rival.items()),
    )
    run_many(
        1,
        config("alone", {zero: 0}),
        config("alone_whole_batch", {zero: 0, "batch.micro_sequences": 8}),
        config("alone_tied", {zero: 0, **tied}),
        config("gpt", {zero: 0, "objective": {"name": "next_token"}}),
        *(config(f"alone_{name}", {**changes, zero: 0, "batch.micro_sequences": 8}) for name, changes in rival.items()),
    )
    return folder / "runs"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("zero3", "alone_whole_batch"),
        ("zero2", "alone_whole_batch"),
        ("zero1", "alone_whole_batch"),
        ("offloaded", "alone_whole_batch"),
        ("zero3_accumulating", "alone_whole_batch"),
        ("alone", "alone_whole_batch"),
        ("zero3_tied", "alone_tied"),
    ],
)
def test_sharding_and_accumulation_change_nothing(runs: Path, name: str, reference: str) -> None:
    ours, theirs = read_metrics(runs / name), read_metrics(runs / reference)
    assert len(ours) == len(theirs) == 20
    for mine, other in zip(ours, theirs, strict=True):
        for key in LOSSES + [k for k in other if k.startswith("val_")]:
            # A term that is nearly nothing carries the rounding of the sum that it is part of.
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), f"step {mine['step']}: {key}"
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5, abs=0)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_sharded_over_two_ranks_equals_one_rank_with_the_whole_batch(runs: Path, name: str) -> None:
    """For BST ranks differ in the number of pairs, and so of chunks."""
    ours, theirs = read_metrics(runs / f"zero3_{name}"), read_metrics(runs / f"alone_{name}")
    assert len(ours) == len(theirs) == 8
    losses = [key for key in theirs[-1] if "loss" in key]
    assert len([key for key in losses if key.startswith("val_")]) == len(losses) / 2
    for mine, other in zip(ours, theirs, strict=True):
        for key in ["grad_norm", *(key for key in losses if key in other)]:
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), f"step {mine['step']}: {key}"
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.5


def test_the_loss_falls(runs: Path) -> None:
    records = read_metrics(runs / "zero3")
    assert records[-1]["loss_next_token"] < records[0]["loss_next_token"] - 1.0
    assert records[-1]["val_loss_next_token"] < records[9]["val_loss_next_token"]


def test_stopped_and_resumed_equals_uninterrupted_to_the_last_digit(runs: Path) -> None:
    assert without_times(read_metrics(runs / "stopped")) == without_times(read_metrics(runs / "zero3"))


def test_metrics_have_the_documented_keys(runs: Path) -> None:
    documented = (
        "step tokens loss loss_next_token loss_next_latent loss_kl learning_rate grad_norm step_seconds "
        "data_seconds tokens_per_second mfu memory_peak_bytes"
    )
    records = read_metrics(runs / "zero3")
    assert all(set(documented.split()) <= set(record) for record in records)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert records[-1]["tokens"] == 20 * 8 * 48
    assert "loss_kl" not in read_metrics(runs / "gpt")[0]


def test_two_ranks_under_zero3_hold_the_weights_of_one_rank_alone(runs: Path) -> None:
    for ours, theirs in [("zero3", "alone"), ("zero3_tied", "alone_tied"), ("zero1", "alone")]:
        sharded, whole = open_checkpoint(runs / ours), open_checkpoint(runs / theirs)
        assert sorted(sharded.weight_names) == sorted(whole.weight_names)
        assert ("lm_head.weight" in sharded.weight_names) == (ours != "zero3_tied")
        for name in whole.weight_names:
            torch.testing.assert_close(sharded.weight(name), whole.weight(name), rtol=1e-3, atol=2e-4)


def test_old_checkpoints_are_pruned_and_latest_names_the_newest(runs: Path) -> None:
    folder = runs / "stopped" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000016", "step_00000020"]
    assert (folder / "latest").read_text() == "step_00000020"


def test_a_checkpoint_says_what_it_is(runs: Path) -> None:
    checkpoint = open_checkpoint(runs / "zero3")
    assert (checkpoint.step, checkpoint.tokens) == (20, 20 * 8 * 48)
    assert checkpoint.config.model.width == 64
    assert checkpoint.tokenizer().fingerprint == checkpoint.dataset["tokenizer_fingerprint"]
    state = json.loads((checkpoint.path / "state.json").read_text())
    assert state["ranks"] == 2 and state["zero_stage"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.seed": 2}, "run.seed=2, but .* was trained with 1"),
        ({"model.width": 96}, "model.width=96, but .* was trained with 64"),
        ({"objective.horizon": 1}, "objective.horizon=1, but .* was trained with 2"),
        ({"batch.global_sequences": 16}, "batch.global_sequences=16, but"),
        (
            {"run.seed": 2, "model.width": 96},
            r"run.seed=2, but .* was trained with 1; model.width was 64, is 96; set it back",
        ),
        ({"optimizer.learning_rate": 1e-3}, None),
        ({"deepspeed.zero_optimization.stage": 2, "batch.micro_sequences": 2}, None),
    ],
)
def test_going_on_as_another_run_is_refused(
    runs: Path, tiny_data: Path, tmp_path: Path, changes: dict[str, object], message: str | None
) -> None:
    checkpoint = open_checkpoint(runs / "zero3").path
    config = load_config(write_run_config(tmp_path, tiny_data, "zero3", changes))
    arguments = (checkpoint, config, open_data(config)[0], Ranks(0, 2, 0, 2))
    if message is None:
        check_same_run(*arguments)
    else:
        with pytest.raises(UserError, match=message):
            check_same_run(*arguments)


def test_going_on_with_other_data_is_refused(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    source = str(tiny_data.parent / "source")
    prepare(["--source", source, "--tokenizer", "bytes", "--validation", "0.2", "--out", str(other)])
    config = load_config(write_run_config(tmp_path, other, "zero3", {}))
    with pytest.raises(UserError, match=r"made with the tokenizer \w{12} \(bytes\), not the \w{12} \(sent"):
        check_same_run(open_checkpoint(runs / "zero3").path, config, open_data(config)[0], Ranks(0, 2, 0, 2))


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "stopped", run)
    newest = run / "checkpoints" / "step_00000020"
    shard = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert open_checkpoint(run).step == 16
    assert (
        f"leaving damaged checkpoint {newest}: {shard.name} does not have the recorded sha256"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="damaged checkpoint"):
        open_checkpoint(newest)
    shard.unlink()
    assert open_checkpoint(run).step == 16

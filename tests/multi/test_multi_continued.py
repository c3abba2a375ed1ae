"""Runs that start from the weights of an exported model, and a run that reports to Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import read_metrics, run_many

from benchmarks.small_run import write_run_config
from benchmarks.synthetic_checkpoint import write_checkpoint
from data_pipeline import UserError
from pretrain.checkpoints import open_checkpoint
from pretrain.checkpoints.state import read_state
from pretrain.checkpoints.unpickling import load_data_only
from pretrain.config import load_config
from pretrain.export import export
from pretrain.run_data import open_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A trained run and its export, and runs that go on from the export."""
    folder = tmp_path_factory.mktemp("continued")
    first = write_run_config(folder, tiny_data, "first", {})
    run_many(2, str(first))
    export(open_checkpoint(folder / "runs" / "first"), folder / "export")
    still: dict[str, object] = {"model.init_from": str(folder / "export"), "optimizer.learning_rate": 1e-12}
    still |= {"schedule.steps": 2, "schedule.warmup_steps": 0, "schedule.decay_steps": 1}
    configs = [
        write_run_config(folder, tiny_data, "sharded", still),
        write_run_config(folder, tiny_data, "wider_dynamics", still | {"objective.dynamics_width": 128}),
        write_run_config(folder, tiny_data, "offline", still | {"metrics.wandb": "offline"}),
    ]
    run_many(2, *map(str, configs), f"{configs[-1]}|schedule.steps=3")
    return folder


def test_a_run_starts_from_an_exports_weights_and_its_dynamics(folder: Path) -> None:
    source, continued = (open_checkpoint(folder / "runs" / name) for name in ("first", "sharded"))
    for name in source.weight_names:
        torch.testing.assert_close(continued.weight(name), source.weight(name), rtol=0, atol=1e-8)
    last, first = read_metrics(folder / "runs" / "first")[-1], read_metrics(folder / "runs" / "sharded")[-1]
    for key in ("val_loss_next_token", "val_loss_next_latent", "val_loss_kl"):
        assert first[key] == pytest.approx(last[key], rel=1e-5)


def test_the_export_benchmarks_checkpoint_is_laid_out_as_deepspeed_lays_it_out(folder: Path, tmp_path: Path) -> None:
    real = open_checkpoint(folder / "runs" / "first")
    made = write_checkpoint(tmp_path / "step_00000001", real.config, real.vocab_size, 2, real.tokenizer())
    same = ["zero_stage", "loss_scaler", "dynamic_loss_scale", "overflow", "partition_count", "fp32_flat_groups"]
    for rank in range(2):
        name = f"zero_pp_rank_{rank}_mp_rank_00_%s_states.pt"
        theirs, ours = (load_data_only(path / (name % "optim"))["optimizer_state_dict"] for path in (real.path, made))
        assert ours.keys() == theirs.keys() == {*same, "optimizer_state_dict"}
        assert [layout(ours[key]) for key in same] == [layout(theirs[key]) for key in same]
        assert layout(ours["optimizer_state_dict"]["state"]) == layout(theirs["optimizer_state_dict"]["state"])
        theirs, ours = (load_data_only(path / (name % "model")) for path in (real.path, made))
        assert [list(group.items()) for group in ours["param_shapes"]] == [
            list(group.items()) for group in theirs["param_shapes"]
        ]
        assert ours["module"].keys() == theirs["module"].keys() and ours.keys() <= theirs.keys()
        for key in ("dp_world_size", "mp_world_size", "buffer_names", "optimizer", "shared_params", "ds_version"):
            assert ours[key] == theirs[key], key
    state = read_state(made)
    assert state.keys() <= read_state(real.path).keys() and state["dataset"].keys() <= real.dataset.keys()


def layout(value: object) -> object:
    """Keys, types, shapes and precisions."""
    match value:
        case torch.Tensor():
            return value.dtype, tuple(value.shape)
        case dict():
            return {key: layout(item) for key, item in value.items()}
        case list():
            return [layout(item) for item in value]
        case _:
            return type(value), value if isinstance(value, int | str) else None


def test_dynamics_of_another_width_start_fresh(folder: Path) -> None:
    source, continued = (open_checkpoint(folder / "runs" / name) for name in ("first", "wider_dynamics"))
    name = "trunk.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(continued.weight(name), source.weight(name), rtol=0, atol=1e-8)
    assert continued.weight("objective.dynamics.input.weight").shape[0] == 128
    std = continued.weight("objective.dynamics.input.weight").std().item()
    assert std == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 96}, "model.width makes hidden_size=96"),
        ({"model.norm_epsilon": 1e-6}, "model.norm_epsilon makes rms_norm_eps=1e-06"),
        ({"model.init_from": "/nowhere"}, "config.json cannot be read"),
    ],
)
def test_a_model_of_another_shape_is_refused_naming_the_key(
    folder: Path, tiny_data: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    changes = {"model.init_from": str(folder / "export"), **changes}
    with pytest.raises(UserError, match=message):
        open_data(load_config(write_run_config(tmp_path, tiny_data, "refused", changes)))


def test_a_model_of_another_tokenizer_is_refused(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    from data_pipeline.prepare import main

    source = str(tiny_data.parent / "source")
    # Another vocabulary of the same size, so that the shapes agree and the tokenizer alone differs.
    (tmp_path / "half").mkdir()
    for path in sorted(Path(source).iterdir())[::2]:
        (tmp_path / "half" / path.name).write_text(path.read_text())
    other = tmp_path / "other"
    main(
        [
            "--source",
            str(tmp_path / "half"),
            "--tokenizer",
            "train:sentencepiece:512",
            "--validation",
            "0.2",
            "--out",
            str(other),
        ]
    )
    config = write_run_config(tmp_path, other, "refused", {"model.init_from": str(folder / "export")})
    with pytest.raises(UserError, match="prepare the data with that model's tokenizer"):
        open_data(load_config(config))


def test_wandb_offline_goes_on_under_one_id(folder: Path) -> None:
    run = folder / "runs" / "offline"
    id_ = (run / "wandb_id").read_text()
    starts = list((run / "wandb").glob(f"offline-run-*-{id_}"))
    assert len(starts) == 2, "one folder per start, both under the same id"
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]

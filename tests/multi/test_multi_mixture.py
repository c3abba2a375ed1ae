"""Real ranks on a mixture: spread, stopped, damaged, read from afar, then exported and evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launch import read_metrics, run_many, without_times

from benchmarks.small_run import write_run_config
from data_pipeline import UserError
from data_pipeline.prepare import main as prepare
from pretrain.checkpoints import check_same_run, open_checkpoint
from pretrain.config import load_config
from pretrain.distributed import Ranks
from pretrain.evaluate import evaluate
from pretrain.export import export
from pretrain.run_data import open_data


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `web` and `code`, `damaged` with one bad shard, and the runs below: two starts."""
    folder = tmp_path_factory.mktemp("mixture")
    sources = sorted((tiny_data.parent / "source").iterdir())
    for name, files in {"web": sources[:9], "code": sources[9:]}.items():
        (folder / f"{name}_text").mkdir()
        for file in files:
            shutil.copy(file, folder / f"{name}_text")
        arguments = ["--tokenizer", str(tiny_data / "tokenizer.model"), "--workers", "1", "--shard-bytes", "40000"]
        prepare(
            [*arguments, "--validation", "0.3", "--source", str(folder / f"{name}_text"), "--out", str(folder / name)]
        )
    shutil.copytree(folder / "web", folder / "damaged")
    next((folder / "damaged" / "train").glob("*.tokens")).unlink()

    remote = {"path": f"file://{folder}/web", "cache": str(folder / "cache"), "cache_bytes": 400_000}
    damaged = {"path": str(folder / "damaged"), "on_damage": "skip"}
    mixed, zero = mixture(folder, 3, 1), {"deepspeed.zero_optimization.stage": 0}
    stopped = config(folder, "stopped", mixed, {"checkpoint.every": 4})
    run_many(
        2,
        config(folder, "mixed", mixed),
        f"{stopped}|run.stop_after=6",
        stopped,
        config(folder, "remote", remote),
        config(folder, "damaged", damaged),
    )
    run_many(
        1,
        config(folder, "mixed_alone", mixed, zero),
        config(folder, "near_alone", {"path": str(folder / "web"), "shard_window": 8}, zero),
        config(folder, "damaged_alone", damaged, zero),
    )
    return folder


def mixture(folder: Path, web: float, code: float) -> dict[str, Any]:
    return {"sources": [{"path": str(folder / "web"), "weight": web}, {"path": str(folder / "code"), "weight": code}]}


def config(folder: Path, name: str, data: dict[str, Any], changes: dict[str, object] | None = None) -> str:
    data = data | {"sequence_length": 48}
    return str(write_run_config(folder, folder, name, {"data": data, "schedule.steps": 12, **(changes or {})}))


@pytest.mark.parametrize(
    ("ours", "theirs"), [("mixed", "mixed_alone"), ("remote", "near_alone"), ("damaged", "damaged_alone")]
)
def test_two_ranks_read_what_one_reads(folder: Path, ours: str, theirs: str) -> None:
    for mine, other in zip(*(read_metrics(folder / "runs" / name) for name in (ours, theirs)), strict=True):
        assert set(mine) == set(other)
        for key in [key for key in mine if "loss" in key or key == "skipped_sequences"]:
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), f"step {mine['step']}: {key}"


def test_a_stopped_mixture_goes_on_to_the_last_digit(folder: Path) -> None:
    stopped, whole = (without_times(read_metrics(folder / "runs" / name)) for name in ("stopped", "mixed"))
    assert stopped == whole


def test_each_source_is_validated_and_together_by_their_shares(folder: Path) -> None:
    last = read_metrics(folder / "runs" / "mixed")[-1]
    for key in ("loss", "loss_next_token", "loss_next_latent", "loss_kl"):
        mean = 0.75 * last[f"val_web_{key}"] + 0.25 * last[f"val_code_{key}"]
        assert last[f"val_{key}"] == pytest.approx(mean, rel=1e-3)
    assert last["val_web_loss"] != last["val_code_loss"]
    assert not any(key.startswith("val_web") for key in read_metrics(folder / "runs" / "remote")[-1])


def test_sequences_of_a_damaged_shard_are_left_out_and_counted(folder: Path) -> None:
    records = read_metrics(folder / "runs" / "damaged")
    data, stream, _ = open_data(load_config(folder / "damaged.yaml"))
    for record in records:
        shards = stream.samples[0].shards(stream.sample_numbers(record["step"] - 1)["sample"])
        missing = [number for number in range(len(stream.split.shards)) if not _is_there(data, number)]
        assert record["skipped_sequences"] == sum(bool(set(row) & set(missing)) for row in shards.tolist())
    assert 0 < sum(record["skipped_sequences"] for record in records) < 8 * len(records)
    assert "skipped_sequences" not in read_metrics(folder / "runs" / "mixed")[-1]
    with pytest.raises(UserError, match=r"\.tokens: missing from the data set"):
        open_data(load_config(folder / "damaged.yaml", ["data.on_damage=stop"]))


def _is_there(data: Any, number: int) -> bool:
    [dataset] = data.datasets.values()
    return (dataset.path / dataset.split("train").shards[number]["files"]["tokens"]["file"]).exists()


def test_the_cache_stays_below_its_bound(folder: Path) -> None:
    assert 0 < sum(file.stat().st_size for file in (folder / "cache").iterdir()) <= 400_000


def test_a_checkpoint_records_every_source_and_refuses_another_mixture(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "runs" / "mixed")
    sources = checkpoint.dataset["sources"]
    assert [source["weight"] for source in sources.values()] == [3, 1] and list(sources) == ["web", "code"]
    assert sources["web"]["fingerprint"] != sources["code"]["fingerprint"] != checkpoint.dataset["fingerprint"]
    assert sources["web"]["tokenizer_fingerprint"] == checkpoint.tokenizer().fingerprint
    other = load_config(config(folder, "other", mixture(folder, 3, 2)))
    with pytest.raises(UserError, match=r"source code .* has weight=2.0, not 1.0 that .*step_00000012 was trained"):
        check_same_run(checkpoint.path, other, open_data(other)[0], Ranks(0, 2, 0, 2))


def test_what_was_trained_on_a_mixture_is_exported_and_evaluated(folder: Path, tmp_path: Path) -> None:
    export(open_checkpoint(folder / "runs" / "mixed_alone"), tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "75.0% of " in card and "25.0% of " in card
    for model in (folder / "runs" / "mixed_alone", tmp_path / "export"):
        for asked, chosen in ((None, "web"), ("code", "code"), (str(folder / "code"), "code")):
            evaluate(model, ["perplexity"], tmp_path / "out", data=asked, limit=2)
            assert json.loads((tmp_path / "out" / "perplexity.json").read_text())["dataset"] == str(folder / chosen)
    evaluate(folder / "runs" / "remote", ["perplexity"], tmp_path / "out", limit=2)

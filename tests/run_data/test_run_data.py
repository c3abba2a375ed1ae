"""What a run reads, from the data section of its config; no ranks are started."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.small_run import write_run_config
from data_pipeline import UserError, open_dataset
from data_pipeline.prepare import main as prepare
from pretrain.config import load_config
from pretrain.distributed import Ranks
from pretrain.run_data import RunData, host_memory, open_data, read_validation
from pretrain.same_data import check_same_data, data_difference, describe_data

Open = Callable[..., RunData]


@pytest.fixture(scope="module")
def sets(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets with the tokenizer of tiny_data: `web` and `code` in several shards, `novalidation`."""
    folder = tmp_path_factory.mktemp("sets")
    sources = sorted((tiny_data.parent / "source").iterdir())
    for name, files, validation in (
        ("web", sources[:9], "0.2"),
        ("code", sources[9:], "0.3"),
        ("short", sources[:2], "0"),
    ):
        (folder / f"{name}_text").mkdir()
        for file in files:
            shutil.copy(file, folder / f"{name}_text")
        arguments = ["--tokenizer", str(tiny_data / "tokenizer.model"), "--workers", "1", "--shard-bytes", "40000"]
        arguments += ["--validation", validation, "--source", str(folder / f"{name}_text")]
        prepare([*arguments, "--out", str(folder / name)])
    return folder


@pytest.fixture
def open_run(tmp_path: Path, sets: Path) -> Open:
    """open_run(data section without sequence_length, …) → the run's data; `web`, `code` name the sets."""

    def open_one(data: dict[str, Any], **changes: object) -> RunData:
        whole = json.loads(json.dumps(data).replace("@", f"{sets}/")) | {"sequence_length": 48}
        return open_data(load_config(write_run_config(tmp_path, sets, "run", {"data": whole, **changes})))[0]

    return open_one


WEB, CODE = "@web", "@code"


def weights(web: float, code: float) -> dict[str, Any]:
    return {"sources": [{"path": WEB, "weight": web}, {"path": CODE, "weight": code}]}


def sources_read(data: RunData, steps: int) -> list[float]:
    """The share of each source among the sequences of so many steps."""
    counts = Counter(np.concatenate([data.stream.sample_numbers(step)["source"] for step in range(steps)]).tolist())
    return [counts[number] / sum(counts.values()) for number in range(len(data.datasets))]


# ---- what is read


def test_a_mixture_by_weight_reads_its_shares(open_run: Open) -> None:
    data = open_run(weights(3, 1))
    assert sources_read(data, 20) == pytest.approx([0.75, 0.25], abs=0.01)
    assert data.shares == pytest.approx({"web": 0.75, "code": 0.25}, abs=0.01)


def test_a_mixture_by_epochs_reads_every_sample_as_often(open_run: Open) -> None:
    data = open_run({"sources": [{"path": WEB, "epochs": 1}, {"path": CODE, "epochs": 2}]})
    web, code = (samples.count for samples in data.stream.samples)
    numbers = np.concatenate([data.stream.sample_numbers(step) for step in range(-(-(web + 2 * code) // 8))])
    numbers = numbers[: web + 2 * code]
    for source, times in ((0, 1), (1, 2)):
        seen = Counter(numbers["sample"][numbers["source"] == source].tolist())
        assert set(seen.values()) == {times} and len(seen) == data.stream.samples[source].count


def test_phases_change_the_weights_by_steps_or_by_tokens(open_run: Open) -> None:
    phases = [
        {"steps": 5, "weights": [1, 0]},
        {"tokens": 5 * 8 * 48, "weights": [0, 1]},
        {"steps": 10, "weights": [1, 0], "to": [0, 1]},
    ]
    data = open_run({"sources": [{"path": WEB}, {"path": CODE}], "phases": phases}, **{"schedule.steps": 40})
    sources = np.concatenate([data.stream.sample_numbers(step)["source"] for step in range(40)]).reshape(40, 8)
    assert (sources[:5] == 0).all() and (sources[5:10] == 1).all() and (sources[20:] == 1).all()
    line = sources[10:20].mean(axis=1)
    assert line[:3].mean() < 0.3 and line[-3:].mean() > 0.7
    assert data.shares["web"] == pytest.approx(10 / 40, abs=0.02)


def test_a_single_source_of_a_mixture_is_read_like_a_path(open_run: Open) -> None:
    alone, mixed = open_run({"path": WEB}), open_run({"sources": [{"path": WEB, "weight": 0.3}]})
    for step in (0, 7, 1000):
        assert np.array_equal(alone.stream.batch(step).tokens, mixed.stream.batch(step).tokens)
    assert not alone.is_mixture and mixed.is_mixture


def test_best_fit_packing_keeps_documents_whole(open_run: Open, sets: Path, tmp_path: Path) -> None:
    from data_pipeline.best_fit import main as best_fit

    with pytest.raises(UserError, match=r"not packed for this sequence length: run python -m data_pipeline\.best_fit"):
        open_run({"path": WEB, "packing": "best_fit"})
    best_fit([str(sets / "web"), "--sequence-length", "48"])
    packed, plain = open_run({"path": WEB, "packing": "best_fit"}), open_run({"path": WEB})
    record = json.loads((sets / "web" / "packing" / "train-48" / "packing.json").read_text())
    assert packed.stream.samples_per_epoch == record["rows"]
    remote = {"path": f"file://{sets}/web", "cache": str(tmp_path / "c"), "packing": "best_fit"}
    with pytest.raises(UserError, match="packing is kept beside a local set's shards"):
        open_run(remote)
    assert "data.packing=best_fit, not end_to_end" in str(data_difference(*map(describe_data, (plain, packed)), 1))


def test_a_remote_set_is_read_through_the_cache(open_run: Open, sets: Path, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "cache"), "cache_bytes": 300_000}
    far = open_run({"path": f"file://{sets}/web", **cache})
    near = open_run({"path": WEB, "shard_window": 8})
    for a, b in zip(far.stream.batches(0, 12), near.stream.batches(0, 12), strict=True):
        assert np.array_equal(a.tokens, b.tokens)
    assert any((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match="give cache"):
        open_run({"path": f"file://{sets}/web"})
    with pytest.raises(UserError, match=r"cache .*: 100 bytes cannot hold a file of [\d,]+: make it larger"):
        open_run({"path": f"file://{sets}/web", "cache": str(tmp_path / "other"), "cache_bytes": 100})


def test_another_programs_file_is_read_with_its_tokenizer(open_run: Open, sets: Path, tmp_path: Path) -> None:
    tokens = open_dataset(sets / "web").split("train")
    tokens.read(0, tokens.tokens).tofile(tmp_path / "train.bin")
    tokens.read(0, 500).tofile(tmp_path / "val.bin")
    made = sets / "web" / "tokenizer.model"
    data = open_run({"path": str(tmp_path / "train.bin"), "tokenizer": str(made)})
    assert data.datasets["train_bin"].foreign and data.tokenizer_file() == ("tokenizer.model", made.read_bytes())
    assert describe_data(data)["tokenizer_fingerprint"] == open_dataset(sets / "web").tokenizer_fingerprint
    with pytest.raises(UserError, match=r"train\.bin does not say what made its tokens; give it"):
        open_run({"path": str(tmp_path / "train.bin")})
    with pytest.raises(UserError, match=r"only \.bin files need to be told it; leave it out"):
        open_run({"path": WEB, "tokenizer": str(made)})


# ---- what is refused before anything is built


def test_sources_of_two_tokenizers_are_refused(open_run: Open, sets: Path, tmp_path: Path) -> None:
    prepare(["--source", str(sets / "web_text"), "--tokenizer", "bytes", "--out", str(tmp_path / "bytes")])
    with pytest.raises(UserError, match=r"bytes: made with another tokenizer .* than .*web .*--tokenizer .*model"):
        open_run({"sources": [{"path": WEB, "weight": 1}, {"path": str(tmp_path / "bytes"), "weight": 1}]})


def test_a_set_whose_tokenizer_file_was_swapped_is_refused(open_run: Open, sets: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sets / "web", tmp_path / "copy")
    from data_pipeline.tokenizers import train_sentencepiece

    (copy / "tokenizer.model").write_bytes(train_sentencepiece(["another text " * 99], 270))
    with pytest.raises(UserError, match=r"tokenizer\.model: not the tokenizer that made this data set"):
        open_run({"path": str(copy)})


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"path": "nowhere"}, {}, "nowhere: no such data set"),
        ({"path": WEB}, {"data.sequence_length": 10**6}, "one sample of sequence length 1,000,000 needs 1,000,001"),
        ({"path": "@short"}, {}, "the validation split has 0 tokens, nothing to predict"),
        (
            {"sources": [{"path": "@short", "weight": 1}]},
            {},
            "none of the sources short that are read has a validation",
        ),
        ({"path": WEB, "groups": 2}, {}, "groups 2 go through windows of shards: give shard_window"),
        ({"path": WEB, "shard_window": 1, "groups": 3}, {}, "groups 3 must divide the global batch of 8"),
        ({"path": "nosuch://x", "cache": "c"}, {}, "nosuch://x: .*give a folder or an fsspec URL"),
    ],
)
def test_data_that_does_not_do_is_one_line(
    open_run: Open, data: dict[str, Any], changes: dict[str, object], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_run(data, **changes)
    assert "\n" not in str(caught.value)


# ---- validation


def test_each_source_with_a_validation_split_is_validated(open_run: Open) -> None:
    data = open_run({"sources": [{"path": name, "weight": 1} for name in (WEB, CODE, "@short")]})
    batches = read_validation(data, Ranks(0, 1, 0, 1))
    assert list(batches) == ["web", "code"]
    for name, split in batches.items():
        own = data.datasets[name].split("validation")
        assert np.array_equal(split[0].tokens[0], own.read(0, 49))


# ---- is it still the same run


def differ(open_run: Open, old: dict[str, Any], new: dict[str, Any], steps: int = 10) -> str | None:
    """What is said of going on with `new` after so many steps of `old`."""
    recorded = json.loads(json.dumps(describe_data(open_run(old))))
    try:
        check_same_data(recorded, open_run(new), steps, Path("runs/x/checkpoints/step_10"))
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith("set it back, or choose another run.name")
        return str(error)
    return None


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (weights(3, 2), r"source code \(.*/code\) has weight=2.0, not 1.0 that runs/x/.*step_10 was trained with"),
        ({"sources": [{"path": CODE, "weight": 3}, {"path": WEB, "weight": 1}]}, "source code .*fingerprint"),
        ({"sources": [{"path": WEB, "weight": 3}, {"path": "@short", "weight": 1}]}, "source short .* of .*/code"),
        ({"sources": [{"path": WEB, "weight": 3}]}, "data.sources=web, not web, code"),
        ({"path": WEB}, "data.sources=web, not web, code"),
        ({"sources": [{"path": WEB, "epochs": 3}, {"path": CODE, "epochs": 1}]}, "has weight=None, not 3.0"),
        ({"sources": [{"path": WEB}, {"path": CODE}], "phases": [{"weights": [3, 1]}]}, "has weight=None, not 3.0"),
        (weights(3, 1) | {"shard_window": 2}, "source web .* has shard_window=2, not None"),
        (weights(3, 1) | {"cache": "elsewhere", "on_damage": "skip"}, None),
    ],
)
def test_a_changed_mixture_is_refused_spelling_the_difference(
    open_run: Open, new: dict[str, Any], said: str | None
) -> None:
    found = differ(open_run, weights(3, 1), new)
    assert found is None if said is None else re.search(said, found or "")


def test_moved_and_renamed_data_is_the_same(open_run: Open, sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "code", tmp_path / "elsewhere")
    moved = weights(3, 1)
    moved["sources"][1] |= {"path": str(tmp_path / "elsewhere"), "name": "other"}
    assert differ(open_run, weights(3, 1), moved) is None


def test_groups_and_the_window_of_a_remote_copy_are_part_of_the_order(
    open_run: Open, sets: Path, tmp_path: Path
) -> None:
    remote = {"path": f"file://{sets}/web", "cache": str(tmp_path / "c")}
    assert "has shard_window=8, not None" in str(differ(open_run, {"path": WEB}, remote))
    assert differ(open_run, {"path": WEB, "shard_window": 8}, remote) is None
    grouped = {"path": WEB, "shard_window": 8, "groups": 2}
    assert "data.groups=2, not 1" in str(differ(open_run, {"path": WEB, "shard_window": 8}, grouped))


def at(web: float, code: float, **rest: Any) -> dict[str, Any]:
    return {"weights": [web, code], **rest}


def phased(*phases: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [{"path": WEB}, {"path": CODE}], "phases": list(phases)}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ([at(3, 1)], [at(3, 1, steps=10), at(0, 1)], True),
        ([at(3, 1)], [at(3, 1, steps=9), at(0, 1)], False),
        ([at(3, 1)], [at(3, 2)], False),
        ([at(3, 1, steps=10), at(0, 1)], [at(3, 1, steps=10), at(1, 1)], True),
        ([at(3, 1, steps=9), at(0, 1)], [at(3, 1, steps=9), at(1, 1)], False),
        ([at(3, 1, steps=12), at(0, 1)], [at(3, 1, steps=11), at(0, 1)], False),
        ([at(3, 1, steps=12), at(0, 1)], [at(3, 1)], False),
        # Lengths in steps and in tokens are the same thing, and the last phase's does not count.
        ([at(3, 1, steps=4), at(0, 1)], [at(3, 1, tokens=4 * 8 * 48), at(0, 1, steps=2)], True),
        ([at(3, 1, to=[1, 1], steps=4)], [at(3, 1, to=[1, 1], steps=4), at(1, 1)], True),
        ([at(3, 1, to=[1, 1], steps=4)], [at(3, 1, to=[1, 2], steps=4)], False),
    ],
)
def test_only_phases_that_have_not_begun_may_change(
    open_run: Open, old: list[dict[str, Any]], new: list[dict[str, Any]], same: bool
) -> None:
    """After 10 steps of 8 sequences of 48 tokens; the endless phase may be given an end from there on."""
    found = differ(open_run, phased(*old), phased(*new))
    assert (found is None) == same and (same or "data.phases." in str(found))


# ---- batches on their way to the accelerator


def test_a_gpu_gets_its_batches_in_page_locked_memory(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append((shape, dtype, pin_memory))
        return torch.zeros(shape, dtype=dtype)  # a machine without a GPU cannot lock pages

    assert host_memory(torch.device("cpu")) is np.empty
    allocate = host_memory(torch.device("cuda", 0))
    monkeypatch.setattr(torch, "empty", empty)
    stream = open_run(weights(1, 1)).stream
    pinned, plain = next(stream.batches(0, 1, allocate=allocate)), next(stream.batches(0, 1))
    assert asked == [((8, 49), kind, True) for kind in (torch.int64, torch.int32, torch.int32, torch.bool)]
    assert np.array_equal(pinned.tokens, plain.tokens) and np.array_equal(pinned.target_mask, plain.target_mask)

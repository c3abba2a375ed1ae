from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import quiet

from data_pipeline import Dataset, Stream, UserError, open_dataset
from data_pipeline.damage import BLOCK, checksums, find_damage
from data_pipeline.prepare import prepare
from data_pipeline.verify import verify


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Every byte of every file of a small set, each with another bit; and the tokenizer's."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    dataset = prepare(str(tmp_path / "a.jsonl"), "bytes", tmp_path / "set", workers=1, validation=0.0, console=quiet())
    assert dataset is not None
    files = [file for file in dataset.path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".tokens", ".documents", ".names"}
    verify(dataset.path, quiet())
    flipped = 0
    for file in files:
        whole = file.read_bytes()
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            file.write_bytes(content)
            with pytest.raises(UserError) as caught:
                verify(dataset.path, quiet())
            assert file.name in str(caught.value) or "format" in str(caught.value)
            flipped += 1
        file.write_bytes(whole)
    verify(dataset.path, quiet())
    assert flipped == sum(file.stat().st_size for file in files) > 1000


@pytest.mark.parametrize("change", ["truncated", "missing", "swapped", "longer"])
def test_files_that_are_not_what_they_were(dataset: Dataset, tmp_path: Path, change: str) -> None:
    copy = Path(shutil.copytree(dataset.path, tmp_path / "copy"))
    first, second = copy / "train/00000.tokens", copy / "train/00001.tokens"
    if change == "truncated":
        first.write_bytes(first.read_bytes()[:-2])
    elif change == "longer":
        first.write_bytes(first.read_bytes() + b"\0\0")
    elif change == "missing":
        first.unlink()
    else:
        a, b = first.read_bytes(), second.read_bytes()
        size = min(len(a), len(b))
        first.write_bytes(b[:size] + a[size:])
        second.write_bytes(a[:size] + b[size:])
    with pytest.raises(UserError, match=r"0000[01]\.tokens"):
        verify(copy, quiet())


def test_the_place_of_damage_is_told_to_the_mebibyte(tmp_path: Path) -> None:
    content = bytearray(np.random.default_rng(0).bytes(3 * BLOCK + 5))
    entry = checksums(bytes(content))
    (tmp_path / "x").write_bytes(content)
    assert find_damage(tmp_path / "x", entry) is None
    content[2 * BLOCK + 77] ^= 4
    (tmp_path / "x").write_bytes(content)
    assert find_damage(tmp_path / "x", entry) == "damaged between byte 2,097,152 and byte 3,145,728"
    (tmp_path / "x").write_bytes(content[:-1])
    assert "ends at byte 3,145,732" in str(find_damage(tmp_path / "x", entry))
    assert "cannot be read" in str(find_damage(tmp_path / "none", entry))


def damage(dataset: Dataset, tmp_path: Path, number: int) -> Dataset:
    copy = Path(shutil.copytree(dataset.path, tmp_path / "copy"))
    file = copy / f"train/{number:05d}.tokens"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    return open_dataset(copy)


SIZES: dict[str, Any] = {"seed": 3, "sequence_length": 64, "global_sequences": 12}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_shard_stops_the_run_and_is_named(dataset: Dataset, tmp_path: Path, rank: int) -> None:
    """Each shard is checked by one of the ranks: shard 1 by rank 1 of 2, so rank 0 goes on alone."""
    stream = Stream(damage(dataset, tmp_path, 1).split("train"), **SIZES)
    batches = stream.batches(0, 10**5, rank, 2)
    if rank == 0:
        assert sum(1 for _, _ in zip(range(3000), batches, strict=False)) == 3000
        return
    with pytest.raises(UserError, match=r"train/00001\.tokens: damaged between byte 0 and byte [\d,]+: restore"):
        for _ in batches:
            pass


def test_a_bad_shard_is_skipped_and_counted(dataset: Dataset, tmp_path: Path) -> None:
    bad = damage(dataset, tmp_path, 1)
    stream = Stream(bad.split("train"), on_damage="skip", **SIZES)
    whole = Stream(dataset.split("train"), **SIZES)
    skipped = 0
    for step in range(40):
        batch, good = stream.batch(step), whole.batch(step)
        shards = whole.samples[0].shards(whole.sample_numbers(step)["sample"])
        hit = (shards == 1).any(axis=1)
        skipped += int(hit.sum())
        assert (batch.document_ids[hit] == -1).all() and not batch.target_mask[hit].any()
        assert np.array_equal(batch.tokens[~hit], good.tokens[~hit])
        assert np.array_equal(batch.positions[~hit], good.positions[~hit])
    assert stream.skipped["samples"] == skipped > 0
    assert sum(1 for _ in stream.batches(0, 40)) == 40  # and nothing is raised
    with pytest.raises(UserError, match="write stop or skip"):
        Stream(bad.split("train"), on_damage="ignore", **SIZES)


def test_a_shard_that_vanishes_is_skipped_too(make_dataset: Callable[..., Dataset]) -> None:
    dataset = make_dataset([50] * 12, shards=3)
    stream = Stream(dataset.split("train"), seed=0, sequence_length=10, global_sequences=4, on_damage="skip")
    (dataset.path / "train/00002.tokens").unlink()
    batches = [stream.batch(step) for step in range(15)]
    assert 0 < stream.skipped["samples"] < 60
    assert sum(int((b.document_ids[:, 0] == -1).sum()) for b in batches) == stream.skipped["samples"]

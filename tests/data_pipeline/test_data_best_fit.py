from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import Dataset, Stream, UserError
from data_pipeline.best_fit import best_fit, cut_documents, main, open_packed, pack_split


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows by looking at every row, longest piece first."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 50))
def test_best_fit_fills_rows_as_the_slow_way_does(lengths: list[int], capacity: int) -> None:
    rows = best_fit(np.array(lengths), capacity)
    fast = [[lengths[piece] for piece in np.flatnonzero(rows == row)] for row in range(int(rows.max()) + 1)]
    assert sorted(map(sum, fast)) == sorted(map(sum, slow_best_fit(lengths, capacity)))
    assert max(map(sum, fast)) <= capacity


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(2, 30))
def test_every_token_is_once_in_a_piece_where_it_can_be_a_target(lengths: list[int], capacity: int) -> None:
    starts = np.cumsum(lengths) - lengths
    begin, tokens = cut_documents(starts, np.array(lengths), capacity)
    assert tokens.max() <= capacity
    targets = [place for b, n in zip(begin, tokens, strict=True) for place in range(b + (b not in starts), b + n)]
    assert targets == list(range(sum(lengths)))


def test_packed_rows_hold_whole_documents(make_dataset: Callable[..., Dataset]) -> None:
    chance = random.Random(1)
    lengths = [chance.choice([1, 2, 5, 9, 17, 60]) for _ in range(80)]
    dataset = make_dataset(lengths, shards=3)
    record = pack_split(dataset, "train", 16)
    packed = open_packed(dataset, "train", seed=2, sequence_length=16)
    split = dataset.split("train")
    stream = Stream(split, seed=2, sequence_length=16, global_sequences=4, samples=[packed])
    assert stream.samples_per_epoch == record["rows"]
    padded, seen = 0, np.zeros(split.tokens, np.int64)
    rows = packed.read(np.arange(packed.count), True, np.empty)
    for row in range(packed.count):
        column = 0
        for number, place in enumerate(range(packed.rows[row], packed.rows[row + 1])):
            begin, tokens = packed.pieces[place].tolist()
            here = slice(column, column + tokens)
            assert np.array_equal(rows.tokens[row, here], split.read(begin, begin + tokens))
            assert (rows.document_ids[row, here] == number).all()
            assert rows.positions[row, here].tolist() == list(range(tokens))
            inside = begin not in split.document_starts
            assert rows.target_mask[row, here].tolist() == [not inside] + [True] * (tokens - 1)
            seen[begin : begin + tokens] += rows.target_mask[row, here]
            column += tokens
        assert (rows.document_ids[row, column:] == -1).all() and not rows.target_mask[row, column:].any()
        assert (rows.tokens[row, column:] == 0).all()
        padded += 17 - column
    assert (seen == 1).all(), "every token is a target once"
    assert record["share_padded"] == pytest.approx(padded / rows.tokens.size)
    assert record["tokens_lost"] == 0 and record["documents_cut"] == sum(n > 17 for n in lengths)
    numbers = np.concatenate([stream.sample_numbers(step)["sample"] for step in range(record["rows"] // 4 + 1)])
    assert sorted(numbers[: record["rows"]]) == list(range(record["rows"]))
    batch, wanted = stream.batch(3), stream.sample_numbers(3)["sample"]
    assert np.array_equal(batch.tokens, rows.tokens[wanted])
    touched = packed.shards(wanted)
    for row, sample in enumerate(wanted.tolist()):
        begins = packed.pieces[packed.rows[sample] : packed.rows[sample + 1], 0]
        assert set(split.shard_of(begins).tolist()) <= set(touched[row].tolist())


def test_a_packing_belongs_to_its_data(
    make_dataset: Callable[..., Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset([5, 6, 40])
    with pytest.raises(UserError, match="not packed for this sequence length: run python"):
        open_packed(dataset, "train", seed=0, sequence_length=8)
    main([str(dataset.path), "--sequence-length", "8"])
    assert "3 documents in" in (shown := capsys.readouterr().out) and "no token lost" in shown
    open_packed(dataset, "train", seed=0, sequence_length=8)
    pieces: Path = dataset.path / "packing" / "train-8" / "pieces"
    content = bytearray(pieces.read_bytes())
    content[3] ^= 1
    pieces.write_bytes(content)
    with pytest.raises(UserError, match="pieces: damaged"):
        open_packed(dataset, "train", seed=0, sequence_length=8)
    with pytest.raises(UserError, match="packing of other data"):
        open_packed(make_dataset([5, 6, 41]), "train", seed=0, sequence_length=8)
    with pytest.raises(UserError, match="nothing to pack"):
        pack_split(dataset, "validation", 8)

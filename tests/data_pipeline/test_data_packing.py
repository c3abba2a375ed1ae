from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from data_helpers import DocumentList

from data_pipeline.packing import Batch, find_segments, pack, pad
from data_pipeline.shards import Dataset


def reference(lengths: list[int], prompts: list[int], start: int, length: int) -> tuple[list[int], ...]:
    """Ids, positions and mask of one window, token by token."""
    owner = [(d, o) for d, size in enumerate(lengths) for o in range(size)]
    ids, positions, mask = [0], [0], []
    for column in range(length):
        document, offset = owner[start + column]
        if column:
            begins = offset == 0
            ids.append(ids[-1] + begins)
            positions.append(0 if begins else positions[-1] + 1)
        mask.append(offset == 0 or offset > prompts[document])
    return ids, positions, [int(m) for m in mask]


@pytest.mark.parametrize("seed", range(30))
def test_pack_equals_the_loop(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice([2, 2, 3, 5, 9, 40]) for _ in range(40)]
    prompts = [chance.randrange(size) for size in lengths]
    length = chance.choice([1, 2, 7, 33])
    starts = np.array([chance.randint(0, sum(lengths) - length) for _ in range(12)])
    document_starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.zeros((12, length), np.int64)
    batch = pack(tokens, DocumentList(document_starts, np.array(prompts)), starts)
    plain = pack(tokens, DocumentList(document_starts), starts)
    for row, start in enumerate(starts.tolist()):
        ids, positions, mask = reference(lengths, prompts, start, length)
        assert batch.document_ids[row].tolist() == plain.document_ids[row].tolist() == ids
        assert batch.positions[row].tolist() == plain.positions[row].tolist() == positions
        assert batch.target_mask[row].tolist() == mask
    assert plain.target_mask.all()


def test_types_are_as_promised() -> None:
    for prompts in (None, np.zeros(1, np.int64)):
        batch = pack(np.zeros((1, 4), np.int64), DocumentList(np.array([0]), prompts), np.array([0]))
        assert batch.tokens.dtype == np.int64 and batch.target_mask.dtype == np.bool_
        assert batch.document_ids.dtype == batch.positions.dtype == np.int32


def test_segments_name_documents_and_what_came_before() -> None:
    pieces = find_segments(DocumentList(np.array([0, 4, 6])), np.array([1, 4]), 5)
    assert pieces.document.tolist() == [0, 1, 1, 2]
    assert pieces.length.tolist() == [3, 2, 2, 3]
    assert pieces.skipped.tolist() == [1, 0, 0, 0]
    assert pieces.begin.tolist() == [0, 3, 5, 7]


def test_prompts_go_through_files_and_shards(make_dataset: Callable[..., Dataset]) -> None:
    from data_pipeline.samples import read_windows

    dataset = make_dataset([5, 7, 3, 9], prompts=[2, 0, 1, 8], shards=2)
    batch = read_windows(dataset.split("train"), np.array([0, 10]), 12)
    assert batch.target_mask[0].astype(int).tolist() == [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert batch.target_mask[1].astype(int).tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_rows_are_views_and_padding_is_marked() -> None:
    batch = pack(np.arange(8).reshape(2, 4), DocumentList(np.array([0, 6])), np.array([0, 4]))
    assert np.shares_memory(batch.rows(1, 2).tokens, batch.tokens)
    assert batch.rows(1, 2).document_ids.tolist() == [[0, 0, 1, 1]]
    padded: Batch = pad(batch, 3, 6)
    assert (padded.document_ids[:2, 4:] == -1).all() and (padded.document_ids[2] == -1).all()
    assert not padded.target_mask[:, 4:].any() and not padded.target_mask[2].any()
    assert np.array_equal(padded.tokens[:2, :4], batch.tokens)

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from data_helpers import quiet

from data_pipeline import Stream, UserError, open_dataset, validation_batches
from data_pipeline.verify import verify

EOS = 256
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def megatron(folder: Path, documents: list[list[int]], sequences: list[int] | None = None, code: int = 8) -> Path:
    """A .bin and .idx as Megatron writes them: magic, version, type, counts, lengths, pointers, documents."""
    dtype = {8: np.dtype("<u2"), 4: np.dtype("<i4")}[code]
    lengths = np.array(sequences or [len(d) for d in documents], "<i4")
    firsts = np.searchsorted(np.cumsum([0, *lengths]), np.cumsum([0, *map(len, documents)])).astype("<i8")
    np.concatenate(documents).astype(dtype).tofile(folder / "c_text.bin")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(firsts))
    pointers = ((np.cumsum(lengths) - lengths) * dtype.itemsize).astype("<i8")
    (folder / "c_text.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + firsts.tobytes())
    return folder / "c_text.bin"


def starts_of(documents: list[list[int]]) -> list[int]:
    return np.cumsum([0, *map(len, documents)])[:-1].tolist()


@pytest.mark.parametrize("code", [8, 4])
def test_megatron(tmp_path: Path, code: int) -> None:
    dataset = open_dataset(megatron(tmp_path, DOCUMENTS, [3, 1, 2, 3, 2], code), tokenizer="bytes")
    split = dataset.split("train")
    assert split.read(0, split.tokens).tolist() == [t for d in DOCUMENTS for t in d]
    assert split.document_starts.tolist() == starts_of(DOCUMENTS)  # a document may be several sequences
    batch = Stream(split, seed=0, sequence_length=10, global_sequences=1).batch(0)
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]]
    assert dataset.manifest["foreign"] == "megatron" and dataset.vocab_size == 257


def test_nanogpt_documents_end_with_eos(tmp_path: Path) -> None:
    documents = [[*d, EOS] for d in DOCUMENTS]
    np.concatenate(documents).astype("<u2").tofile(tmp_path / "train.bin")
    np.array([7, 7, EOS, 8], "<u2").tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path / "train.bin", tokenizer="bytes")
    assert dataset.split("train").document_starts.tolist() == starts_of(documents)
    validation = dataset.split("validation")
    assert validation.read(0, 4).tolist() == [7, 7, EOS, 8] and validation.document_starts.tolist() == [0, 3]
    assert len(validation_batches(validation, sequence_length=3, micro_sequences=1)) == 1
    assert open_dataset(tmp_path / "val.bin", tokenizer="bytes").split("validation").tokens == 0


def test_llmc_documents_begin_with_eos(tmp_path: Path) -> None:
    documents = [[EOS, *d] for d in DOCUMENTS]
    tokens = np.concatenate(documents).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "x.bin").write_bytes(header.tobytes() + tokens.tobytes())
    split = open_dataset(tmp_path / "x.bin", tokenizer="bytes").split("train")
    assert split.read(0, split.tokens).tolist() == tokens.tolist()
    assert split.document_starts.tolist() == starts_of(documents)
    assert verify(tmp_path / "x.bin", quiet(), tokenizer="bytes").foreign


def test_foreign_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = megatron(tmp_path, DOCUMENTS)
    with pytest.raises(UserError, match="give its tokenizer"):
        open_dataset(path)
    index = path.with_suffix(".idx")
    whole = index.read_bytes()
    for damaged, message in [
        (whole[:-1], "not a whole index"),
        (b"x" + whole[1:], "not an index of Megatron's"),
        (whole[:34] + b"\x09" + whole[35:], "do not lie end to end"),
    ]:
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            open_dataset(path, tokenizer="bytes")
    index.write_bytes(whole)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="its index counts others"):
        open_dataset(path, tokenizer="bytes")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="no whole number of 2-byte tokens"):
        open_dataset(tmp_path / "odd.bin", tokenizer="bytes")
    with pytest.raises(UserError, match="cannot be read"):
        open_dataset(tmp_path / "none.bin", tokenizer="bytes")
    np.array([1, 2, 300], "<u2").tofile(tmp_path / "high.bin")
    with pytest.raises(UserError, match="token 300 at place 2"):
        verify(tmp_path / "high.bin", quiet(), tokenizer="bytes")


def test_a_tokenizer_is_only_for_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave tokenizer out"):
        open_dataset(tmp_path, tokenizer="bytes")

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import quiet

from data_pipeline import Dataset, UserError, open_dataset
from data_pipeline.inspect import inspect
from data_pipeline.shards import (
    MANIFEST,
    manifest_sha256,
    token_dtype,
    write_json,
    write_manifest,
    write_shard,
)
from data_pipeline.verify import verify


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    shutil.copytree(dataset.path, tmp_path / "copy")
    return tmp_path / "copy"


def change(folder: Path, **entries: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text()) | entries
    write_json(folder / MANIFEST, manifest | {"sha256": manifest_sha256(manifest)})


def test_what_an_opened_data_set_says(dataset: Dataset) -> None:
    assert (dataset.vocab_size, dataset.eos_id) == (257, 256)
    assert dataset.tokenizer_fingerprint == dataset.tokenizer().fingerprint
    for name in ("train", "validation"):
        split = dataset.split(name)
        assert split.documents == len(split.document_starts) > 10
        assert split.tokens == split.text_bytes + split.documents  # a byte is a token, and each document has an EOS


@pytest.mark.parametrize(
    ("vocab", "name"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_smallest_type_that_holds_the_vocabulary(vocab: int, name: str) -> None:
    assert token_dtype(vocab).name == name


def test_a_small_vocabulary_is_read_from_one_byte_a_token(tmp_path: Path) -> None:
    from dataclasses import replace

    from data_pipeline import Stream, load_tokenizer

    tokenizer = replace(load_tokenizer("bytes"), vocab_size=256, eos_id=255)
    tokens = np.array([255, 1, 254, 255, 2, 3, 4], token_dtype(256))
    entry = write_shard(tmp_path, "train", 0, tokens, np.array([0, 3]), text_bytes=5)
    write_manifest(tmp_path, tokenizer, {"train": [entry]})
    assert entry["files"]["tokens"]["bytes"] == len(tokens) and verify(str(tmp_path), quiet())
    stream = Stream(open_dataset(tmp_path).split("train"), seed=0, sequence_length=6, global_sequences=1)
    assert stream.batch(0).tokens.tolist() == [[255, 1, 254, 255, 2, 3, 4]]


def test_folders_that_are_no_data_sets(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="no such data set"):
        open_dataset(tmp_path / "none")
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_dataset(copy)


def test_other_formats_and_altered_manifests(copy: Path) -> None:
    change(copy, dtype="uint32")
    with pytest.raises(UserError, match="does not match its own fingerprint"):
        open_dataset(copy)
    change(copy, format=99)
    with pytest.raises(UserError, match="format 99"):
        open_dataset(copy)


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_missing_and_truncated_files_are_found_on_opening(copy: Path, kind: str) -> None:
    file = copy / f"train/00001.{kind}"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"00001\.{kind}: .* bytes where the manifest records"):
        open_dataset(copy)
    file.unlink()
    with pytest.raises(UserError, match=rf"00001\.{kind}: missing"):
        open_dataset(copy)


def test_verify_passes_a_whole_set_and_names_any_flipped_bit(copy: Path) -> None:
    files = [copy / entry["file"] for entry in verify(str(copy), quiet()).files()]
    assert len(files) > 8
    for number, file in enumerate(files):
        whole = file.read_bytes()
        content = bytearray(whole)
        place = (number * 7919) % len(content)
        content[place] ^= 1 << number % 8
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=f"{file.parent.name}/{file.name}: damaged between byte 0 and byte {len(whole):,}"
        ):
            verify(str(copy), quiet())
        file.write_bytes(whole)
    verify(str(copy), quiet())


EOS = 256


@pytest.mark.parametrize(
    ("tokens", "starts", "prompts", "message"),
    [
        ([EOS, 1, 300, EOS, 2], [0, 3], None, "token 300 at place 2, of a vocabulary of 257"),
        ([EOS, 1, 2, EOS, 2], [3, 0], None, "not where the end-of-text tokens are"),
        ([1, EOS, 2, EOS, 2], [1, 3], None, "the first of them at 0"),
        ([EOS, 1, 2, EOS, 2], [0, 2], None, "not where the end-of-text tokens are"),
        ([EOS, 1, EOS, EOS, 2], [0, 3], None, "not where the end-of-text tokens are"),
        ([EOS, 1, 2, EOS, 2], [0, 3], [2, 2], "a prompt is longer than its document"),
    ],
)
def test_verify_checks_what_checksums_cannot(
    tmp_path: Path, tokens: list[int], starts: list[int], prompts: list[int] | None, message: str
) -> None:
    from data_pipeline import load_tokenizer

    given = None if prompts is None else np.array(prompts, np.uint32)
    entry = write_shard(tmp_path, "train", 0, np.array(tokens, "<u2"), np.array(starts), given, text_bytes=3)
    write_manifest(tmp_path, load_tokenizer("bytes"), {"train": [entry]})
    with pytest.raises(UserError, match=message):
        verify(str(tmp_path), quiet())


def test_verify_wants_a_name_for_each_document(tmp_path: Path) -> None:
    from data_pipeline import load_tokenizer

    tokens = np.array([EOS, 1, EOS, 2], "<u2")
    for names, whole in ((["a", "b"], True), (["a"], False)):
        entry = write_shard(tmp_path, "train", 0, tokens, np.array([0, 2]), text_bytes=2, names=names)
        write_manifest(tmp_path, load_tokenizer("bytes"), {"train": [entry]})
        if whole:
            verify(str(tmp_path), quiet())
    with pytest.raises(UserError, match=r"00000\.names: not one line for each of 2 documents"):
        verify(str(tmp_path), quiet())


def test_fingerprint_is_of_the_data_alone(make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    first = make_dataset([5, 6], shards=2).fingerprint
    change(tmp_path / "made", source="elsewhere", software={})
    assert open_dataset(tmp_path / "made").fingerprint == first
    assert make_dataset([5, 7], shards=2).fingerprint != first
    assert make_dataset([5, 6], prompts=[1, 2], shards=2).fingerprint != first


def test_inspect_shows_lengths_and_documents(dataset: Dataset) -> None:
    console = quiet()
    inspect(str(dataset.path), samples=2, sequence_length=400, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{dataset.split('train').tokens:,}" in shown and "a document begins" in shown
    text = dataset.tokenizer().decode(dataset.split("train").read(1, 20))
    sample = shown[shown.index("training sample") :]
    assert any(word in sample for word in ("alpha", "gamma", "naïve")) and text
    counts = [line.split("│")[2] for line in shown.splitlines() if " – " in line]
    assert sum(int(count.replace(",", "")) for count in counts) == dataset.split("train").documents
    with pytest.raises(UserError, match="--sample"):
        inspect(str(dataset.path), samples=-1, console=console)


def test_inspect_reports_what_packing_loses_and_pads(make_dataset: Callable[..., Dataset]) -> None:
    from data_pipeline.best_fit import pack_split

    dataset = make_dataset([10, 10, 5, 8])  # 33 tokens; windows of 10 begin at 0, 10 and 20
    record = pack_split(dataset, "train", 15)
    console = quiet()
    console.width = 200
    inspect(str(dataset.path), sequence_length=9, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    [end_to_end] = [line for line in shown.splitlines() if "end to end" in line]
    cells = [cell.strip() for cell in end_to_end.strip("│┃ ").split("│")]
    assert cells == ["end to end", "9", "3", "5 (15.152%)", "none", "2"]
    [best] = [line for line in shown.splitlines() if "best fit" in line]
    assert f"{record['share_padded']:.3%}" in best

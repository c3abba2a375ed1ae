"""Preparation shared by machines, and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import contents, make_whole, quiet

from data_pipeline import UserError, open_dataset
from data_pipeline.claim import PART
from data_pipeline.merge import MERGING, merge
from data_pipeline.merge import main as merge_main
from data_pipeline.prepare import prepare
from data_pipeline.verify import verify


def part(source: Path, out: Path, number: str, **options: Any) -> Path:
    usual = {"tokenizer": "bytes", "workers": 1, "validation": 0.2, "shard_bytes": 4_000}
    assert prepare(str(source), out=out, part=number, console=quiet(), **(usual | options)) is None
    return out


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sentencepiece:300"])
@pytest.mark.parametrize("parts", [1, 3])
def test_merged_parts_are_what_one_machine_makes(corpus: Path, tmp_path: Path, tokenizer: str, parts: int) -> None:
    whole = make_whole(corpus, tmp_path / "whole", tokenizer, validation=0.2, shard_bytes=4_000)
    folders = [part(corpus, tmp_path / f"p{n}", f"{n}/{parts}", tokenizer=tokenizer) for n in range(1, parts + 1)]
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(folders[0])
    merge(reversed(folders), tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    shards = [len(json.loads((folder / PART).read_text())["records"]) for folder in folders]
    assert sum(shards) >= len(whole.split("train").shards) and min(shards) > 0
    verify(tmp_path / "merged", quiet())


def test_parts_that_do_not_make_a_whole(corpus: Path, tmp_path: Path) -> None:
    one, two = part(corpus, tmp_path / "1", "1/2"), part(corpus, tmp_path / "2", "2/2")
    other = part(corpus, tmp_path / "3", "2/2", validation=0.3)
    for folders, message in [
        ([one], "part 2/2 is missing"),
        ([one, other], "a part of another data set"),
        ([one, two, two], "3 folders for 2 parts"),
        ([one, tmp_path], "not a finished part"),
        ([], "no parts"),
    ]:
        with pytest.raises(UserError, match=message):
            merge(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    file = next((two / "train").glob("*.tokens"))
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name}: damaged between"):
        merge([one, two], tmp_path / "out")
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(tmp_path / "out")
    content[7] ^= 1
    file.write_bytes(content)
    assert merge([one, two], tmp_path / "out").split("train").tokens  # goes on where it stopped
    assert not (tmp_path / "out" / MERGING).exists()
    with pytest.raises(UserError, match="not empty"):
        merge([one, two], tmp_path / "out")


def test_a_finished_part_is_left_alone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = part(corpus, tmp_path / "1", "1/2")
    before = contents(folder)
    part(corpus, folder, "1/2")
    assert contents(folder) == before
    with pytest.raises(UserError, match="holds part 1/2 of a data set made with other options"):
        part(corpus, folder, "2/2")
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="write i/n"):
            part(corpus, tmp_path / "x", wrong)
    merge_main([str(folder), str(part(corpus, tmp_path / "2", "2/2")), "--out", str(tmp_path / "out")])
    assert "training tokens" in capsys.readouterr().out

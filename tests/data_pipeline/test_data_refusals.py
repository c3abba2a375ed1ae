"""What a user can mend is one line, and leaves no data set."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make, run

from data_pipeline import Dataset, UserError, open_dataset, run_command


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul.txt", b"text\x00more", r"nul\.txt: NUL byte at byte 4"),
        ("latin.txt", "caf\xe9 noir".encode("latin-1"), r"latin\.txt: not UTF-8 at byte 3"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "y"}\n',
            r"a\.jsonl:3: no field 'text', it has 'body'.*--field",
        ),
        ("b.jsonl", b'{"text": "x"}\n{"text": ', r"b\.jsonl:2: not JSON"),
        ("c.jsonl", b'{"text": 5}\n', r"c\.jsonl:1: field 'text' is not text"),
        ("d.jsonl", b'"x"\n', r"d\.jsonl:1: not a record"),
        ("e.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"e\.jsonl: not UTF-8 at byte 27"),
        ("f.jsonl", b'{"text": "\\ud800"}\n', r"f\.jsonl:1: half of a surrogate pair at character 0"),
        ("g.jsonl.gz", b"not gzip", r"g\.jsonl\.gz: cannot be read"),
        ("h.jsonl.zst", b"not zstd", r"h\.jsonl\.zst: cannot be read"),
        ("i.parquet", b"not parquet", r"i\.parquet: not a Parquet file"),
        ("empty.txt", b"", "no text at all"),
        ("nulls.jsonl", b'{"text": ""}\n{"text": null}\n', "no text at all"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str, in_folder: bool) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path / "in" if in_folder else tmp_path / "in" / name, tmp_path / "o")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        open_dataset(tmp_path / "o")


def test_parquet_without_the_field(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: no field 'text', it has 'body'"):
        make(tmp_path / "x.parquet", tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "nowhere/at/all"], "source nowhere/at/all: nothing found"),
        (["--source", "task:path_star,d=5"], "has a vocabulary of its own: leave --tokenizer out"),
        (["--source", "nosuch://x"], "source nosuch://x: .*known"),
        (["--workers", "0"], "--workers 0: give 1 or more"),
        (["--validation", "1"], "--validation 1"),
        (["--limit", "0"], "--limit 0"),
        (["--shard-bytes", "0"], "--shard-bytes 0"),
        (["--tokenizer", "none.model"], "none.model: cannot be read"),
        (["--tokenizer", "train:bpe:9"], "write train:sentencepiece:VOCAB"),
        (["--tokenizer", "train:sentencepiece:90000"], "vocabulary of 90,000 pieces .*choose another size"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:

    from data_pipeline.prepare import main

    usual = {"--source": str(corpus), "--tokenizer": "bytes", "--out": str(tmp_path / "o")}
    arguments = [part for pair in (usual | dict([options])).items() for part in pair]  # type: ignore[list-item]
    with pytest.raises(SystemExit) as caught:
        run_command(lambda _: main(arguments))
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)
    assert not (tmp_path / "o" / "manifest.json").exists()


def test_folders_that_cannot_be_used(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a data set in the making"):
        make(corpus, tmp_path / "o")
    with pytest.raises(UserError, match="cannot be written"):
        make(corpus, tmp_path / "o" / "thesis.txt" / "under")
    # Permissions do not stop root, so the system's answer is given by hand.
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).rstrip("/").endswith("part1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        make(corpus, tmp_path / "p")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            2,
            "error: the disk that holds /x/y is full",
        ),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code and capsys.readouterr().err.startswith(line)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 // 0 and None)


def test_inspect_and_verify_commands(dataset: Dataset, tmp_path: Path) -> None:
    shown = run("data_pipeline.inspect", str(dataset.path), "--sample", "1")
    assert shown.returncode == 0 and "training sample" in shown.stdout
    assert "whole" in run("data_pipeline.verify", str(dataset.path)).stdout
    bad = shutil.copytree(dataset.path, tmp_path / "bad")
    content = bytearray((bad / "train/00001.tokens").read_bytes())
    content[5] ^= 64
    (bad / "train/00001.tokens").write_bytes(content)
    failed = run("data_pipeline.verify", str(bad))
    assert failed.returncode == 2 and "train/00001.tokens" in failed.stderr.splitlines()[-1]
    for command in ("inspect", "verify"):
        missing = run(f"data_pipeline.{command}", str(tmp_path / "none"))
        assert missing.returncode == 2 and missing.stderr.startswith("error: ")

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_texts, quiet

from data_pipeline import Dataset, UserError, load_tokenizer, open_dataset, run_command
from data_pipeline.documents import open_source
from data_pipeline.prepare import WORK, prepare

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def decoded(dataset: Dataset, name: str) -> list[str]:
    split, tokenizer = dataset.split(name), dataset.tokenizer()
    borders = [*split.document_starts.tolist(), split.tokens]
    pieces = [split.read(a, b) for a, b in pairwise(borders)]
    assert all(piece[0] == dataset.eos_id for piece in pieces)
    return [tokenizer.decode(piece) for piece in pieces]


def make(source: Path | str, out: Path, tokenizer: str = "bytes", **options: Any) -> Dataset:
    return prepare(str(source), tokenizer, out, console=quiet(), **({"workers": 1, "validation": 0.2} | options))


# ---- what is prepared


def test_every_document_is_kept_in_order_and_split_by_its_hash(corpus: Path, dataset: Dataset) -> None:
    texts = [path.read_bytes().decode() for path in sorted(corpus.rglob("*.txt"))]
    chosen = [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.2 * 2**64 for t in texts]
    assert decoded(dataset, "train") == [t for t, c in zip(texts, chosen, strict=True) if not c]
    assert decoded(dataset, "validation") == [t for t, c in zip(texts, chosen, strict=True) if c]
    assert dataset.split("train").text_bytes + dataset.split("validation").text_bytes == sum(
        len(t.encode()) for t in texts
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "train:sentencepiece:300"])
def test_bytes_do_not_depend_on_workers(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    for workers in (1, 2):
        make(corpus, tmp_path / str(workers), tokenizer, workers=workers, shard_bytes=9_000)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len([name for name in one if name.startswith("train/")]) >= 6
    assert not any(name.startswith(WORK) or name.endswith(".partial") for name in one)


def test_standard_library_comes_back_as_it_is(tmp_path: Path) -> None:
    dataset = make("stdlib", tmp_path / "set", "train:sentencepiece:512", limit=60, workers=2, shard_bytes=200_000)
    import sysconfig
    import tokenize

    library = Path(sysconfig.get_path("stdlib"))
    texts = set()
    for name in ("__future__.py", "abc.py", "argparse.py", "ast.py"):
        with tokenize.open(library / name) as file:
            texts.add(file.read())
    kept = decoded(dataset, "train") + decoded(dataset, "validation")
    assert len(kept) == 60 and texts <= set(kept)


def test_prepare_runs_in_a_program_without_a_main_guard(corpus: Path, tmp_path: Path) -> None:
    call = f"prepare({str(corpus)!r}, 'bytes', {str(tmp_path / 'o')!r}, workers=2)"
    program = f"from data_pipeline.prepare import prepare\n{call}\n"
    done = subprocess.run([sys.executable, "-"], input=program, text=True, capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert open_dataset(tmp_path / "o").split("train").tokens


def test_the_tokenizer_is_kept_with_the_data(corpus: Path, tmp_path: Path) -> None:
    first = make(corpus, tmp_path / "a", "train:sentencepiece:300")
    second = make(corpus, tmp_path / "b", str(tmp_path / "a" / "tokenizer.model"))
    assert first.fingerprint == second.fingerprint and second.vocab_size == 300
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()
    (tmp_path / "b" / "tokenizer.model").write_bytes((tmp_path / "a" / "tokenizer.model").read_bytes() + b"\x00")
    with pytest.raises(UserError):
        second.tokenizer()


def test_the_vocabulary_is_trained_on_training_documents_alone(tmp_path: Path) -> None:
    texts = make_texts(300)
    held = [t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.2 * 2**64]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts if t not in held))
    a = make(tmp_path / "a.jsonl", tmp_path / "x", "train:sentencepiece:300")
    b = make(tmp_path / "b.jsonl", tmp_path / "y", "train:sentencepiece:300")
    assert held and a.tokenizer_fingerprint == b.tokenizer_fingerprint
    assert b.split("validation").documents == 0


def test_every_kind_of_file(tmp_path: Path) -> None:
    texts = make_texts(30)
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts).encode()
    for name, content in {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
    }.items():
        (tmp_path / f"x.{name}").write_bytes(content)
    pq.write_table(pa.table({"id": list(range(30)), "body": texts}), tmp_path / "x.parquet", row_group_size=7)
    prints = set()
    for name in (
        "x.jsonl",
        "x.jsonl.gz",
        "x.jsonl.zst",
        "x.parquet",
        f"file://{tmp_path}/x.jsonl",
        "x.jsonl.g*",
    ):
        source = name if "://" in name else tmp_path / name
        dataset = make(source, tmp_path / f"out{len(list(tmp_path.iterdir()))}", field="body", validation=0.0)
        assert decoded(dataset, "train") == texts
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_hub_source_streams_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((name, config, options))
        if name == "none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'none' doesn't exist")
        return [{"text": t} for t in ("one", "", "two")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = make("hub:some/set:cfg:test", tmp_path / "o", validation=0.0)
    assert decoded(dataset, "train") == ["one", "two"] and dataset.manifest["skipped"] == {"empty": 1}
    assert asked == [("some/set", "cfg", {"split": "test", "streaming": True})]
    with pytest.raises(UserError, match="hub:none: Dataset 'none' doesn't exist"):
        make("hub:none", tmp_path / "p")
    with pytest.raises(UserError, match="write hub:NAME"):
        open_source("hub:a:b:c:d")


# ---- stopped and started again


def test_killed_halfway_and_started_again(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": t}) + "\n" for t in make_texts(20_000, words=100))
    (tmp_path / "x.jsonl").write_text(lines)
    out = tmp_path / "out"
    command = [
        "data_pipeline.prepare",
        "--source",
        str(tmp_path / "x.jsonl"),
        "--tokenizer",
        "train:sentencepiece:300",
    ]
    command += ["--workers", "2", "--shard-bytes", "150000"]
    process = subprocess.Popen([sys.executable, "-m", *command, "--out", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    while len(list(out.glob(f"{WORK}/0*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = [json.loads(f.read_text()) for f in out.glob(f"{WORK}/0*.json")]
    files = [out / file["file"] for r in finished for s in r["shards"].values() for file in s["files"].values()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(finished) >= 3 and not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(out)
    again = run(*command, "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert len(open_dataset(out).split("train").shards) > len(finished)
    assert run(*command[:-4], "--workers", "1", *command[-2:], "--out", str(tmp_path / "whole")).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_interrupted_with_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t * 40}) + "\n" for t in make_texts(20_000)))
    command = [sys.executable, "-m", "data_pipeline.prepare", "--source", str(tmp_path / "x.jsonl")]
    command += ["--tokenizer", "bytes", "--out", str(tmp_path / "o"), "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(f"o/{WORK}/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.strip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in error and not (tmp_path / "o" / "manifest.json").exists()


def test_no_shard_is_lost_when_all_workers_finish_together(
    corpus: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import concurrent.futures

    import data_pipeline.prepare as module

    monkeypatch.setattr(module, "wait", lambda running, return_when: concurrent.futures.wait(running))
    assert make(corpus, tmp_path / "o", shard_bytes=15_000).fingerprint == dataset.fingerprint


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> list[int]:
    """Interrupt preparation after so many shards; returns the numbers of those written."""
    import data_pipeline.prepare as module

    write, written = module.write_shard, []

    def limited(folder: Path, split: str, number: int, *rest: Any, **named: Any) -> Any:
        if number >= shards:
            raise KeyboardInterrupt
        written.append(number)
        return write(folder, split, number, *rest, **named)

    monkeypatch.setattr(module, "write_shard", limited)
    return written


def test_a_stopped_preparation_belongs_to_its_settings(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(corpus, tmp_path / "source")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        make(source, out, shard_bytes=9_000)
    for options in ({"shard_bytes": 8_000}, {"shard_bytes": 9_000, "validation": 0.3}):
        with pytest.raises(UserError, match="begun with another source or other options"):
            make(source, out, **options)
    first = sorted(source.rglob("*.txt"))[0]
    kept = first.read_bytes()
    first.write_bytes(b"x" * len(kept))  # the same size, so that only its content tells
    with pytest.raises(UserError, match="the source has changed"):
        make(source, out, shard_bytes=9_000)
    first.write_bytes(kept)
    written = stop_after(monkeypatch, 10**6)
    make(source, out, shard_bytes=9_000)
    assert 0 not in written and 1 not in written and 2 in written


def test_a_finished_folder_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    command = [
        "data_pipeline.prepare",
        "--source",
        str(corpus),
        "--tokenizer",
        "bytes",
        "--out",
        str(tmp_path / "o"),
    ]
    assert run(*command).returncode == 0
    before = contents(tmp_path / "o")
    again = run(*command)
    assert again.returncode == 0 and "already complete" in again.stderr
    other = run(*command, "--validation", "0.5")
    assert other.returncode == 2 and "with other options" in other.stderr
    assert contents(tmp_path / "o") == before


def test_a_refused_source_can_be_mended(tmp_path: Path) -> None:
    source, out = tmp_path / "s", tmp_path / "o"
    source.mkdir()
    (source / "a.txt").write_text("some text")
    (source / "b.txt").write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match=r"b\.txt: NUL byte at byte 0"):
        make(source, out, validation=0.0)
    (source / "b.txt").unlink()
    assert decoded(make(source, out, validation=0.0), "train") == ["some text"]


def test_one_process_at_a_time(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_pipeline.prepare as module

    inside, leave = threading.Event(), threading.Event()
    tokenizer = module._tokenizer

    def wait(*arguments: Any) -> Any:
        inside.set()
        leave.wait(10)
        return tokenizer(*arguments)

    monkeypatch.setattr(module, "_tokenizer", wait)
    first = threading.Thread(target=make, args=(corpus, tmp_path / "o"))
    first.start()
    assert inside.wait(10)
    with pytest.raises(UserError, match="another process is preparing it"):
        make(corpus, tmp_path / "o")
    leave.set()
    first.join()
    open_dataset(tmp_path / "o")


# ---- what goes wrong


def test_a_full_disk_while_writing_shards(corpus: Path, tmp_path: Path) -> None:
    """/dev/full stands in for the file being written: the kernel itself says that the disk is full."""
    out = tmp_path / "o"
    command = ["data_pipeline.prepare", "--source", str(corpus), "--tokenizer", "bytes", "--out", str(out)]
    command += ["--shard-bytes", "9000", "--workers", "1"]
    (out / "train").mkdir(parents=True)
    (out / WORK).mkdir()
    (out / "train" / "00001.tokens.partial").symlink_to("/dev/full")
    failed = run(*command)
    assert failed.returncode == 2
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the disk is full, cannot write") and "00001.tokens" in last
    assert "Traceback" not in failed.stderr and not list(out.rglob("*.partial"))
    with pytest.raises(UserError, match="not a finished data set"):
        open_dataset(out)
    assert run(*command).returncode == 0
    assert open_dataset(out).fingerprint == make(corpus, tmp_path / "p", validation=0.01, shard_bytes=9_000).fingerprint


def test_a_worker_that_dies(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.workers import Workers

    with Workers(load_tokenizer("bytes"), 2) as workers:
        assert workers.encode(["ab"]).tokens.tolist() == [256, 97, 98]
        os.kill(workers._processes[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a tokenising process died"):
            workers.encode(["ab"])


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


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    for name, text in {"a": "", "b": "text", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    dataset = make(tmp_path, tmp_path / "o", validation=0.0)
    assert dataset.manifest["skipped"] == {"empty": 2} and decoded(dataset, "train") == ["text"]


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
    import re

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


# ---- commands


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


def test_the_package_needs_neither_torch_nor_the_trainer() -> None:
    code = "import sys, data_pipeline.prepare; assert not {'torch', 'pretrain'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_types_on_disk_hold_a_large_vocabulary() -> None:
    from dataclasses import replace

    from data_pipeline.workers import encode_documents

    wide = replace(load_tokenizer("bytes"), vocab_size=70_000, encode_batch=lambda texts: [[69_999] for _ in texts])
    encoded = encode_documents(wide, ["x", "y"])
    assert encoded.tokens.dtype == np.uint32 and encoded.tokens.tolist() == [256, 69_999, 256, 69_999]
    assert encoded.document_starts.tolist() == [0, 2]

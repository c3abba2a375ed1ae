"""Preparation that is killed, stopped or refused, and started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data_helpers import ROOT, contents, decoded, jsonl, make, make_texts, make_whole, run

from data_pipeline import Dataset, UserError, load_tokenizer, open_dataset
from data_pipeline.claim import WORK


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


def test_thirty_kills_at_random_instants(tmp_path: Path) -> None:
    """Shards that were finished stay as they are, and in the end so do all bytes."""
    texts = make_texts(3000, words=100)
    source = jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    out, chance = tmp_path / "out", random.Random(1)
    program = "from data_pipeline.prepare import main; import sys; print('go', flush=True); main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--source", str(source), "--tokenizer", "train:sentencepiece:300"]
    command += ["--workers", "2", "--shard-bytes", "15000", "--validation", "0.1", "--out", str(out)]
    kept: dict[Path, int] = {}
    unfinished = 0

    def finished_shards() -> int:
        return len(list((out / WORK).glob("0*.json")))

    for _ in range(30):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout and process.stdout.readline() == "go\n", process.communicate()[1]
        # Up to five shards further, so that every start but the earliest kills gets on, however slow the machine.
        goal = finished_shards() + chance.randint(0, 5)
        while finished_shards() < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
        if (out / "manifest.json").exists():
            break
        unfinished += 1
        records = [json.loads(path.read_text()) for path in (out / WORK).glob("0*.json")]
        entries = [entry for record in records for entry in record["shards"].values()]
        kept = {out / f["file"]: (out / f["file"]).stat().st_mtime_ns for e in entries for f in e["files"].values()}
    assert unfinished >= 10 and len(kept) >= 10
    again = make_whole(source, out, "train:sentencepiece:300", workers=2, shard_bytes=15_000, validation=0.1)
    make_whole(source, tmp_path / "whole", "train:sentencepiece:300", shard_bytes=15_000, validation=0.1)
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(decoded(again) + decoded(again, "validation")) == sorted(texts)


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

    import data_pipeline.encode as module

    monkeypatch.setattr(module, "wait", lambda running, return_when: concurrent.futures.wait(running))
    assert make(corpus, tmp_path / "o", shard_bytes=15_000).fingerprint == dataset.fingerprint


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> list[int]:
    """Interrupt preparation after so many shards; returns the numbers of those written."""
    import data_pipeline.encode as module

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


def test_leftovers_of_a_kill_after_the_manifest_are_removed(corpus: Path, tmp_path: Path) -> None:
    dataset = make_whole(corpus, tmp_path / "o")
    shutil.copytree(corpus, dataset.path / WORK)
    make_whole(corpus, tmp_path / "o")
    assert not (dataset.path / WORK).exists()


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
    tokenizer = module.provide_tokenizer

    def wait(*arguments: Any) -> Any:
        inside.set()
        leave.wait(10)
        return tokenizer(*arguments)

    monkeypatch.setattr(module, "provide_tokenizer", wait)
    first = threading.Thread(target=make, args=(corpus, tmp_path / "o"))
    first.start()
    assert inside.wait(10)
    with pytest.raises(UserError, match="another process is preparing it"):
        make(corpus, tmp_path / "o")
    leave.set()
    first.join()
    open_dataset(tmp_path / "o")


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

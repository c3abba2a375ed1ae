"""What several test folders share: a small data set of real text, and a run config that trains on it in seconds."""

from __future__ import annotations

import os
import signal
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.small_run import write_run_config

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that interrupt them need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXTS = [
    "argparse.py",
    "ast.py",
    "codecs.py",
    "copy.py",
    "csv.py",
    "enum.py",
    "functools.py",
    "heapq.py",
    "json/decoder.py",
]
TEXTS += [
    "pathlib.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "string.py",
    "tempfile.py",
    "textwrap.py",
    "types.py",
]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some of the standard library's files, in a vocabulary of 512 pieces."""
    from data_pipeline.prepare import main

    folder = tmp_path_factory.mktemp("tiny")
    source = folder / "source"
    source.mkdir()
    for number, name in enumerate(TEXTS):
        text = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
        (source / f"{number:02}.txt").write_text(text, encoding="utf-8")
    arguments = ["--source", str(source), "--tokenizer", "train:sentencepiece:512", "--validation", "0.2"]
    main([*arguments, "--out", str(folder / "data"), "--workers", "1"])
    return folder / "data"


@pytest.fixture
def write_config(tmp_path: Path, tiny_data: Path) -> Callable[..., Path]:
    """A function that writes a run config: write_config("name", {"section.key": value, …}) → its path."""

    def write(name: str, changes: dict[str, object] | None = None) -> Path:
        return write_run_config(tmp_path, tiny_data, name, changes or {})

    return write

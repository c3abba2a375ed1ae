"""What several test folders share: a small data set of real text, and a run config that trains on it in seconds."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")

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


def write_run_config(folder: Path, data: Path, name: str, changes: dict[str, object]) -> Path:
    """A NextLat run of 20 steps on `data` in `folder`, with `changes` applied."""
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 1},
        "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2},
        "objective": {
            "name": "nextlat",
            "horizon": 2,
            "next_latent_weight": 1.0,
            "kl_weight": 1.0,
            "dynamics_width": 96,
        },
        "data": {"path": str(data), "sequence_length": 48},
        "batch": {"global_sequences": 8, "micro_sequences": 4},
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "gradient_clip": 1.0},
        "schedule": {"name": "wsd", "steps": 20, "warmup_steps": 4, "decay_steps": 8},
        "validation": {"every": 10, "sequences": 12},
        # Without it every tensor of so small a model stays whole on each rank, and ZeRO-3 has nothing to gather.
        "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }
    for key, value in changes.items():
        *sections, last = key.split(".")
        target: dict[str, Any] = values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path

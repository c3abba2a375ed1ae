"""Every study that the repository brings goes the whole way, in a few steps: data, training, evaluation, page."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pretrain.study.__main__ import run_study

SHORT = ["schedule={name: constant, steps: 3}", "batch.global_sequences=8", "batch.micro_sequences=8", "model.width=32"]


@pytest.mark.parametrize("path", sorted(Path("studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_of_the_repository_makes_its_page(path, tiny_data, tmp_path):
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    name, entry = next((name, run) for name, run in study["runs"].items() if "nextlat" in name)
    reads = yaml.safe_load(Path(entry["config"]).read_text(encoding="utf-8"))["data"]["path"]
    (data,) = (data for data in study["data"] if data["out"] == reads)
    source = re.sub(r"samples=\d+", "samples=4000", data["source"])
    read = tiny_data if source == "stdlib" else tmp_path / "data"  # of real text, the other tests' small set is enough
    study["data"] = [] if source == "stdlib" else [{"source": source, "out": str(read)}]
    entry["overrides"] = [*entry.get("overrides", ()), *SHORT, f"data.path={read}"]
    short = tmp_path / path.name
    short.write_text(yaml.safe_dump(study | {"runs": {name: entry}, "seeds": [0], "limit": 20}), encoding="utf-8")
    page = run_study(short, tmp_path / "runs", tmp_path / "out", Console(file=io.StringIO()))
    assert f"| {entry['label']} | 0 | " in page.read_text(encoding="utf-8")

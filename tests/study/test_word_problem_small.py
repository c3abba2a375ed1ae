"""The small word problem, three seeds: what p_ψ, rolled out by itself, keeps that both trunks lose (-m slow)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pretrain.study.__main__ import result_file, run_study
from pretrain.study.plan import plan_runs, read_study

STUDY = Path("studies/word_problem_small.yaml")
Accuracy = dict[str, list[list[float]]]


def accuracies(folder: Path, **changes: object) -> Accuracy:
    """A(t) of every seed, by who answers."""
    values = yaml.safe_load(STUDY.read_text(encoding="utf-8")) | changes
    values["data"][0]["out"] = str(folder / "data")
    for entry in values["runs"].values():
        entry["overrides"] = [*entry.get("overrides", ()), f"data.path={folder / 'data'}"]
    path = folder / STUDY.name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    run_study(path, folder / "runs", folder / "out", Console(file=io.StringIO()))
    study, found = read_study(path), {}
    for run in plan_runs(study, path.stem, folder / "runs"):
        result = json.loads(result_file(study, run).read_text(encoding="utf-8"))
        for who in ("trunk", "dynamics"):
            if who in result:
                points = [point["value"] for point in result[who]["accuracy"]]
                found.setdefault(f"{run.config.objective.name} {who}", []).append(points)
    return found


def test_the_whole_way_in_a_few_steps(tmp_path):
    values = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    short = ["schedule={name: constant, steps: 40}"]
    runs = {name: entry | {"overrides": short} for name, entry in values["runs"].items()}
    data = [{"source": "task:word_problem,group=A5,letters=(012)+(021)+(234)+(243),length=6,samples=6000", "out": ""}]
    found = accuracies(tmp_path, runs=runs, data=data, seeds=[0], limit=100)
    assert set(found) == {"next_token trunk", "nextlat trunk", "nextlat dynamics"}
    for ((points,),) in zip(found.values(), strict=True):
        assert len(points) == 19
        assert points[0] == 1.0  # the identity after EOS is learned at once
        assert max(points[12:]) < 0.2  # of 60 elements


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Accuracy:
    return accuracies(tmp_path_factory.mktemp("word_problem"))


@pytest.mark.slow
def test_trunks_are_right_up_to_their_training_length_and_p_psi_keeps_on_at_twice_that(trained):
    for who in ("next_token trunk", "nextlat trunk"):
        for points in trained[who]:
            assert min(points[:7]) > 0.98 and max(points[12:]) <= 0.1, who
    assert all(points[12] >= 0.7 for points in trained["nextlat dynamics"])

"""Every config that comes with the project loads, and the rivals differ in the objective alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import OBJECTIVES, Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = sorted((CONFIGS / "fineweb_edu_1b").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_loads(path: Path):
    """Those in deepspeed/ are that section alone."""
    section = path.parent.name == "deepspeed"
    config = load_config(CONFIGS / "quickstart.yaml", [f"deepspeed=@{path}"]) if section else load_config(path)
    assert isinstance(config, Config)


def test_the_large_runs_cover_every_objective_and_differ_in_it_and_in_the_name_alone():
    configs = [load_config(path) for path in LARGE]
    assert {config.objective.name for config in configs} == set(OBJECTIVES)
    assert [config.run.name for config in configs] == [f"fineweb_edu_1b_{path.stem}" for path in LARGE]
    rest = []
    for config in configs:
        values = config.model_dump(exclude={"objective": True})
        del values["run"]["name"]
        rest.append(values)
    assert all(values == rest[0] for values in rest)

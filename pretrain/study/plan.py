"""A study's file: which configs, which seeds, what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, PositiveInt, ValidationError

from data_pipeline import UserError
from pretrain.config import Config, load_config
from pretrain.config.section import NonNegativeInt, Section
from pretrain.evals import SUITES

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Source(Section):
    """A data set that is prepared where it is missing: the options of the same names of data_pipeline.prepare."""

    source: str
    tokenizer: str | None = None
    """None for a task, which has a vocabulary of its own."""
    out: str


class Entry(Section):
    """One config of the study."""

    label: str
    """What tables call it."""
    config: str
    """A run's YAML file."""
    overrides: tuple[str, ...] = Field((), strict=False)
    """`section.key=value`, as on the command line; run.name, run.dir and run.seed are the study's."""


class Study(Section):
    """A study's file."""

    title: str
    question: str
    """What the page begins with."""
    suite: str
    limit: PositiveInt | None = None
    """As for pretrain.evaluate."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Values of run.seed; all are shown, and pictures are of the first."""
    data: tuple[Source, ...] = Field((), strict=False)
    runs: Annotated[dict[Name, Entry], Field(min_length=1)]


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a study."""

    entry: Entry
    seed: int
    overrides: list[str]
    config: Config

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder


def read_study(path: Path) -> Study:
    """Read a study's file. Raises UserError, in one line, for what does not fit."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        study = Study.model_validate(values)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a study's YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{path}: {where or 'the file'}: {problem['msg']}; keys: {', '.join(Study.model_fields)}"
        ) from None
    if study.suite not in SUITES:
        raise UserError(f"{path}: suite={study.suite}: no such suite; there are {', '.join(SUITES)}")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{path}: seeds={study.seeds}: one is given twice; leave it out")
    return study


def plan_runs(study: Study, name: str, folder: Path) -> list[PlannedRun]:
    """Every run of the study, below folder/name. Raises UserError for a config that does not load."""
    planned = []
    for key, entry in study.runs.items():
        for seed in study.seeds:
            own = [f"run.name={key}_seed{seed}", f"run.dir={folder / name}", f"run.seed={seed}"]
            overrides = [*entry.overrides, *own]
            planned.append(PlannedRun(entry, seed, overrides, load_config(entry.config, overrides)))
    return planned

"""The benchmarks' configs: alike but for the objective, of the paper's size, and fitting the data that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from data_pipeline.tasks import open_task
from pretrain.config import load_config
from pretrain.model import PretrainingModel, parameter_counts
from pretrain.study.plan import plan_runs, read_study

CONFIGS = Path("configs")
TASKS = ("path_star", "countdown", "city", "word_problem", "belief")
FOLDERS = [CONFIGS / task / size for task in TASKS for size in ("", "small")]
LABELLED = {"gpt", "nextlat"}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_configs_of_a_folder_differ_in_name_and_objective_alone(folder):
    files = sorted(folder.glob("*.yaml"))
    every = LABELLED if "word_problem" in folder.parts else {*LABELLED, "mtp", "jtp", "bst"}
    assert {file.stem for file in files} == every
    rest = []
    for file in files:
        values = load_config(file).model_dump()
        assert values["run"].pop("name").endswith(f"_{file.stem}")
        assert values.pop("objective")["name"] == {"gpt": "next_token"}.get(file.stem, file.stem)
        rest.append(values)
    assert all(values == rest[0] for values in rest)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_configs_fit_the_data_that_they_name(folder):
    for file in folder.glob("*.yaml"):
        text, config = file.read_text(encoding="utf-8"), load_config(file)
        command = re.search(r"--source '?task:([^\s']+)'? \\\n#     --out (\S+)\n", text)
        assert command and command[2] == config.data.path
        task = open_task(command[1])
        assert task.name in folder.parts
        if task.document_length:
            assert config.data.sequence_length == task.document_length and config.data.packing == "end_to_end"
        else:
            assert config.data.packing == "best_fit" and config.data.sequence_length > task.longest + 2
        assert (config.model.vocab_size or task.vocabulary.size) >= task.vocabulary.size
        steps = config.schedule.steps * config.batch.global_sequences
        if folder.name == "small" and "word_problem" in folder.parts:
            assert steps < 0.985 * task.count  # fresh data


def test_path_star_models_have_the_papers_parameters():
    sizes = {}
    for name in ("gpt", "nextlat"):
        config = load_config(CONFIGS / "path_star" / f"{name}.yaml")
        with torch.device("meta"):
            sizes[name] = parameter_counts(PretrainingModel(config, config.model.vocab_size))["training"]
    assert sizes == {"gpt": 21_324_672, "nextlat": 21_915_264}


@pytest.mark.parametrize("file", sorted(Path("studies").glob("*.yaml")), ids=str)
def test_studies_load_and_name_their_data(file):
    study = read_study(file)
    runs = plan_runs(study, file.stem, Path("runs"))
    assert len(runs) == len(study.runs) * len(study.seeds) >= 4
    assert len({run.folder for run in runs}) == len(runs)
    made = {source.out: source.source for source in study.data}
    for run in runs:
        source = made[str(run.config.data.path)]
        assert source == "stdlib" or open_task(source.removeprefix("task:")).name == study.suite

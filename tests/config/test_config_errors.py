"""Whatever does not fit the schema: one line that names file, key, value and what would do."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline import UserError
from pretrain.config import load_config

BASE: dict[str, dict[str, Any]] = {
    "run": {"name": "test"},
    "model": {"layers": 2, "width": 96, "heads": 6},
    "objective": {
        "name": "nextlat", "horizon": 2, "next_latent_weight": 1.0, "kl_weight": 1.0, "dynamics_width": 64,
    },
    "data": {"path": "somewhere", "sequence_length": 64},
    "batch": {"global_sequences": 8, "micro_sequences": 2},
    "optimizer": {"learning_rate": 0.001, "weight_decay": 0.1, "gradient_clip": 1.0},
    "schedule": {"name": "constant", "steps": 100},
}  # fmt: skip


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message and message == message.strip()
    return message


def test_the_base_of_these_tests_is_accepted(tmp_path: Path):
    load_config(write(tmp_path, yaml.safe_dump(BASE)))


NO_PATH = ["data.path=null"]
TWO_SOURCES = [*NO_PATH, "data.sources=[{path: a}, {path: b}]"]

# each: what is wrong, the overrides that make it so, and what the line must say: key, value, remedy
BAD = {
    "unknown key, near another": (["model.widht=3"], ["model.widht=3", "did you mean model.width"]),
    "unknown key, near none": (["run.zzz=3"], ["run.zzz=3", "name", "stop_after"]),
    "unknown section": (["modle.width=3"], ["modle", "did you mean model"]),
    "unknown section, near none": (["zzz.q=3"], ["zzz", "run", "model", "validation"]),
    "unknown section named as an objective": (["nextlat.horizon=3"], ["nextlat", "objective"]),
    "unknown section named as the other objective": (["next_token.x=3"], ["next_token", "objective"]),
    "unknown objective key": (
        ["objective.horizn=3"],
        ["objective.horizn=3", "did you mean objective.horizon"],
    ),
    "unknown objective key named as an objective": (
        ["objective.nextlat=3"],
        ["objective.nextlat=3", "horizon"],
    ),
    "unknown key of a section with defaults": (
        ["metrics.wandb_projct=x"],
        ["metrics.wandb_projct='x'", "metrics.wandb_project"],
    ),
    "whole number as text": (["model.width='96'"], ["model.width='96'", "integer"]),
    "whole number as a fraction": (["model.layers=2.0"], ["model.layers=2.0", "integer"]),
    "whole number as a truth value": (["model.layers=true"], ["model.layers=True", "integer"]),
    "number as text": (["optimizer.learning_rate='3e-4'"], ["optimizer.learning_rate='3e-4'", "number"]),
    "truth value as a word": (["model.tie_embeddings=yes"], ["model.tie_embeddings='yes'", "boolean"]),
    "resume as it once was, true": (["run.resume=true"], ["run.resume=true", "write auto or must"]),
    "resume as it once was, false": (["run.resume=false"], ["run.resume=false", "write never"]),
    "resume as another word": (["run.resume=always"], ["run.resume='always'", "'never', 'auto' or 'must'"]),
    "checkpoints kept where none are saved": (
        ["checkpoint.every=4", "checkpoint.keep_every=10"],
        ["checkpoint.keep_every=10", "not a multiple of checkpoint.every=4"],
    ),
    "the best checkpoints without a validation": (
        ["checkpoint.every=5", "checkpoint.keep_best=1", "validation.every=10"],
        ["checkpoint.keep_best=1", "checkpoint.every=5", "validation.every=10"],
    ),
    "truth value as a number": (["model.tie_embeddings=1"], ["model.tie_embeddings=1", "boolean"]),
    "text as a number": (["run.name=2024"], ["run.name=2024", "string"]),
    "null where a value is needed": (["model.width=null"], ["model.width=None", "integer"]),
    "zero": (["model.heads=0"], ["model.heads=0", "greater than 0"]),
    "negative": (
        ["optimizer.weight_decay=-0.1"],
        ["optimizer.weight_decay=-0.1", "greater than or equal"],
    ),
    "infinite": (["optimizer.learning_rate=.inf"], ["optimizer.learning_rate=inf", "finite"]),
    "not a number": (["objective.kl_weight=.nan"], ["objective.kl_weight=nan", "finite"]),
    "fraction above one": (
        ["schedule.final_fraction=1.5"],
        ["schedule.final_fraction=1.5", "less than or equal to 1"],
    ),
    "one beta": (["optimizer.betas=[0.9]"], ["optimizer.betas.1", "add it"]),
    "beta above one": (["optimizer.betas=[0.9, 95]"], ["optimizer.betas.1=95", "less than or equal to 1"]),
    "word outside a choice": (
        ["metrics.wandb=on"],
        ["metrics.wandb='on'", "'off'", "'offline'", "'online'"],
    ),
    "run name that leaves the folder": (["run.name=../x"], ["run.name='../x'", "match"]),
    "heads not dividing the width": (["model.heads=5"], ["model.heads=5", "model.width=96", "6, 8"]),
    "odd head width": (["model.heads=32"], ["model.heads=32", "model.width=96", "odd", "choose"]),
    "kv heads not dividing the heads": (
        ["model.kv_heads=4"],
        ["model.kv_heads=4", "model.heads=6", "1, 2, 3, 6"],
    ),
    "more kv heads than heads": (["model.kv_heads=12"], ["model.kv_heads=12", "model.heads=6", "1, 2, 3, 6"]),
    "horizon as long as the sequence": (
        ["objective.horizon=64"],
        ["objective.horizon=64", "data.sequence_length=64", "smaller"],
    ),
    "horizon beyond the sequence": (["objective.horizon=1000"], ["objective.horizon=1000", "smaller"]),
    "no positions for the rollouts": (["objective.kl_positions=0"], ["objective.kl_positions=0", "greater than 0"]),
    "more than all positions": (["objective.kl_positions=1.5"], ["objective.kl_positions=1.5", "less than or equal"]),
    "unknown latent loss": (["objective.latent_loss=l1"], ["objective.latent_loss='l1'", "'smooth_l1'", "'mse'"]),
    "muon without its rate": (
        ["optimizer.name=muon", "optimizer.gradient_clip=null"],
        ["optimizer.muon_learning_rate", "such as 0.02"],
    ),
    "muon's rate without muon": (
        ["optimizer.muon_learning_rate=0.02"],
        ["optimizer.muon_learning_rate=0.02", "optimizer.name=adamw", "leave it out"],
    ),
    "muon with clipping": (
        ["optimizer.name=muon", "optimizer.muon_learning_rate=0.02"],
        ["optimizer.gradient_clip=1.0", "null"],
    ),
    "muon with reduce scatter": (
        [
            "optimizer.name=muon",
            "optimizer.muon_learning_rate=0.02",
            "optimizer.gradient_clip=null",
            "deepspeed={zero_optimization: {stage: 3, reduce_scatter: true}}",
        ],
        ["deepspeed.zero_optimization.reduce_scatter=True", "muon"],
    ),
    "p_psi alone for longer than the run": (
        ["objective.dynamics_only_steps=101"],
        ["objective.dynamics_only_steps=101", "100 steps"],
    ),
    "horizon of zero": (["objective.horizon=0"], ["objective.horizon=0", "greater than 0"]),
    "horizon of MTP beyond the sequence": (
        ["objective={name: mtp, horizon: 64, multi_token_weight: 1.0}"],
        ["objective.horizon=64", "data.sequence_length=64", "smaller"],
    ),
    "horizon of JTP beyond the sequence": (
        ["objective={name: jtp, horizon: 64, joint_token_weight: 1.0}"],
        ["objective.horizon=64", "data.sequence_length=64", "smaller"],
    ),
    "BST with a horizon": (
        ["objective={name: bst, horizon: 2}"],
        ["unknown key objective.horizon=2", "objective.name=bst", "name, pair_fraction"],
    ),
    "MTP with JTP's weight": (
        ["objective={name: mtp, horizon: 2, joint_token_weight: 1.0}"],
        ["unknown key objective.joint_token_weight=1.0", "objective.name=mtp", "multi_token_weight"],
    ),
    "JTP without its weight": (
        ["objective={name: jtp, horizon: 2}"],
        ["missing key objective.joint_token_weight", "add it"],
    ),
    "negative weight of MTP": (
        ["objective={name: mtp, horizon: 2, multi_token_weight: -1.0}"],
        ["objective.multi_token_weight=-1.0", "greater than or equal to 0"],
    ),
    "no pairs": (
        ["objective={name: bst, pair_fraction: 0.0}"],
        ["objective.pair_fraction=0.0", "greater than 0"],
    ),
    "more pairs than there are": (
        ["objective={name: bst, pair_fraction: 1.5}"],
        ["objective.pair_fraction=1.5", "less than or equal to 1"],
    ),
    "JTP's heads not dividing the width": (
        ["objective={name: jtp, horizon: 2, joint_token_weight: 1.0}", "model.width=90", "model.heads=5"],
        ["objective.name=jtp", "4 heads", "model.width=90", "multiple of 4"],
    ),
    "no objective named": (
        ["objective={horizon: 2}"],
        ["missing key objective.name", "next_token or nextlat or mtp or jtp or bst"],
    ),
    "batch not divisible": (
        ["batch.micro_sequences=3"],
        ["batch.global_sequences=8", "batch.micro_sequences=3", "multiple"],
    ),
    "steps and tokens": (
        ["schedule.tokens=7777"],
        ["schedule.steps=100", "schedule.tokens=7777", "one of"],
    ),
    "neither steps nor tokens": (["schedule.steps=null"], ["schedule.steps", "schedule.tokens", "one of"]),
    "two warm-ups": (
        ["schedule.warmup_steps=11", "schedule.warmup_tokens=7777"],
        ["schedule.warmup_steps=11", "schedule.warmup_tokens=7777", "not both"],
    ),
    "wsd without decay": (
        ["schedule.name=wsd"],
        ["schedule.name=wsd", "schedule.decay_steps", "schedule.decay_tokens"],
    ),
    "wsd with two decays": (
        ["schedule.name=wsd", "schedule.decay_steps=13", "schedule.decay_tokens=7777"],
        ["schedule.decay_steps=13", "schedule.decay_tokens=7777", "one of"],
    ),
    "decay outside wsd": (
        ["schedule.decay_steps=13"],
        ["schedule.name=constant", "schedule.decay_steps=13", "wsd"],
    ),
    "unknown schedule": (
        ["schedule.name=linear"],
        ["schedule.name='linear'", "'constant'", "'cosine'", "'wsd'"],
    ),
    "warm-up longer than the run": (
        ["schedule.warmup_steps=101"],
        ["schedule.warmup_steps=101", "100", "lengthen the run"],
    ),
    "warm-up in tokens longer than the run": (
        ["schedule.warmup_tokens=52000"],
        ["schedule.warmup_tokens=52000", "100", "lengthen the run"],
    ),
    "warm-up and decay longer than the run": (
        ["schedule.name=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=41"],
        ["schedule.warmup_steps=60", "schedule.decay_steps=41", "100", "lengthen the run"],
    ),
    "sequence of one token": (
        ["data.sequence_length=1"],
        ["data.sequence_length=1", "greater than or equal to 2"],
    ),
    "no data": (["data.path=null"], ["data.path", "data.sources", "neither"]),
    "data twice": (["data.sources=[{path: a, weight: 1}]"], ["data.path", "data.sources", "both"]),
    "no source": ([*NO_PATH, "data.sources=[]"], ["data.sources=[]", "at least 1 item"]),
    "weight of zero": (
        [*NO_PATH, "data.sources=[{path: a, weight: 0}]"],
        ["data.sources.0.weight=0", "greater than 0"],
    ),
    "negative epochs": ([*NO_PATH, "data.sources=[{path: a, epochs: -1}]"], ["data.sources.0.epochs=-1", "greater"]),
    "weight and epochs": (
        [*NO_PATH, "data.sources=[{path: a, weight: 1, epochs: 2}]"],
        ["data.sources", "a weight for every source, or epochs for every source"],
    ),
    "a weight here and epochs there": (
        [*NO_PATH, "data.sources=[{path: a, weight: 1}, {path: b, epochs: 2}]"],
        ["data.sources", "a weight for every source, or epochs for every source"],
    ),
    "neither weight nor epochs": ([*NO_PATH, "data.sources=[{path: a}]"], ["data.sources", "a weight for every"]),
    "mistyped key of a source": (
        [*NO_PATH, "data.sources=[{path: a, weigth: 1}]"],
        ["data.sources.0.weigth=1", "did you mean data.sources.0.weight"],
    ),
    "source without a path": ([*NO_PATH, "data.sources=[{weight: 1}]"], ["missing key data.sources.0.path"]),
    "two sources of one name": (
        [*NO_PATH, "data.sources=[{path: x/Web, weight: 1}, {path: y/web, weight: 1}]"],
        ["data.sources", "'web'", "give each a name"],
    ),
    "a name for no metric": (
        [*NO_PATH, "data.sources=[{path: a, weight: 1, name: The Web}]"],
        ["data.sources.0.name='The Web'", "match"],
    ),
    "phases of a single path": (["data.phases=[{weights: [1]}]"], ["data.phases", "data.sources"]),
    "phases and weights": (
        [*NO_PATH, "data.sources=[{path: a, weight: 1}]", "data.phases=[{weights: [1]}]"],
        ["data.phases", "leave those out"],
    ),
    "phase without a length": (
        [*TWO_SOURCES, "data.phases=[{weights: [1, 2]}, {weights: [1, 1]}]"],
        ["data.phases.0", "needs its length, steps or tokens"],
    ),
    "phase of two lengths": (
        [*TWO_SOURCES, "data.phases=[{weights: [1, 2], steps: 5, tokens: 9}]"],
        ["data.phases.0", "one of steps and tokens"],
    ),
    "line without a length": (
        [*TWO_SOURCES, "data.phases=[{weights: [1, 2], to: [2, 1]}]"],
        ["data.phases.0", "needs its length"],
    ),
    "phase of too few weights": (
        [*TWO_SOURCES, "data.phases=[{weights: [1]}]"],
        ["data.phases.0.weights=[1.0]", "2 numbers, one for each source"],
    ),
    "line to too few weights": (
        [*TWO_SOURCES, "data.phases=[{weights: [1, 1], to: [2], steps: 3}]"],
        ["data.phases.0.to=[2.0]", "2 numbers, one for each source"],
    ),
    "phase of nothing": (
        [*TWO_SOURCES, "data.phases=[{weights: [0, 0]}]"],
        ["data.phases.0.weights=[0.0, 0.0]", "at least one must be above 0"],
    ),
    "mistyped key of a phase": (
        [*TWO_SOURCES, "data.phases=[{weight: [1, 0]}]"],
        ["data.phases.0.weight=[1, 0]", "did you mean data.phases.0.weights"],
    ),
    "groups of a mixture": (
        [*NO_PATH, "data.sources=[{path: a, weight: 1}, {path: b, weight: 1}]", "data.groups=2"],
        ["data.groups=2", "leave it out for a mixture"],
    ),
    "packing and a window": (
        ["data.packing=best_fit", "data.shard_window=2"],
        ["data.packing=best_fit", "leave data.shard_window"],
    ),
    "cache of no bytes": (["data.cache_bytes=0"], ["data.cache_bytes=0", "greater than 0"]),
    "damage ignored": (["data.on_damage=ignore"], ["data.on_damage='ignore'", "'stop'", "'skip'"]),
    "deepspeed batch size": (
        ["deepspeed.train_batch_size=77"],
        ["deepspeed.train_batch_size=77", "batch.global_sequences"],
    ),
    "deepspeed micro batch": (
        ["deepspeed.train_micro_batch_size_per_gpu=77"],
        ["deepspeed.train_micro_batch_size_per_gpu=77", "batch.micro_sequences"],
    ),
    "deepspeed accumulation": (
        ["deepspeed.gradient_accumulation_steps=77"],
        ["deepspeed.gradient_accumulation_steps=77", "batch.micro_sequences"],
    ),
    "deepspeed clipping": (
        ["deepspeed.gradient_clipping=77.5"],
        ["deepspeed.gradient_clipping=77.5", "optimizer.gradient_clip"],
    ),
    "deepspeed optimizer": (
        ["deepspeed.optimizer.type=Lamb"],
        ["deepspeed.optimizer", "Lamb", "leave this out"],
    ),
    "deepspeed scheduler": (["deepspeed.scheduler.type=Foo"], ["deepspeed.scheduler", "Foo", "schedule"]),
    "deepspeed bf16": (["deepspeed.bf16.enabled=true"], ["deepspeed.bf16", "True", "run.precision"]),
    "deepspeed fp16": (["deepspeed.fp16.enabled=true"], ["deepspeed.fp16", "True", "run.precision"]),
    "ZeRO stage 4": (
        ["deepspeed.zero_optimization.stage=4"],
        ["deepspeed.zero_optimization.stage=4", "0, 1, 2 or 3"],
    ),
    "ZeRO stage as text": (
        ["deepspeed.zero_optimization.stage='3'"],
        ["deepspeed.zero_optimization.stage='3'", "0, 1, 2 or 3"],
    ),
    "ZeRO stage as a truth value": (
        ["deepspeed.zero_optimization.stage=true"],
        ["deepspeed.zero_optimization.stage=True", "0, 1, 2 or 3"],
    ),
    "ZeRO section as a number": (
        ["deepspeed.zero_optimization=77"],
        ["deepspeed.zero_optimization=77", "{stage: 3}"],
    ),
    "unknown objective": (
        ["objective.name=gpt"],
        ["objective.name='gpt'", "'next_token', 'nextlat', 'mtp', 'jtp', 'bst'"],
    ),
    "objective of the wrong type": (["objective.name=3"], ["objective.name=3", "next_token", "nextlat"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_one_line_with_file_key_value_and_remedy(case: str, tmp_path: Path):
    overrides, parts = BAD[case]
    path = write(tmp_path, yaml.safe_dump(BASE))
    message = refusal(path, tuple(overrides))
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message.removeprefix(f"{path}: "), f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("case", ["batch not divisible", "steps and tokens", "unknown objective key"])
def test_the_same_mistake_in_the_file_reads_the_same_as_in_an_override(case: str, tmp_path: Path):
    values = copy.deepcopy(BASE)
    for override in BAD[case][0]:
        key, _, value = override.partition("=")
        section, name = key.split(".")
        values[section][name] = yaml.safe_load(value)
    in_override = refusal(write(tmp_path, yaml.safe_dump(BASE)), tuple(BAD[case][0]))
    assert refusal(write(tmp_path, yaml.safe_dump(values))) == in_override


@pytest.mark.parametrize(
    "key",
    [
        "run.name", "model.layers", "model.width", "model.heads", "objective.name", "objective.horizon",
        "objective.next_latent_weight", "objective.kl_weight", "objective.dynamics_width",
        "data.sequence_length", "batch.global_sequences", "batch.micro_sequences", "optimizer.learning_rate",
        "optimizer.weight_decay", "optimizer.gradient_clip", "schedule.name",
        "run", "model", "objective", "data", "batch", "optimizer", "schedule",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(key: str, tmp_path: Path):
    values: dict[str, Any] = copy.deepcopy(BASE)
    *section, name = key.split(".")
    del (values[section[0]] if section else values)[name]
    path = write(tmp_path, yaml.safe_dump(values))
    message = refusal(path)
    assert message.startswith(f"{path}: missing key {key};") and "add it" in message


def test_a_mistyped_required_key_is_shown_as_the_typo_and_not_as_the_missing_key(tmp_path: Path):
    values = copy.deepcopy(BASE)
    values["model"]["widht"] = values["model"].pop("width")
    message = refusal(write(tmp_path, yaml.safe_dump(values)))
    assert "model.widht=96" in message and "did you mean model.width?" in message and "1 more" in message


def test_keys_of_another_objective_are_refused_without_being_recommended(tmp_path: Path):
    message = refusal(write(tmp_path, yaml.safe_dump(BASE)), ("objective.name=next_token",))
    named = re.search(r"unknown key (objective\.\w+)", message)
    assert named, message
    assert f"did you mean {named.group(1)}" not in message, "recommends the very key that it refuses"
    assert "next_token" in message, "does not say which objective has no such key"


@pytest.mark.parametrize("override", ["width", "width=3", "=3", "model.=3", ".width=3", "model..width=3", ""])
def test_a_malformed_override_is_named_with_the_form_that_would_do(override: str, tmp_path: Path):
    message = refusal(write(tmp_path, yaml.safe_dump(BASE)), (override,))
    assert repr(override) in message and "section.key=value" in message


def test_an_override_through_a_value_is_refused(tmp_path: Path):
    message = refusal(write(tmp_path, yaml.safe_dump(BASE)), ("model.width.x=3",))
    assert "'model.width.x=3'" in message and "'width' is not a section" in message


def test_an_override_that_is_no_yaml_is_named(tmp_path: Path):
    message = refusal(write(tmp_path, yaml.safe_dump(BASE)), ("optimizer.betas=[0.9",))
    assert "'optimizer.betas=[0.9'" in message and "not valid YAML" in message


@pytest.mark.parametrize("value", ["2024-13-45"], ids=["impossible date"])
def test_a_scalar_that_yaml_cannot_convert_is_an_error_line_and_no_traceback(value: str, tmp_path: Path):
    path = write(tmp_path, yaml.safe_dump(BASE).replace("name: test", f"name: {value}"))
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "- run\n- model\n", "3", "just words"])
def test_a_file_that_is_no_mapping_is_refused_with_the_sections(text: str, tmp_path: Path):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and "mapping" in message and "run, model, objective" in message


@pytest.mark.parametrize(
    "text", ["run: {name: x", "run:\n\t- tab", "a: b: c", "run: *nothing", "run: !!python/name:os.x"]
)
def test_bad_yaml_is_one_line_with_the_file_and_the_place(text: str, tmp_path: Path):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: not valid YAML: ") and "line" in message


def test_a_key_given_twice_is_refused(tmp_path: Path):
    """Otherwise the last one would win without a word."""
    text = yaml.safe_dump(BASE).replace("  layers: 2\n", "  layers: 2\n  layers: 3\n")
    assert text.count("layers:") == 2
    message = refusal(write(tmp_path, text))
    assert "layers" in message


def test_a_section_that_is_no_mapping_is_refused(tmp_path: Path):
    for section in ("model", "objective", "deepspeed", "metrics"):
        path = write(tmp_path, yaml.safe_dump({**BASE, section: 77}))
        message = refusal(path)
        assert message.startswith(f"{path}: {section}=77: ")


def test_unreadable_files_are_one_line_with_the_path_and_the_reason(tmp_path: Path):
    missing, folder, binary = tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (missing, folder, binary):
        message = refusal(path)
        assert message.startswith(f"{path}: cannot read the config (") and "YAML file" in message
    assert "No such file" in refusal(missing)

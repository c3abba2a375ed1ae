from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from data_pipeline import UserError
from pretrain.config import BatchConfig, Config, NextTokenConfig, dump_config, load_config

TEXT = """
run: {name: test}
model: {layers: 2, width: 96, heads: 6}
objective: {name: nextlat, horizon: 2, next_latent_weight: 1.0, kl_weight: 0.1, dynamics_width: 64}
data: {path: somewhere, sequence_length: 64}
batch: {global_sequences: 8, micro_sequences: 2}
optimizer: {learning_rate: 3e-4, weight_decay: 0.1, gradient_clip: 1.0}
schedule: {name: constant, steps: 100}
"""


def load(tmp_path: Path, *overrides: str, text: str = TEXT) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("1e3", 1000.0),
        ("+2e0", 2.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1.5e-3", 0.0015),
        ("1", 1.0),
        ("1_0.5", 10.5),
    ],
)
def test_a_number_is_a_number_in_file_and_override(text: str, number: float, tmp_path: Path):
    assert load(tmp_path, f"optimizer.learning_rate={text}").optimizer.learning_rate == number
    in_file = load(tmp_path, text=TEXT.replace("learning_rate: 3e-4", f"learning_rate: {text}"))
    assert in_file.optimizer.learning_rate == number


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "Off", "YES", "e5", "1e", "v1.5", "1.2.3", "1-2", "n"])
def test_a_word_stays_a_word(word: str, tmp_path: Path):
    assert load(tmp_path, f"run.name={word}").run.name == word


def test_off_is_a_word_and_true_is_a_truth_value(tmp_path: Path):
    text = TEXT + "metrics: {wandb: off}\n"
    config = load(tmp_path, "checkpoint.in_background=false", "model.tie_embeddings=True", text=text)
    assert config.metrics.wandb == "off" and config.model.tie_embeddings is True
    assert config.checkpoint.in_background is False


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path: Path):
    config = load(tmp_path, "model.layers=3", "schedule.warmup_steps=0", "model.layers=5")
    assert config.model.layers == 5 and config.model.width == 96 and config.schedule.warmup_steps == 0


def test_an_override_may_name_a_section_that_the_file_leaves_out(tmp_path: Path):
    config = load(tmp_path, "checkpoint.every=7", "metrics.wandb=offline")
    assert (config.checkpoint.every, config.checkpoint.keep, config.metrics.wandb) == (7, 2, "offline")


def test_an_override_of_a_nested_deepspeed_key_keeps_its_siblings_and_stage_3_is_the_default(tmp_path: Path):
    text = TEXT + "deepspeed: {zero_optimization: {stage: 1, overlap_comm: true}, wall_clock_breakdown: true}\n"
    config = load(tmp_path, "deepspeed.zero_optimization.stage=2", text=text)
    assert config.deepspeed == {
        "zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": True,
    }  # fmt: skip
    assert config.zero_stage == 2
    assert load(tmp_path).zero_stage == 3
    assert load(tmp_path, "deepspeed.zero_optimization.overlap_comm=true").zero_stage == 3


def test_null_switches_a_value_of_the_file_off(tmp_path: Path):
    text = TEXT.replace("heads: 6}", "heads: 6, kv_heads: 2}")
    assert load(tmp_path, text=text).model.key_value_heads == 2
    config = load(tmp_path, "model.kv_heads=null", "optimizer.gradient_clip=null", text=text)
    assert config.model.kv_heads is None and config.model.key_value_heads == 6
    assert config.optimizer.gradient_clip is None
    length = load(tmp_path, "schedule.steps=null", "schedule.tokens=5121")
    assert length.total_steps == 11


def test_an_override_may_hold_equals_signs_lists_and_unicode(tmp_path: Path):
    config = load(tmp_path, "data.path=s3://bücket/a=b", "optimizer.betas=[0.8, 0.99]")
    assert config.data.path == "s3://bücket/a=b" and config.optimizer.betas == (0.8, 0.99)


def test_overrides_do_not_change_the_file_or_a_later_load(tmp_path: Path):
    load(tmp_path, "deepspeed.zero_optimization.stage=0")
    assert (tmp_path / "run.yaml").read_text() == TEXT
    assert load(tmp_path).zero_stage == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.learning_rate=1e-8", "optimizer.epsilon=1e-12", "optimizer.gradient_clip=null"],
        ["metrics.wandb=offline", "metrics.wandb_project='off'", "run.resume=never"],
        ["schedule.name=wsd", "schedule.decay_tokens=100", "schedule.warmup_tokens=1000"],
        ["deepspeed.zero_optimization.stage=0", "deepspeed.comms_logger={enabled: true, prof_ops: [a, b]}"],
        ["data.path=/bücket/a b", "model.init_from='null'"],
        ["run.name='1e5'"],
        ["run.name='12e7'", "data.path='3E4'"],
        ["run.name='123'", "data.path='true'"],
        ["run.name='2024-01-01'", "data.path='1.5'"],
        ["data.path='1:30'", "metrics.wandb_project='~'"],
        ["data.path=null", "data.sources=[{path: a, weight: 0.25}, {path: s3://b/c, weight: 1}]", "data.cache=/tmp/c"],
        [
            "data.path=null",
            "data.sources=[{path: a}, {path: b}]",
            "data.phases=[{weights: [1, 0], to: [0, 1], steps: 9}]",
        ],
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_a_dumped_config_loads_to_an_equal_one(overrides: list[str], tmp_path: Path):
    config = load(tmp_path, *overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


def test_a_dumped_next_token_config_loads_to_an_equal_one(tmp_path: Path):
    lines = [line if not line.startswith("objective") else "objective: {name: next_token}" for line in TEXT.split("\n")]
    config = load(tmp_path, text="\n".join(lines))
    assert config.objective == NextTokenConfig(name="next_token")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


def test_a_dump_holds_every_key_of_every_section_resolved(tmp_path: Path):
    config = load(tmp_path)
    values = yaml.safe_load(dump_config(config))
    assert list(values) == list(Config.model_fields)
    for section, given in values.items():
        if section != "deepspeed":
            assert set(given) == set(type(getattr(config, section)).model_fields)
    assert values["deepspeed"] == {"zero_optimization": {"stage": 3}}


def test_a_config_cannot_be_changed_once_loaded(tmp_path: Path):
    config = load(tmp_path)
    with pytest.raises(ValidationError):
        config.model.width = 3


def test_lengths_in_tokens_become_whole_steps_rounded_up(tmp_path: Path):
    tokens_per_step = 8 * 64
    config = load(
        tmp_path, "schedule.name=wsd", "schedule.steps=null", f"schedule.tokens={tokens_per_step * 100 + 1}",
        f"schedule.warmup_tokens={tokens_per_step * 3}", f"schedule.decay_tokens={tokens_per_step * 7 - 1}",
    )  # fmt: skip
    assert config.tokens_per_step == tokens_per_step
    assert (config.total_steps, config.warmup_steps, config.decay_steps) == (101, 3, 7)
    assert (load(tmp_path).total_steps, load(tmp_path).warmup_steps, load(tmp_path).decay_steps) == (
        100,
        0,
        0,
    )


def test_the_longest_warm_up_horizon_and_heads_that_fit_are_accepted(tmp_path: Path):
    assert load(tmp_path, "schedule.warmup_steps=100").warmup_steps == 100
    assert load(tmp_path, "objective.horizon=63").objective.horizon == 63
    assert load(tmp_path, "model.heads=48", "model.kv_heads=1").model.key_value_heads == 1
    wsd = load(tmp_path, "schedule.name=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=40")
    assert (wsd.warmup_steps, wsd.decay_steps) == (60, 40)


def test_a_run_in_tokens_may_be_warm_up_and_decay_alone(tmp_path: Path):
    config = load(
        tmp_path, "schedule.name=wsd", "schedule.steps=null", "schedule.tokens=1000",
        "schedule.warmup_tokens=500", "schedule.decay_tokens=500", "batch.global_sequences=2",
        "data.sequence_length=50",
    )  # fmt: skip
    assert (config.total_steps, config.warmup_steps, config.decay_steps) == (10, 5, 5)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_accumulation_follows_from_the_ranks(ranks: int, steps: int):
    assert BatchConfig(global_sequences=24, micro_sequences=2).accumulation_steps(ranks) == steps


@pytest.mark.parametrize("ranks", [5, 24, 100])
def test_ranks_that_do_not_fit_are_refused_with_the_numbers_and_a_multiple_that_would_do(ranks: int):
    with pytest.raises(UserError) as caught:
        BatchConfig(global_sequences=24, micro_sequences=2).accumulation_steps(ranks)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("batch.global_sequences=24", f"{ranks} ranks", "batch.micro_sequences=2", f"of {2 * ranks}"):
        assert part in message


def test_the_run_folder_is_dir_and_name(tmp_path: Path):
    assert load(tmp_path, "run.dir=elsewhere").run.folder == Path("elsewhere/test")
    assert math.isclose(load(tmp_path).optimizer.learning_rate, 3e-4)


def test_an_override_replaces_a_whole_section(tmp_path: Path):
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    config = load_config(path, ["objective={name: next_token}"])
    assert config.objective.model_dump() == {"name": "next_token"}


@pytest.mark.parametrize(
    ("path", "name"),
    [("data/web", "web"), ("s3://bucket/Fine-Web 2/", "fine_web_2"), ("东京", "data"), ("x/train.bin", "train_bin")],
)
def test_a_source_is_called_by_the_last_part_of_its_path(tmp_path: Path, path: str, name: str):
    foreign = ["data.tokenizer=bytes"] if path.endswith(".bin") else []
    config = load(tmp_path, "data.path=null", f"data.sources=[{{path: {path}, weight: 1}}]", *foreign)
    assert list(config.data.sources_by_name) == [name]

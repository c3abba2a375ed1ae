"""configs/deepspeed: each fragment is a config that DeepSpeed itself accepts, merged into a run's own section."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline import UserError
from pretrain.config import load_config
from pretrain.engine import check_precision, deepspeed_config

CONFIGS = Path(__file__).parents[2] / "configs"
FRAGMENTS = sorted((CONFIGS / "deepspeed").glob("*.yaml"))


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_key(fragment: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(CONFIGS / "quickstart.yaml", [f"deepspeed=@{fragment}"])
    accepted = DeepSpeedConfig(deepspeed_config(config, 1, torch.float32)).zero_config
    assert accepted.stage == 3
    for key, value in config.deepspeed["zero_optimization"].items():
        seen = getattr(accepted, key.removeprefix("stage3_"))
        if isinstance(value, dict):
            assert {name: getattr(seen, name) for name in value} == value | {
                name: Path(value[name]) for name in value if name == "nvme_path"
            }
        else:
            assert seen == value


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_every_key_says_why(fragment: Path) -> None:
    """A comment, of its own or shared with the line above, stands over every setting but `stage` of the heading."""
    lines = fragment.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and f"deepspeed=@configs/deepspeed/{fragment.name}" in lines[0]
    assert sum(line.lstrip().startswith("#") for line in lines) >= 3


def test_a_file_is_merged_into_the_section_and_later_overrides_win(tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text(yaml.safe_dump({"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}))
    first = "deepspeed.zero_optimization.stage=2"
    last = "deepspeed.wall_clock_breakdown=false"
    config = load_config(CONFIGS / "quickstart.yaml", [first, f"deepspeed=@{fragment}", last])
    assert config.deepspeed == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(("text", "part"), [(None, "cannot read the config"), ("- 1", "must be mappings")])
def test_a_file_that_cannot_be_merged_is_one_line(tmp_path: Path, text: str | None, part: str) -> None:
    fragment = tmp_path / "fragment.yaml"
    if text is not None:
        fragment.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load_config(CONFIGS / "quickstart.yaml", [f"deepspeed=@{fragment}"])
    assert str(fragment) in str(caught.value) and "\n" not in str(caught.value)


def test_a_typo_in_a_file_is_refused_by_the_same_rules(tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    fragment.write_text("train_batch_size: 3")
    with pytest.raises(UserError, match=r"deepspeed.train_batch_size=3 follows from batch.global_sequences"):
        load_config(CONFIGS / "quickstart.yaml", [f"deepspeed=@{fragment}"])


def test_bfloat16_without_zero_is_refused_in_one_line() -> None:
    keys = ["run.precision=bfloat16", "deepspeed.zero_optimization.stage=0"]
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"set deepspeed\.zero_optimization\.stage=1, 2 or 3, or run\.precision="):
        check_precision(load_config(CONFIGS / "quickstart.yaml", keys), cpu)
    for one in keys:
        check_precision(load_config(CONFIGS / "quickstart.yaml", [one]), cpu)

"""What a run reads is checked against what it trains before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import UserError, open_dataset
from pretrain.config import load_config
from pretrain.run_data import check_horizon, open_data


def longest_document(data: Path) -> int:
    train = open_dataset(data).split("train")
    return int(np.diff(train.document_starts, append=train.tokens).max())


def test_a_horizon_that_no_document_has_room_for_is_refused_in_one_line(
    write_config: Callable[..., Path], tiny_data: Path
) -> None:
    longest = longest_document(tiny_data)

    def config(horizon: int) -> Path:
        return write_config("long", {"objective.horizon": horizon, "data.sequence_length": longest + 10})

    check_horizon(load_config(config(longest - 1)), open_dataset(tiny_data))
    with pytest.raises(UserError) as refusal:
        open_data(load_config(config(longest)))
    assert str(refusal.value) == (
        f"objective.horizon={longest} needs documents of {longest + 1} tokens, and the longest of "
        f"data.path={tiny_data} has {longest}; shorten the horizon, or give longer documents"
    )


def test_a_vocabulary_may_be_larger_than_the_datas_and_not_smaller(write_config: Callable[..., Path]) -> None:
    assert open_data(load_config(write_config("larger", {"model.vocab_size": 600})))[2] == 600
    with pytest.raises(UserError, match=r"model\.vocab_size=400 is smaller than the 512 tokens of"):
        open_data(load_config(write_config("smaller", {"model.vocab_size": 400})))

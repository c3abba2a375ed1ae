"""On how many of the nodes that are left a job goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import UserError
from pretrain.config import BatchConfig
from pretrain.jobs.fit import fit, main


@pytest.mark.parametrize(
    ("sequences", "micro", "nodes", "per_node", "fitting"),
    [
        (512, 4, 8, 8, (8, 4)),  # as it was
        (512, 4, 7, 8, (4, 4)),  # 7, 6 and 5 nodes do not divide the batch
        (96, 8, 3, 2, (3, 8)),
        (96, 8, 4, 2, (4, 6)),  # 12 rows a rank: in parts of 6
        (6, 4, 4, 3, (2, 1)),  # more ranks than rows: fewer nodes
    ],
)
def test_the_batch_stays_as_it_is_on_as_many_nodes_as_it_fits(
    sequences: int, micro: int, nodes: int, per_node: int, fitting: tuple[int, int]
) -> None:
    batch = BatchConfig(global_sequences=sequences, micro_sequences=micro)
    assert fit(batch, nodes, per_node) == fitting
    fitted = BatchConfig(global_sequences=sequences, micro_sequences=fitting[1])
    assert fitted.accumulation_steps(fitting[0] * per_node) >= 1


def test_a_batch_that_not_even_one_node_shares_is_refused(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="global_sequences=8 is not a multiple of 3 ranks, those of one node"):
        main([str(write_config("odd")), "--nodes", "2", "--per-node", "3"])


def test_the_command_prints_nodes_and_micro_sequences(write_config: Callable[..., Path], capsys) -> None:
    main([str(write_config("even")), "--nodes", "3", "--per-node", "1"])
    assert capsys.readouterr().out == "2 4\n"

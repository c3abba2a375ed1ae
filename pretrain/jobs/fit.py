"""The largest part of a job's nodes that its batch fits: `python -m pretrain.jobs.fit CONFIG --nodes N --per-node T`.

A job that lost nodes goes on with the same global batches on those that are left. Prints `NODES MICRO_SEQUENCES`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline import UserError, run_command
from pretrain.config import BatchConfig, load_config


def fit(batch: BatchConfig, nodes: int, per_node: int) -> tuple[int, int]:
    """At most `nodes` nodes of `per_node` ranks, and `batch.micro_sequences`, at most the config's, that share a batch.

    UserError where not even one node can.
    """
    for used in range(nodes, 0, -1):
        rows, rest = divmod(batch.global_sequences, used * per_node)
        if rest == 0:
            return used, max(micro for micro in range(1, batch.micro_sequences + 1) if rows % micro == 0)
    raise UserError(
        f"batch.global_sequences={batch.global_sequences} is not a multiple of {per_node} ranks, those of one node"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.fit", description="How many nodes a batch fits.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that are there")
    parser.add_argument("--per-node", type=int, required=True, metavar="T", help="ranks on each")
    arguments = parser.parse_args(argv)
    print(*fit(load_config(arguments.config).batch, arguments.nodes, arguments.per_node))


if __name__ == "__main__":
    run_command(main)

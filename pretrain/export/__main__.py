"""Command: a run or checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse

from rich.console import Console

from data_pipeline import UserError, run_command
from pretrain.export import DTYPES, SHARD_BYTES, export


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.export",
        description="Write a run's newest checkpoint, or one checkpoint, as a folder that transformers loads "
        "with no custom code; verified before it gets its name.",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder or a checkpoint folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; float32 keeps them as trained (default)"
    )
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help="largest file (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    arguments = parser.parse_args(argv)
    if arguments.shard_gb <= 0:
        raise UserError(f"--shard-gb {arguments.shard_gb} must be above 0")

    from pretrain.checkpoints import open_checkpoint

    console = Console(stderr=True)
    checkpoint = open_checkpoint(arguments.source)
    out = export(
        checkpoint,
        arguments.out,
        arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        overwrite=arguments.overwrite,
        console=console,
    )
    console.print(f"exported step {checkpoint.step:,} of {checkpoint.config.run.name} to {out}", highlight=False)


if __name__ == "__main__":
    run_command(main)

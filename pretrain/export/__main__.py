"""Command: a run or checkpoint as a folder that transformers loads; and such a folder copied to a URL."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from data_pipeline import UserError, run_command
from pretrain.decoding.loading import MANIFEST
from pretrain.export import DTYPES, SHARD_BYTES, check_target, export
from pretrain.export.pushing import check_url, push


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.export",
        description="Write a run's newest checkpoint, or one checkpoint, as a folder that transformers loads "
        "with no custom code; verified before it gets its name.",
    )
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run's folder or a checkpoint folder; or an export, to push it"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--dtype",
        default="float32",
        help=f"of the weights: {', '.join(DTYPES)}; float32 keeps them as trained (default)",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help="largest file (default: 5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument(
        "--push-to", metavar="URL", help="copy the export there, such as s3://bucket/name; again to go on"
    )
    arguments = parser.parse_args(argv)
    if arguments.shard_gb <= 0:
        raise UserError(f"--shard-gb {arguments.shard_gb} must be above 0")
    if arguments.push_to is not None:
        check_url(arguments.push_to)
    console = Console(stderr=True)
    folder = arguments.out
    if folder is None:
        if arguments.push_to is None or not (Path(arguments.source) / MANIFEST).is_file():
            raise UserError(
                "--out DIR is missing; only an exported folder can do without, to be pushed to --push-to URL"
            )
        folder = Path(arguments.source)
    else:
        _export(arguments, console)
    if arguments.push_to is not None:
        copied = push(folder, arguments.push_to, console)
        console.print(f"pushed {folder} to {arguments.push_to} ({copied} files were not there yet)", highlight=False)


def _export(arguments: argparse.Namespace, console: Console) -> None:
    from pretrain.checkpoints import open_checkpoint

    # A checkpoint is read from end to end when it is opened; what is wrong with the target is said before.
    check_target(arguments.out, arguments.dtype, arguments.overwrite)
    checkpoint = open_checkpoint(arguments.source)
    export(
        checkpoint,
        arguments.out,
        arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        overwrite=arguments.overwrite,
        console=console,
    )
    console.print(
        f"exported step {checkpoint.step:,} of {checkpoint.config.run.name} to {arguments.out}", highlight=False
    )


if __name__ == "__main__":
    run_command(main)

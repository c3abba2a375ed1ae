"""Command: what a data set holds: statistics, document lengths, and samples as the model sees them.

python -m data_pipeline.inspect DIR [--sample N]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.errors import UserError, run_command
from data_pipeline.shards import SPLITS, Dataset, open_dataset
from data_pipeline.splits import Split
from data_pipeline.stream import Stream
from data_pipeline.tokenizers import Tokenizer

BAR = 30  # characters


def inspect(
    path: str,
    samples: int = 0,
    sequence_length: int = 256,
    console: Console | None = None,
    tokenizer: str | None = None,
) -> None:
    """Print a data set's statistics and `samples` of its training samples. Raises UserError if it is none.

    tokenizer: of another program's .bin file.
    """
    console = console or Console()
    if samples < 0 or sequence_length < 1:
        raise UserError("--sample must be 0 or more and --sequence-length 1 or more")
    dataset = open_dataset(path, tokenizer=tokenizer)
    console.print(_statistics(dataset))
    train = dataset.split("train")
    if train.documents:
        console.print(_histogram(_document_lengths(train)))
        console.print(_packing(dataset, train, sequence_length))
    if samples:
        stream = Stream(train, seed=0, sequence_length=sequence_length, global_sequences=samples)
        _print_samples(stream, dataset.tokenizer(), console)


def _statistics(dataset: Dataset) -> Table:
    tokenizer = dataset.manifest["tokenizer"]
    table = Table(
        title=f"{dataset.path} from {dataset.manifest.get('source', 'an unknown source')}",
        caption=f"{tokenizer['kind']} tokenizer of {dataset.vocab_size:,} tokens, "
        f"as {dataset.manifest['dtype']}; data {dataset.fingerprint[:12]}, "
        f"tokenizer {dataset.tokenizer_fingerprint[:12]}",
    )
    table.add_column("")
    for name in SPLITS:
        table.add_column(name, justify="right")
    splits = [dataset.split(name) for name in SPLITS]
    for label, values in {
        "shards": [f"{len(split.shards):,}" for split in splits],
        "documents": [f"{split.documents:,}" for split in splits],
        "tokens": [f"{split.tokens:,}" for split in splits],
        "text bytes": [f"{split.text_bytes:,}" for split in splits],
        "bytes per token": [f"{split.text_bytes / max(split.tokens, 1):.3f}" for split in splits],
        "median document, tokens": [_quantile(split, 0.5) for split in splits],
        "longest document, tokens": [_quantile(split, 1.0) for split in splits],
    }.items():
        table.add_row(label, *values)
    return table


def _document_lengths(split: Split) -> NDArray[np.int64]:
    """Tokens of each document, its EOS counted: (documents,) int64."""
    return np.diff(split.document_starts, append=split.tokens)


def _quantile(split: Split, share: float) -> str:
    return f"{int(np.quantile(_document_lengths(split), share)):,}" if split.documents else "–"


def _histogram(lengths: NDArray[np.int64]) -> Table:
    """Documents by length, in doublings."""
    table = Table(title="training documents by length")
    for column in ("tokens", "documents", "share of tokens"):
        table.add_column(column, justify="right")
    table.add_column("")
    doubling = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(doubling)
    tokens = np.bincount(doubling, weights=lengths)
    for power in range(int(doubling.min()), len(counts)):
        bar = "█" * round(BAR * counts[power] / counts.max())
        table.add_row(
            f"{1 << power:,} – {(2 << power) - 1:,}",
            f"{counts[power]:,}",
            f"{tokens[power] / lengths.sum():.1%}",
            bar or ("▏" if counts[power] else ""),
        )
    return table


def _packing(dataset: Dataset, train: Split, sequence_length: int) -> Table:
    """What sequences of the training split leave out, pad and cut: end to end, and as best_fit recorded it."""
    table = Table(title="sequences of the training split")
    for column in ("packing", "length", "sequences", "tokens never a target", "padding", "documents cut"):
        table.add_column(column, justify="right")
    samples = max(0, train.tokens - 1) // sequence_length
    lost = max(0, train.tokens - 1) - samples * sequence_length
    borders = np.arange(1, samples) * sequence_length
    cut = np.unique(train.document_at(borders[~np.isin(borders, train.document_starts)])).size
    lost_share = f"{lost:,} ({lost / max(1, train.tokens):.3%})"
    table.add_row("end to end", f"{sequence_length:,}", f"{samples:,}", lost_share, "none", f"{cut:,}")
    for file in sorted(dataset.path.glob("packing/train-*/packing.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        numbers = [f"{record[key]:,}" for key in ("sequence_length", "rows", "tokens_lost")]
        table.add_row("best fit", *numbers, f"{record['share_padded']:.3%}", f"{record['documents_cut']:,}")
    return table


def _print_samples(stream: Stream, tokenizer: Tokenizer, console: Console) -> None:
    batch = stream.batch(0)
    numbers = stream.sample_numbers(0)["sample"]
    for number, tokens, documents in zip(numbers.tolist(), batch.tokens, batch.document_ids, strict=True):
        console.rule(f"training sample {number:,}: {len(tokens)} tokens, {documents[-1] + 1} documents")
        for document in range(int(documents[-1]) + 1):
            piece = tokens[documents == document]
            if piece[0] == tokenizer.eos_id:
                console.print(f"[bold cyan]──── a document begins ({len(piece)} tokens here)[/]")
            console.print(escape(tokenizer.decode(piece)), highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description="Show what a data set holds.")
    parser.add_argument("path", metavar="DIR", help="folder of the data set")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="decode N training samples")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="T", help="of the samples (default: 256)")
    parser.add_argument("--tokenizer", help="what made the tokens of a .bin file of another program")
    options = parser.parse_args(argv)
    inspect(options.path, options.sample, options.sequence_length, tokenizer=options.tokenizer)


if __name__ == "__main__":
    run_command(main)

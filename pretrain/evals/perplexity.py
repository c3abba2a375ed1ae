"""Suite `perplexity`: how well the validation split is predicted, in nats per token and in bits per byte.

    loss            nats / tokens, over all tokens that are targets
    perplexity      e^loss
    bits_per_byte   nats / (ln 2 · text bytes), with the nats of each document's end among them
    xz_bits_per_byte   8 · (bytes of the text under xz −9) / text bytes, of the same text

Of a mixture each source is evaluated. Bits per byte can be compared between tokenizers, and with a compressor.
"""

from __future__ import annotations

import lzma
import math
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from data_pipeline import Dataset, Split, UserError, validation_batches
from pretrain.evals.pictures import ACCENT, GREY, INK, new_picture
from pretrain.evals.subject import Subject, open_domains
from pretrain.evals.suite import Suite
from pretrain.objectives import TokenBatch
from pretrain.objectives.base import next_token_mask
from pretrain.objectives.fused_loss import fused_cross_entropy_kl

TOKENS_PER_BATCH = 4096


def measure(
    subject: Subject, dataset: Dataset, limit: int | None, progress: Progress, data: str | None = None
) -> dict[str, Any]:
    """Evaluate the validation split, or the first `limit` sequences of it; of every data set, where there are several.

    data: as in `open_domains`. The result has the keys of `Subject.described`, those of `measure_one` for `dataset`,
    and where there are several, `domains`: by name, the same for each of them.
    """
    domains = open_domains(subject, data)
    rows = {name: measure_one(subject, one, limit, progress) for name, one in domains.items()}
    chosen = next(row for row in rows.values() if row["dataset"] == str(dataset.path))
    return subject.described() | chosen | ({"domains": rows} if len(rows) > 1 else {})


def measure_one(subject: Subject, dataset: Dataset, limit: int | None, progress: Progress) -> dict[str, Any]:
    """Evaluate one data set.

    Keys: dataset, split_tokens, sequences (None: all), tokens, nats, loss, perplexity, text_bytes, bits_per_byte,
    xz_bytes, xz_bits_per_byte. The last four are None where the evaluated tokens are no whole text: prompts left out,
    or a limit that cuts a character. Without validation text there are no tokens, and the numbers after them are None.
    """
    split = dataset.split("validation")
    nats, tokens = total_nats(subject, split, limit, progress) if split.tokens > 1 else (0.0, 0)
    texts = evaluated_texts(dataset, split, subject.sequence_length, limit) if tokens else None
    text_bytes = xz_bytes = None
    if texts is not None:
        whole = "".join(texts).encode()
        text_bytes = len(whole) if limit is not None else split.text_bytes
        xz_bytes = compressed_bytes(whole, progress)
    loss = nats / tokens if tokens else None
    return {
        "dataset": str(dataset.path),
        "split_tokens": split.tokens,
        "sequences": limit,
        "tokens": tokens,
        "nats": nats,
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "text_bytes": text_bytes,
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "xz_bytes": xz_bytes,
        "xz_bits_per_byte": 8 * xz_bytes / text_bytes if text_bytes and xz_bytes else None,
    }


@torch.inference_mode()
def total_nats(subject: Subject, split: Split, limit: int | None, progress: Progress) -> tuple[float, int]:
    """−Σ log p of the targets, in nats, and their number."""
    length = subject.sequence_length
    rows = max(1, TOKENS_PER_BATCH // length)
    batches = validation_batches(split, sequence_length=length, micro_sequences=rows, limit=limit)
    windows = -(-(split.tokens - 1) // length)
    windows = windows if limit is None else min(windows, limit)
    nats, tokens = 0.0, 0
    for numpy_batch in progress.track(batches, total=-(-windows // rows), description="perplexity"):
        batch = TokenBatch.from_numpy(numpy_batch, subject.device)
        mask_BT = next_token_mask(batch)
        hidden_BTD = subject.hidden_states(batch)
        sum_of_nats, _ = fused_cross_entropy_kl(
            hidden_BTD.flatten(0, 1), subject.head_VD, batch.targets.flatten(), mask_BT.flatten().float()
        )
        nats += float(sum_of_nats)
        tokens += int(mask_BT.sum())
    return nats, tokens


def evaluated_texts(dataset: Dataset, split: Split, length: int, limit: int | None) -> list[str] | None:
    """The text of exactly the evaluated tokens, document by document; None where they are no text by themselves."""
    if (split.prompt_lengths is not None and bool(split.prompt_lengths.any())) or split.has_labels:
        return None  # the prompt's tokens are text that was not evaluated, labels are no text
    end = split.tokens if limit is None else min(split.tokens, limit * length + 1)
    tokenizer = dataset.tokenizer()
    bounds = [*split.document_starts.tolist(), split.tokens]
    texts = []
    for start, stop in pairwise(bounds):
        if start >= end:
            break
        document = split.read(start + 1, stop).tolist()  # without the EOS that opens it
        texts.append(tokenizer.decode(document[: end - start - 1]))
        if end < stop and not tokenizer.decode(document).startswith(texts[-1]):
            return None  # the last document is cut within a character
    return texts


def compressed_bytes(text: bytes, progress: Progress) -> int:
    """Size under xz −9, which cannot report how far it is."""
    task = progress.add_task("xz −9 on the same text", total=None)
    size = len(lzma.compress(text, preset=9))
    progress.update(task, total=1, completed=1)
    return size


def table(result: dict[str, Any]) -> Table:
    """For the console: a column for each data set."""
    rows = Table(title="perplexity", title_justify="left", show_header="domains" in result)
    sets = result.get("domains", {"": result})
    rows.add_column()
    for name in sets:
        rows.add_column(name, justify="right")
    shown = {
        "tokens evaluated": ("tokens", "{:,}"),
        "loss, nats per token": ("loss", "{:.4f}"),
        "perplexity": ("perplexity", "{:,.2f}"),
        "bits per byte": ("bits_per_byte", "{:.4f}"),
        "xz −9, bits per byte": ("xz_bits_per_byte", "{:.4f}"),
    }
    for title, (key, form) in shown.items():
        values = [one[key] for one in sets.values()]
        if values != [None] * len(values):
            rows.add_row(title, *("–" if value is None else form.format(value) for value in values))
    return rows


def picture(result: dict[str, Any]) -> Figure:
    """Of one data set, bits per byte beside the compressor's and the 8 of plain text, or the loss; of several, each."""
    sets = {name: one for name, one in result.get("domains", {}).items() if one["tokens"]}
    key = "bits_per_byte" if all(one["bits_per_byte"] is not None for one in [result, *sets.values()]) else "loss"
    unit, title = {
        "bits_per_byte": ("bits per byte", "Validation text, bits per byte (less is better)"),
        "loss": ("nats per token", "Validation loss (less is better)"),
    }[key]
    if sets:
        bars = {name: (sets[name][key], ACCENT) for name in reversed(sets)}
    else:
        bars = {"this model": (result[key], ACCENT)}
        if key == "bits_per_byte":
            bars = {"uncompressed": (8.0, GREY), "xz −9": (result["xz_bits_per_byte"], GREY)} | bars
    values = [value for value, _ in bars.values()]
    figure, axes = new_picture(title, height=1.2 + 0.7 * len(bars))
    axes.barh(list(bars), values, color=[colour for _, colour in bars.values()], height=0.6)
    for row, value in enumerate(values):
        axes.annotate(f"{value:.3f}", (value, row), (4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.12 * max(values))
    return figure


def check(subject: Subject, dataset: Dataset, limit: int | None, data: str | None = None) -> None:
    """The split must hold something to predict."""
    open_domains(subject, data)
    if dataset.split("validation").tokens < 2:
        raise UserError(
            f"{dataset.path}: its validation split is empty; prepare the data again with a larger --validation"
        )


PERPLEXITY = Suite(measure, table, picture, check, options=("data",))

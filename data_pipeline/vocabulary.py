"""The tokenizer that a data set is prepared with: known by its name, copied into the folder, or trained there."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from itertools import islice
from pathlib import Path

import sentencepiece
from rich.progress import Progress

from data_pipeline.documents import Source
from data_pipeline.errors import UserError
from data_pipeline.shards import write_file
from data_pipeline.tasks import Task
from data_pipeline.tokenizers import Tokenizer, load_tokenizer, tokenizer_file, train_sentencepiece

SAMPLE_BYTES = 8 << 20  # text that a vocabulary is trained on; four times as much improves bytes per token by < 1%
SAMPLE_WINDOW = 1 << 30  # source text that the sample is chosen from
SAMPLE_DOCUMENT = 1 << 18  # characters of one document, so that no single one fills the sample


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document of this sha256 is among the fraction that is for validation."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def tokenizer_identity(spec: str) -> tuple[str, str | None]:
    """What identifies a tokenizer in the settings, and its file, if any. Raises UserError if it is none."""
    if spec == "bytes":
        return spec, None
    if spec.startswith("train:"):
        _vocabulary_to_train(spec)
        return f"{spec} with sentencepiece {sentencepiece.__version__}", None
    return load_tokenizer(spec).fingerprint, spec


def _vocabulary_to_train(spec: str) -> int:
    kind, _, size = spec.removeprefix("train:").partition(":")
    if kind != "sentencepiece" or not size.isdecimal():
        raise UserError(f"tokenizer {spec}: write train:sentencepiece:VOCAB, for example train:sentencepiece:4096")
    return int(size)


def provide_tokenizer(
    folder: Path, spec: str | Task, source: Source, validation: float, limit: int | None, bar: Progress
) -> Tokenizer:
    """The tokenizer that the data set keeps: copied into its folder, or trained there unless that is done.

    spec: of a tokenizer, or the task whose vocabulary it is.
    """
    if isinstance(spec, Task):
        write_file(folder / "tokenizer.json", spec.vocabulary.tokenizer_json())
        return load_tokenizer(folder / "tokenizer.json", eos_id=spec.vocabulary.eos_id)
    if spec == "bytes":
        return load_tokenizer(spec)
    if not spec.startswith("train:"):
        name, content = tokenizer_file(spec)
        write_file(folder / name, content)
        return load_tokenizer(folder / name, eos_id=load_tokenizer(spec).eos_id)
    kept = folder / "tokenizer.model"
    if not kept.exists():
        texts = _sample(source, validation, limit, bar)
        task = bar.add_task(f"training {_vocabulary_to_train(spec):,} pieces", total=None, rates="")
        write_file(kept, train_sentencepiece(texts, _vocabulary_to_train(spec)))
        bar.update(task, total=1, completed=1, visible=False)
    return load_tokenizer(kept)


def _sample(source: Source, validation: float, limit: int | None, bar: Progress) -> list[str]:
    """Training documents for a vocabulary: of lowest hash, up to SAMPLE_BYTES, in the source's order."""
    task = bar.add_task("sampling text for the vocabulary", total=source.total_bytes, rates="")
    heap: list[tuple[int, int, int, str]] = []
    kept = seen = 0
    for number, document in enumerate(islice(source.read(Counter()), limit)):
        content = document.text.encode()
        bar.advance(task, document.source_bytes)
        digest = hashlib.sha256(content).digest()
        if not is_validation(digest, validation):
            text = document.text[:SAMPLE_DOCUMENT]
            size = len(text.encode())
            heapq.heappush(heap, (-int.from_bytes(digest[8:16], "big"), number, size, text))
            kept += size
            while kept > SAMPLE_BYTES:
                kept -= heapq.heappop(heap)[2]
        seen += len(content)
        if seen >= SAMPLE_WINDOW:
            break
    bar.update(task, visible=False)
    if not heap:
        raise UserError("the source has no training text to make a vocabulary from: check --source and --field")
    return [text for _, _, _, text in sorted(heap, key=lambda entry: entry[1])]

"""The readers that `benchmarks.data` compares, and the measuring of one of them in a process of its own.

    python benchmarks/data_readers.py NAME WORK [--first BATCH] [--seconds S]

prints what it measured as a line of JSON. Exit code 75: it had first to make its files, and is to be started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

T, B = 1024, 8
ROUNDS = 5

Batches = Iterator[Any]
Open = Callable[[Path, int], Batches]


def samples_of(work: Path) -> np.ndarray[Any, Any]:
    """The corpus as samples: (N, T + 1) uint16, overlapping by one token; a view."""
    corpus = np.memmap(work / "corpus.bin", dtype=np.uint16, mode="r")
    return np.lib.stride_tricks.sliding_window_view(corpus, T + 1)[::T]


# ---- contenders: each opens its reader at a batch number and yields batches of int64


def raw_memmap(work: Path, first: int) -> Batches:
    """Random windows of np.memmap, as nanoGPT reads them."""
    corpus = np.memmap(work / "corpus.bin", dtype=np.uint16, mode="r")
    chance = np.random.default_rng(first)
    while True:
        starts = chance.integers(0, len(corpus) - T - 1, B)
        yield np.stack([corpus[start : start + T + 1].astype(np.int64) for start in starts])


def raw_array(work: Path, first: int) -> Batches:
    """The same over a plain array, which slices faster: the least that reading costs one batch at a time."""
    corpus = np.asarray(np.memmap(work / "corpus.bin", dtype=np.uint16, mode="r"))
    chance = np.random.default_rng(first)
    while True:
        out = np.empty((B, T + 1), np.int64)
        for row, start in enumerate(chance.integers(0, len(corpus) - T - 1, B).tolist()):
            out[row] = corpus[start : start + T + 1]
        yield out


def ours(name: str, documents: bool) -> Open:
    """This package's stream over a data set of the corpus."""

    def batches(work: Path, first: int) -> Batches:
        from data_pipeline import Stream, open_dataset

        split = open_dataset(work / name).split("train")
        stream = Stream(split, seed=0, sequence_length=T, global_sequences=B, documents=documents)
        return stream.batches(first, first + 10**9)

    return batches


def stateful_dataloader(work: Path, first: int) -> Batches:
    """torchdata's StatefulDataLoader over the samples; resumed by its own state."""
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows = samples_of(work)

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]  # torch has it generic for checkers only
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(rows[index].astype(np.int64))

    def loader() -> Any:
        return StatefulDataLoader(Rows(), batch_size=B, shuffle=True, num_workers=0)

    return resumed(loader, first, work / f"stateful{first}.pt")


def resumed(make: Callable[[], Any], first: int, kept: Path) -> Batches:
    """A loader that has a state: walk to batch `first` once, keep the state in a file, then open it from there."""
    import torch

    if first and not kept.exists():
        loader = make()
        for _ in islice(loader, first):
            pass
        torch.save(loader.state_dict(), kept)
        raise SystemExit(75)  # the timed opening is for a fresh process
    loader = make()
    if first:
        loader.load_state_dict(torch.load(kept, weights_only=False))
    return iter(loader)


def hugging_face(iterable: bool) -> Open:
    """`datasets` with one sample in a row: random access, or a shuffle buffer of 1,000."""

    def batches(work: Path, first: int) -> Batches:
        import datasets
        import pyarrow

        folder = work / "hugging_face"
        if not folder.exists():
            kinds = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=T + 1)})
            rows = np.ascontiguousarray(samples_of(work))
            table = pyarrow.table({"tokens": pyarrow.FixedSizeListArray.from_arrays(rows.reshape(-1), T + 1)})
            datasets.Dataset(table, datasets.DatasetInfo(features=kinds)).save_to_disk(folder)
            raise SystemExit(75)
        table = datasets.load_from_disk(folder).with_format("numpy")
        if not iterable:
            shuffled = table.shuffle(seed=0)
            return (row["tokens"].astype(np.int64) for row in shuffled.skip(first * B).iter(B))
        kept = work / f"hf_iterable{first}.json"
        stream = table.to_iterable_dataset(num_shards=16).shuffle(seed=0, buffer_size=1000).batch(B)
        if first and not kept.exists():
            for _ in islice(stream, first):
                pass
            kept.write_text(json.dumps(stream.state_dict()))
            raise SystemExit(75)
        if first:
            stream.load_state_dict(json.loads(kept.read_text()))
        return (np.asarray(row["tokens"]).astype(np.int64) for row in stream)

    return batches


def litdata(work: Path, first: int) -> Batches:
    """litdata's StreamingDataset of tokens over local chunks."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    folder = work / "litdata"
    if not folder.exists():
        import torch
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder), chunk_bytes="64MB", item_loader=TokensLoader(block_size=T + 1))
        corpus = np.fromfile(work / "corpus.bin", np.uint16)
        borders = [*np.load(work / "starts.npy").tolist(), len(corpus)]
        for number, (a, b) in enumerate(pairwise(borders)):
            writer.add_item(number, torch.from_numpy(corpus[a:b]))
        writer.done()
        writer.merge()
        raise SystemExit(75)

    def loader() -> Any:
        rows = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=T + 1), shuffle=True)
        return StreamingDataLoader(rows, batch_size=B, num_workers=0)

    return (batch.long() for batch in resumed(loader, first, work / f"litdata{first}.pt"))


def mosaicml(work: Path, first: int) -> Batches:
    """mosaicml-streaming's StreamingDataset over local shards; its state is a number of samples."""
    import torch

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = sys.modules.setdefault(f"torchvision{name}", ModuleType("torchvision"))
        module.__spec__ = ModuleSpec(f"torchvision{name}", None)
        vars(module).update(__path__=[], VisionDataset=object, to_tensor=None)  # it needs them for images alone
    from streaming import MDSWriter, StreamingDataset

    folder = work / "mosaicml"
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{T + 1}"}) as writer:
            for row in samples_of(work):
                writer.write({"tokens": np.asarray(row)})
        raise SystemExit(75)
    rows = StreamingDataset(local=str(folder), shuffle=True, batch_size=B)
    if first:
        rows.load_state_dict(rows.state_dict(first * B, from_beginning=True))

    def collate(items: list[dict[str, Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([item["tokens"] for item in items]).astype(np.int64))

    return iter(torch.utils.data.DataLoader(rows, batch_size=B, num_workers=0, collate_fn=collate))


def megatron(work: Path, first: int) -> Batches:
    """megatron-core's IndexedDataset; samples put together from documents as its GPTDataset does."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = work / "megatron"
    starts = np.load(work / "starts.npy")
    if not prefix.with_suffix(".idx").exists():
        corpus = np.fromfile(work / "corpus.bin", np.uint16)
        builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.uint16)
        for a, b in zip(starts, np.append(starts[1:], len(corpus)), strict=True):
            builder.add_document(torch.from_numpy(corpus[a:b]), [int(b - a)])
        builder.finalize(str(prefix.with_suffix(".idx")))
        raise SystemExit(75)
    data = IndexedDataset(str(prefix), mmap=True)
    ends = np.cumsum(data.sequence_lengths.astype(np.int64))
    order = np.random.default_rng(0).permutation((int(ends[-1]) - 1) // T)

    def sample(number: int) -> Any:
        place, left, parts = number * T, T + 1, []
        document = int(np.searchsorted(ends, place, side="right"))
        while left:
            offset = place - int(ends[document] - data.sequence_lengths[document])
            length = min(left, int(ends[document]) - place)
            parts.append(data.get(document, offset, length))
            place, left, document = place + length, left - length, document + 1
        return np.concatenate(parts).astype(np.int64)

    def batches() -> Batches:
        for step in range(first, len(order) // B):
            yield torch.from_numpy(np.stack([sample(int(n)) for n in order[step * B : step * B + B]]))

    return batches()


CONTENDERS: dict[str, Open] = {
    "raw np.memmap, random windows": raw_memmap,
    "raw plain array, random windows": raw_array,
    "data_pipeline, no document ids": ours("one_shard", False),
    "data_pipeline, no document ids, 110 shards": ours("shards", False),
    "data_pipeline, document ids": ours("one_shard", True),
    "data_pipeline, document ids, 110 shards": ours("shards", True),
    "torch StatefulDataLoader": stateful_dataloader,
    "litdata": litdata,
    "datasets, map style": hugging_face(False),
    "Megatron indexed data set": megatron,
    "datasets, iterable": hugging_face(True),
    "mosaicml-streaming": mosaicml,
}


# ---- one contender, in a process of its own


def measure(name: str, work: Path, first: int, seconds: float) -> dict[str, float]:
    """Open at a batch number; time to the first batch, and for first = 0 the rate and the memory after it."""
    import psutil

    next(iter(CONTENDERS[name](work, 0)))  # imports do not count
    began = time.perf_counter()
    batches = iter(CONTENDERS[name](work, first))
    next(batches)
    result = {"first_ms": 1e3 * (time.perf_counter() - began)}
    if first:
        return result
    rates, cpu_rates = [], []
    for _ in range(ROUNDS):
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds / ROUNDS and next(batches, None) is not None:
            count += 1
        rates.append(count * B * T / (time.perf_counter() - began))
        cpu_rates.append(count * B * T / (time.process_time() - cpu))
    status = Path("/proc/self/status")
    anonymous = status.read_text().split("RssAnon:")[1].split()[0] if status.exists() else 0
    memory = int(anonymous) * 1024 or psutil.Process().memory_info().rss
    return result | {"rate": max(rates), "cpu_rate": max(cpu_rates), "memory": memory}


def far_away(work: Path) -> float:
    """Milliseconds to this package's first batch at sample 10^12, of a set that is made to look that large."""
    from data_pipeline import Stream, open_dataset
    from data_pipeline.samples import Windows

    class Endless(Windows):
        @property
        def count(self) -> int:
            return 4 * 10**12

        def starts(self, samples: Any) -> Any:
            return samples % (self.split.tokens // T - 1) * T

    split = open_dataset(work / "shards").split("train")
    began = time.perf_counter()
    windows = [Endless(split, 0, T)]
    Stream(split, seed=0, sequence_length=T, global_sequences=B, samples=windows).batch(10**12 // B)
    return 1e3 * (time.perf_counter() - began)


# ---- preparation


def preparation(work: Path) -> dict[str, float]:
    """MB/s of text for each CPU-second: the bare tokenizer, and prepare with everything that it does."""
    from collections import Counter

    from data_pipeline.documents import open_source
    from data_pipeline.prepare import prepare
    from data_pipeline.tokenizers import load_tokenizer

    prepare("stdlib", "train:sentencepiece:4096", work / "stdlib", workers=1)
    tokenizer = load_tokenizer(work / "stdlib" / "tokenizer.model")
    texts = [document.text for document in open_source("stdlib").read(Counter())]
    size = sum(len(text.encode()) for text in texts) / 1e6
    bare, whole = [], []
    for number in range(3):
        cpu = time.process_time()
        for start in range(0, len(texts), 100):
            tokenizer.encode_batch(texts[start : start + 100])
        bare.append(size / (time.process_time() - cpu))
        cpu = time.process_time()
        prepare("stdlib", str(work / "stdlib" / "tokenizer.model"), work / f"again{number}", workers=1)
        whole.append(size / (time.process_time() - cpu))
        shutil.rmtree(work / f"again{number}")
    return {"bare": statistics.median(bare), "prepare": statistics.median(whole)}


def main() -> None:
    """Measure one contender; see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("work", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    match options.name:
        case "far":
            result = {"first_ms": far_away(options.work)}
        case "preparation":
            result = preparation(options.work)
        case reader:
            result = measure(reader, options.work, options.first, options.seconds)
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # some peers' threads do not end by themselves


if __name__ == "__main__":
    main()

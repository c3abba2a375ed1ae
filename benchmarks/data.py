"""Reading tokens, side by side: raw memory maps, this package, and the loaders that people use.

    python -m benchmarks.data [--out docs/results/data.md]

Every contender reads the same corpus, in shuffled samples of T + 1 tokens, in a process of its own, without worker
processes. The peers get an environment of their own in the work folder, because some of them cannot live beside
others; it sees the packages of the environment that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

T, B = 1024, 8
EOS, VOCAB = 1, 32_000
ROUNDS = 5
PEERS = ["torchdata==0.11.0", "litdata==0.2.76", "mosaicml-streaming==0.13.0", "megatron-core==0.16.1"]
# What those import and the environment lacks; their own lists would pull a second torch and an old `datasets`.
PEERS += ["lightning-utilities", "boto3", "botocore", "s3transfer", "jmespath", "tifffile", "obstore", "python-snappy"]
PEERS += ["cramjam", "zstd", "Brotli", "catalogue"]

Batches = Iterator[Any]
Open = Callable[[Path, int], Batches]


# ---- the corpus


def make_corpus(work: Path, tokens: int) -> None:
    """A file of random tokens in documents of 600 on average, and a data set of the same."""
    from data_pipeline import load_tokenizer
    from data_pipeline.shards import write_manifest, write_shard

    chance = np.random.default_rng(0)
    lengths = chance.geometric(1 / 600, tokens // 500)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < tokens]
    stream = chance.integers(2, VOCAB, tokens, dtype=np.uint16)
    stream[starts] = EOS
    stream.tofile(work / "corpus.bin")
    np.save(work / "starts.npy", starts)
    tokenizer = replace(load_tokenizer("bytes"), vocab_size=VOCAB, eos_id=EOS)
    for name, shards in {"one_shard": 1, "shards": 110}.items():
        borders = [*starts[np.linspace(0, len(starts), shards, endpoint=False).astype(int)].tolist(), tokens]
        entries = []
        for number, (a, b) in enumerate(pairwise(borders)):
            own = starts[(starts >= a) & (starts < b)] - a
            entries.append(write_shard(work / name, "train", number, stream[a:b], own, text_bytes=b - a))
        write_manifest(work / name, tokenizer, {"train": entries})


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

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
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
    collate = lambda items: torch.from_numpy(np.stack([i["tokens"] for i in items]).astype(np.int64))  # noqa: E731
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


def far_away() -> float:
    """Milliseconds to this package's first batch at sample 10^12, of a set that is made to look that large."""
    from data_pipeline import Stream, open_dataset
    from data_pipeline.samples import Windows

    class Endless(Windows):
        @property
        def count(self) -> int:
            return 4 * 10**12

        def starts(self, samples: Any) -> Any:
            return samples % (self.split.tokens // T - 1) * T

    split = open_dataset(Path(sys.argv[-1]) / "shards").split("train")
    began = time.perf_counter()
    windows = [Endless(split, 0, T)]
    Stream(split, seed=0, sequence_length=T, global_sequences=B, samples=windows).batch(10**12 // B)
    return 1e3 * (time.perf_counter() - began)


def run_apart(python: Path, arguments: list[str]) -> dict[str, float]:
    """This file in a process: its last line of output, as JSON; again where it had first to make its files."""
    while True:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, env=environment)
        if done.returncode != 75:
            break
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"  did not run: {reason}", file=sys.stderr)
        return {}
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


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


# ---- the table


def make_peers(folder: Path) -> Path:
    """The peers' environment, and its Python. It sees this environment's packages behind its own."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PEERS], check=True)
    return python


def compare(work: Path, tokens: int, passes: int, seconds: float, peers: Path | None) -> str:
    """Run every contender `passes` times and return the table; a rate is the median over passes."""
    if not (work / "shards" / "manifest.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        make_corpus(work, tokens)
    python = make_peers(peers or work / "peers")
    half = tokens // T // B // 2
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(passes):
        for name in CONTENDERS:
            print(f"pass {number + 1}/{passes}: {name}", file=sys.stderr)
            own = Path(sys.executable) if name.startswith(("raw", "data_pipeline")) else python
            arguments = ["--contender", name, "--seconds", str(seconds)]
            result = run_apart(own, [*arguments, "--first", "0", str(work)])
            if result:
                again = run_apart(own, [*arguments, "--first", str(half), str(work)])
                result["resume_ms"] = again.get("first_ms", float("nan"))
                found[name].append(result)
    far = statistics.median(
        run_apart(Path(sys.executable), ["--contender", "far", str(work)]).get("first_ms", float("nan"))
        for _ in range(passes)
    )
    return _table(found, far, run_apart(Path(sys.executable), ["--contender", "preparation", str(work)]), tokens)


def _table(found: dict[str, list[dict[str, float]]], far: float, made: dict[str, float], tokens: int) -> str:
    def middle(name: str, key: str) -> float:
        return statistics.median(result[key] for result in found[name])

    raw = middle("raw np.memmap, random windows", "rate")
    lines = ["| | Mtok/s | ÷ raw | Mtok per CPU-second | first batch, ms | resume at 50%, ms | memory, MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        if not results:
            lines.append(f"| {name} | did not run | | | | | |")
            continue
        cells = [f"{middle(name, 'rate') / 1e6:.1f}", f"{middle(name, 'rate') / raw:.2f}"]
        cells += [f"{middle(name, 'cpu_rate') / 1e6:.1f}", f"{middle(name, 'first_ms'):.0f}"]
        cells += [f"{middle(name, 'resume_ms'):.0f}", f"{middle(name, 'memory') / 1e6:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"data_pipeline, first batch at sample 10^12 of a simulated index: {far:.0f} ms.", ""]
    lines.append(
        f"Preparation, one core, MB of text per CPU-second: bare tokenizer {made['bare']:.2f}, "
        f"prepare {made['prepare']:.2f} ({made['prepare'] / made['bare']:.0%})."
    )
    head = (
        f"{tokens / 1e6:.0f} million tokens of uint16, T = {T}, batch of {B}; a rate is the best of {ROUNDS} rounds, "
    )
    return head + "the median over passes.\n\n" + "\n".join(lines) + "\n"


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and "model name" in (text := info.read_text()):
        model = text.split("model name")[1].split(":", 1)[1].splitlines()[0].strip()
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}, shared with other work"
    )


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="Compare readers of tokens.")
    parser.add_argument("work", nargs="?", default=".cache/benchmark-data", help="folder for corpus and peers")
    parser.add_argument("--out", help="also write the table to this Markdown file")
    parser.add_argument("--tokens", type=int, default=115_000_000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of reading, for each contender and pass")
    parser.add_argument("--peers", type=Path, help="environment with the peers (default: made in the work folder)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    work = Path(options.work)
    if options.contender:
        special: dict[str, Callable[[], dict[str, float]]] = {
            "far": lambda: {"first_ms": far_away()},
            "preparation": lambda: preparation(work),
        }
        usual = lambda: measure(options.contender, work, options.first, options.seconds)  # noqa: E731
        print("\n" + json.dumps(special.get(options.contender, usual)()), flush=True)
        os._exit(0)  # some peers' threads do not end by themselves
    table = compare(work, options.tokens, options.passes, options.seconds, options.peers)
    print(table)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.data " + " ".join(sys.argv[1:])
        head = f"# Reading tokens, side by side\n\n`{command.strip()}`, {time.strftime('%Y-%m-%d')}, {machine()}.\n"
        Path(options.out).write_text(f"{head}\n{table}")


if __name__ == "__main__":
    main()

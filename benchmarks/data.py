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
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.data_readers import CONTENDERS, ROUNDS, B, T
from benchmarks.machine import machine

EOS, VOCAB = 1, 32_000
RAW = "raw np.memmap, random windows"
READERS = Path(__file__).with_name("data_readers.py")
PEERS = ["torchdata==0.11.0", "litdata==0.2.76", "mosaicml-streaming==0.13.0", "megatron-core==0.16.1"]
# What those import and the environment lacks; their own lists would pull a second torch and an old `datasets`.
PEERS += ["lightning-utilities", "boto3", "botocore", "s3transfer", "jmespath", "tifffile", "obstore", "python-snappy"]
PEERS += ["cramjam", "zstd", "Brotli", "catalogue"]

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


def run_apart(python: Path, arguments: list[str]) -> dict[str, float]:
    """One reader in a process: its last line of output, as JSON; again where it had first to make its files."""
    while True:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, READERS, *arguments], capture_output=True, text=True, env=environment)
        if done.returncode != 75:
            break
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"  did not run: {reason}", file=sys.stderr)
        return {}
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


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
            arguments = [name, str(work), "--seconds", str(seconds)]
            result = run_apart(own, arguments)
            if result:
                again = run_apart(own, [*arguments, "--first", str(half)])
                result["resume_ms"] = again.get("first_ms", float("nan"))
                # Per CPU-second and in the same pass: the machine's other work takes time and changes meanwhile.
                result["ratio"] = result["cpu_rate"] / (result if name == RAW else found[RAW][-1])["cpu_rate"]
                found[name].append(result)
    far = statistics.median(
        run_apart(Path(sys.executable), ["far", str(work)]).get("first_ms", float("nan")) for _ in range(passes)
    )
    return _table(found, far, run_apart(Path(sys.executable), ["preparation", str(work)]), tokens)


def _table(found: dict[str, list[dict[str, float]]], far: float, made: dict[str, float], tokens: int) -> str:
    def middle(name: str, key: str) -> float:
        return statistics.median(result[key] for result in found[name])

    lines = [
        "| | Mtok/s | Mtok per CPU-second | ÷ raw, per CPU-second | first batch, ms | resume at 50%, ms | memory, MB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, results in found.items():
        if not results:
            lines.append(f"| {name} | did not run | | | | | |")
            continue
        cells = [f"{middle(name, 'rate') / 1e6:.1f}", f"{middle(name, 'cpu_rate') / 1e6:.1f}"]
        cells += [f"{middle(name, 'ratio'):.2f}", f"{middle(name, 'first_ms'):.0f}"]
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


def main(argv: list[str] | None = None) -> None:
    """The command; argv without the program's name, by default sys.argv's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="Compare readers of tokens.")
    parser.add_argument("work", nargs="?", default=".cache/benchmark-data", help="folder for corpus and peers")
    parser.add_argument("--out", help="also write the table to this Markdown file")
    parser.add_argument("--tokens", type=int, default=115_000_000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of reading, for each contender and pass")
    parser.add_argument("--peers", type=Path, help="environment with the peers (default: made in the work folder)")
    options = parser.parse_args(argv)
    work = Path(options.work)
    table = compare(work, options.tokens, options.passes, options.seconds, options.peers)
    print(table)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.data " + " ".join(sys.argv[1:])
        head = f"# Reading tokens, side by side\n\n`{command.strip()}`, {time.strftime('%Y-%m-%d')}, {machine()}.\n"
        Path(options.out).write_text(f"{head}\n{table}")


if __name__ == "__main__":
    main()

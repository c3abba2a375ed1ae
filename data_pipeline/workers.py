"""Processes that turn text into tokens, or make the samples of a task.

Each is `python -m data_pipeline.workers TOKENIZER EOS` or `… task:SPEC EOS`, which answers pickled lists of texts, or
of samples' places, on its standard input with arrays on its standard output. It runs no code of the calling program
(multiprocessing would import the caller's main module again) and touches no file but the tokenizer's, so that killing
anything at any instant leaves no writer.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.shards import token_dtype
from data_pipeline.tasks import Task, open_task
from data_pipeline.tokenizers import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """Documents laid end to end.

    tokens: (N,) in the type on disk, each document opened by EOS. document_starts: (D,) int64. seconds: of
    encoding. prompt_lengths: (D,), and labels: (N,), or None; see shards.py.
    """

    tokens: NDArray[Any]
    document_starts: NDArray[np.int64]
    seconds: float
    prompt_lengths: NDArray[np.uint32] | None = None
    labels: NDArray[Any] | None = None


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Encode documents, each as [EOS, tokens…], laid end to end."""
    began = time.perf_counter()
    ids = tokenizer.encode_batch(texts)
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(document) + 1 for document in ids], out=starts[1:])
    tokens = np.empty(starts[-1], token_dtype(tokenizer.vocab_size))
    for start, document in zip(starts.tolist(), ids, strict=False):
        tokens[start] = tokenizer.eos_id
        tokens[start + 1 : start + 1 + len(document)] = document
    return Encoded(tokens, starts[:-1], time.perf_counter() - began)


def make_samples(task: Task, numbers: Sequence[int]) -> Encoded:
    """The samples of a task at these places of its split."""
    began = time.perf_counter()
    made = task.numbered(np.asarray(numbers, np.int64))
    dtype = token_dtype(task.vocabulary.size)
    prompts = made.prompt_lengths.astype(np.uint32) if made.prompt_lengths.any() else None
    labels = None if made.labels is None else made.labels.astype(dtype)
    return Encoded(made.tokens.astype(dtype), made.starts, time.perf_counter() - began, prompts, labels)


class Workers:
    """`count` processes that encode; with one, the work is done in the calling process. A context manager.

    encode may be called by `count` threads at a time; each of them gets a process of its own. task: whose samples are
    made, where there are no texts.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, task: Task | None = None) -> None:
        self.tokenizer = tokenizer
        self.count = count
        self.task = task
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # what was not sent to a process that died
                        pipe.close()

    def encode(self, texts: Sequence[Any]) -> Encoded:
        """encode_documents, or make_samples, in a worker. Raises UserError if that dies, RuntimeError if it fails."""
        if self.count == 1:
            return make_samples(self.task, texts) if self.task else encode_documents(self.tokenizer, texts)
        process = self._process()
        assert process.stdin and process.stdout
        try:
            pickle.dump(list(texts), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a tokenising process died (exit code {process.wait()}), out of memory perhaps: run the "
                "same command again with fewer --workers; finished shards are kept"
            ) from error
        if isinstance(answer, str):
            raise RuntimeError(f"a tokenising process failed:\n{answer}")
        return Encoded(*answer)

    def _process(self) -> subprocess.Popen[bytes]:
        if not hasattr(self._local, "process"):
            tokenizer = self.tokenizer
            spec = str(tokenizer.path.resolve()) if tokenizer.path else "bytes"
            spec = f"task:{self.task.spec}" if self.task else spec
            package_root = str(Path(__file__).resolve().parents[1])
            paths = [package_root, os.environ.get("PYTHONPATH", "")]
            self._local.process = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.workers", spec, str(tokenizer.eos_id)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
            self._processes.append(self._local.process)
        process: subprocess.Popen[bytes] = self._local.process
        return process


def main(spec: str, eos_id: int) -> None:
    """Answer requests until standard input ends, which it does when the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller decides
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints must not end up among the answers
    if spec.startswith("task:"):
        encode: Callable[[Any], Encoded] = partial(make_samples, open_task(spec.removeprefix("task:")))
    else:
        encode = partial(encode_documents, load_tokenizer(spec, eos_id=eos_id))
    while True:
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] | str = tuple(encode(texts))
        except Exception:  # the caller raises whatever it is, with this trace
            answer = traceback.format_exc()
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""What every task is: options, a vocabulary, and samples numbered from 0."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError

EOS = "<eos>"
TEST_SAMPLES = 1 << 40
"""Test samples are numbered from here: another stream than any training set's."""


@dataclass(frozen=True)
class Vocabulary:
    """Names of the tokens: words without spaces, id by id."""

    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.names)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each name."""
        return {name: number for number, name in enumerate(self.names)}

    @property
    def eos_id(self) -> int:
        """The token that opens each document."""
        return self.ids[EOS]

    def decode(self, tokens: Iterable[int]) -> str:
        """The names, with spaces between."""
        return " ".join(self.names[int(token)] for token in tokens)

    def tokenizer_json(self) -> bytes:
        """The vocabulary as a Hugging Face tokenizer.json: one word, one token."""
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.eos_id, "content": EOS, **special}],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            # A word that is no token is an error: the unknown token that the format asks for is not in the vocabulary.
            "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"},
        }
        return (json.dumps(content, ensure_ascii=False, indent=0) + "\n").encode()


class Samples(NamedTuple):
    """Samples as documents on disk, laid end to end.

    tokens: (M,) int64, each sample opened by EOS. starts: (N,) int64, where each begins. prompt_lengths: (N,) int64,
    tokens after EOS that are given. labels: (M,) int64, what each token is to be answered with, or None where that is
    the next token.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None

    def tokens_of(self, number: int) -> NDArray[np.int64]:
        """The tokens of one sample, without its EOS."""
        return np.split(self.tokens, self.starts[1:])[number][1:]

    def rows(self) -> NDArray[np.int64]:
        """(N, L): the tokens of samples that are all of one length, with EOS."""
        return self.tokens.reshape(len(self.starts), -1)


def equal_samples(
    tokens_NL: NDArray[np.int64], eos_id: int, prompt_length: int, labels_NL: NDArray[np.int64] | None = None
) -> Samples:
    """Samples of one length L, given without their EOS; labels (N, L + 1) with a label for the EOS."""
    count, length = tokens_NL.shape
    rows = np.concatenate([np.full((count, 1), eos_id), tokens_NL], 1)
    labels = None if labels_NL is None else labels_NL.reshape(-1)
    return Samples(rows.reshape(-1), np.arange(count) * (length + 1), np.full(count, prompt_length), labels)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its options. Fields are the options of a spec; `count` is written `samples=`."""

    name: ClassVar[str]
    seed: int = 0
    count: int = 100_000
    split: Literal["train", "test"] = "train"

    def check(self) -> None:
        """Raise UserError for options that do not fit together."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens."""
        raise NotImplementedError

    @property
    def document_length(self) -> int | None:
        """Tokens of every sample, its EOS counted, or None where they differ.

        With data.sequence_length equal to it, each row of a batch is exactly one sample and the next one's EOS.
        """
        return None

    def generate(self, numbers: NDArray[np.int64]) -> Samples:
        """The samples of these numbers (N,) of all the task's samples, of whichever split."""
        raise NotImplementedError

    def samples(self, start: int, stop: int) -> Samples:
        """Samples start … stop − 1 of the split."""
        return self.numbered(np.arange(start, stop))

    def numbered(self, places: NDArray[np.int64]) -> Samples:
        """The samples at these places (N,) of the split."""
        return self.generate(places + (TEST_SAMPLES if self.split == "test" else 0))

    def as_text(self, tokens: Iterable[int]) -> str:
        """A form that a person can read."""
        return self.vocabulary.decode(tokens)

    @property
    def spec(self) -> str:
        """What `open_task` makes this task of, every option written out."""
        options = {_key(field.name): getattr(self, field.name) for field in dataclasses.fields(self)}
        return ",".join([self.name, *(f"{key}={value}" for key, value in options.items())])

    @property
    def identity(self) -> str:
        """sha256 of what the samples depend on."""
        return hashlib.sha256(f"task 1 {self.spec}".encode()).hexdigest()


AnyTask = TypeVar("AnyTask", bound=Task)


def _key(field: str) -> str:
    return "samples" if field == "count" else field


def parse_options(task: type[AnyTask], options: str) -> AnyTask:
    """A task of `key=value,…`. Raises UserError that names what is wrong and what there is."""
    types = {_key(field.name): get_type_hints(task)[field.name] for field in dataclasses.fields(task)}
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, text = option.partition("=")
        if not equals or key not in types:
            raise UserError(f"task {task.name}: unknown option {option!r}; the options are {', '.join(types)}")
        if key in values:
            raise UserError(f"task {task.name}: {key} is given twice; leave one out")
        values[key] = _value(task.name, key, text, types[key])
    made = task(**{"count" if key == "samples" else key: value for key, value in values.items()})
    if made.count < 1 or not 0 <= made.seed < 1 << 63:
        raise UserError(f"task {task.name}: samples={made.count} and seed={made.seed}: give 1 or more, and 0 or more")
    made.check()
    return made


def _value(task: str, key: str, text: str, kind: Any) -> Any:
    choices = get_args(kind)
    try:
        if choices:
            return choices[[str(choice) for choice in choices].index(text)]
        return {"True": True, "False": False, "true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = " or ".join(map(str, choices)) if choices else {int: "a whole number", float: "a number"}.get(kind)
        raise UserError(f"task {task}: {key}={text}: give {wanted or 'true or false'}") from None

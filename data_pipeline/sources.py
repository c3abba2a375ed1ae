"""Several data sets read as one stream: by weight, by epochs, or by weights that change on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.mixture import Mixture, Phase, anneal, by_epochs, by_phases, by_weights
from data_pipeline.samples import window_samples
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.splits import Split
from data_pipeline.stream import Stream


def open_mixture(
    sources: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    sequence_length: int,
    global_sequences: int,
    schedule: Sequence[Mapping[str, Any]] | None = None,
    split: str = "train",
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    **options: Any,
) -> Stream:
    """The stream of a mixture of data sets, all made with one tokenizer.

    sources: {"path": …, "weight": …} each, or {"path": …, "epochs": …} each. schedule, in place of weights: phases
    {"tokens": …, "weights": […]}, with "to": […] for weights that move there in a straight line; the last needs no
    tokens and goes on for ever. cache, cache_bytes: see open_dataset; options: see Stream. Raises UserError for
    sources that do not go together.
    """
    if not sources:
        raise UserError("a mixture needs sources: give at least one {path, weight}")
    datasets = [open_dataset(source["path"], cache=cache, cache_bytes=cache_bytes) for source in sources]
    check_same_tokenizer(datasets)
    splits = [dataset.split(split) for dataset in datasets]
    mixture = _mixture(sources, splits, seed, sequence_length, global_sequences, schedule)
    return Stream(
        splits,
        seed=seed,
        sequence_length=sequence_length,
        global_sequences=global_sequences,
        mixture=mixture,
        **options,
    )


def check_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Raise UserError unless all the data sets were made with the same tokenizer."""
    for dataset in datasets[1:]:
        if dataset.tokenizer_fingerprint != datasets[0].tokenizer_fingerprint:
            raise UserError(
                f"{dataset.path}: made with another tokenizer than {datasets[0].path}: prepare both with the "
                f"same one, for example --tokenizer {datasets[0].path}/tokenizer.model"
            )


def _mixture(
    sources: Sequence[Mapping[str, Any]],
    splits: Sequence[Split],
    seed: int,
    sequence_length: int,
    global_sequences: int,
    schedule: Sequence[Mapping[str, Any]] | None,
) -> Mixture:
    keys = {key for source in sources for key in source if key != "path"}
    if schedule is not None:
        if keys:
            raise UserError("a mixture has either a schedule or a weight for each source, not both")
        return by_phases([phase for entry in schedule for phase in _phases(entry, sequence_length)])
    if not (keys == {"weight"} or keys == {"epochs"}) or any(len(source) != 2 for source in sources):
        raise UserError("a mixture needs a weight for every source, or epochs for every source")
    numbers = [source[key] for source in sources for key in keys]
    if keys == {"weight"}:
        return by_weights(numbers)
    counts = [window_samples(one, seed, sequence_length, global_sequences).count for one in splits]
    return by_epochs(numbers, counts)


def _phases(entry: Mapping[str, Any], sequence_length: int) -> list[Phase]:
    samples = max(1, int(entry["tokens"]) // sequence_length) if "tokens" in entry else None
    if "to" not in entry:
        return [Phase(tuple(entry["weights"]), samples)]
    if samples is None:
        raise UserError(f"a phase to the weights {entry['to']} needs its length: give its tokens")
    return anneal(entry["weights"], entry["to"], samples)

"""Several data sets read as one stream: by weight, by epochs, or by weights that change on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.mixture import Mixture, Phase, anneal, by_epochs, by_phases, by_weights
from data_pipeline.samples import Samples
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.stream import Stream


def open_mixture(
    sources: Sequence[Mapping[str, Any]],
    *,
    schedule: Sequence[Mapping[str, Any]] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    **options: Any,
) -> Stream:
    """The stream of a mixture of data sets, all made with one tokenizer.

    sources: {"path": …, "weight": …} each, or {"path": …, "epochs": …} each. schedule: see mix. cache, cache_bytes:
    see open_dataset. options: see mix and Stream. Raises UserError for sources that do not go together.
    """
    datasets = [open_dataset(source["path"], cache=cache, cache_bytes=cache_bytes) for source in sources]
    shares = [{key: value for key, value in source.items() if key != "path"} for source in sources]
    return mix(datasets, shares, schedule=schedule, **options)


def mix(
    datasets: Sequence[Dataset],
    shares: Sequence[Mapping[str, float]],
    *,
    seed: int,
    sequence_length: int,
    global_sequences: int,
    schedule: Sequence[Mapping[str, Any]] | None = None,
    split: str = "train",
    packing: str = "end_to_end",
    **options: Any,
) -> Stream:
    """The stream that mixes a split of opened data sets.

    shares: {"weight": …} or {"epochs": …} for each of them, or {} with a schedule. schedule: phases {"tokens": …,
    "weights": […]}, with "to": […] for weights that move there in a straight line; the last needs no tokens and goes
    on for ever. packing: "end_to_end", or "best_fit" as that command has packed them. options: see Stream. Raises
    UserError for data sets and shares that do not go together.
    """
    if not datasets:
        raise UserError("a mixture needs sources: give at least one {path, weight}")
    check_same_tokenizer(datasets)
    splits = [dataset.split(split) for dataset in datasets]
    options |= {"seed": seed, "sequence_length": sequence_length, "global_sequences": global_sequences}
    if packing == "best_fit":
        options["samples"] = _packed(datasets, split, seed, sequence_length)
    plain = Stream(splits, **options)
    mixture = _mixture(shares, [samples.count for samples in plain.samples], sequence_length, schedule)
    return Stream(splits, mixture=mixture, **options)


def _packed(datasets: Sequence[Dataset], split: str, seed: int, sequence_length: int) -> Sequence[Samples]:
    from data_pipeline.best_fit import open_packed  # a command, which the package must not have imported already

    return [
        open_packed(dataset, split, seed=seed + number, sequence_length=sequence_length)
        for number, dataset in enumerate(datasets)
    ]


def check_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Raise UserError unless all the data sets were made with the same tokenizer."""
    first = datasets[0]
    kept = first.path / first.manifest["tokenizer"]["file"] if first.manifest["tokenizer"]["file"] else "bytes"
    for dataset in datasets[1:]:
        if dataset.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{dataset.path}: made with another tokenizer ({dataset.tokenizer_fingerprint[:12]}) than {first.path} "
                f"({first.tokenizer_fingerprint[:12]}): prepare both with the same one, for example --tokenizer {kept}"
            )


def _mixture(
    shares: Sequence[Mapping[str, float]],
    counts: Sequence[int],
    sequence_length: int,
    schedule: Sequence[Mapping[str, Any]] | None,
) -> Mixture:
    """counts: samples in an epoch of each source."""
    keys = {key for share in shares for key in share}
    if schedule is not None:
        if keys:
            raise UserError("a mixture has either a schedule or a weight for each source, not both")
        return by_phases([phase for entry in schedule for phase in _phases(entry, sequence_length)])
    if not (keys == {"weight"} or keys == {"epochs"}) or any(len(share) != 1 for share in shares):
        raise UserError("a mixture needs a weight for every source, or epochs for every source")
    numbers = [share[key] for share in shares for key in keys]
    return by_weights(numbers) if keys == {"weight"} else by_epochs(numbers, counts)


def _phases(entry: Mapping[str, Any], sequence_length: int) -> list[Phase]:
    samples = max(1, int(entry["tokens"]) // sequence_length) if "tokens" in entry else None
    if "to" not in entry:
        return [Phase(tuple(entry["weights"]), samples)]
    if samples is None:
        raise UserError(f"a phase to the weights {entry['to']} needs its length: give its tokens")
    return anneal(entry["weights"], entry["to"], samples)

"""What a run reads: the data sets that its config names, checked against the model before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline import (
    Allocate,
    Batch,
    Dataset,
    Stream,
    Tokenizer,
    UserError,
    mix,
    open_dataset,
    validation_batches,
)
from pretrain import init_from
from pretrain.config import Config
from pretrain.distributed import Ranks, all_reduce_sum


@dataclass(frozen=True)
class RunData:
    """The data sets of a run by name, all of one tokenizer, and the training stream that mixes them."""

    config: Config
    datasets: dict[str, Dataset]
    stream: Stream

    @property
    def is_mixture(self) -> bool:
        """Whether the config names sources, even if a single one."""
        return self.config.data.sources is not None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made all of the data."""
        return self._first.tokenizer()

    def tokenizer_file(self) -> tuple[str, bytes] | None:
        """The name and content of its one file; None if it has none."""
        return self._first.tokenizer_file()

    @cached_property
    def shares(self) -> dict[str, float]:
        """Each source's share of the samples that the whole run reads; they add up to 1."""
        counts = self.stream.mixture.counts(self.config.total_steps * self.config.batch.global_sequences)
        return dict(zip(self.datasets, (counts / counts.sum()).tolist(), strict=True))

    @property
    def _first(self) -> Dataset:
        return next(iter(self.datasets.values()))


def open_data(config: Config) -> tuple[RunData, Stream, int]:
    """The data, its training stream, and the rows that the model's embedding gets. Raises UserError."""
    data = config.data
    datasets = {
        name: open_dataset(
            source.path,
            tokenizer=data.tokenizer if source.path.endswith(".bin") else None,
            cache=data.cache,
            cache_bytes=data.cache_bytes,
            check_files=data.on_damage == "stop",
        )
        for name, source in data.sources_by_name.items()
    }
    first = next(iter(datasets.values()))
    vocab_size = config.model.vocab_size or first.vocab_size
    if vocab_size < first.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the {first.vocab_size} tokens of "
            f"{next(iter(data.sources_by_name.values())).path}; leave it out, or give at least that"
        )
    run_data = RunData(config, datasets, _open_stream(config, datasets))
    run_data.tokenizer()  # refused unless its file is the one that made the tokens
    read_validation(run_data, Ranks(0, 1, 0, 1))  # a split with nothing in it is better met now than at the end
    check_horizon(config, datasets)
    check_labels(config, datasets)
    if config.model.init_from is not None:
        init_from.check_folder(Path(config.model.init_from), config, vocab_size, first.tokenizer_fingerprint)
    return run_data, run_data.stream, vocab_size


def _open_stream(config: Config, datasets: dict[str, Dataset]) -> Stream:
    data = config.data
    return mix(
        list(datasets.values()),
        [
            source.model_dump(include={"weight", "epochs"}, exclude_none=True)
            for source in data.sources_by_name.values()
        ],
        schedule=phases(config) or None,
        seed=config.run.seed,
        sequence_length=data.sequence_length,
        global_sequences=config.batch.global_sequences,
        packing=data.packing,
        shard_window=data.shard_window,
        groups=data.groups,
        on_damage=data.on_damage,
    )


def check_horizon(config: Config, datasets: dict[str, Dataset]) -> None:
    """UserError where no training document is long enough for a single rollout over the whole horizon.

    Over i steps it needs i + 1 tokens, the document's EOS among them. Looks no further than it must.
    """
    horizon, longest = getattr(config.objective, "horizon", 0), 0
    if horizon == 0:
        return
    for split in (dataset.split("train") for dataset in datasets.values()):
        for shard, entry in enumerate(split.shards):
            try:
                lengths = np.diff(split.file(shard, "documents"), append=entry["tokens"])
            except UserError:
                if config.data.on_damage == "stop":
                    raise
                continue
            longest = max(longest, int(lengths.max(initial=0)))
            if longest > horizon:
                return
    raise UserError(
        f"objective.horizon={horizon} needs documents of {horizon + 1} tokens, and the longest of "
        f"{', '.join(datasets)} has {longest}; shorten the horizon, or give longer documents"
    )


def check_labels(config: Config, datasets: dict[str, Dataset]) -> None:
    """UserError where tokens are answered with labels of their own, and the objective knows next tokens alone."""
    labelled = [name for name, dataset in datasets.items() if dataset.split("train").has_labels]
    if labelled and config.objective.name not in ("next_token", "nextlat"):
        raise UserError(
            f"{labelled[0]}: its tokens are answered with labels, which objective.name={config.objective.name} does "
            "not know; use next_token or nextlat"
        )


def phases(config: Config) -> list[dict[str, Any]]:
    """data.phases as `mix` takes them: lengths in tokens, and a last one without an end."""
    described: list[dict[str, Any]] = []
    for phase in config.data.phases or []:
        tokens = phase.tokens if phase.steps is None else phase.steps * config.tokens_per_step
        described.append({"weights": phase.weights})
        described[-1] |= ({"tokens": tokens} if tokens else {}) | ({"to": phase.to} if phase.to else {})
    if described and "to" in described[-1]:
        described.append({"weights": described[-1]["to"]})
    elif described:
        described[-1].pop("tokens", None)
    return described


# ---- validation


def read_validation(data: RunData, ranks: Ranks) -> dict[str, Sequence[Batch]]:
    """This rank's validation batches of every source that has a validation split.

    Raises UserError where no source that the run reads has one.
    """
    config = data.config
    splits = {name: dataset.split("validation") for name, dataset in data.datasets.items()}
    if data.is_mixture and not any(split.tokens > 1 and data.shares[name] for name, split in splits.items()):
        raise UserError(
            f"none of the sources {', '.join(splits)} that are read has a validation split with text: prepare one of "
            "them again with a larger --validation fraction"
        )
    return {
        name: validation_batches(
            split,
            sequence_length=config.data.sequence_length,
            micro_sequences=config.batch.micro_sequences,
            rank=ranks.rank,
            ranks=ranks.world,
            limit=config.validation.sequences,
        )
        for name, split in splits.items()
        if split.tokens > 1 or not data.is_mixture
    }


def first_validation_batches(data: RunData) -> Sequence[Batch]:
    """The same batches on every rank: those of the first source that has a validation split."""
    return next(iter(read_validation(data, Ranks(0, 1, 0, 1)).values()))


# ---- batches on their way to the accelerator


def host_memory(device: torch.device) -> Allocate:
    """Where batches are made: page-locked memory for a GPU, which copies from it while it computes.

    The copies of a step are done when its loss has been read, and until then the loop holds the batch: its memory is
    not given to another one too early.
    """
    if device.type != "cuda":
        return np.empty

    def pinned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    return pinned


def skipped_sequences(config: Config, batch: Batch, device: torch.device) -> dict[str, int]:
    """For a step's metrics: sequences of the global batch left out for damage, where data.on_damage lets them be."""
    if config.data.on_damage == "stop":
        return {}
    mine = torch.tensor(float((batch.document_ids[:, 0] < 0).sum()), device=device)
    return {"skipped_sequences": int(all_reduce_sum(mine))}

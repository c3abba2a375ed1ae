"""What a run reads: the data set that its config names, checked against the model before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline import Batch, Dataset, Stream, UserError, open_dataset, validation_batches
from pretrain import init_from
from pretrain.config import Config
from pretrain.distributed import Ranks


def open_data(config: Config) -> tuple[Dataset, Stream, int]:
    """The data set, its training stream, and the rows that the model's embedding gets."""
    dataset = open_dataset(config.data.path)
    vocab_size = config.model.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the {dataset.vocab_size} tokens of data.path="
            f"{config.data.path}; leave it out, or give at least that"
        )
    read_validation(config, dataset, Ranks(0, 1, 0, 1))  # a split with nothing in it is better met now than at the end
    check_horizon(config, dataset)
    if config.model.init_from is not None:
        init_from.check_folder(Path(config.model.init_from), config, vocab_size, dataset.tokenizer_fingerprint)
    stream = Stream(
        dataset.split("train"),
        seed=config.run.seed,
        sequence_length=config.data.sequence_length,
        global_sequences=config.batch.global_sequences,
    )
    return dataset, stream, vocab_size


def check_horizon(config: Config, dataset: Dataset) -> None:
    """UserError where no training document is long enough for a single rollout over the whole horizon.

    Over i steps it needs i + 1 tokens, the document's EOS among them. Looks no further than it must.
    """
    horizon, train, longest = getattr(config.objective, "horizon", 0), dataset.split("train"), 0
    for shard, entry in enumerate(train.shards):
        lengths = np.diff(train.file(shard, "documents"), append=entry["tokens"])
        longest = max(longest, int(lengths.max(initial=0)))
        if longest > horizon:
            return
    raise UserError(
        f"objective.horizon={horizon} needs documents of {horizon + 1} tokens, and the longest of data.path="
        f"{config.data.path} has {longest}; shorten the horizon, or give longer documents"
    )


def read_validation(config: Config, dataset: Dataset, ranks: Ranks) -> Sequence[Batch]:
    """This rank's validation batches; UserError where the split has nothing to predict."""
    return validation_batches(
        dataset.split("validation"),
        sequence_length=config.data.sequence_length,
        micro_sequences=config.batch.micro_sequences,
        rank=ranks.rank,
        ranks=ranks.world,
        limit=config.validation.sequences,
    )

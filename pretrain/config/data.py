"""The data section: one data set or a mixture of several, and how they are read."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pretrain.config.section import NonNegativeFloat, Section


class SourceConfig(Section):
    """One data set of a mixture. Every source has a weight, or every source has epochs, or there are phases."""

    path: Annotated[str, Field(min_length=1)]
    """A data set's folder or fsspec URL."""
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] | None = None
    """What metrics call it, val_NAME_loss; null: made from the last part of its path."""
    weight: PositiveFloat | None = None
    """Its share of the samples, relative to the other sources' weights."""
    epochs: PositiveFloat | None = None
    """How many times it is read while the others are read as often as theirs say; then all of it again."""

    @property
    def called(self) -> str:
        """Its name, or the last part of its path in small letters, digits and underscores."""
        last = self.path.rstrip("/").rpartition("/")[2].lower()
        return self.name or re.sub(r"[^a-z0-9]+", "_", last).strip("_") or "data"


class PhaseConfig(Section):
    """A stretch of the run with weights of its own. The last phase needs no length and goes on to the end."""

    steps: PositiveInt | None = None
    """Its length in optimizer steps; this or `tokens`."""
    tokens: PositiveInt | None = None
    """Its length in tokens; this or `steps`."""
    weights: Annotated[list[NonNegativeFloat], Field(min_length=1)]
    """A weight for each source, in their order."""
    to: list[NonNegativeFloat] | None = None
    """Weights that those move to in a straight line over the phase; null: they stay."""


class DataConfig(Section):
    """What is read."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """A data set made by `python -m data_pipeline.prepare`, a folder or an fsspec URL; this or `sources`."""
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = None
    """Data sets that are mixed; this or `path`."""
    phases: Annotated[list[PhaseConfig], Field(min_length=1)] | None = None
    """Weights of the sources that change on the way, in place of one weight each."""
    tokenizer: str | None = None
    """What made the tokens of another program's .bin files (Megatron, nanoGPT, llm.c), which do not say."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens in a sequence, T."""
    packing: Literal["end_to_end", "best_fit"] = "end_to_end"
    """best_fit keeps documents whole, as `python -m data_pipeline.best_fit` has packed them."""
    shard_window: PositiveInt | None = None
    """Mix samples within so many shards at a time; null: 8 for a remote data set, all of a local one."""
    groups: PositiveInt = 1
    """Parts of the global batch that go through different shards, for nodes that fetch their own; needs a window."""
    cache: str | None = None
    """Local folder for the shards of remote data sets."""
    cache_bytes: PositiveInt | None = None
    """The most that `cache` holds; null: 10 GiB."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What a damaged shard does: end the run, or have its sequences left out and counted."""

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        if (self.path is None) == (self.sources is None):
            given = "both" if self.path is not None else "neither"
            raise ValueError(f"give exactly one of data.path and data.sources, not {given}")
        sources, phases = self.sources or [], self.phases
        if phases is not None:
            self._check_phases(phases, sources)
        elif sources:
            kinds = [(source.weight is not None, source.epochs is not None) for source in sources]
            if len(set(kinds)) > 1 or kinds[0] not in ((True, False), (False, True)):
                raise ValueError("data.sources: give a weight for every source, or epochs for every source")
        names = [source.called for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"data.sources: two are called {name!r}; give each a name")
        foreign = [source.path for source in self.sources_by_name.values() if source.path.endswith(".bin")]
        if (self.tokenizer is None) == bool(foreign):
            what = (
                f"{foreign[0]} does not say what made its tokens" if foreign else "only .bin files need to be told it"
            )
            raise ValueError(f"data.tokenizer={self.tokenizer}: {what}; {'give it' if foreign else 'leave it out'}")
        if self.packing == "best_fit" and (self.shard_window is not None or self.groups > 1):
            raise ValueError("data.packing=best_fit mixes all shards; leave data.shard_window and data.groups out")
        if self.groups > 1 and len(sources) > 1:
            raise ValueError(f"data.groups={self.groups} needs a single data set; leave it out for a mixture")
        return self

    def _check_phases(self, phases: list[PhaseConfig], sources: list[SourceConfig]) -> None:
        if not sources:
            raise ValueError("data.phases are weights of data.sources; give those in place of data.path")
        if any(source.weight is not None or source.epochs is not None for source in sources):
            raise ValueError("data.phases take the place of each source's weight or epochs; leave those out")
        for number, phase in enumerate(phases):
            where = f"data.phases.{number}"
            if phase.steps is not None and phase.tokens is not None:
                raise ValueError(f"{where}: give one of steps and tokens, not both")
            has_length = phase.steps is not None or phase.tokens is not None
            if not has_length and (number < len(phases) - 1 or phase.to is not None):
                raise ValueError(f"{where}: needs its length, steps or tokens")
            for key, weights in {"weights": phase.weights, "to": phase.to or phase.weights}.items():
                if len(weights) != len(sources):
                    raise ValueError(f"{where}.{key}={weights}: give {len(sources)} numbers, one for each source")
                if not any(weights):
                    raise ValueError(f"{where}.{key}={weights}: at least one must be above 0")

    @property
    def sources_by_name(self) -> dict[str, SourceConfig]:
        """The sources; a single `path` is one of weight 1."""
        sources = self.sources or [SourceConfig(path=self.path or "", weight=1.0)]
        return {source.called: source for source in sources}

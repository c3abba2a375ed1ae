"""What a checkpoint records of a run's data, and whether a run that goes on from it still reads the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline import UserError
from pretrain.run_data import RunData, phases


def describe_data(data: RunData) -> dict[str, Any]:
    """All that decides which sequences a step reads, besides the seed and the sizes, which the config holds.

    Keys: path (of the source with the largest share), fingerprint (of the data of all sources), tokenizer_kind,
    tokenizer_fingerprint, vocab_size, eos_id, tokenizer, cache, cache_bytes, phases, packing, groups, and sources: by
    name their path, fingerprint, tokenizer_fingerprint, weight, epochs, share of the whole run's samples, shard_window.
    """
    config = data.config.data
    sources = {
        name: {
            "path": source.path,
            "fingerprint": dataset.fingerprint,
            "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
            "weight": source.weight,
            "epochs": source.epochs,
            "share": data.shares[name],
            "shard_window": getattr(samples, "shard_window", None),  # of samples in two levels alone
        }
        for (name, source), dataset, samples in zip(
            config.sources_by_name.items(), data.datasets.values(), data.stream.samples, strict=True
        )
    }
    fingerprints = [dataset.fingerprint for dataset in data.datasets.values()]
    together = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
    first = next(iter(data.datasets.values()))
    return {
        "path": sources[max(data.shares, key=lambda name: data.shares[name])]["path"],
        "fingerprint": fingerprints[0] if len(fingerprints) == 1 else together,
        "tokenizer_kind": data.tokenizer().kind,
        "tokenizer_fingerprint": first.tokenizer_fingerprint,
        "vocab_size": first.vocab_size,
        "eos_id": first.eos_id,
        "tokenizer": config.tokenizer,
        "cache": config.cache,
        "cache_bytes": config.cache_bytes,
        "sources": sources,
        "phases": phases(data.config),
        "packing": config.packing,
        "groups": config.groups,
    }


def check_same_data(recorded: dict[str, Any], data: RunData, steps: int, checkpoint: Path) -> None:
    """Raise UserError, naming the first difference, unless `data` would have been read alike in a checkpoint's steps.

    recorded: what `describe_data` gave then. Paths, names, the cache, and phases that have not begun may change.
    """
    if difference := data_difference(recorded, describe_data(data), steps * data.config.tokens_per_step):
        raise UserError(f"{difference} that {checkpoint} was trained with; set it back, or choose another run.name")


def data_difference(old: dict[str, Any], new: dict[str, Any], tokens: int) -> str | None:
    """The first thing in which two descriptions read differently within so many tokens, new before old; or None."""
    before, after = old["sources"], new["sources"]
    if old["tokenizer_fingerprint"] != new["tokenizer_fingerprint"]:
        was, now = (f"{data['tokenizer_fingerprint'][:12]} ({data['tokenizer_kind']})" for data in (old, new))
        return f"data {new['path']} was made with the tokenizer {now}, not the {was}"
    if len(before) != len(after):
        return f"data.sources={', '.join(after)}, not {', '.join(before)}"
    for name, was, now in zip(after, before.values(), after.values(), strict=True):
        where = f"source {name} ({now['path']})" if len(after) > 1 else f"data {now['path']}"
        if was["fingerprint"] != now["fingerprint"]:
            return (
                f"{where} has the fingerprint {now['fingerprint'][:12]}, not the {was['fingerprint'][:12]} of "
                f"{was['path']}"
            )
        for key in ("weight", "epochs", "shard_window"):
            if was[key] != now[key]:
                return f"{where} has {key}={now[key]}, not {was[key]}"
    for key in ("packing", "groups"):
        if old[key] != new[key]:
            return f"data.{key}={new[key]}, not {old[key]}"
    return _phase_difference(old["phases"], new["phases"], tokens)


def _phase_difference(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], tokens: int) -> str | None:
    """The first phase begun within so many tokens that differs. The endless one may be given an end after them."""
    begins = 0
    for number, was in enumerate(old):
        if begins >= tokens:
            break
        now = dict(new[number]) if number < len(new) else None
        if now and "tokens" not in was and begins + now.get("tokens", tokens) >= tokens:
            now.pop("tokens", None)
        if was != now:
            return f"data.phases.{number}={now}, not {was}"
        begins += was.get("tokens", tokens)
    return None

"""`model.generate(ids, custom_generate=DIR, trust_remote_code=True, draft_length=5)`: drafting inside transformers.

The exporter writes this file as DIR/custom_generate/generate.py, and beside it the modules that it imports, so that it
runs where only transformers is installed. Texts have the distribution of plain `model.generate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pretrain.decoding.adaptive_length import AdaptiveLength
from pretrain.decoding.draft_length import DraftLength, FixedLength
from pretrain.decoding.drafting import DraftStep, draft_with_latent_dynamics
from pretrain.decoding.dynamics_folder import load_dynamics
from pretrain.decoding.sampling import Sampling
from pretrain.decoding.speculative import check_room, generate_batch
from pretrain.latent_dynamics import LatentDynamics

SETTINGS = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "transformers_version"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "early_stopping", "length_penalty"),
}
"""Generation settings that are followed, or mean nothing here; any other is refused."""


class _Drafter(NamedTuple):
    """What drafts for a model."""

    dynamics: LatentDynamics
    adaptive_length: AdaptiveLength
    steps: dict[int | None, DraftStep]
    """By the size of the draft vocabulary."""


_drafters: WeakKeyDictionary[Any, _Drafter] = WeakKeyDictionary()


def generate(
    model: Any,
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    draft_length: int | str = 4,
    draft_vocabulary: int | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Tensor:
    """Continue a batch of prompts.

    Args:
        model: LlamaForCausalLM of an exported folder.
        inputs, input_ids: (B, T) token ids; shorter prompts are padded where `attention_mask` is 0.
        attention_mask: (B, T); all ones where None.
        generation_config: as in transformers; or its settings by name.
        streamer: for one prompt.
        draft_length: tokens drafted per cycle, or "auto".
        draft_vocabulary: draft only so many of the training data's most frequent tokens; None for all.
        generator: of the random numbers; torch's own where None.
        settings: max_new_tokens, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id.

    Returns:
        (B, T + N) prompts and new tokens, padded after a text's end.

    Raises ValueError for what is not supported.
    """
    ids_BT = input_ids if input_ids is not None else inputs
    if ids_BT is None:
        raise ValueError("give input_ids, (batch, tokens)")
    if streamer is not None and len(ids_BT) != 1:
        raise ValueError("a streamer shows one text; give one prompt")
    config = _settings(model, generation_config, settings)
    mask_BT = attention_mask if attention_mask is not None else torch.ones_like(ids_BT)
    prompts = [row[kept].tolist() for row, kept in zip(ids_BT, mask_BT.bool(), strict=True)]
    eos_id = _only_eos(config)
    pad = config.pad_token_id if config.pad_token_id is not None else eos_id
    new_tokens = config.max_new_tokens or config.max_length - ids_BT.shape[1]
    sampling = Sampling(config.temperature, config.top_k or None, config.top_p) if config.do_sample else Sampling()
    step, length = _drafting(model, draft_length, draft_vocabulary)
    for prompt in prompts:
        check_room(model, len(prompt), new_tokens)
    if streamer is not None:
        streamer.put(ids_BT.cpu())
    texts, _ = generate_batch(
        model,
        prompts,
        new_tokens,
        eos_id=eos_id,
        draft_step=step,
        draft_length=length,
        sampling=sampling,
        generator=generator,
        on_tokens=None if streamer is None else lambda _, new: streamer.put(torch.tensor(new)),
    )
    if streamer is not None:
        streamer.end()
    longest = max(map(len, texts))
    new_BN = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=ids_BT.device)
    return torch.cat([ids_BT, new_BN], dim=1)


def _settings(model: Any, given: Any, settings: dict[str, Any]) -> Any:
    """The GenerationConfig that transformers' own `generate` would follow. ValueError for what cannot be followed."""
    config, others = model._prepare_generation_config(given, **settings)
    defaults = config._get_default_generation_params()
    unsupported = [
        *(key for key, value in others.items() if value not in (None, False, [])),
        *(k for k, v in config.to_diff_dict().items() if k not in SETTINGS and v != defaults.get(k)),
    ]
    if unsupported:
        raise ValueError(f"{unsupported[0]}: not supported with drafts; leave out it or custom_generate")
    return config


def _only_eos(config: Any) -> int | None:
    eos = config.eos_token_id
    if isinstance(eos, list | tuple):
        if len(eos) > 1:
            raise ValueError(f"eos_token_id={list(eos)}: drafting knows one end token; give one")
        return eos[0]
    return eos


def _drafting(model: Any, length: int | str, vocabulary: int | None) -> tuple[DraftStep, DraftLength]:
    """How the model drafts, and how much. ValueError for settings out of range, or where it cannot."""
    if length != "auto" and not (type(length) is int and length >= 1):
        raise ValueError(f"draft_length={length!r}: give at least 1 or 'auto'; or leave out custom_generate")
    if vocabulary is not None and not (type(vocabulary) is int and vocabulary >= 1):
        raise ValueError(f"draft_vocabulary={vocabulary!r}: give a number of tokens of at least 1, or leave it out")
    drafter = _drafter(model)
    if vocabulary not in drafter.steps:
        most_frequent = _most_frequent(model, vocabulary)
        drafter.steps[vocabulary] = draft_with_latent_dynamics(model, drafter.dynamics, most_frequent)
    return drafter.steps[vocabulary], FixedLength(length) if isinstance(length, int) else drafter.adaptive_length


def _drafter(model: Any) -> _Drafter:
    """That of this model, made at its first use, and anew where it was moved or cast since.

    ValueError where there is no p_ψ beside the model's weights, or where those are on several devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"the model is on {names}; drafting needs it on one, as with device_map='cuda:0'")
    if model not in _drafters or not _is_like(_drafters[model].dynamics, model):
        shape, weights = (_beside(model, f"nextlat/{name}") for name in ("config.json", "model.safetensors"))
        dynamics = load_dynamics(shape.parent, model.dtype) if shape and weights else None
        if dynamics is None:
            raise ValueError(
                f"{model.name_or_path or 'this model'}: has no latent dynamics model (nextlat/) to draft with; load "
                "the model from a folder that has one, or leave out custom_generate"
            )
        _drafters[model] = _Drafter(dynamics.to(model.device), AdaptiveLength(), {})
    return _drafters[model]


def _is_like(dynamics: LatentDynamics, model: Any) -> bool:
    """Is p_ψ of the model's device and type?"""
    weight = next(dynamics.parameters())
    return weight.device == model.device and weight.dtype == model.dtype


def _most_frequent(model: Any, count: int | None) -> list[int] | None:
    """The training data's `count` most frequent tokens; None for all. ValueError where they are not recorded."""
    if count is None:
        return None
    ranks = _beside(model, "nextlat/tokens_by_frequency.json")
    if ranks is None:
        raise ValueError(
            f"draft_vocabulary={count}: {model.name_or_path} records no token frequencies; leave it out, or export the "
            "model again where its training data can be read"
        )
    return list(json.loads(ranks.read_text(encoding="utf-8"))[:count])


def _beside(model: Any, name: str) -> Path | None:
    """A file of the folder or hub repository that the model was loaded from; None where there is no such file."""
    from transformers.utils import cached_file

    try:
        return Path(cached_file(model.name_or_path, name))
    except OSError:
        return None

"""Start a run from the weights of a Llama-shaped folder: one of our exports, or any other of that architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data_pipeline import UserError
from pretrain.config import Config
from pretrain.decoding.llama import DYNAMICS_PREFIX, llama_config, llama_name
from pretrain.decoding.loading import MANIFEST

KEYS = {
    "hidden_size": "model.width",
    "intermediate_size": "model.mlp_width",
    "num_hidden_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "vocab_size": "model.vocab_size",
    "tie_word_embeddings": "model.tie_embeddings",
    "rms_norm_eps": "model.norm_epsilon",
    "rope_theta": "model.rope_theta",
}


def check_folder(folder: Path, config: Config, vocab_size: int, tokenizer_fingerprint: str) -> None:
    """UserError unless the folder holds safetensors of a Llama of exactly this run's shape.

    One of our own exports says which tokenizer it was trained with; that must be the data set's too.
    """
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.init_from={folder}: config.json cannot be read ({error}); give a model folder"
        ) from None
    if theirs.get("model_type") != "llama":
        raise UserError(f"model.init_from={folder}: a {theirs.get('model_type')!r} model; only llama fits the trunk")
    theirs.setdefault("num_key_value_heads", theirs.get("num_attention_heads"))
    theirs["rope_theta"] = (theirs.get("rope_parameters") or {}).get("rope_theta", theirs.get("rope_theta", 10_000.0))
    ours = llama_config(config, vocab_size, 0, torch.float32)
    for key, our_key in KEYS.items():
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{our_key} makes {key}={ours[key]}, but model.init_from={folder} has {theirs.get(key)}; "
                f"set {our_key} to fit it"
            )
    manifest = folder / MANIFEST
    if manifest.exists():
        trained_with = json.loads(manifest.read_text(encoding="utf-8"))["dataset"]["tokenizer_fingerprint"]
        if trained_with != tokenizer_fingerprint:
            paths = ", ".join(source.path for source in config.data.sources_by_name.values())
            raise UserError(
                f"{paths}: made with tokenizer {tokenizer_fingerprint[:12]}, but model.init_from="
                f"{folder} was trained with {trained_with[:12]}; prepare the data with that model's tokenizer"
            )
    _files(folder)


def load_weights(
    model: nn.Module, folder: Path, whole: Callable[[nn.Parameter], AbstractContextManager[object]]
) -> bool:
    """Copy the folder's weights into the model, and p_ψ's if the folder holds one of the same shape.

    Args:
        model: a PretrainingModel.
        folder: checked by `check_folder`.
        whole: a context in which a parameter is gathered, and written back on leaving (ZeRO-3).

    Returns:
        Whether p_ψ was loaded too; if not, it keeps its initial weights.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    with ExitStack() as stack:
        trunk = {name: file for path in _files(folder) for name, file in _open(path, stack)}
        dynamics = dict(_open(folder / "nextlat" / "model.safetensors", stack))
        ours = {name: name.removeprefix(DYNAMICS_PREFIX) for name in shapes if name.startswith(DYNAMICS_PREFIX)}
        with_dynamics = bool(ours) and all(
            short in dynamics and tuple(dynamics[short].get_slice(short).get_shape()) == shapes[name]
            for name, short in ours.items()
        )
        for name, parameter in model.named_parameters():
            source, key = (trunk, llama_name(name)) if llama_name(name) else (dynamics, ours.get(name))
            if key is None or (source is dynamics and not with_dynamics):
                continue
            if key not in source:
                raise UserError(f"model.init_from={folder}: no tensor {key}; its files are not whole")
            with whole(parameter), torch.no_grad():
                parameter.copy_(source[key].get_tensor(key))
    return with_dynamics


def _open(path: Path, stack: ExitStack) -> list[tuple[str, Any]]:
    """Every tensor's name with the open file that holds it; none where there is no such file."""
    if not path.exists():
        return []
    file = stack.enter_context(safe_open(path, framework="pt"))
    return [(name, file) for name in list(file.keys())]


def _files(folder: Path) -> list[Path]:
    """The folder's top-level safetensors files; UserError where there are none or one is damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model.init_from={folder}: no safetensors here; give a model folder")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); export or download it again") from None
    return files

"""Models that hold no weights: each is read when it is used, and let go of after.

So a forward pass, or transformers' own `generate`, needs memory for one weight and the activations however large the
model is; and every pass reads all weights again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data_pipeline import UserError
from pretrain.resident_memory import release_freed

Read = Callable[[str], Tensor]
"""A parameter's name to its value."""


def stream(model: nn.Module, read: Read, dtype: torch.dtype = torch.float32) -> None:
    """Replace every parameter of a model on the meta device by a property that reads it anew at each use.

    A weight that two modules share is read under the first one's name. The model is in evaluation mode after.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in list(model.modules()):
        own = {key: names[id(value)] for key, value in module._parameters.items() if value is not None}
        if not own:
            continue
        properties = {key: property(partial(_read_for, read, name)) for key, name in own.items()}
        for key in own:
            del module._parameters[key]
        module.__class__ = type(type(module).__name__, (type(module),), properties)
    # By this transformers tells a model's device and precision.
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
    model.eval()


def _read_for(read: Read, name: str, module: nn.Module) -> Tensor:
    return read(name)


class WeightFiles:
    """The safetensors files of a folder, as their readers find them: by the index where there is one."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                weight_map = dict.fromkeys(file.keys(), "model.safetensors")
        self.paths = {name: folder / file for name, file in weight_map.items()}
        """The file of each tensor."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor. The file is opened for it alone: a mapping keeps in memory what was read through it."""
        release_freed()
        with safe_open(self.paths[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(dtype)


def stream_llama(folder: Path, dtype: torch.dtype, watch: Callable[[str], None] = lambda name: None) -> Any:
    """The LlamaForCausalLM of a folder, streamed in `dtype`, as transformers makes it from config.json.

    watch: hears the name of each weight that is read. Raises UserError unless the folder holds exactly its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # What is computed and not stored, the rotary frequencies, was computed on the meta device too.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    files = WeightFiles(folder)
    expected = {name for name, _ in model.named_parameters()}
    if differing := expected ^ files.paths.keys():
        raise UserError(
            f"{folder}: {len(differing)} weights are missing or unknown to {type(model).__name__}, such as "
            f"{min(differing)}; nothing was exported, report this"
        )

    def read(name: str) -> Tensor:
        watch(name)
        return files.read(name, dtype)

    stream(model, read, dtype)
    return model

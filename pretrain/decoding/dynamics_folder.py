"""p_ψ from the folder that an export keeps it in."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.latent_dynamics import LatentDynamics


def empty_dynamics(folder: Path) -> LatentDynamics:
    """p_ψ in the shape of an export's nextlat/ folder, its weights on the meta device."""
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return LatentDynamics(shape["width"], shape["hidden_width"])


def load_dynamics(folder: Path, dtype: torch.dtype) -> LatentDynamics | None:
    """p_ψ from an export's nextlat/ folder, in `dtype`; None where there is no such folder."""
    from safetensors.torch import load_file

    if not folder.is_dir():
        return None
    dynamics = empty_dynamics(folder)
    weights = load_file(folder / "model.safetensors")
    dynamics.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return dynamics.eval()

"""Muon's updates do not depend on which instructions a CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.config import load_config
from pretrain.engine import build_optimizer
from pretrain.model import PretrainingModel

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def original_muon(monkeypatch):
    """DeepSpeed's module, which is as it was after the test."""
    from deepspeed.runtime.zero.muon import original_muon

    monkeypatch.setattr(original_muon, "ns_compute_dtype", original_muon.ns_compute_dtype)
    yield original_muon
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("method", ["gram", "standard"])
def test_a_cpu_with_half_precision_gives_the_same_update(original_muon, monkeypatch, method):
    from deepspeed.accelerator import get_accelerator

    muon = ["optimizer.name=muon", "optimizer.muon_learning_rate=0.02", "optimizer.gradient_clip=null"]
    config = load_config(QUICKSTART, muon)
    build_optimizer(PretrainingModel(config, 50), config, torch.device("cpu"))
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    updates = []
    for supported in (False, True):
        for name in ("is_fp16_supported", "is_bf16_supported"):
            monkeypatch.setattr(type(get_accelerator()), name, lambda _, supported=supported: supported)
        momentum = torch.zeros_like(gradient)
        updates.append(original_muon.muon_update(gradient.clone(), momentum, ns_method=method))
    assert torch.equal(*updates) and updates[0].abs().max() > 0.01

"""What is damaged between writing and reading back is found, and models are run one weight at a time."""

from __future__ import annotations

import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_helpers import MemoryCheckpoint, bytes_tokenizer, left_behind
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import pretrain.export as export_module
from data_pipeline import UserError
from pretrain.export import export, verification
from pretrain.export.streaming import stream, stream_llama


def run(checkpoint: MemoryCheckpoint, out: Path, dtype: str = "float32", shard_bytes: int = 20_000) -> Path:
    return export(checkpoint, out, dtype, shard_bytes=shard_bytes, console=Console(file=io.StringIO()))


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


def flip_a_bit(folder: Path) -> None:
    path = last_shard(folder)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def drop_a_tensor(folder: Path) -> None:
    path = last_shard(folder)
    weights = load_file(path)
    weights.pop("lm_head.weight")
    save_file(weights, path, {"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    weights = load_file(last_shard(folder))
    save_file({**weights, "model.extra": torch.ones(2)}, last_shard(folder), {"format": "pt"})


def swap_two_tensors(folder: Path) -> None:
    """Of one shape: nothing but the values can tell."""
    path = next(path for path in sorted(folder.glob("model-*")) if "gate_proj" in str(names(path)))
    weights = load_file(path)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, path, {"format": "pt"})


def names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def leave_an_older_shard(folder: Path) -> None:
    (folder / "model-00099-of-00099.safetensors").write_bytes(last_shard(folder).read_bytes())


def change_precision(folder: Path) -> None:
    path = folder / "nextlat" / "model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "lm_head.weight does not read back as it was written"),
        (swap_two_tensors, "gate_proj.weight does not read back as it was written"),
        (change_precision, "norm.weight does not read back as it was written"),
        (drop_a_tensor, "its files do not hold each weight once"),
        (add_a_tensor, "its files do not hold each weight once"),
        (leave_an_older_shard, "its files do not hold each weight once"),
    ],
)
def test_damage_before_the_verification_is_found_and_nothing_is_exported(
    damage: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = verification.verify_export

    def damaged(folder: Path, *rest: object) -> dict[str, object]:
        damage(folder)
        return verify(folder, *rest)

    monkeypatch.setattr(export_module, "verify_export", damaged)
    with pytest.raises(UserError, match=message):
        run(MemoryCheckpoint(bytes_tokenizer()), tmp_path / "model", shard_bytes=50_000)
    assert left_behind(tmp_path) == []


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_llama_is_the_one_that_transformers_loads(tied: bool, tmp_path: Path) -> None:
    folder = run(MemoryCheckpoint(bytes_tokenizer(), kv_heads=2, tie_embeddings=tied), tmp_path / "model")
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))
    asked: list[str] = []
    streamed, loaded = stream_llama(folder, torch.float32, asked.append), AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(streamed(tokens).logits, loaded(tokens).logits)
    assert set(asked) == {name for name, _ in loaded.named_parameters()}
    generated = streamed.generate(tokens, do_sample=False, max_new_tokens=8)
    assert torch.equal(generated, loaded.generate(tokens, do_sample=False, max_new_tokens=8))


@torch.no_grad()
def test_a_streamed_model_holds_one_weight_at_a_time() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        weight = torch.eye(8) * (int(name[0]) + 1)
        alive.add(weight)
        most = max(most, len(alive))
        return weight

    stream(model, read)
    gc.disable()  # what goes must go by itself
    try:
        assert torch.equal(model(torch.ones(1, 8)), torch.full((1, 8), 720.0))
    finally:
        gc.enable()
    assert most == 1 and len(alive) == 0


def test_a_folder_that_lacks_a_weight_or_has_one_more_is_named(tmp_path: Path) -> None:
    folder = run(MemoryCheckpoint(bytes_tokenizer()), tmp_path / "model", shard_bytes=10**9)
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.extra": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing or unknown to LlamaForCausalLM, such as model\.extra"):
        stream_llama(folder, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_model_is_verified_within_its_limits_and_the_card_says_how(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    whole = run(checkpoint, tmp_path / "whole", dtype)
    monkeypatch.setattr(verification, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(verification, "GREEDY_READ_BYTES", 1000)
    if dtype == "float32":
        monkeypatch.setattr(verification, "LOGIT_BYTES", 4 * 4 * checkpoint.vocab_size * 20)
    else:
        monkeypatch.setattr(verification, "MOST_PRODUCTS", 4 * 20 * sum(w.numel() for w in checkpoint.weights.values()))
    monkeypatch.setattr(verification, "load_folder", lambda *_: pytest.fail("was loaded whole"))
    large = run(checkpoint, tmp_path / "large", dtype)
    verified = [json.loads((out / "nextlat_manifest.json").read_text())["verified"] for out in (whole, large)]
    assert [found["loaded_whole_by_transformers"] for found in verified] == [True, False]
    assert [found["greedy_tokens_equal"] for found in verified] == [4 * 16, 4 * 4]
    assert [found["logit_positions"] for found in verified] == [4 * 48, 4 * 20]
    assert (
        verified[0]["values_equal"]
        == verified[1]["values_equal"]
        == sum(weight.numel() for weight in checkpoint.weights.values())
    )
    cards = [" ".join((out / "README.md").read_text().split()) for out in (whole, large)]
    assert "`from_pretrained` loaded it whole" in cards[0] and "one weight in memory at a time" in cards[1]

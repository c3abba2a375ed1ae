"""What vLLM and SGLang need of a folder, checked on the files alone: neither can be started here.

Both choose their implementation by config.json's architecture, read the tensors of the safetensors files at the top of
the folder by their names in LlamaForCausalLM, and take tokenizer and generation settings from the usual files.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from export_helpers import MemoryCheckpoint, sentencepiece_tokenizer
from rich.console import Console
from safetensors import safe_open

from pretrain.export import export

MTP = {"name": "mtp", "horizon": 2, "multi_token_weight": 1.0}
LAYER = ["input_layernorm", "post_attention_layernorm"]
LAYER += [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]


def tensors_at_the_top(folder: Path) -> dict[str, list[int]]:
    """Every tensor of DIR/*.safetensors by name, with its shape; each once."""
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                assert name not in found
                found[name] = file.get_slice(name).get_shape()
    return found


@pytest.mark.parametrize(
    ("objective", "shape", "shard_bytes"),
    [(None, {"kv_heads": 2}, 10**9), (None, {"tie_embeddings": True}, 40_000), (MTP, {}, 10**9)],
    ids=["grouped", "tied, in shards", "mtp"],
)
def test_other_engines_find_a_llama_and_nothing_else(tmp_path, objective, shape, shard_bytes):
    checkpoint = MemoryCheckpoint(sentencepiece_tokenizer(tmp_path), objective, **shape)
    quiet = Console(file=io.StringIO())
    folder = export(checkpoint, tmp_path / "model", "bfloat16", shard_bytes=shard_bytes, console=quiet)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert "auto_map" not in config and "quantization_config" not in config  # no code, nothing to unpack

    found = tensors_at_the_top(folder)
    names = {f"model.layers.{n}.{part}.weight" for n in range(config["num_hidden_layers"]) for part in LAYER}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert found.keys() == names | (set() if config["tie_word_embeddings"] else {"lm_head.weight"})
    width, head = config["hidden_size"], config["head_dim"]
    assert found["model.embed_tokens.weight"] == [config["vocab_size"], width]
    assert found["model.layers.0.self_attn.q_proj.weight"] == [config["num_attention_heads"] * head, width]
    assert found["model.layers.0.self_attn.v_proj.weight"] == [config["num_key_value_heads"] * head, width]
    assert found["model.layers.1.mlp.down_proj.weight"] == [width, config["intermediate_size"]]
    in_shards = (folder / "model.safetensors.index.json").exists()
    assert in_shards is (len(list(folder.glob("*.safetensors"))) > 1) is (shard_bytes < 10**9)
    assert (folder / ("nextlat" if objective is None else "mtp") / "model.safetensors").exists()

    generation = json.loads((folder / "generation_config.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    [eos] = [token for token in tokenizer["added_tokens"] if token["content"] == settings["eos_token"]]
    assert config["eos_token_id"] == config["bos_token_id"] == generation["eos_token_id"] == eos["id"]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == config["max_position_embeddings"] == 48

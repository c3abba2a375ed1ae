"""A run starts from a folder that transformers wrote: any Llama-shaped model, whatever trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from objectives.reference import make_batch

from data_pipeline import UserError
from pretrain.config import Config, load_config
from pretrain.init_from import check_folder, load_weights
from pretrain.model import PretrainingModel, initialise

VOCAB = 50
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def save_llama(folder: Path, tied: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, tie_word_embeddings=tied, rms_norm_eps=1e-5, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def run_config(folder: Path, tied: bool, *changes: str) -> Config:
    overrides = [
        "model.width=32", "model.mlp_width=48", "model.layers=2", "model.heads=4", "model.kv_heads=2",
        "model.rope_theta=500.0", f"model.tie_embeddings={str(tied).lower()}", f"model.init_from={folder}",
    ]  # fmt: skip
    return load_config(CONFIG, [*overrides, *changes])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_trunk_predicts_as_the_model_it_starts_from_and_p_psi_is_fresh(tmp_path: Path, tied: bool) -> None:
    theirs = save_llama(tmp_path, tied)
    config = run_config(tmp_path, tied)
    check_folder(tmp_path, config, VOCAB, "any tokenizer: the folder does not say its own")
    ours = PretrainingModel(config, VOCAB)
    initialise(ours, config.run.seed, config.model.init_std)
    fresh = ours.objective.dynamics.input.weight.detach().clone()
    assert not load_weights(ours, tmp_path, lambda parameter: torch.no_grad()), "there is no p_psi to load"
    assert torch.equal(ours.objective.dynamics.input.weight, fresh)
    batch = make_batch([[12]], 13, VOCAB)
    with torch.no_grad():
        logits = ours.lm_head(ours.trunk_states(batch).hidden)
        expected = theirs(batch.tokens[:, :-1]).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_key_that_differs_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path, tied=False)
    for changes, message in (
        (["model.tie_embeddings=true"], "model.tie_embeddings makes tie_word_embeddings=True"),
        (["model.rope_theta=10000.0"], "model.rope_theta makes rope_theta=10000.0"),
        (["model.kv_heads=4"], "model.kv_heads makes num_key_value_heads=4"),
    ):
        with pytest.raises(UserError, match=message):
            check_folder(tmp_path, run_config(tmp_path, False, *changes), VOCAB, "")

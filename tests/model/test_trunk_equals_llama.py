from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config import Config
from pretrain.model import PretrainingModel, initialise
from pretrain.objectives import TokenBatch

VOCAB = 37


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(**model) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {"layers": 3, "width": 32, "heads": 4, "mlp_width": 48} | model,
            "objective": {"name": "next_token"},
            "data": {"path": "nowhere", "sequence_length": 16},
            "batch": {"global_sequences": 2, "micro_sequences": 2},
            "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
            "schedule": {"name": "constant", "steps": 1},
        }
    )


def make_model(config: Config) -> PretrainingModel:
    model = PretrainingModel(config, VOCAB)
    initialise(model, seed=1, std=0.15)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def make_llama(model: PretrainingModel, config: Config) -> LlamaForCausalLM:
    shape = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=shape.width,
            intermediate_size=shape.inner_width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            rms_norm_eps=shape.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tie_embeddings,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    ).eval()
    weights = {
        "model." + name.removeprefix("trunk.") if name.startswith("trunk.") else name: value
        for name, value in model.state_dict().items()
    }
    llama.load_state_dict(weights, strict=True)
    return llama


def one_document(tokens: torch.Tensor) -> TokenBatch:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return TokenBatch(tokens, torch.zeros_like(tokens), positions, torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_embeddings": True},
        {"kv_heads": 2},
        {"kv_heads": 1, "tie_embeddings": True},
        {"rope_theta": 50.0},
        {"norm_epsilon": 0.1},
        {"mlp_width": None},
    ],
    ids=lambda shape: ",".join(f"{key}={value}" for key, value in shape.items()) or "plain",
)
@torch.no_grad()
def test_hidden_states_and_logits_equal_transformers_llama(shape: dict):
    config = make_config(**shape)
    model = make_model(config)
    llama = make_llama(model, config)
    tokens = torch.randint(VOCAB, (2, 25), generator=torch.Generator().manual_seed(3))
    states = model.trunk_states(one_document(tokens))
    hidden, embeddings = states.hidden, states.embeddings
    expected = llama.model(tokens[:, :-1]).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    logits, expected_logits = model.lm_head(hidden), llama(tokens[:, :-1]).logits
    assert expected_logits.std() > 0.5
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeddings, llama.model.embed_tokens(tokens[:, :-1]), rtol=0, atol=0)


@torch.no_grad()
def test_every_document_of_a_packed_row_equals_llama_on_that_document_alone():
    config = make_config(kv_heads=2)
    model = make_model(config)
    llama = make_llama(model, config)
    tokens = torch.randint(VOCAB, (1, 25), generator=torch.Generator().manual_seed(4))
    lengths = [1, 9, 14]  # the 25th token is a label only
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 9, 15]))[None]
    positions = torch.cat([torch.arange(n) for n in (1, 9, 15)])[None]
    batch = TokenBatch(tokens, documents, positions, torch.ones_like(tokens, dtype=torch.bool))
    hidden = model.trunk_states(batch).hidden
    for piece, mine in zip(tokens[:, :-1].split(lengths, 1), hidden.split(lengths, 1), strict=True):
        torch.testing.assert_close(mine, llama.model(piece).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_loss_equals_the_loss_of_llama():
    config = make_config(tie_embeddings=True)
    model = make_model(config)
    batch = one_document(torch.randint(VOCAB, (2, 25), generator=torch.Generator().manual_seed(5)))
    loss = model(batch, model.objective.valid_counts(batch))["loss"]
    expected = make_llama(model, config)(batch.tokens, labels=batch.tokens).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_the_embedding_itself_and_an_untied_one_is_not():
    tied, untied = make_model(make_config(tie_embeddings=True)), make_model(make_config())
    assert tied.lm_head.weight is tied.trunk.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.trunk.embed_tokens.weight)


def test_bfloat16_trunk_keeps_its_precision_of_position_far_into_the_sequence():
    """Angles in bfloat16 would confuse neighbouring positions beyond 256."""
    config = make_config(rope_theta=10_000.0)
    model = make_model(config).bfloat16()
    exact = make_model(config)
    tokens = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(6))
    batch = one_document(tokens)
    far = TokenBatch(tokens, batch.document_ids, batch.positions + 3001, batch.target_mask)
    with torch.no_grad():
        expected = exact.trunk_states(far).hidden
        hidden = model.trunk_states(far).hidden
    assert hidden.dtype == torch.bfloat16
    assert ((hidden.float() - expected).norm() / expected.norm()).item() < 0.1

"""Small models to decode with: a real Llama with a random p_psi, and a table that behaves like one, but fast."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.decoding import AdaptiveLength
from pretrain.latent_dynamics import LatentDynamics

EOS = 1


def make_llama(vocab: int = 7, seed: int = 0, **shape) -> tuple[LlamaForCausalLM, LatentDynamics]:
    """Weights large enough for varied texts; p_psi random, so that a small vocabulary decides how often it is right."""
    torch.manual_seed(seed)
    values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4} | shape
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, bos_token_id=EOS, eos_token_id=EOS, **values)).eval()
    dynamics = LatentDynamics(values["hidden_size"], 48)
    for parameter in dynamics.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, dynamics.eval()


class TableModel:
    """A Llama-like model whose hidden state is looked up by the last two tokens, read back from the KV cache."""

    def __init__(self, vocab: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.config = LlamaConfig(vocab_size=vocab, num_hidden_layers=1, max_position_embeddings=64)
        self.device = torch.device("cpu")
        self.states = torch.randn(vocab, vocab, 6, generator=generator)
        self.head = 0.7 * torch.randn(6, vocab, generator=generator)
        self.noise = torch.randn(vocab, 6, generator=generator)

    def model(self, input_ids, position_ids, attention_mask, past_key_values, use_cache):
        new = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(new, new, 0)
        before = torch.nn.functional.pad(keys[:, 0, :, 0].long(), (1, 0)).gather(1, position_ids)
        return SimpleNamespace(last_hidden_state=self.states[before, input_ids])

    def lm_head(self, states):
        return states @ self.head

    def draft_step(self, state, token):
        """A draft model that is often, and not always, right."""
        state = 0.5 * state + self.noise[token]
        return state, state @ self.head


class AtSetCosts(AdaptiveLength):
    """The rule of `auto` where a draft costs a fiftieth of a verification, whatever the machine does meanwhile."""

    def saw_cycle(self, accepted, drafted, draft_seconds, rest):
        super().saw_cycle(accepted, drafted, [0.02] * len(draft_seconds), 1.0)

"""The whole of what is trained: trunk, output head and objective, in one forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.objectives import LanguageModelHead, Objective, TokenBatch, build_objective
from pretrain.transformer import Transformer, TrunkStates


class PretrainingModel(nn.Module):
    """Tokens to losses.

    Args:
        config: the run's config.
        vocab_size: V, rows of the embedding and of the head.
    """

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.trunk = Transformer(config.model, vocab_size)
        tied_to = self.trunk.embed_tokens if config.model.tie_embeddings else None
        self.lm_head = LanguageModelHead(config.model.width, vocab_size, tied_to)
        self.objective: Objective = build_objective(config)

    def forward(
        self,
        batch: TokenBatch,
        counts: Tensor | None = None,
        measure: Callable[[PretrainingModel, TokenBatch], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """This micro-batch's share of each loss, `counts` as in `Objective.forward`; or what `measure` finds."""
        if measure is not None:
            return measure(self, batch)
        return self.objective(self.trunk_states(batch), batch, self.lm_head, counts)

    def trunk_states(self, batch: TokenBatch) -> TrunkStates:
        """What the trunk makes of the first T tokens."""
        return self.trunk(batch.tokens[:, :-1], batch.document_ids[:, :-1], batch.positions[:, :-1])

    def next_token_states(self, batch: TokenBatch, eos_id: int) -> Tensor:
        """(B, T, D): what `lm_head` reads to predict the next token; the weights must be whole."""
        return self.objective.next_token_states(self.trunk_states(batch), self.trunk.embed_tokens.weight[eos_id])


def initialise(
    model: nn.Module,
    seed: int,
    std: float,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = lambda parameter: nullcontext(),
) -> None:
    """Matrices from a normal distribution, norms to one, as the authors do; or as a module's `initial_values` say.

    Each parameter has its own generator, seeded by (seed, name): its values depend neither on the order of
    construction nor on how parameters are spread over ranks.

    Args:
        model: whose parameters are set in place.
        seed: the run's seed.
        std: standard deviation of the matrices.
        whole: a context in which a parameter is gathered, and written back on leaving (ZeRO-3).
    """
    stated = {
        f"{module_name}.{name}": value
        for module_name, module in model.named_modules()
        for name, value in getattr(module, "initial_values", {}).items()
    }
    for name, parameter in model.named_parameters():
        with whole(parameter), torch.no_grad():
            if name in stated or parameter.ndim < 2:
                parameter.fill_(stated.get(name, 1.0))
                continue
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            parameter.copy_(torch.normal(0.0, std, parameter.shape, generator=generator))


def parameter_counts(model: PretrainingModel) -> dict[str, int]:
    """Parameters of the model at inference (trunk and head, mostly) and in training (with the objective's modules).

    Valid under ZeRO-3 too, where a parameter's own shape is that of its shard.
    """

    def count(module: nn.Module) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())

    total = count(model)
    for_training_alone = 0 if model.objective.needed_at_inference else count(model.objective)
    return {"inference": total - for_training_alone, "training": total}

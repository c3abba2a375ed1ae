"""Next-token prediction: the GPT objective."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.objectives.base import Objective, TokenBatch, mean_weights, next_token_mask
from pretrain.transformer import TrunkStates


class NextToken(Objective):
    """Mean over valid positions of −log p(x_{t+1} | h_t)."""

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1,) float64: the positions whose next token is a target."""
        return next_token_mask(batch).sum().double().unsqueeze(0)

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        weights_BT = mean_weights(next_token_mask(batch), counts[0])
        next_token, _ = head(states.hidden, batch.targets, weights_BT)
        return {"loss": next_token, "loss_next_token": next_token.detach()}

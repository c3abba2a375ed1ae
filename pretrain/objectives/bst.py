"""The belief state transformer (Hu et al., arXiv 2410.23506): next and previous token from a prefix and a suffix.

    f_t          final hidden state of the forward encoder, the trunk: x_≤t of the document
    b_s          that of a backward encoder, as deep, which reads x_s … to the document's end; embedding shared
    combine      z = [f_t ; b_s];  z + SwiGLU(z);  norm;  the halves are n and p, of the trunk's width each
    loss         mean over pairs t < s of one document of ½ · (−log p(x_{t+1} | n) − log p(x_{s−1} | p))

Both encoders count positions from the document: forwards from its start, backwards from its end. The EOS that closes a
document belongs to it backwards. Which pairs there are is told in `pairs`; a row's last column, which the trunk does
not read, is left out. At inference nothing after the text is known, so b is the state of a suffix that is EOS alone.

A pair with nothing between predicts x_{t+1} = x_s and x_{s−1} = x_t, by the formula. The authors' released code sets
EOS as both targets there by default, for infilling; we follow the formula, and the two agree where the suffix is EOS
alone, which is all that next-token prediction reads. That code also averages chunk by chunk and row by row; ours is one
mean over all pairs of the global batch, which does not depend on how the batch is cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import BstConfig, ModelConfig
from pretrain.objectives.base import Objective, TokenBatch, mean_weights
from pretrain.objectives.chunked_loss import cross_entropy_of_made_streams
from pretrain.objectives.pairs import backward_documents, backward_positions, kept_pairs
from pretrain.transformer import Block, TrunkStates, rotary


class BackwardEncoder(nn.Module):
    """The trunk's twin, which reads documents from their end."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.rope_theta = model.rope_theta
        self.head_width = model.width // model.heads
        self.layers = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)

    def forward(self, embeddings_BTD: Tensor, documents_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Final hidden states (B, T, D): a token attends to those after it of its own document, and to itself."""
        rotation = rotary(positions_BT, self.head_width, self.rope_theta, embeddings_BTD.dtype)
        mask_B1TT = (documents_BT[:, :, None] == documents_BT[:, None, :]).triu().unsqueeze(1)
        x_BTD = embeddings_BTD
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation, mask_B1TT)
        return self.norm(x_BTD)


class PairHead(nn.Module):
    """A prefix's and a suffix's state to what the output head reads for the next and for the previous token.

    Its weights are parameters of its own, not of linear layers in it: under ZeRO-3 they are then whole from its
    forward's start to its end, however many chunks of pairs there are, and ranks may differ in that number.
    """

    def __init__(self, model: ModelConfig):
        super().__init__()
        double = 2 * model.width
        inner = pair_inner_width(model)
        self.epsilon = model.norm_epsilon
        self.gate = nn.Parameter(torch.empty(inner, double))
        self.up = nn.Parameter(torch.empty(inner, double))
        self.down = nn.Parameter(torch.empty(double, inner))
        self.norm = nn.Parameter(torch.empty(double))

    def forward(
        self,
        forward_BTD: Tensor,
        backward_BTD: Tensor,
        pairs_P3: Tensor,
        targets_2P: Tensor,
        weights_2P: Tensor,
        head: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """Half the sum of both cross-entropies, (); and each, (2,), without gradient."""
        halves = weights_2P.new_tensor([0.5, 0.5])

        def states_of(here: slice, forward_BTD: Tensor, backward_BTD: Tensor, *weights: Tensor) -> Tensor:
            row, t, s = pairs_P3[here].unbind(1)
            return self.combine(forward_BTD[row, t], backward_BTD[row, s], *weights)

        def loss_of(forward_BTD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
            sources = (forward_BTD, backward_BTD, self.gate, self.up, self.down, self.norm)
            return cross_entropy_of_made_streams(states_of, sources, head_VD, targets_2P, weights_2P, halves)

        return head(forward_BTD, compute=loss_of)

    def combine(
        self, forward_PD: Tensor, backward_PD: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm: Tensor
    ) -> Tensor:
        """(2, P, D): what the output head reads for the next and for the previous token of each pair."""
        x = torch.cat([forward_PD, backward_PD], dim=-1)
        x = x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return torch.stack(F.rms_norm(x, norm.shape, norm, self.epsilon).chunk(2, dim=-1))


class BeliefState(Objective):
    """Next and previous token for pairs of a prefix and a suffix.

    Args:
        config: the run's objective section.
        model: the trunk's shape.
    """

    needed_at_inference = True

    def __init__(self, config: BstConfig, model: ModelConfig):
        super().__init__()
        self.fraction = config.pair_fraction
        self.backward_encoder = BackwardEncoder(model)
        self.pair_head = PairHead(model)

    def valid_counts(self, batch: TokenBatch) -> Tensor:
        """(1,) float64: the pairs that are trained on."""
        return torch.tensor([len(kept_pairs(batch, self.fraction))], device=batch.tokens.device).double()

    def forward(self, states: TrunkStates, batch: TokenBatch, head: nn.Module, counts: Tensor) -> dict[str, Tensor]:
        """See `Objective.forward`. `loss_next_token` knows the suffix, so it is below that of other objectives."""
        documents_BT = backward_documents(batch)
        backward_BTD = self.backward_encoder(states.embeddings, documents_BT, backward_positions(documents_BT))
        pairs_P3 = kept_pairs(batch, self.fraction)
        row, t, s = pairs_P3.unbind(1)
        targets_2P = torch.stack([batch.tokens[row, t + 1], batch.tokens[row, s - 1]])
        weights_2P = mean_weights(torch.ones_like(targets_2P), counts[0])
        loss, (next_token, previous_token) = self.pair_head(
            states.hidden, backward_BTD, pairs_P3, targets_2P, weights_2P, head
        )
        return {"loss": loss, "loss_next_token": next_token, "loss_previous_token": previous_token}

    def next_token_states(self, states: TrunkStates, eos_embedding_D: Tensor) -> Tensor:
        """Of every prefix with a suffix that is EOS alone."""
        hidden_BTD = states.hidden
        alone = torch.zeros(1, 1, dtype=torch.long, device=hidden_BTD.device)  # one token, one document, position 0
        suffix_D = self.backward_encoder(eos_embedding_D[None, None], alone, alone)[0, 0]
        weights = (self.pair_head.gate, self.pair_head.up, self.pair_head.down, self.pair_head.norm)
        return self.pair_head.combine(hidden_BTD, suffix_D.expand_as(hidden_BTD), *weights)[0]


def pair_inner_width(model: ModelConfig) -> int:
    """Inner width of the pair head's SwiGLU: 128·round((8·2D/3)/128), the paper's rule for a width of 2D."""
    return max(128, 128 * round(16 * model.width / 3 / 128))

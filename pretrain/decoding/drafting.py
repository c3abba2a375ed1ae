"""Drafting: one step of the latent dynamics model, and how many steps a cycle should take.

A draft step maps (state, token) to (next state, logits of the token after it), for the B texts of a batch at once;
the state starts as the trunk's own hidden state. Any objective that can draft does so through this interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.latent_dynamics import LatentDynamics

DraftStep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(states (B, D), token ids (B,)) → (next states (B, D), logits (B, V))."""


def draft_with_latent_dynamics(
    model: Any, dynamics: LatentDynamics, vocabulary: Sequence[int] | None = None
) -> DraftStep:
    """ĥ' = p_ψ(ĥ, x), logits = head · ĥ', with the embedding and the head of `model` (LlamaForCausalLM).

    vocabulary: token ids that may be drafted; None for all. The head's rows of the others are not read, which makes
    the step cheaper, and their logits are −∞. The text's distribution stays as it is: a token that is never drafted
    still comes from the target, by the residual.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if vocabulary is None:

        def step(state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
            state_BD = dynamics.step(state_BD, embedding.weight[token_B])
            return state_BD, head(state_BD)

        return step

    ids_N = torch.tensor(sorted(set(vocabulary)), device=head.weight.device)
    head_ND = head.weight.detach()[ids_N].contiguous()

    def trimmed_step(state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        state_BD = dynamics.step(state_BD, embedding.weight[token_B])
        logits_BV = state_BD.new_full((len(state_BD), len(head.weight)), float("-inf"))
        logits_BV[:, ids_N] = F.linear(state_BD, head_ND)
        return state_BD, logits_BV

    return trimmed_step


class DraftLength(Protocol):
    """Decides how many tokens a cycle drafts, and is told what came of it.

    The texts of a batch draft together, one step for all: a text that drafted less than its neighbours would save
    nothing.
    """

    def wants_another(self, drafted: int) -> bool:
        """Draft once more, with `drafted` tokens drafted in this cycle? 0 begins a cycle."""

    def saw_draft(self, logits_BV: Tensor, seconds: float) -> None:
        """Drafts were drawn after these logits; with the draft step it took so long."""

    def saw_verification(self, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """The cycle's drafts were verified: of each text, how many stood of how many."""


class FixedLength:
    """The same number of drafts in every cycle."""

    def __init__(self, length: int):
        self.length = length

    def wants_another(self, drafted: int) -> bool:
        """See `DraftLength`."""
        return drafted < self.length

    def saw_draft(self, logits_BV: Tensor, seconds: float) -> None:
        """See `DraftLength`."""

    def saw_verification(self, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """See `DraftLength`."""


class AdaptiveLength:
    """Draft on while it pays, from what was seen so far in these texts.

    With s_i the chance that the i drafts made so far all stand and a the chance that one more would, another draft
    yields Σ s_i · a tokens, over the texts of the batch, and costs c = (a draft step) + (one more token of each text in
    the verification). It is made if

        Σ s_i · a / c  >  r,        r = tokens per second over the last cycles,

    which is the stopping rule that maximises the long-run rate (renewal-reward theorem). All is estimated online:

    - s_i is the product of the acceptance measured for drafts of like confidence (the draft distribution's largest
      probability, in ten bins); a is the acceptance measured at the next position, not yet drafted.
    - c and r come from the clock; the verification's cost is a line in the number of drafts.
    - Counts fade by FADING a cycle towards PRIOR. So a length that was given up is tried again some time.

    The decision falls before the draft is drawn, so it cannot depend on it, and the sampled distribution stays
    exact. It depends on the clock, so with temperature > 0 a seed does not fix the text.
    """

    LONGEST = 16
    FADING = 0.98
    PRIOR = (0.8, 2.0)  # acceptance before any was seen, and how many observations that is worth
    BINS = 10
    FIRST_CYCLES = 4  # with growing lengths, to learn the costs

    def __init__(self) -> None:
        self._by_confidence: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # accepted, seen
        self._by_position: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._draft_seconds = [0.0, 0.0]  # sum, count
        self._line = [0.0] * 5  # count, Σk, Σk², Σt, Σkt of verifications: k drafts took t seconds
        self._rate = [0.0, 0.0]  # tokens, seconds
        self._cycles = 0
        self._texts = 1
        self._bins: list[list[int]] = []  # of this cycle's drafts: position, text → bin of confidence
        self._alive: list[float] = []  # text → s_i
        self._cycle_draft_seconds = 0.0

    def wants_another(self, drafted: int) -> bool:
        """See `DraftLength`."""
        if drafted == 0:
            self._bins, self._alive, self._cycle_draft_seconds = [], [], 0.0
        if self._cycles < self.FIRST_CYCLES:
            return drafted <= self._cycles
        if drafted >= self.LONGEST:
            return False
        alive = sum(self._alive) if drafted else self._texts
        gain = alive * self._acceptance(self._by_position[drafted])
        return gain * self._rate[1] > self._cost() * self._rate[0]

    def saw_draft(self, logits_BV: Tensor, seconds: float) -> None:
        """See `DraftLength`."""
        confidences = logits_BV.float().softmax(-1).amax(-1).tolist()
        bins = [min(int(confidence * self.BINS), self.BINS - 1) for confidence in confidences]
        before = self._alive or [1.0] * len(bins)
        self._alive = [s * self._acceptance(self._by_confidence[b]) for s, b in zip(before, bins, strict=True)]
        self._bins.append(bins)
        self._cycle_draft_seconds += seconds

    def saw_verification(self, accepted: list[int], drafted: list[int], seconds: float) -> None:
        """See `DraftLength`."""
        for counts in (*self._by_confidence.values(), *self._by_position.values()):
            counts[:] = [self.FADING * count for count in counts]
        for text, (stood, made) in enumerate(zip(accepted, drafted, strict=True)):
            for position in range(min(stood + 1, made)):  # later ones were never compared
                for counts in (self._by_position[position], self._by_confidence[self._bins[position][text]]):
                    counts[0] += position < stood
                    counts[1] += 1
        steps, total = len(self._bins), seconds + self._cycle_draft_seconds
        self._draft_seconds = self._faded(self._draft_seconds, [self._cycle_draft_seconds, steps])
        self._rate = self._faded(self._rate, [len(accepted) + sum(accepted), total])
        self._line = self._faded(self._line, [1, steps, steps**2, seconds, steps * seconds])
        self._texts = len(accepted)
        self._cycles += 1

    def _acceptance(self, counts: list[float]) -> float:
        chance, weight = self.PRIOR
        return (counts[0] + chance * weight) / (counts[1] + weight)

    def _cost(self) -> float:
        """Seconds that one more draft adds to a cycle."""
        n, k, kk, t, kt = self._line
        spread = n * kk - k * k
        # Where the lengths hardly varied the slope cannot be told from noise: the added n·n draws it to zero.
        slope = max(0.0, (n * kt - k * t) / (spread + n * n))
        return self._draft_seconds[0] / max(self._draft_seconds[1], 1.0) + slope

    def _faded(self, sums: list[float], new: list[float]) -> list[float]:
        return [self.FADING * a + b for a, b in zip(sums, new, strict=True)]

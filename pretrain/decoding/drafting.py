"""Drafting: one step of the latent dynamics model, and how many steps a cycle should take.

A draft step maps (state, token) to (next state, logits of the token after it); the state starts as the trunk's
own hidden state. Any objective that can draft does so through this interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from pretrain.latent_dynamics import LatentDynamics

DraftStep = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(state (D,), token id) → (next state (D,), logits (V,))."""


def draft_with_latent_dynamics(model: Any, dynamics: LatentDynamics) -> DraftStep:
    """ĥ' = p_ψ(ĥ, x), logits = head · ĥ', with the embedding and the head of `model` (LlamaForCausalLM)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def step(state_D: Tensor, token: int) -> tuple[Tensor, Tensor]:
        state_D = dynamics.step(state_D, embedding.weight[token])
        return state_D, head(state_D)

    return step


class DraftLength(Protocol):
    """Decides how many tokens a cycle drafts, and is told what came of it."""

    def wants_another(self, drafted: int) -> bool:
        """Draft once more, with `drafted` tokens drafted in this cycle? 0 begins a cycle."""

    def saw_draft(self, logits_V: Tensor, seconds: float) -> None:
        """A draft was drawn after these logits; with the draft step it took so long."""

    def saw_verification(self, accepted: int, drafted: int, seconds: float) -> None:
        """The cycle's drafts were verified."""


class FixedLength:
    """The same number of drafts in every cycle."""

    def __init__(self, length: int):
        self.length = length

    def wants_another(self, drafted: int) -> bool:
        """See `DraftLength`."""
        return drafted < self.length

    def saw_draft(self, logits_V: Tensor, seconds: float) -> None:
        """See `DraftLength`."""

    def saw_verification(self, accepted: int, drafted: int, seconds: float) -> None:
        """See `DraftLength`."""


class AdaptiveLength:
    """Draft on while it pays, from what was seen so far in this text.

    With s_i the chance that the i drafts made so far all stand and a the chance that one more would, another draft
    yields s_i · a tokens and costs c = (a draft step) + (one more token in the verification). It is made if

        s_i · a / c  >  r,        r = tokens per second over the last cycles,

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
        self._confidences: list[float] = []
        self._cycle_draft_seconds = 0.0

    def wants_another(self, drafted: int) -> bool:
        """See `DraftLength`."""
        if drafted == 0:
            self._confidences, self._cycle_draft_seconds = [], 0.0
        if self._cycles < self.FIRST_CYCLES:
            return drafted <= self._cycles
        if drafted >= self.LONGEST:
            return False
        alive = 1.0
        for confidence in self._confidences:
            alive *= self._acceptance(self._by_confidence[self._bin(confidence)])
        gain = alive * self._acceptance(self._by_position[drafted])
        return gain * self._rate[1] > self._cost() * self._rate[0]

    def saw_draft(self, logits_V: Tensor, seconds: float) -> None:
        """See `DraftLength`."""
        self._confidences.append(float(logits_V.softmax(-1).max()))
        self._cycle_draft_seconds += seconds

    def saw_verification(self, accepted: int, drafted: int, seconds: float) -> None:
        """See `DraftLength`."""
        for counts in (*self._by_confidence.values(), *self._by_position.values()):
            counts[:] = [self.FADING * count for count in counts]
        for position in range(min(accepted + 1, drafted)):  # later ones were never compared
            for counts in (
                self._by_position[position],
                self._by_confidence[self._bin(self._confidences[position])],
            ):
                counts[0] += position < accepted
                counts[1] += 1
        total = seconds + self._cycle_draft_seconds
        self._draft_seconds = self._faded(self._draft_seconds, [self._cycle_draft_seconds, drafted])
        self._rate = self._faded(self._rate, [1 + accepted, total])
        self._line = self._faded(self._line, [1, drafted, drafted**2, seconds, drafted * seconds])
        self._cycles += 1

    def _acceptance(self, counts: list[float]) -> float:
        chance, weight = self.PRIOR
        return (counts[0] + chance * weight) / (counts[1] + weight)

    def _bin(self, confidence: float) -> int:
        return min(int(confidence * self.BINS), self.BINS - 1)

    def _cost(self) -> float:
        """Seconds that one more draft adds to a cycle."""
        n, k, kk, t, kt = self._line
        spread = n * kk - k * k
        # Where the lengths hardly varied the slope cannot be told from noise: the added n·n draws it to zero.
        slope = max(0.0, (n * kt - k * t) / (spread + n * n))
        return self._draft_seconds[0] / max(self._draft_seconds[1], 1.0) + slope

    def _faded(self, sums: list[float], new: list[float]) -> list[float]:
        return [self.FADING * a + b for a, b in zip(sums, new, strict=True)]

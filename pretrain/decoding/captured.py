"""A draft step as one CUDA graph: to launch a small model's kernels one by one takes longer than to run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Graph:
    """What was captured, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]

    def __call__(self, state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        for place, value in zip(self.inputs, (state_BD, token_B), strict=True):
            place.copy_(value)
        self.graph.replay()
        next_BD, logits_BV = self.outputs
        return next_BD.clone(), logits_BV.clone()  # the next replay writes over them


class CapturedStep:
    """A `drafting.DraftStep` on a GPU that is captured for each number of texts, and again if `weight` has moved.

    The first steps of so many texts run as they are: libraries set themselves up outside a capture, and numbers of
    texts that pass, as texts end one by one, cost none. `launched` is the step as it is, kernel by kernel.
    """

    EAGER = 3

    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], weight: Tensor):
        self.launched, self._weight = step, weight
        self._steps: Counter[tuple[int, int]] = Counter()
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, state_BD: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
        """See `drafting.DraftStep`."""
        case = len(state_BD), self._weight.data_ptr()
        if case not in self._graphs:
            self._steps[case] += 1
            if self._steps[case] <= self.EAGER:
                return self.launched(state_BD, token_B)
            self._graphs[case] = self._capture(state_BD, token_B)
        return self._graphs[case](state_BD, token_B)

    def _capture(self, state_BD: Tensor, token_B: Tensor) -> _Graph:
        with torch.inference_mode(False):  # else only inference mode may write to them, in all steps to come
            inputs = state_BD.clone(), token_B.clone()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(state_BD.device)
        # What other threads do on the GPU meanwhile is their own affair.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self.launched(*inputs)
        return _Graph(graph, inputs, outputs)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that graphs of a GPU are captured on: torch's own is of the GPU that is current when it is first used.

    What runs on another GPU than the stream's is not captured, and a graph without it replays nothing. One for all:
    libraries keep memory for each stream that they see.
    """
    return torch.cuda.Stream(device)

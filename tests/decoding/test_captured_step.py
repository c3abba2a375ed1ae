"""Draft steps as CUDA graphs. Without a GPU, of a graph that works as one does: in place, and on the same memory."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from decoding_helpers import make_llama
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.decoding import FixedLength, captured, draft_with_latent_dynamics, generate_batch
from pretrain.decoding.captured import CapturedStep
from pretrain.decoding.loading import Export


class PretendedGraphs:
    """What torch.cuda's graphs do, on a CPU: a replay computes from the captured inputs into the captured outputs."""

    def __init__(self, step):
        self.step, self.captures, self.replays, self.streams = step, [], 0, []
        self._graph = self._captured_on = None

    def __call__(self, state_BD, token_B):
        """The step, seen while it is captured."""
        outputs = self.step(state_BD, token_B)
        if self._graph is not None and state_BD.device == self._captured_on:  # other GPUs' work is not captured
            self._graph.inputs, self._graph.outputs = (state_BD, token_B), outputs
            self.captures.append(len(state_BD))
        return outputs

    def CUDAGraph(self):
        owner = self

        class Graph:
            def replay(self):
                owner.replays += 1
                with torch.inference_mode():  # a replay knows nothing of modes
                    for place, value in zip(self.outputs, owner.step(*self.inputs), strict=True):
                        place.copy_(value)

        return Graph()

    def Stream(self, device):
        self.streams.append(device)
        return device

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self._graph, self._captured_on = graph, stream
        yield
        self._graph = None


@pytest.fixture
def pretended(monkeypatch):
    model, dynamics = make_llama()
    model, dynamics = model.double(), dynamics.double()
    graphs = PretendedGraphs(draft_with_latent_dynamics(model, dynamics))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.graph)
    monkeypatch.setattr(torch.cuda, "Stream", graphs.Stream)
    captured._capture_stream.cache_clear()
    yield model, graphs
    captured._capture_stream.cache_clear()


def captured_step(model, graphs):
    """A step that has just been captured, in inference mode; its inputs, and what it gave."""
    step = CapturedStep(graphs, model.lm_head.weight)
    inputs = torch.randn(2, 32, dtype=torch.float64), torch.tensor([3, 4])
    with torch.inference_mode():
        for _ in range(CapturedStep.EAGER + 1):
            given = step(*inputs)
    assert graphs.captures == [2]
    return step, inputs, given


def test_a_replay_gives_what_the_step_gives_and_leaves_earlier_results_alone(pretended):
    model, graphs = pretended
    step = CapturedStep(graphs, model.lm_head.weight)
    with torch.inference_mode():
        given, expected = [], []
        for number in range(12):
            texts = 2 + number % 2
            inputs = torch.randn(texts, 32, dtype=torch.float64), torch.randint(0, 7, (texts,))
            kept = [value.clone() for value in inputs]
            given.append(step(*inputs))
            expected.append(graphs.step(*kept))
            assert all(map(torch.equal, inputs, kept))
    for mine, right in zip(given, expected, strict=True):
        assert all(map(torch.equal, mine, right))
    assert graphs.captures == [2, 3] and graphs.streams == [torch.device("cpu")]
    assert graphs.replays == 12 - 2 * CapturedStep.EAGER


def test_what_was_captured_in_inference_mode_is_replayed_outside_it_too(pretended):
    model, graphs = pretended
    step, inputs, expected = captured_step(model, graphs)
    with torch.no_grad():
        assert all(map(torch.equal, step(*inputs), expected))
    assert graphs.replays == 2


def test_weights_that_have_moved_are_captured_again(pretended):
    model, graphs = pretended
    step, inputs, _ = captured_step(model, graphs)
    with torch.inference_mode():
        model.lm_head.weight.data = 2.0 * model.lm_head.weight
        for _ in range(CapturedStep.EAGER + 1):
            moved = step(*inputs)
        assert graphs.captures == [2, 2] and torch.equal(moved[1], graphs.step(*inputs)[1])


def test_texts_of_a_batch_are_those_of_the_plain_step(pretended):
    model, graphs = pretended
    prompts = [[1, 2, 3], [4], [5, 6], [2, 2]]
    step = CapturedStep(graphs, model.lm_head.weight)
    counted = [
        generate_batch(model, prompts, 40, draft_step=each, draft_length=FixedLength(3)) for each in (step, graphs.step)
    ]
    assert counted[0][0] == counted[1][0]
    assert counted[0][1].accepted == counted[1][1].accepted > 10 and graphs.replays > 10


class Operations(TorchDispatchMode):
    """Names of all operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", [None, [5, 2, 3]])
def test_a_step_does_nothing_that_a_capture_refuses(vocabulary):
    model, dynamics = make_llama()
    step = draft_with_latent_dynamics(model, dynamics, vocabulary)
    inputs = torch.randn(2, 32), torch.tensor([3, 4])
    with torch.inference_mode(), Operations() as operations:
        step(*inputs)
    # Values of the GPU that the host waits for, shapes that depend on them, and what comes from the host's memory.
    refused = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "_to_copy", "scalar_tensor"}
    assert {"index", "linear"} < set(operations.names) and not refused & set(operations.names)


def test_a_step_is_kept_for_each_draft_vocabulary_as_its_graphs_are_with_it():
    model, dynamics = make_llama()
    export = Export(Path("model"), model, None, dynamics, {})
    assert export.draft_step() is export.draft_step() is not export.draft_step([5, 2])
    assert export.draft_step([5, 2]) is export.draft_step([5, 2]) is not export.draft_step([5, 3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocabulary", [None, [5, 2, 3]])
def test_on_a_gpu(vocabulary):
    last = torch.device("cuda", torch.cuda.device_count() - 1)  # of several not the current one
    model, dynamics = (module.to(last).double() for module in make_llama())
    step = draft_with_latent_dynamics(model, dynamics, vocabulary)
    assert isinstance(step, CapturedStep)
    prompts = [[1, 2, 3], [4], [5, 6], [2, 2]]
    counted = [
        generate_batch(model, prompts, 40, draft_step=each, draft_length=FixedLength(3))
        for each in (step, step.launched)
    ]
    assert counted[0][0] == counted[1][0] and counted[0][1].accepted == counted[1][1].accepted
    assert step._graphs

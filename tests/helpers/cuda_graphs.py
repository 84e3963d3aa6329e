"""torch.cuda's graph functions on the CPU: a graph is the function that was captured, called again at each replay.

What it shows: the order of calls, when a step is captured anew, what is refused, and that a replay's step is the plain
loop's. What it can't show: what a real graph keeps for good, since a replay reads Python's values anew; so tests count
captures where these have changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_ademamix.training import captured
from torch_ademamix.training.captured import CapturedTrainStep


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Graphs:
    """What was called, in its order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.graph: CUDAGraph | None = None  # that is captured now
        self.default = Stream("the default stream", self.log)

    @property
    def captures(self) -> int:
        return self.log.count("capture")


class CUDAGraph:
    body: Any = None
    result: Any = None

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def replay(self) -> None:
        self.graphs.log.append("replay")
        for old, new in zip(tree_leaves(self.result), tree_leaves(self.body()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    graphs = Graphs()
    run, fork_rng = CapturedTrainStep._run, torch.random.fork_rng

    def recorded_run(step: CapturedTrainStep, update: Any) -> Any:
        if graphs.graph is None:
            graphs.log.append("warm-up")
            return run(step, update)
        graphs.graph.body = lambda: run(step, update)
        with _without_effect(step):
            graphs.graph.result = run(step, update)
        return graphs.graph.result

    @contextmanager
    def graph(graph: CUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        graphs.log.append("capture")
        graphs.graph = graph
        yield
        graphs.graph = None

    @contextmanager
    def nothing(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(captured, "_one_cuda_device", lambda loop: torch.device("cpu"))
    monkeypatch.setattr(CapturedTrainStep, "_run", recorded_run)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng(devices=[]))
    for name, value in {
        "Stream": lambda: Stream("a stream", graphs.log),
        "current_stream": lambda: graphs.default,
        "stream": nothing,
        "device": nothing,
        "CUDAGraph": lambda: CUDAGraph(graphs),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs


@contextmanager
def _without_effect(step: CapturedTrainStep) -> Iterator[None]:
    """As a capture computes nothing."""
    optimizer = step._body.optimizer
    tensors = [*step._body.model.parameters(), *step._body.model.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    tensors += [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    before = [t.detach().clone() for t in tensors]
    random = torch.get_rng_state()
    yield
    torch.set_rng_state(random)
    with torch.no_grad():
        for t, value in zip(tensors, before, strict=True):
            t.copy_(value)

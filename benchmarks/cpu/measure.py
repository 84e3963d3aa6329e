"""Takes the figures of `benchmarks.cpu`."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.cpu.cases import IN_PLACE, IN_PLACE_NUMEL, Case, Group
from benchmarks.cpu.peers import PEERS
from benchmarks.cpu.rounds import Times, seconds_per_call, take_turns
from benchmarks.shared import footprint

Clock = Callable[[], float]


@dataclass
class Result:
    """What was measured in one case."""

    case: Case
    times: list[Times] = field(default_factory=list)  # by group
    state_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)  # of state and what a step allocates beside it
    absent: dict[str, str] = field(default_factory=dict)
    load_average: list[float] = field(default_factory=list)  # before and after

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.case.shapes)

    def times_of(self, name: str) -> Times:
        return next(times for times in self.times if name in times.rounds)

    def ratio(self, name: str, other: str) -> float:
        return self.times_of(name).ratio(name, other)

    def traffic(self, name: str) -> int:
        """Bytes that a step reads and writes."""
        if name == IN_PLACE:
            return 2 * 4 * IN_PLACE_NUMEL  # float32, read and written
        return 3 * self.case.dtype.itemsize * self.numel + 2 * self.state_bytes[name]


def run_case(case: Case, rounds: int | None = None, clock: Clock = time.perf_counter) -> Result:
    """Measures one case; `rounds` instead of those that its groups ask for."""
    result = Result(case, load_average=[os.getloadavg()[0]])
    for group in case.groups:
        params = [torch.nn.Parameter(torch.randn(shape, dtype=case.dtype)) for shape in case.shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        result.times.append(run_group(group, params, result, rounds or group.rounds, clock))
    result.load_average.append(os.getloadavg()[0])
    return result


def run_group(group: Group, params: list[torch.Tensor], result: Result, rounds: int, clock: Clock) -> Times:
    torch._dynamo.reset()  # other groups' guards
    steps: dict[str, Callable[[], object]] = {}
    first = {}
    for name in (*group.names, *group.references):
        if name == IN_PLACE:
            buffer = torch.ones(IN_PLACE_NUMEL)
            steps[name] = lambda buffer=buffer: buffer.mul_(1.0)
            first[name] = seconds_per_call(steps[name])
            continue
        if name in result.case.left_out:
            result.absent[name] = result.case.left_out[name]
            continue
        try:
            peer = PEERS[name](params)
            first[name] = seconds_per_call(peer.step)
        except ImportError as error:
            result.absent[name] = f"not installed: {error}"
            continue
        steps[name] = peer.step
        result.state_bytes[name] = footprint.state_bytes(peer.state)
        allocated = footprint.peak_bytes(peer.step)
        result.peak_bytes[name] = None if allocated is None else result.state_bytes[name] + allocated
    measured = take_turns(steps, rounds=rounds, calls=group.calls, title=result.case.title, clock=clock)
    return Times(measured, first)

"""What is on the GPU: times between events, the profiler's events, memory."""

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Step = Callable[[], object]

DEVICE = "cuda"
OVERWRITTEN_BYTES = 2**28  # more than any L2 cache
COPIED_NUMEL = 2**28  # of float32, to see what a copy reaches
HEAD_START_CYCLES = 10_000_000  # some 5 ms, in which the host enqueues a step


class Prepared:
    """A step with what has to be done before each, outside the time."""

    def __init__(self, before: Step, step: Step) -> None:
        self.before, self.step = before, step

    def __call__(self) -> object:
        return self.step()


def gpu_times(step: Step, steps: int) -> list[float]:
    """Seconds on the GPU."""
    overwritten = torch.empty(OVERWRITTEN_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(steps):
        if isinstance(step, Prepared):
            step.before()
        overwritten.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)  # else a short step is over before its last launch has come
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times


def step_time(step: Step, steps: int) -> float:
    """Seconds per step, when they follow one another: the host's, where that is what they wait for."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def gpu_events(step: Step) -> list[Any]:
    """The profiler's events of a step on the GPU: kernels, copies and fills."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Optimizer.")  # a label
    ]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.randn(COPIED_NUMEL, device=DEVICE)
    target = torch.empty_like(source)
    times = gpu_times(lambda: target.copy_(source), 20)
    return 2 * source.nbytes / median(times)


def free_memory() -> None:
    gc.collect()  # models and their compiled steps refer to each other
    torch.cuda.empty_cache()

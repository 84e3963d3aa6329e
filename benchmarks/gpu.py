"""Speed on a GPU, side by side with others, in one run: `python -m benchmarks.gpu`.

Times are medians over steps, each between two CUDA events after the caches have been overwritten; "us in a row" is the
time of a step where many follow one another, which is the host's where the host is slower. GB/s counts the traffic that
an update can't do without; its share is of what a copy on the device reaches in the same run. "Paged out" steps find
their state in the host's memory. What compiles comes last. Each row is written to the folder as soon as it is measured.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_report
from benchmarks.report import summary
from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit, paging

Step = Callable[[], object]
Shapes = list[tuple[int, ...]]

DEVICE = "cuda"
OVERWRITTEN_BYTES = 2**28  # more than any L2 cache
HEAD_START_CYCLES = 10_000_000  # some 5 ms, in which the host enqueues a step
COPIED_NUMEL = 2**28  # of float32, to see what a copy reaches
WARM_UP = 5

GPT2: Shapes = [
    (50257, 768),
    (1024, 768),
    *[
        shape
        for _ in range(12)
        for shape in (
            *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
            *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
        )
    ],
    (768,),
    (768,),
]
LLAMA_8B_LAYER: Shapes = [
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    *((14336, 4096), (14336, 4096), (4096, 14336)),
    *((4096,), (4096,)),
]

CASES: dict[str, Shapes] = {
    gpu_report.LARGE: [(2**24,)] * 8,
    "32 x (2048, 2048)": [(2048, 2048)] * 32,
    gpu_report.GPT2_124M: GPT2,
    "Llama-8B layer x 4": LLAMA_8B_LAYER * 4,
    gpu_report.SMALL: [(4096,)] * 1000,
}


# The competitors: each takes parameters that have gradients, makes its state and returns its step.


def replayed(step: Step) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def ours(cls: type[AdEMAMix], how: str = "eager") -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        optimizer = cls(params, capturable=True)
        optimizer.init_state()
        if how == "compiled":
            return torch.compile(optimizer.step, fullgraph=True)  # type: ignore[no-any-return]
        return replayed(optimizer.step) if how == "replayed" else optimizer.step

    return make


def paged_out(cls: type[AdEMAMix]) -> Callable[[list[Tensor]], Step]:
    """Each step finds its state in the host's memory; the time is that of bringing it back and computing."""

    def make(params: list[Tensor]) -> Step:
        optimizer = cls(params, capturable=True)
        optimizer.init_state()

        def before() -> None:
            for state in optimizer.state.values():
                for tensor in state.values():
                    if tensor.numel() >= paging.MIN_PAGED_SIZE:
                        paging.page_out(tensor)

        return _Prepared(before, optimizer.step)

    return make


class _Prepared:
    """A step with what has to be done before each, outside the time."""

    def __init__(self, before: Step, step: Step) -> None:
        self.before, self.step = before, step

    def __call__(self) -> object:
        return self.step()


def plain_compiled(params: list[Tensor]) -> Step:
    """The formula written down for torch.compile; tensors hold what changes with the step."""
    beta1, beta2, beta3, alpha, lr, eps, weight_decay = 0.9, 0.999, 0.9999, 5.0, 1e-3, 1e-8, 1e-2
    grads = [p.grad for p in params]
    state = [tuple(torch.zeros_like(p, dtype=torch.float32) for _ in range(3)) for p in params]
    step = torch.zeros((), device=DEVICE)

    @torch.compile(fullgraph=True)
    @torch.no_grad()
    def update() -> None:
        step.add_(1)
        bias1, sqrt_bias2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        for p, g, (m1, m2, nu) in zip(params, grads, state, strict=True):
            m1.copy_(beta1 * m1 + (1 - beta1) * g)
            m2.copy_(beta3 * m2 + (1 - beta3) * g)
            nu.copy_(beta2 * nu + (1 - beta2) * g * g)
            direction = (m1 / bias1 + alpha * m2) / (nu.sqrt() / sqrt_bias2 + eps)
            p.copy_(p - lr * (direction + weight_decay * p))

    return update


def adamw_fused(params: list[Tensor]) -> Step:
    return torch.optim.AdamW(params, fused=True).step


def torchao_adamw8bit(params: list[Tensor]) -> Step:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params).step  # type: ignore[no-any-return]


def bitsandbytes(name: str) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        import bitsandbytes.optim

        check_bitsandbytes()
        return getattr(bitsandbytes.optim, name)(params).step  # type: ignore[no-any-return]

    return make


def check_bitsandbytes() -> None:
    """Its CUDA errors end the process that they happen in, so another one makes the first step."""
    if problem := _bitsandbytes_problem(DEVICE):
        raise RuntimeError(problem)


@cache
def _bitsandbytes_problem(device: str) -> str | None:
    program = f"""
import torch, bitsandbytes.optim
p = torch.nn.Parameter(torch.ones(5000, device="{device}"))
p.grad = torch.ones_like(p)
bitsandbytes.optim.AdEMAMix8bit([p]).step()
print(p.sum().item())"""
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = (tried.stdout + tried.stderr).strip().splitlines()
    return None if tried.returncode == 0 else f"bitsandbytes can't make a step here: {lines[-1] if lines else ''}"


def bitsandbytes_paged_out(params: list[Tensor]) -> Step:
    """Its state is in managed memory, too, which its steps bring to the GPU parameter by parameter."""
    import bitsandbytes.functional
    import bitsandbytes.optim

    check_bitsandbytes()
    optimizer = bitsandbytes.optim.PagedAdEMAMix8bit(params)

    def before() -> None:
        for state in optimizer.state.values():
            for value in state.values():
                if getattr(value, "is_paged", False):
                    bitsandbytes.functional.prefetch_tensor(value, to_cpu=True)
        torch.cuda.synchronize()

    return _Prepared(before, optimizer.step)


@dataclass(frozen=True)
class Competitor:
    make: Callable[[list[Tensor]], Step]  # raises where the peer isn't installed or can't
    dtype: torch.dtype
    bytes_per_param: float  # read and written: parameter, gradient, state and its scales
    cases: tuple[str, ...] = tuple(CASES)
    is_ours: bool = False
    compiles: bool = False


def own(how: Callable[[list[Tensor]], Step], dtype: torch.dtype, size: float, *cases: str) -> Competitor:
    return Competitor(how, dtype, size, cases or tuple(CASES), is_ours=True)


def own_compiled(cls: type[AdEMAMix], dtype: torch.dtype, size: float) -> Competitor:
    return Competitor(ours(cls, "compiled"), dtype, size, FEW_TENSORS, is_ours=True, compiles=True)


FEW_TENSORS = (gpu_report.LARGE, "32 x (2048, 2048)", "Llama-8B layer x 4")
PAGED = "32 x (2048, 2048)"
SCALES = 3 * 2 * 4 / 256  # of three states, read and written
FP32, BF16 = torch.float32, torch.bfloat16

COMPETITORS = {
    "fp32 AdEMAMix, eager": own(ours(AdEMAMix), FP32, 36),
    "fp32 AdEMAMix, compiled": own_compiled(AdEMAMix, FP32, 36),
    "fp32 AdEMAMix, replayed": own(ours(AdEMAMix, "replayed"), FP32, 36),
    "fp32 PagedAdEMAMix, eager": own(ours(PagedAdEMAMix), FP32, 36, PAGED),
    "fp32 PagedAdEMAMix, paged out": own(paged_out(PagedAdEMAMix), FP32, 36, PAGED),
    "fp32 plain formula, compiled": Competitor(plain_compiled, FP32, 36, FEW_TENSORS, compiles=True),
    "fp32 AdamW, fused": Competitor(adamw_fused, FP32, 28),
    "fp32 bitsandbytes AdEMAMix": Competitor(bitsandbytes("AdEMAMix"), FP32, 36),
    "bf16 AdEMAMix, eager": own(ours(AdEMAMix), BF16, 30),
    "bf16 AdEMAMix8bit, eager": own(ours(AdEMAMix8bit), BF16, 14 + SCALES),
    "bf16 AdEMAMix8bit, compiled": own_compiled(AdEMAMix8bit, BF16, 14 + SCALES),
    "bf16 AdEMAMix8bit, replayed": own(ours(AdEMAMix8bit, "replayed"), BF16, 14 + SCALES),
    "bf16 PagedAdEMAMix8bit, eager": own(ours(PagedAdEMAMix8bit), BF16, 14 + SCALES, PAGED),
    "bf16 PagedAdEMAMix8bit, paged out": own(paged_out(PagedAdEMAMix8bit), BF16, 14 + SCALES, PAGED),
    "bf16 AdamW, fused": Competitor(adamw_fused, BF16, 14),  # its state has the parameters' dtype
    "bf16 bitsandbytes AdEMAMix8bit": Competitor(bitsandbytes("AdEMAMix8bit"), BF16, 12 + SCALES),
    "bf16 bitsandbytes PagedAdEMAMix8bit, paged out": Competitor(bitsandbytes_paged_out, BF16, 12 + SCALES, (PAGED,)),
    "bf16 torchao AdamW8bit": Competitor(torchao_adamw8bit, BF16, 10 + SCALES * 2 / 3, FEW_TENSORS[:2], compiles=True),
}


def gpu_times(step: Step, steps: int) -> list[float]:
    """Seconds on the GPU."""
    overwritten = torch.empty(OVERWRITTEN_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(steps):
        if isinstance(step, _Prepared):
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


def run(case: str, name: str, copy: float, steps: int) -> gpu_report.Result:
    competitor = COMPETITORS[name]
    torch._dynamo.reset()
    params: list[Tensor] = []
    for shape in CASES[case]:
        params.append(torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(competitor.dtype)))
        params[-1].grad = torch.randn(shape, device=DEVICE).to(competitor.dtype)
    step = competitor.make(params)
    for _ in range(WARM_UP):
        step()
    seconds = median(gpu_times(step, steps))
    numel = sum(p.numel() for p in params)
    rate = numel * competitor.bytes_per_param / seconds
    return gpu_report.Result(
        case,
        name,
        seconds * 1e6,
        step_time(step, steps) * 1e6,
        rate / 1e9,
        rate / copy,
        len(gpu_events(step)),
        competitor.bytes_per_param,
    )


def free_memory() -> None:
    gc.collect()  # models and their compiled steps refer to each other
    torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--competitors", default="", help="only those whose name has this in it")
    parser.add_argument("--minutes", type=float, default=8, help="nothing is begun after so many (8)")
    parser.add_argument("--out", type=Path, default=gpu_report.RESULTS, help="folder for speed.json, .md and .svg")
    args = parser.parse_args(arguments)
    begin = time.monotonic()

    gpu_events(lambda: None)  # the profiler must be there before a graph that it is to look into
    report = gpu_report.Report(args.out, gpu_report.machine(), copy_bandwidth())
    print(f"{', '.join(report.machine['gpus'])}: a copy moves {report.copy_bytes_per_second / 1e9:,.0f} GB/s")
    runs = [(case, name) for case in args.cases for name in COMPETITORS if case in COMPETITORS[name].cases]
    for case, name in sorted(runs, key=lambda run: COMPETITORS[run[1]].compiles):
        if args.competitors not in name:
            continue
        result, problem = gpu_report.attempt(
            partial(run, case, name, report.copy_bytes_per_second, args.steps), begin, args.minutes
        )
        free_memory()
        if result:
            report.results[case, name] = result
            print(" | ".join(gpu_report.cells(result)), flush=True)
        else:
            report.left_out[case, name] = problem
            report.ours_failed |= COMPETITORS[name].is_ours and problem.startswith(gpu_report.FAILED)
            print(f"left out: {case}, {name}: {problem}", flush=True)
        report.write()
    report.plot()
    print(report.markdown(), summary(report.required), sep="\n")
    return 1 if report.ours_failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed on a GPU, side by side with others, in one run: `python -m benchmarks.gpu`.

Times are medians over steps, each between two CUDA events after the caches have been overwritten. GB/s counts the
traffic that an update can't do without; its share is of what a copy on the device reaches in the same run.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit, paging

Step = Callable[[], object]
Shapes = list[tuple[int, ...]]

OVERWRITTEN_BYTES = 2**28  # more than any L2 cache
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
    "8 x 2^24": [(2**24,)] * 8,
    "32 x (2048, 2048)": [(2048, 2048)] * 32,
    "GPT-2 124M": GPT2,
    "Llama-8B layer x 4": LLAMA_8B_LAYER * 4,
    "1000 x 4096": [(4096,)] * 1000,
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
    step = torch.zeros((), device="cuda")

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

        return getattr(bitsandbytes.optim, name)(params).step  # type: ignore[no-any-return]

    return make


@dataclass(frozen=True)
class Competitor:
    make: Callable[[list[Tensor]], Step]  # raises where the peer isn't installed or can't
    dtype: torch.dtype
    bytes_per_param: float  # read and written: parameter, gradient, state and its scales
    cases: tuple[str, ...] = tuple(CASES)
    is_ours: bool = False


def own(how: Callable[[list[Tensor]], Step], dtype: torch.dtype, size: float, *cases: str) -> Competitor:
    return Competitor(how, dtype, size, cases or tuple(CASES), is_ours=True)


FEW_TENSORS = ("8 x 2^24", "32 x (2048, 2048)", "Llama-8B layer x 4")
PAGED = "32 x (2048, 2048)"
SCALES = 3 * 2 * 4 / 256  # of three states, read and written
FP32, BF16 = torch.float32, torch.bfloat16

COMPETITORS = {
    "fp32 AdEMAMix, eager": own(ours(AdEMAMix), FP32, 36),
    "fp32 AdEMAMix, compiled": own(ours(AdEMAMix, "compiled"), FP32, 36, *FEW_TENSORS),
    "fp32 AdEMAMix, replayed": own(ours(AdEMAMix, "replayed"), FP32, 36),
    "fp32 PagedAdEMAMix, eager": own(ours(PagedAdEMAMix), FP32, 36, PAGED),
    "fp32 PagedAdEMAMix, paged out": own(paged_out(PagedAdEMAMix), FP32, 36, PAGED),
    "fp32 plain formula, compiled": Competitor(plain_compiled, FP32, 36, FEW_TENSORS),
    "fp32 AdamW, fused": Competitor(adamw_fused, FP32, 28),
    "fp32 bitsandbytes AdEMAMix": Competitor(bitsandbytes("AdEMAMix"), FP32, 36),
    "bf16 AdEMAMix, eager": own(ours(AdEMAMix), BF16, 30),
    "bf16 AdEMAMix8bit, eager": own(ours(AdEMAMix8bit), BF16, 14 + SCALES),
    "bf16 AdEMAMix8bit, compiled": own(ours(AdEMAMix8bit, "compiled"), BF16, 14 + SCALES, *FEW_TENSORS),
    "bf16 AdEMAMix8bit, replayed": own(ours(AdEMAMix8bit, "replayed"), BF16, 14 + SCALES),
    "bf16 PagedAdEMAMix8bit, eager": own(ours(PagedAdEMAMix8bit), BF16, 14 + SCALES, PAGED),
    "bf16 PagedAdEMAMix8bit, paged out": own(paged_out(PagedAdEMAMix8bit), BF16, 14 + SCALES, PAGED),
    "bf16 bitsandbytes AdEMAMix8bit": Competitor(bitsandbytes("AdEMAMix8bit"), BF16, 12 + SCALES),
    "bf16 torchao AdamW8bit": Competitor(torchao_adamw8bit, BF16, 10 + SCALES * 2 / 3, FEW_TENSORS[:2]),
}


@dataclass(frozen=True)
class Result:
    case: str
    competitor: str
    microseconds: float  # of the GPU, from the step's begin to its end
    host_microseconds: float  # of a step, when many follow one another
    gigabytes_per_second: float
    share_of_copy: float
    launches: int
    bytes_per_param: float


def gpu_times(step: Step, steps: int) -> list[float]:
    """Seconds on the GPU."""
    overwritten = torch.empty(OVERWRITTEN_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(steps):
        if isinstance(step, _Prepared):
            step.before()
        overwritten.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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


def launches(step: Step) -> int:
    """Of a step: kernels, and copies and fills."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = gpu_times(lambda: target.copy_(source), 20)
    return 2 * source.nbytes / median(times)


def run(case: str, name: str, copy: float, steps: int) -> Result:
    competitor = COMPETITORS[name]
    torch._dynamo.reset()
    params: list[Tensor] = []
    for shape in CASES[case]:
        params.append(torch.nn.Parameter(torch.randn(shape, device="cuda").to(competitor.dtype)))
        params[-1].grad = torch.randn(shape, device="cuda").to(competitor.dtype)
    step = competitor.make(params)
    for _ in range(WARM_UP):
        step()
    seconds = median(gpu_times(step, steps))
    numel = sum(p.numel() for p in params)
    rate = numel * competitor.bytes_per_param / seconds
    return Result(
        case,
        name,
        seconds * 1e6,
        step_time(step, steps) * 1e6,
        rate / 1e9,
        rate / copy,
        launches(step),
        competitor.bytes_per_param,
    )


TABLE_HEAD = """\
| case | | us | us in a row | GB/s | of copy | launches | bytes/param |
|---|---|---:|---:|---:|---:|---:|---:|"""


def row(r: Result) -> str:
    return (
        f"| {r.case} | {r.competitor} | {r.microseconds:,.1f} | {r.host_microseconds:,.1f} "
        f"| {r.gigabytes_per_second:,.0f} | {r.share_of_copy:.0%} | {r.launches} | {r.bytes_per_param:.1f} |"
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--competitors", default="", help="only those whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    args = parser.parse_args(arguments)

    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e9:,.0f} GB/s")
    print(TABLE_HEAD)
    results, left_out = [], []
    for case in args.cases:
        for name, competitor in COMPETITORS.items():
            if case not in competitor.cases or args.competitors not in name:
                continue
            try:
                results.append(run(case, name, copy, args.steps))
            except Exception as error:  # a peer that is absent, or can't do it
                if competitor.is_ours:
                    raise
                left_out.append(
                    f"left out: {name}, {case} ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
                )
                continue
            print(row(results[-1]), flush=True)
            if args.json:  # after each, for whoever has no time to wait for the last
                numbers = {"copy_bytes_per_second": copy, "results": [asdict(r) for r in results]}
                args.json.write_text(json.dumps(numbers, indent=1))
            torch.cuda.empty_cache()
    print("\n".join(left_out))
    return results


if __name__ == "__main__":
    main()

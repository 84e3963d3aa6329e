"""What `benchmarks.gpu` measures: cases, and their competitors."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.gpu import timing
from benchmarks.gpu.report import GPT2_124M, LARGE, SMALL
from benchmarks.gpu.timing import Prepared, Step
from benchmarks.shared import formula, writing
from benchmarks.shared.gpt2 import SHAPES, Shapes
from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit
from torch_ademamix.state import paging

LLAMA_8B_LAYER: Shapes = [
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    *((14336, 4096), (14336, 4096), (4096, 14336)),
    *((4096,), (4096,)),
]

CASES: dict[str, Shapes] = {
    LARGE: [(2**24,)] * 8,
    "32 x (2048, 2048)": [(2048, 2048)] * 32,
    GPT2_124M: SHAPES,
    "Llama-8B layer x 4": LLAMA_8B_LAYER * 4,
    SMALL: [(4096,)] * 1000,
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

        return Prepared(before, optimizer.step)

    return make


def plain_compiled(params: list[Tensor]) -> Step:
    grads = [p.grad for p in params]
    states = [tuple(torch.zeros_like(p, dtype=torch.float32) for _ in range(3)) for p in params]
    step = torch.zeros((), device=timing.DEVICE)

    @torch.compile(fullgraph=True)
    @torch.no_grad()
    def update() -> None:
        step.add_(1)
        bias1, sqrt_bias2 = 1 - formula.BETA1**step, (1 - formula.BETA2**step).sqrt()
        for p, grad, state in zip(params, grads, states, strict=True):
            formula.update(p, grad, state, bias1, sqrt_bias2)

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


def check_bitsandbytes(paged: bool = False) -> None:
    """Its CUDA errors end the process that they happen in, so another one makes the first steps."""
    if problem := _bitsandbytes_problem(timing.DEVICE, paged):
        raise RuntimeError(problem)


@cache
def _bitsandbytes_problem(device: str, paged: bool = False) -> str | None:
    program = f"""
import torch, bitsandbytes.optim
from benchmarks.gpu.competitors import page_bitsandbytes_out
p = torch.nn.Parameter(torch.ones(200_000, device="{device}"))
p.grad = torch.ones_like(p)
optimizer = bitsandbytes.optim.{"Paged" if paged else ""}AdEMAMix8bit([p])
for _ in range(2):
    optimizer.step()
    page_bitsandbytes_out(optimizer)
print(p.sum().item())"""
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=writing.ROOT)
    lines = (tried.stdout + tried.stderr).strip().splitlines()
    return None if tried.returncode == 0 else f"bitsandbytes can't make a step here: {lines[-1] if lines else ''}"


def page_bitsandbytes_out(optimizer: torch.optim.Optimizer) -> None:
    """By writing, as to the host it is a tensor of its own memory: bitsandbytes' own way fails with CUDA 13."""
    torch.cuda.synchronize()
    for state in optimizer.state.values():
        for value in state.values():
            if getattr(value, "is_paged", False):
                value.copy_(value.clone())


def bitsandbytes_paged_out(params: list[Tensor]) -> Step:
    """Its state is in managed memory, too, which its steps bring to the GPU parameter by parameter."""
    import bitsandbytes.optim

    check_bitsandbytes(paged=True)
    optimizer = bitsandbytes.optim.PagedAdEMAMix8bit(params)
    return Prepared(partial(page_bitsandbytes_out, optimizer), optimizer.step)


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


FEW_TENSORS = (LARGE, "32 x (2048, 2048)", "Llama-8B layer x 4")
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

"""What `benchmarks.gpu_training` measures: optimizers, and how a step is made of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.competitors import check_bitsandbytes
from benchmarks.shared.gpt2 import loss_fn
from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix8bit, capture_train_step, compile_train_step

LR = 3e-4
NO_OPTIMIZER, ADAMW, BITSANDBYTES = "no optimizer", "AdamW, fused", "bitsandbytes AdEMAMix8bit"
EAGER, COMPILED, CAPTURED, COMPILED_LOSS = "eager", "compiled", "captured", "compiled loss"

TrainStep = Callable[[Tensor], Tensor]


class Spans:
    """Times on the GPU between events, read when all is done."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def around(self, call: Callable[[], Any]) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()
        self._pairs.append((begin, end))
        return result

    def seconds(self, last: int) -> list[float]:
        """Of the last so many."""
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._pairs[-last:]]


class NoOptimizer:
    """Clears the gradients, as every loop does."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.state: dict[Tensor, Any] = {}
        self._params = list(params)

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        for p in self._params:
            p.grad = None


def bitsandbytes_8bit(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdEMAMix8bit as Other

    check_bitsandbytes()
    return Other(params, lr=LR)  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Any]] = {  # raise ImportError where they aren't installed
    "AdEMAMix8bit": partial(AdEMAMix8bit, lr=LR),
    "AdEMAMix": partial(AdEMAMix, lr=LR),
    "PagedAdEMAMix8bit": partial(PagedAdEMAMix8bit, lr=LR),
    ADAMW: partial(torch.optim.AdamW, lr=LR, fused=True),
    BITSANDBYTES: bitsandbytes_8bit,
    NO_OPTIMIZER: NoOptimizer,
}
OURS = ("AdEMAMix8bit", "AdEMAMix", "PagedAdEMAMix8bit")


def eager_step(model: nn.Module, optimizer: Any, loss: Callable[..., Tensor], updates: Spans) -> TrainStep:
    def step(batch: Tensor) -> Tensor:
        value = loss(model, batch)
        value.backward()
        updates.around(optimizer.step)
        optimizer.zero_grad()
        return value.detach()

    return step


def make_step(mode: str, model: nn.Module, optimizer: Any, sample: Tensor, updates: Spans) -> TrainStep:
    if mode == COMPILED:
        return compile_train_step(model, optimizer, loss_fn)
    if mode == CAPTURED:
        return capture_train_step(model, optimizer, loss_fn, (sample,))
    loss = torch.compile(loss_fn, fullgraph=True) if mode == COMPILED_LOSS else loss_fn
    return eager_step(model, optimizer, loss, updates)


@dataclass(frozen=True)
class Case:
    optimizer: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.mode}"


# The most telling first, and what takes long to compile after what doesn't.
CASES = (
    *(Case(optimizer, EAGER) for optimizer in ("AdEMAMix8bit", ADAMW, BITSANDBYTES, "AdEMAMix", "PagedAdEMAMix8bit")),
    Case(NO_OPTIMIZER, EAGER),
    *(Case(optimizer, CAPTURED) for optimizer in ("AdEMAMix8bit", "AdEMAMix", "PagedAdEMAMix8bit")),
    Case("AdEMAMix8bit", COMPILED),
    *(Case(optimizer, COMPILED_LOSS) for optimizer in (ADAMW, BITSANDBYTES, "AdEMAMix8bit", NO_OPTIMIZER)),
    Case("AdEMAMix", COMPILED),
    Case("PagedAdEMAMix8bit", COMPILED),
)

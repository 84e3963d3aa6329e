"""Training on a GPU with whole steps eager, compiled and captured: `python -m benchmarks.gpu_training`.

The model has GPT-2 124M's shapes, in bfloat16 throughout; all runs begin with the same weights and see the same random
bytes. Modes: "eager"; "compiled" (`compile_train_step`: forward, backward and update are one graph); "captured"
(`capture_train_step`, of the eager forward and backward); and "compiled loss", what is left to optimizers that can't
be compiled with the model: forward and backward are compiled, the optimizer's step is eager.

How each figure is taken:

- ms/step: between CUDA events around each step, while steps follow one another without waiting; the median of them,
  and its quartiles. Batches are on the GPU already; captured steps copy theirs.
- optimizer, ms: where its step is eager, between events around it, so gaps in which the GPU waits for the host count.
  In compiled and captured steps, where nothing can be put around it, the time of the package's own kernels, which the
  profiler saw on the GPU. "no optimizer" is the same loop without a step, for differences.
- peak: the most of `torch.cuda.max_memory_allocated` from the making of the optimizer to the last step, compilation
  and capture included; reserved: the same of what torch has taken from the GPU. Paged state is in neither. State is
  counted in its tensors, paged ones too.
- first step, s: from the making of the optimizer to the end of the first step, and so compiling and capturing. One
  cache of compiled code, empty at first, serves all: what a later case has in common with an earlier one is there.
  The very first case loads CUDA's libraries as well.

Each case is written to the folder as soon as it is measured, the plot at the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from benchmarks import footprint, gpu, gpu_report, report
from benchmarks.gpt2 import Size, loss_fn, make_batches, make_model
from benchmarks.report import Requirement
from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix8bit, capture_train_step, compile_train_step

LR = 3e-4
BATCHES = 8  # which the steps go through again and again
COMPARED_STEPS = 20  # whose losses are compared; the others are timed
PROFILED_STEPS = 3
# Kernels round bfloat16 in other places, and attention's backward pass adds in no fixed order. A step that trains
# otherwise shows: the loss falls by several tenths at each of the first steps.
TOLERANCE = 0.05  # nats

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

    gpu.check_bitsandbytes()
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
    *(Case(optimizer, EAGER) for optimizer in ("AdEMAMix8bit", ADAMW, BITSANDBYTES, "AdEMAMix", NO_OPTIMIZER)),
    *(Case(optimizer, CAPTURED) for optimizer in ("AdEMAMix8bit", "AdEMAMix")),
    Case("AdEMAMix8bit", COMPILED),
    *(Case(optimizer, COMPILED_LOSS) for optimizer in (ADAMW, BITSANDBYTES, "AdEMAMix8bit", NO_OPTIMIZER)),
    Case("AdEMAMix", COMPILED),
    *(Case("PagedAdEMAMix8bit", mode) for mode in (EAGER, CAPTURED, COMPILED)),
)


@dataclass(frozen=True)
class Row:
    optimizer: str
    mode: str
    seconds: float  # per step
    quartiles: tuple[float, float]
    optimizer_seconds: float | None  # None where the profiler saw none of the package's kernels
    peak_bytes: int
    reserved_bytes: int
    state_bytes: int
    first_step_seconds: float
    losses: list[float]  # of the first steps
    steps: int  # that were timed


def measure(case: Case, size: Size, batch_size: int, steps: int) -> Row:
    torch._dynamo.reset()
    model = make_model(size, gpu.DEVICE)
    batches = make_batches(size, batch_size, BATCHES, gpu.DEVICE)
    gpu.free_memory()
    torch.cuda.reset_peak_memory_stats()

    begin = time.perf_counter()
    optimizer, updates = OPTIMIZERS[case.optimizer](model.parameters()), Spans()
    step = make_step(case.mode, model, optimizer, batches[0], updates)
    losses = [step(batches[0])]
    torch.cuda.synchronize()
    first = time.perf_counter() - begin

    losses += [step(batches[i % BATCHES]) for i in range(1, COMPARED_STEPS)]
    whole = Spans()
    for i in range(COMPARED_STEPS, COMPARED_STEPS + steps):
        whole.around(partial(step, batches[i % BATCHES]))
    seconds = whole.seconds(steps)
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return Row(
        optimizer=case.optimizer,
        mode=case.mode,
        seconds=median(seconds),
        quartiles=(low, high),
        optimizer_seconds=(
            kernel_seconds(partial(step, batches[0]))
            if case.mode in (COMPILED, CAPTURED)
            else median(updates.seconds(steps))
        ),
        peak_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=torch.cuda.max_memory_reserved(),
        state_bytes=footprint.state_bytes(optimizer.state),
        first_step_seconds=first,
        losses=torch.stack(losses).tolist(),
        steps=steps,
    )


def kernel_seconds(step: Callable[[], object]) -> float | None:
    """Time on the GPU of the package's kernels in a step."""
    found = [
        event.time_range.elapsed_us() / 1e6
        for event in gpu.gpu_events(lambda: [step() for _ in range(PROFILED_STEPS)])
        if "ademamix" in event.name  # their namespace
    ]
    return sum(found) / PROFILED_STEPS if found else None


# ------------------------------------------------------------------------------------------------ the report

Rows = Mapping[str, Row]  # by the name of the case


def difference(rows: Rows, optimizer: str, mode: str) -> float:
    """The largest of a loss from the eager run's."""
    pairs = zip(rows[f"{optimizer}, {mode}"].losses, rows[f"{optimizer}, {EAGER}"].losses, strict=True)
    return max((abs(a - b) for a, b in pairs), key=lambda d: (d != d, d))  # NaN is the largest


REQUIREMENTS = (
    *(
        Requirement(
            f"difference of a loss from the eager run's, the largest of {COMPARED_STEPS} steps (nats)",
            case.name,
            lambda rows, case=case: difference(rows, case.optimizer, case.mode),
            at_most=TOLERANCE,
        )
        for case in CASES
        if case.optimizer in OURS and case.mode != EAGER
    ),
    Requirement(
        f"fall of the loss over these {COMPARED_STEPS} steps (nats)",
        f"AdEMAMix8bit, {EAGER}",
        lambda rows: (lambda losses: losses[0] - losses[-1])(rows[f"AdEMAMix8bit, {EAGER}"].losses),
        at_least=1.0,
    ),
)

HEADS = (
    *("", "ms/step", "quartiles", "optimizer, ms", "of the step", "peak, GB", "reserved, GB", "state, GB"),
    *("first step, s", "loss 1", f"loss {COMPARED_STEPS}"),
)


def cells(row: Row) -> list[str]:
    part = row.optimizer_seconds
    return [
        f"{row.optimizer}, {row.mode}",
        f"{row.seconds * 1e3:.2f}",
        " to ".join(f"{seconds * 1e3:.2f}" for seconds in row.quartiles),
        "" if part is None else f"{part * 1e3:.3f}",
        "" if part is None else f"{part / row.seconds:.1%}",
        *(f"{size / 1e9:.2f}" for size in (row.peak_bytes, row.reserved_bytes, row.state_bytes)),
        f"{row.first_step_seconds:.1f}",
        f"{row.losses[0]:.3f}",
        f"{row.losses[-1]:.3f}",
    ]


@dataclass
class Run:
    """What has been measured, and where it is written."""

    folder: Path
    setting: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # why

    @property
    def required(self) -> list[tuple[str, ...]]:
        return [(r.case, *r.verdict(self.rows)) for r in REQUIREMENTS]

    def write(self) -> None:
        numbers = {
            "setting": self.setting,
            "rows": [asdict(row) for row in self.rows.values()],
            "left out": self.left_out,
            "required": self.required,
        }
        report.write(self.folder / "training.json", json.dumps(numbers, indent=1) + "\n")
        report.write(self.folder / "training.md", self.markdown())

    def markdown(self) -> str:
        parts = [
            "# Training on a GPU",
            "Written by `python -m benchmarks.gpu_training`, which also says how each figure is taken.",
            "\n".join(f"- {name}: {value}" for name, value in self.setting.items()),
            "![Time of a step, and memory](training.svg)",
            report.markdown_table(HEADS, [cells(row) for row in self.rows.values()]),
        ]
        if self.left_out:
            parts.append("\n".join(f"- left out: {name} ({reason})" for name, reason in self.left_out.items()))
        parts += ["## Required", report.markdown_table(("case", "what", "value", "bound", ""), self.required)]
        return "\n\n".join(parts) + "\n"

    def plot(self) -> None:
        """Left: the time of a step and the optimizer's part of it. Right: the peak of memory."""
        names = list(self.rows)
        with report.figure(self.folder / "training.svg", 11, 1.2 + 0.3 * len(names)) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            for y, row in enumerate(self.rows.values()):
                colour = report.OURS if row.optimizer in OURS else report.OTHERS
                left.barh(y, row.seconds * 1e3, color=colour, alpha=0.45)
                left.barh(y, (row.optimizer_seconds or 0) * 1e3, color=colour)
                left.text(row.seconds * 1e3, y, f" {row.seconds * 1e3:.1f}", va="center")
                right.barh(y, row.peak_bytes / 1e9, color=colour, alpha=0.45)
                right.barh(y, row.state_bytes / 1e9, color=colour)
                right.text(row.peak_bytes / 1e9, y, f" {row.peak_bytes / 1e9:.1f}", va="center")
            left.set_yticks(range(len(names)), names)
            left.invert_yaxis()
            left.set_xlabel("ms per step (dark: the optimizer's part)")
            right.set_xlabel("GB at the peak (dark: the optimizer's state, of which the peak has what isn't paged)")
            for axes in (left, right):
                axes.margins(x=0.12)
                axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=gpu_report.RESULTS, help="folder for training.json, .md and .svg")
    parser.add_argument("--minutes", type=float, default=6, help="no case is begun after so many (6)")
    parser.add_argument("--steps", type=int, default=30, help="to time, of each case (30)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch (8)")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only those whose name has this in it")
    args = parser.parse_args(arguments)
    begin = time.monotonic()

    size = Size()
    shape = f"{args.batch} sequences of {size.context} tokens, bfloat16"
    run = Run(args.out, {**gpu_report.machine(), "batch": shape, "steps timed": args.steps})
    print(", ".join(f"{name}: {value}" for name, value in run.setting.items()), " | ".join(HEADS), sep="\n")
    gpu.gpu_events(lambda: None)  # the profiler must be there before a graph that it is to look into
    with fresh_cache():
        for case in CASES:
            if args.cases not in case.name:
                continue
            row, problem = gpu_report.attempt(partial(measure, case, size, args.batch, args.steps), begin, args.minutes)
            if row:
                run.rows[case.name] = row
            else:
                run.left_out[case.name] = problem
            gpu.free_memory()
            run.write()
            print(" | ".join(cells(row) if row else [case.name, problem]), flush=True)
    if run.rows:
        run.plot()
    print(run.markdown(), report.summary(run.required), sep="\n")
    failed = any(verdict == "MISSED" for *_, verdict in run.required) or any(
        case.optimizer in OURS and run.left_out.get(case.name, "").startswith(gpu_report.FAILED) for case in CASES
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

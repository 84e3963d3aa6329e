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
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.gpu import timing
from benchmarks.gpu.report import FAILED, RESULTS, attempt, machine
from benchmarks.gpu_training.report import COMPARED_STEPS, HEADS, Row, Run, cells
from benchmarks.gpu_training.steps import CAPTURED, CASES, COMPILED, OPTIMIZERS, OURS, Case, Spans, make_step
from benchmarks.shared import footprint
from benchmarks.shared.gpt2 import Size, make_batches, make_model
from benchmarks.shared.target import summary

BATCHES = 8  # which the steps go through again and again
PROFILED_STEPS = 3


def measure(case: Case, size: Size, batch_size: int, steps: int) -> Row:
    torch._dynamo.reset()
    model = make_model(size, timing.DEVICE)
    batches = make_batches(size, batch_size, BATCHES, timing.DEVICE)
    timing.free_memory()
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
        for event in timing.gpu_events(lambda: [step() for _ in range(PROFILED_STEPS)])
        if "ademamix" in event.name  # their namespace
    ]
    return sum(found) / PROFILED_STEPS if found else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for training.json, .md and .svg")
    parser.add_argument("--minutes", type=float, default=6, help="no case is begun after so many (6)")
    parser.add_argument("--steps", type=int, default=30, help="to time, of each case (30)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch (8)")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only those whose name has this in it")
    args = parser.parse_args(arguments)
    begin = time.monotonic()

    size = Size()
    shape = f"{args.batch} sequences of {size.context} tokens, bfloat16"
    run = Run(args.out, {**machine(), "batch": shape, "steps timed": args.steps})
    print(", ".join(f"{name}: {value}" for name, value in run.setting.items()), " | ".join(HEADS), sep="\n")
    timing.gpu_events(lambda: None)  # the profiler must be there before a graph that it is to look into
    with fresh_cache():
        for case in CASES:
            if args.cases not in case.name:
                continue
            row, problem = attempt(partial(measure, case, size, args.batch, args.steps), begin, args.minutes)
            if row:
                run.rows[case.name] = row
            else:
                run.left_out[case.name] = problem
            timing.free_memory()
            run.write()
            print(" | ".join(cells(row) if row else [case.name, problem]), flush=True)
    if run.rows:
        run.plot()
    print(run.markdown(), summary(run.verdicts), sep="\n")
    failed = any(verdict == "MISSED" for *_, verdict in run.verdicts) or any(
        case.optimizer in OURS and run.left_out.get(case.name, "").startswith(FAILED) for case in CASES
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

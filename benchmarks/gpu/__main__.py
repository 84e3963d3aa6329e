"""Speed on a GPU, side by side with others, in one run: `python -m benchmarks.gpu`.

Times are medians over steps, each between two CUDA events after the caches have been overwritten; "us in a row" is the
time of a step where many follow one another, which is the host's where the host is slower. GB/s counts the traffic that
an update can't do without; its share is of what a copy on the device reaches in the same run. "Paged out" steps find
their state in the host's memory. What compiles comes last. Each row is written to the folder as soon as it is measured.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu import timing
from benchmarks.gpu.competitors import CASES, COMPETITORS
from benchmarks.gpu.report import FAILED, RESULTS, Report, Result, attempt, cells, machine
from benchmarks.shared.target import summary

WARM_UP = 5


def run(case: str, name: str, copy: float, steps: int) -> Result:
    competitor = COMPETITORS[name]
    torch._dynamo.reset()
    params: list[Tensor] = []
    for shape in CASES[case]:
        params.append(torch.nn.Parameter(torch.randn(shape, device=timing.DEVICE).to(competitor.dtype)))
        params[-1].grad = torch.randn(shape, device=timing.DEVICE).to(competitor.dtype)
    step = competitor.make(params)
    for _ in range(WARM_UP):
        step()
    seconds = median(timing.gpu_times(step, steps))
    numel = sum(p.numel() for p in params)
    rate = numel * competitor.bytes_per_param / seconds
    return Result(
        case,
        name,
        seconds * 1e6,
        timing.step_time(step, steps) * 1e6,
        rate / 1e9,
        rate / copy,
        len(timing.gpu_events(step)),
        competitor.bytes_per_param,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--competitors", default="", help="only those whose name has this in it")
    parser.add_argument("--minutes", type=float, default=8, help="nothing is begun after so many (8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for speed.json, .md and .svg")
    args = parser.parse_args(arguments)
    begin = time.monotonic()

    timing.gpu_events(lambda: None)  # the profiler must be there before a graph that it is to look into
    report = Report(args.out, machine(), timing.copy_bandwidth())
    print(f"{', '.join(report.machine['gpus'])}: a copy moves {report.copy_bytes_per_second / 1e9:,.0f} GB/s")
    runs = [(case, name) for case in args.cases for name in COMPETITORS if case in COMPETITORS[name].cases]
    for case, name in sorted(runs, key=lambda run: COMPETITORS[run[1]].compiles):
        if args.competitors not in name:
            continue
        result, problem = attempt(
            partial(run, case, name, report.copy_bytes_per_second, args.steps), begin, args.minutes
        )
        timing.free_memory()
        if result:
            report.results[case, name] = result
            print(" | ".join(cells(result)), flush=True)
        else:
            report.left_out[case, name] = problem
            report.ours_failed |= COMPETITORS[name].is_ours and problem.startswith(FAILED)
            print(f"left out: {case}, {name}: {problem}", flush=True)
        report.write()
    report.plot()
    print(report.markdown(), summary(report.verdicts), sep="\n")
    return 1 if report.ours_failed else 0


if __name__ == "__main__":
    sys.exit(main())

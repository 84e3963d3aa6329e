"""Speed on the CPU, side by side with others, in one run: `python -m benchmarks.cpu`.

Competitors take turns, in another order each round; times are medians over the rounds, ratios medians of the rounds'
ratios. With large tensors the memory is the limit, and GB/s counts the traffic that an update can't do without: the
parameters and the state read and written, the gradients read. With tiny ones the host is. A table of
targets ends the report. Each case goes into the report as soon as it is measured, in place of an older one.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.cpu import report
from benchmarks.cpu.cases import CASES, QUICK, QUICK_ROUNDS, SLOW
from benchmarks.cpu.measure import Clock, Result, run_case
from benchmarks.shared.writing import RESULTS


def main(arguments: list[str] | None = None) -> Mapping[str, Result]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, help="threads that torch uses (its own choice)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few rounds of few cases; writes nothing")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine with other work: one thread, whose own time counts and not the clock's",
    )
    parser.add_argument("--out", type=Path, help="folder of the report (benchmarks/results/cpu)")
    args = parser.parse_args(arguments)
    if args.threads or args.busy:
        torch.set_num_threads(1 if args.busy else args.threads)
    clock: Clock = time.process_time if args.busy else time.perf_counter

    host = {**report.machine(), "time": "the process' own" if args.busy else "the clock's"}
    print(", ".join(f"{name}: {value}" for name, value in host.items()))
    out = args.out or (None if args.quick else RESULTS / "cpu")
    results: dict[str, Result] = {}
    with fresh_cache():
        for name in args.case or (QUICK if args.quick else CASES):
            case = CASES[name]
            if args.quick:
                case = replace(case, groups=tuple(group for group in case.groups if group.names != SLOW))
            results[name] = run_case(case, QUICK_ROUNDS if args.quick else None, clock)
            record = report.record(results[name], host, report.verdicts(name, results[name]))
            print("\n".join(report.lines(record)), flush=True)
            if out:
                report.write(out, {name: record}, CASES)
    return results


if __name__ == "__main__":
    main()

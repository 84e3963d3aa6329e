"""Speed on the CPU, side by side with others, in one run: `python -m benchmarks.cpu`.

Competitors take turns, in another order each round; times are medians over the rounds, ratios medians of the rounds'
ratios. With large tensors the memory is the limit, and GB/s counts the traffic that an update can't do without: the
parameters and the state read and written, the gradients read. With tiny ones the host is. Required ratios stand below
their case. Each case goes into the report as soon as it is measured, in place of an older one.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache

from benchmarks import cpu_report, footprint, report
from benchmarks.gpu import GPT2
from benchmarks.peers import ADAMW, PEERS, PLAIN
from benchmarks.report import Requirement
from benchmarks.rounds import Times, seconds_per_call, take_turns

Clock = Callable[[], float]

IN_PLACE = "in-place multiply"  # of one large buffer: what this machine's memory gives
IN_PLACE_NUMEL = 2**26
IN_PLACE_BYTES = 2 * 4 * IN_PLACE_NUMEL


@dataclass(frozen=True)
class Group:
    """Competitors that take turns; each group has fused AdamW and the in-place multiply to compare with."""

    names: tuple[str, ...]
    rounds: int
    calls: int = 1  # per round and competitor
    references: tuple[str, ...] = (ADAMW, IN_PLACE)


FLOAT32_STATE = ("AdEMAMix", "AdEMAMix, compiled", PLAIN, "plain loop (Apple's)", "AdamW, foreach")
EAGER_8BIT = ("AdEMAMix8bit", "AdEMAMix8bit, slow 8")
QUANTIZED = tuple(name + how for name in EAGER_8BIT for how in ("", ", compiled"))
SLOW = ("torchao AdamW8bit", "bitsandbytes AdEMAMix", "bitsandbytes AdEMAMix8bit")
GROUPS = (Group(FLOAT32_STATE, rounds=15), Group(QUANTIZED, rounds=10), Group(SLOW, rounds=2))
HOST = (Group(("AdEMAMix", "AdEMAMix, compiled"), rounds=200, calls=5, references=(ADAMW,)),)


@dataclass(frozen=True)
class Case:
    title: str
    shapes: list[tuple[int, ...]]
    groups: tuple[Group, ...]
    dtype: torch.dtype = torch.float32
    left_out: Mapping[str, str] = field(default_factory=dict)  # why


COMPILED = ("AdEMAMix, compiled", *(name for name in QUANTIZED if name.endswith(", compiled")), PLAIN)
LONG_LIST = dict.fromkeys(COMPILED[1:], "takes minutes to compile for 1000 tensors")
AS_IN_FLOAT32 = dict.fromkeys(COMPILED, "compiled in the float32 case only, to save time")

CASES = {
    "host 400": Case("400 tensors of 1", [(1,)] * 400, HOST),
    "host 400 x 1000": Case("400 tensors of 1000", [(1000,)] * 400, HOST),
    "large": Case("16 tensors of 2048 x 1024", [(2048, 1024)] * 16, GROUPS),
    "small": Case("1000 tensors of 4096", [(4096,)] * 1000, GROUPS, left_out=LONG_LIST),
    "GPT-2": Case("GPT-2 124M, 148 tensors", GPT2, GROUPS),
    "large, bf16": Case("16 tensors of 2048 x 1024", [(2048, 1024)] * 16, GROUPS, torch.bfloat16),
    "small, bf16": Case("1000 tensors of 4096", [(4096,)] * 1000, GROUPS, torch.bfloat16, AS_IN_FLOAT32),
    "GPT-2, bf16": Case("GPT-2 124M, 148 tensors", GPT2, GROUPS, torch.bfloat16, AS_IN_FLOAT32),
    "host 1000": Case("1000 tensors of 1", [(1,)] * 1000, HOST),
}
QUICK = ("host 400", "host 400 x 1000", "large")  # without the slow peers
QUICK_ROUNDS = 10


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
            return IN_PLACE_BYTES
        return 3 * self.case.dtype.itemsize * self.numel + 2 * self.state_bytes[name]


REQUIREMENTS = (
    Requirement(
        "parameters/s, over the plain formula's under torch.compile",
        "large",
        lambda r: 1 / r.ratio("AdEMAMix", PLAIN),
        at_least=1.0,
    ),
    Requirement(
        "bytes/s, over fused AdamW's",
        "large",
        lambda r: r.traffic("AdEMAMix") / r.traffic(ADAMW) / r.ratio("AdEMAMix", ADAMW),
        at_least=0.95,
    ),
    Requirement(
        "parameters/s of AdEMAMix8bit, over fused AdamW's",
        "large",
        lambda r: 1 / r.ratio("AdEMAMix8bit", ADAMW),
        at_least=0.5,
    ),
    Requirement("time, over fused AdamW's", "host 400 x 1000", lambda r: r.ratio("AdEMAMix", ADAMW), at_most=1.0),
    Requirement("the host's time, over fused AdamW's", "host 400", lambda r: r.ratio("AdEMAMix", ADAMW), at_most=2.0),
    *(
        Requirement(
            "the host's time, compiled over eager",
            case,
            lambda r: r.ratio("AdEMAMix, compiled", "AdEMAMix"),
            at_most=3.0,
        )
        for case in ("host 400", "host 1000")
    ),
    Requirement(
        "seconds to compile, caches cold",
        "host 1000",
        lambda r: r.times_of("AdEMAMix, compiled").first["AdEMAMix, compiled"],
        at_most=60.0,
    ),
)


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


def verdicts(name: str, result: Result) -> list[tuple[str, ...]]:
    """What is required of a case."""
    return [requirement.verdict(result) for requirement in REQUIREMENTS if requirement.case == name]


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

    host = {**cpu_report.machine(), "time": "the process' own" if args.busy else "the clock's"}
    print(", ".join(f"{name}: {value}" for name, value in host.items()))
    out = args.out or (None if args.quick else report.RESULTS / "cpu")
    results: dict[str, Result] = {}
    with fresh_cache():
        for name in args.case or (QUICK if args.quick else CASES):
            case = CASES[name]
            if args.quick:
                case = replace(case, groups=tuple(group for group in case.groups if group.names != SLOW))
            results[name] = run_case(case, QUICK_ROUNDS if args.quick else None, clock)
            record = cpu_report.record(results[name], host, verdicts(name, results[name]))
            print("\n".join(cpu_report.lines(record)), flush=True)
            if out:
                cpu_report.write(out, {name: record}, CASES)
    return results


if __name__ == "__main__":
    main()

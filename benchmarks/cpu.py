"""Speed on the CPU, side by side with others, in one run: `python -m benchmarks.cpu`.

Times are medians over rounds in which the competitors take turns, ratios medians of the rounds'
ratios; the last lines say how the required ones came out. With large tensors the memory is the
limit, and GB/s counts the traffic that an update can't do without; with tiny ones the host is.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from benchmarks.rounds import Times, take_turns
from torch_ademamix import AdEMAMix, AdEMAMix8bit

Step = Callable[[], object]


# The competitors: each takes parameters that have gradients, makes its state and returns its step.


def ademamix(params: list[Tensor]) -> Step:
    return AdEMAMix(params).step


def ademamix_compiled(params: list[Tensor]) -> Step:
    optimizer = AdEMAMix(params)
    optimizer.init_state()
    return torch.compile(optimizer.step, fullgraph=True)


def ademamix_8bit(params: list[Tensor]) -> Step:
    return AdEMAMix8bit(params).step


def ademamix_8bit_slow_8(params: list[Tensor]) -> Step:
    return AdEMAMix8bit(params, slow_ema_bits=8).step


def bitsandbytes_8bit(params: list[Tensor]) -> Step:
    from bitsandbytes.optim import AdEMAMix8bit as Peer

    return Peer(params).step


def torchao_8bit(params: list[Tensor]) -> Step:
    from torchao.optim import AdamW8bit as Peer

    return Peer(params).step


def plain_compiled(params: list[Tensor]) -> Step:
    """The formula written down for torch.compile; tensors hold what changes with the step."""
    beta1, beta2, beta3, alpha, lr, eps, weight_decay = 0.9, 0.999, 0.9999, 5.0, 1e-3, 1e-8, 1e-2
    grads = [p.grad for p in params]
    state = [tuple(torch.zeros_like(p) for _ in range(3)) for p in params]
    step = 0

    @torch.compile(fullgraph=True)
    def update(bias1: Tensor, sqrt_bias2: Tensor) -> None:
        for p, g, (m1, m2, nu) in zip(params, grads, state, strict=True):
            m1.copy_(beta1 * m1 + (1 - beta1) * g)
            m2.copy_(beta3 * m2 + (1 - beta3) * g)
            nu.copy_(beta2 * nu + (1 - beta2) * g * g)
            direction = (m1 / bias1 + alpha * m2) / (nu.sqrt() / sqrt_bias2 + eps)
            p.copy_(p - lr * (direction + weight_decay * p))

    @torch.no_grad()
    def step_all() -> None:
        nonlocal step
        step += 1
        update(torch.tensor(1 - beta1**step), torch.tensor((1 - beta2**step) ** 0.5))

    return step_all


def adamw_fused(params: list[Tensor]) -> Step:
    return torch.optim.AdamW(params, fused=True).step


def multiply_in_place(params: list[Tensor]) -> Step:
    buffer = torch.ones(sum(p.numel() for p in params))
    return lambda: buffer.mul_(1.0)


@dataclass(frozen=True)
class Competitor:
    make: Callable[[list[Tensor]], Step]  # raises ImportError where the peer isn't installed
    bytes_per_param: int  # read and written; parameters and gradients are float32


COMPETITORS = {
    "AdEMAMix": Competitor(ademamix, 36),
    "AdEMAMix, compiled": Competitor(ademamix_compiled, 36),
    "plain formula, compiled": Competitor(plain_compiled, 36),
    "AdamW, fused": Competitor(adamw_fused, 28),
    "in-place multiply": Competitor(multiply_in_place, 8),
    "AdEMAMix8bit": Competitor(ademamix_8bit, 20),
    "AdEMAMix8bit, slow 8": Competitor(ademamix_8bit_slow_8, 18),
    "bitsandbytes 8-bit": Competitor(bitsandbytes_8bit, 18),
    "torchao AdamW8bit": Competitor(torchao_8bit, 16),
}


@dataclass(frozen=True)
class Case:
    tensors: int
    shape: tuple[int, ...]
    competitors: tuple[str, ...]
    rounds: int
    calls: int = 1  # per round and competitor

    @property
    def title(self) -> str:
        return f"{self.tensors} tensors of {' x '.join(map(str, self.shape))}"


HOST = ("AdEMAMix", "AdEMAMix, compiled", "AdamW, fused")

LARGE = ("AdEMAMix", "AdEMAMix, compiled", "plain formula, compiled", "AdamW, fused", "in-place multiply")
QUANTIZED = ("AdEMAMix8bit", "AdEMAMix8bit, slow 8", "AdamW, fused", "bitsandbytes 8-bit", "torchao AdamW8bit")

# The first case finds the compiler's caches cold.
CASES = {
    "host 1000": Case(1000, (1,), HOST, rounds=200, calls=5),
    "host 400": Case(400, (1,), HOST, rounds=300, calls=10),
    "small": Case(400, (1000,), HOST, rounds=300, calls=10),
    "large": Case(32, (2048, 1024), LARGE, rounds=100),
    "quantized": Case(16, (2048, 1024), QUANTIZED, rounds=30),
}
QUICK = ("host 400", "small", "large", "quantized")
QUICK_ROUNDS = 20


@dataclass(frozen=True)
class Requirement:
    text: str
    case: str
    value: Callable[[Times], float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        return f"at least {self.at_least}" if self.at_most is None else f"at most {self.at_most}"

    def holds(self, value: float) -> bool:
        if self.at_most is None:
            return self.at_least is not None and value >= self.at_least
        return value <= self.at_most


def traffic(name: str) -> int:
    return COMPETITORS[name].bytes_per_param


REQUIREMENTS = (
    Requirement(
        "parameters/s, over the plain formula's under torch.compile",
        "large",
        lambda t: 1 / t.ratio("AdEMAMix", "plain formula, compiled"),
        at_least=1.0,
    ),
    Requirement(
        "bytes/s, over fused AdamW's",
        "large",
        lambda t: traffic("AdEMAMix") / traffic("AdamW, fused") / t.ratio("AdEMAMix", "AdamW, fused"),
        at_least=0.95,
    ),
    Requirement(
        "parameters/s of AdEMAMix8bit, over fused AdamW's",
        "quantized",
        lambda t: 1 / t.ratio("AdEMAMix8bit", "AdamW, fused"),
        at_least=0.5,
    ),
    Requirement(
        "time, over fused AdamW's",
        "small",
        lambda t: t.ratio("AdEMAMix", "AdamW, fused"),
        at_most=1.0,
    ),
    Requirement(
        "the host's time, over fused AdamW's",
        "host 400",
        lambda t: t.ratio("AdEMAMix", "AdamW, fused"),
        at_most=2.0,
    ),
    *(
        Requirement(
            "the host's time, compiled over eager",
            case,
            lambda t: t.ratio("AdEMAMix, compiled", "AdEMAMix"),
            at_most=3.0,
        )
        for case in ("host 400", "host 1000")
    ),
    Requirement(
        "seconds to compile, caches cold",
        "host 1000",
        lambda t: t.first["AdEMAMix, compiled"],
        at_most=60.0,
    ),
)


def run_case(case: Case, rounds: int) -> Times:
    params = [torch.nn.Parameter(torch.randn(case.shape)) for _ in range(case.tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    steps = {}
    for name in case.competitors:
        try:
            steps[name] = COMPETITORS[name].make(params)
        except ImportError as error:
            print(f"absent: {name} ({error})")
    torch._dynamo.reset()  # other cases' guards
    return take_turns(steps, rounds=rounds, calls=case.calls, title=case.title)


def table(case: Case, times: Times) -> Iterable[str]:
    numel = case.tensors * torch.Size(case.shape).numel()
    rounds = len(next(iter(times.rounds.values())))
    yield f"\n{case.title}, {rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    columns = f"{'us/step':>10}{'best':>10}{'params/s':>10}{'GB/s':>8}{'x AdamW':>9}{'first call':>12}"
    yield f"{'':24}{columns}"
    for name in times.rounds:
        seconds = times.median(name)
        yield (
            f"{name:<24}{seconds * 1e6:10,.0f}{times.best(name) * 1e6:10,.0f}{numel / seconds:10.2e}"
            f"{numel * traffic(name) / seconds / 1e9:8.1f}"
            f"{times.ratio(name, 'AdamW, fused'):9.2f}{times.first[name]:10.1f} s"
        )


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "processor": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> Mapping[str, Times]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, help="threads that torch uses (its own choice)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few rounds, and no compile time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there as well")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)

    host = machine()
    print(", ".join(f"{name}: {value}" for name, value in host.items()))
    results: dict[str, Times] = {}
    with fresh_cache():
        for name in args.case or (QUICK if args.quick else CASES):
            case = CASES[name]
            results[name] = run_case(case, QUICK_ROUNDS if args.quick else case.rounds)
            print("\n".join(table(case, results[name])), flush=True)

    print("\nrequired")
    for requirement in REQUIREMENTS:
        if requirement.case in results:
            value = requirement.value(results[requirement.case])
            verdict = "holds" if requirement.holds(value) else "MISSED"
            print(f"{CASES[requirement.case].title:<28}{requirement.text}: {value:.2f} ({requirement.bound}) {verdict}")
    if args.json:
        times = {name: asdict(result) for name, result in results.items()}
        args.json.write_text(json.dumps({"machine": host, "seconds": times}, indent=1))
    return results


if __name__ == "__main__":
    main()

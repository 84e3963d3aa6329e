"""How fast the reference kernels are, by themselves and compiled, on GPT-2's shapes: `python -m benchmarks.reference`.

They serve devices without native kernels. They are measured on the CPU, whose native kernels are measured first, in a
process of their own, and then switched off. Times are those of the fastest of some steps, with as many threads as torch
takes; the first step compiles.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.shared.gpt2 import SHAPES
from benchmarks.shared.writing import markdown_table

CASES = [
    (name, dtype, state)
    for dtype in (torch.float32, torch.bfloat16)
    for name, state in (("AdEMAMix", {}), ("AdEMAMix8bit", {}), ("AdEMAMix8bit", {"slow_ema_bits": 8}))
]
HEADS = (
    *("", "parameters", "native, s", "compiled reference, s", "over native", "reference, s", "over compiled"),
    "first step, s",
)


def steps(name: str, dtype: torch.dtype, state: dict[str, Any], count: int) -> list[float]:
    """Seconds of each."""
    import torch_ademamix

    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = getattr(torch_ademamix, name)(params, **state)
    optimizer.init_state()
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return times


def measure_native(count: int) -> list[float]:
    """Seconds of each case's fastest step with the native kernels."""
    import torch_ademamix

    if torch_ademamix.ops.native is None:
        sys.exit("the native kernels must be built")
    return [min(steps(*case, count + 1)[1:]) for case in CASES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--native", action="store_true", help="only the native kernels: prints seconds as JSON")
    args = parser.parse_args(arguments)
    if args.native:
        print(json.dumps(measure_native(args.steps)))
        return
    command = [sys.executable, "-m", "benchmarks.reference", "--native", "--steps", str(args.steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    all_native = json.loads(done.stdout)
    sys.modules["torch_ademamix._native"] = None  # type: ignore[assignment]  # as if it hadn't been built
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it hasn't
        from torch_ademamix.ops import compiled_reference

    rows = []
    for (name, dtype, state), native in zip(tqdm(CASES), all_native, strict=True):
        compiled_reference._unable.clear()
        first, *times = steps(name, dtype, state, args.steps + 1)
        if compiled_reference._unable:
            sys.exit("torch.compile doesn't serve this machine: a C++ compiler must be there")
        compiled_reference._unable.add("cpu")
        reference, compiled = min(steps(name, dtype, state, args.steps)), min(times)
        text = ", ".join([name, *(f"{option}={value}" for option, value in state.items())])
        dtype_name = str(dtype).removeprefix("torch.")
        cells = [f"{native:.3f}", f"{compiled:.3f}", f"{compiled / native:.1f}"]
        cells += [f"{reference:.2f}", f"{reference / compiled:.1f}", f"{first:.0f}"]
        rows.append([text, dtype_name, *cells])
    print(markdown_table(HEADS, rows))


if __name__ == "__main__":
    main()

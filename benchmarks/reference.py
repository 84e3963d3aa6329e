"""What torch.compile makes of the reference kernels, on GPT-2's shapes: `python -m benchmarks.reference`.

For devices without native kernels; measured on the CPU, whose own are switched off. Times are of the fastest of some
steps, with as many threads as torch takes; the first step, which compiles, stands beside them.
"""

import argparse
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
HEADS = ("", "parameters", "plain, s", "compiled, s", "times as fast", "first step, s")


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(arguments)
    sys.modules["torch_ademamix._native"] = None  # type: ignore[assignment]  # as if it hadn't been built
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it hasn't
        from torch_ademamix.ops import compiled_reference

    rows = []
    for name, dtype, state in tqdm(CASES):
        compiled_reference._unable.clear()
        first, *times = steps(name, dtype, state, args.steps + 1)
        if compiled_reference._unable:
            sys.exit("torch.compile doesn't serve this machine: a C++ compiler must be there")
        compiled_reference._unable.add("cpu")
        plain, compiled = min(steps(name, dtype, state, args.steps)), min(times)
        text = ", ".join([name, *(f"{option}={value}" for option, value in state.items())])
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append([text, dtype_name, f"{plain:.2f}", f"{compiled:.3f}", f"{plain / compiled:.1f}", f"{first:.0f}"])
    print(markdown_table(HEADS, rows))


if __name__ == "__main__":
    main()

"""The CUDA kernels' variants, by the names under which NVRTC compiles them, and NVRTCs to do it with."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

import torch_ademamix

ROOT = Path(__file__).parents[2]

# What `make test` takes out of PyPI's packages, by the major version.
NVRTC = {version: ROOT / f"build/nvrtc/libnvrtc.so.{version}" for version in (12, 13)}

DTYPES = ("float", "bfloat16", "half", "double")
ROUNDINGS = {"bfloat16": ("NEAREST", "REMAINDER", "REMAINDER8", "STOCHASTIC")}
FORMATS = ("SignedSqrt", "FourthRoot", "Linear", "Linear12", "SignedSqrt4", "FourthRoot4")
STOCHASTIC_FORMATS = ("FourthRoot", "SignedSqrt4", "FourthRoot4")

# Of exp_avg, exp_avg_slow and exp_avg_sq: by slow_ema_bits, with a beta1 above 0 and of 0.
MOMENTS = (
    *(f"{fast}, {slow}, FourthRoot" for fast in ("SignedSqrt", "NoCodes") for slow in ("Linear", "SignedSqrt")),
    "SignedSqrt4, Linear12, FourthRoot",
    "NoCodes, Linear12, FourthRoot4",
)


def step_types() -> Iterator[tuple[str, str, str]]:
    """Of parameters and gradients, and how the parameters are rounded."""
    for param, grad in product(DTYPES, DTYPES):
        for rounding in ROUNDINGS.get(param, ("NEAREST",)):
            yield param, grad, f"ParamRounding::{rounding}"


def kernels() -> Iterator[str]:
    """Names. All but the prologue are for long lists: short ones differ in a number.

    All pairs of dtypes are there for the default formats; the other formats for gradients of the parameters' dtype.
    """
    tables = ("SHORT_LIST, 1", "LONG_STEP_LIST<1>, 1", "LONG_STEP_LIST<MANY_ROWS>, MANY_ROWS")
    for dtype, table in product(("float", "double"), tables):
        yield f"prologue_kernel<{dtype}, {table}>"
    for param, grad, rounding in step_types():
        for exp_avg in ("true", "false") if param == grad else ("true",):
            yield f"step_kernel<{param}, {grad}, {exp_avg}, {rounding}, LONG_LIST<StepRecord>>"
        for moments in MOMENTS if param == grad else MOMENTS[:1]:
            for stochastic in ("true", "false") if param == grad and "NEAREST" in rounding else ("true",):
                types = ", ".join((param, grad, moments, stochastic, rounding))
                yield f"blockwise_step_kernel<{types}, LONG_LIST<BlockwiseRecord>>"
    for format in FORMATS:
        yield f"quantize_kernel<{format}, false>"
        yield f"dequantize_kernel<{format}>"
    for format in STOCHASTIC_FORMATS:
        yield f"quantize_kernel<{format}, true>"


def is_typical(name: str) -> bool:
    """Whether a kernel is one of those that stand for all: gradients of the parameters' dtype, the default formats."""
    types = name.partition("<")[2].split(", ")
    if name.startswith(("step_kernel", "blockwise_step_kernel")) and types[0] != types[1]:
        return False
    if name.startswith("step_kernel"):
        return types[2] == "true"
    return not name.startswith("blockwise_step_kernel") or ", ".join(types[2:6]) == f"{MOMENTS[0]}, true"


def compile_kernels(wanted: Iterable[str], nvrtc: str | Path, capability: int, folder: Path) -> list[Path]:
    """Files of their code, behind a first line (ops/cuda/compiler.cpp)."""
    script = ROOT / "tests/native/compile_kernels.py"
    library = Path(torch_ademamix.__file__).with_name("_cuda.so")
    done = subprocess.run(
        [sys.executable, script, library, nvrtc, folder, str(capability)],
        input="\n".join(wanted),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return [next(numbered.glob("*.bin")) for numbered in sorted(folder.iterdir(), key=lambda path: int(path.name))]

"""The CUDA kernels' variants, by the names under which NVRTC compiles them, and NVRTCs to do it with."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What `make test` takes out of PyPI's packages, by the major version.
NVRTC = {version: ROOT / f"build/nvrtc/libnvrtc.so.{version}" for version in (12, 13)}

DTYPES = ("float", "bfloat16", "half", "double")
ROUNDINGS = {"bfloat16": ("NEAREST", "REMAINDER", "STOCHASTIC")}
FORMATS = ("SignedSqrt", "FourthRoot", "Linear")


def step_types() -> Iterator[tuple[str, str, str]]:
    """Of parameters and gradients, and how the parameters are rounded."""
    for param, grad in product(DTYPES, DTYPES):
        for rounding in ROUNDINGS.get(param, ("NEAREST",)):
            yield param, grad, f"ParamRounding::{rounding}"


def kernels() -> Iterator[tuple[str, str]]:
    """Headers and names. All but the prologue are for long lists: short ones differ in a number."""
    for dtype, tensors in product(("float", "double"), ("SHORT_LIST", "LONG_STEP_LIST")):
        yield "prologue.cuh", f"prologue_kernel<{dtype}, {tensors}>"
    for types in step_types():
        yield "step_kernel.cuh", f"step_kernel<{', '.join(types)}, LONG_LIST<StepRecord>>"
    for (param, grad, rounding), slow, stochastic in product(step_types(), ("Linear", "SignedSqrt"), ("true", "false")):
        types = ", ".join((param, grad, slow, stochastic, rounding))
        yield "blockwise_kernel.cuh", f"blockwise_step_kernel<{types}, LONG_LIST<BlockwiseRecord>>"
    for format in FORMATS:
        yield "blockwise_kernel.cuh", f"quantize_kernel<{format}, false>"
        yield "blockwise_kernel.cuh", f"dequantize_kernel<{format}>"
    yield "blockwise_kernel.cuh", "quantize_kernel<FourthRoot, true>"


def is_typical(name: str) -> bool:
    """Whether a kernel is one of those that stand for all: gradients of the parameters' dtype, the default formats."""
    types = name.partition("<")[2].split(", ")
    if name.startswith(("step_kernel", "blockwise_step_kernel")) and types[0] != types[1]:
        return False
    return not name.startswith("blockwise_step_kernel") or types[2:4] == ["Linear", "true"]

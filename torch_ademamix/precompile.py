"""Compiles kernels ahead of time, on a machine without a GPU: `python -m torch_ademamix compile`."""

import argparse
import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from torch_ademamix.ops import cuda
from torch_ademamix.optimizer import AdEMAMix

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64
SHAPES = ((64, 64), (8,))  # of parameters whose state is quantized, and of smaller ones
MORE_THAN_A_SHORT_LIST = 17

_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def cuda_kernel(op: OpOverload) -> Callable[..., Any]:
    """An op's kernel for CUDA tensors, for tensors of any device."""
    return partial(op.redispatch, _CUDA)


class _OnCuda(TorchDispatchMode):
    """Our ops are served by their kernels for CUDA tensors, the others as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = cuda_kernel(func) if func.namespace == "torch_ademamix" else func
        return op(*args, **(kwargs or {}))


@contextmanager
def _only_compiling(capability: int) -> Iterator[None]:
    library = cuda.library()
    library.ademamix_only_compile_for(capability)
    try:
        with _OnCuda():  # type: ignore[no-untyped-call]
            yield
    finally:
        library.ademamix_only_compile_for(0)


def precompile(
    capabilities: Sequence[int],
    folder: Path,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Compiles the kernels that the steps of an optimizer need into a folder that everybody can read.

    This needs no GPU, but a torch with CUDA, whose NVRTC it uses. Set ``TORCH_ADEMAMIX_PRECOMPILED`` to the folder in
    the processes that use it; they need not be able to write to it.

    Args:
        capabilities: the GPUs' compute capabilities, 90 for sm_90.
        folder: created if it is missing.
        dtypes: of the parameters.
        grad_dtype: of the gradients; None for the parameters'.
        options: AdEMAMix's: those of formats and rounding matter (`optim_bits`, `slow_ema_bits`, `master_weights`,
            `param_rounding`, `stochastic_rounding`, `betas`).

    Raises:
        RuntimeError: the CUDA library isn't in use, or NVRTC can't compile for such a GPU.
        ValueError: an option is out of its range.
    """
    cuda.set_cache(folder)
    for dtype in dtypes:
        params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES * MORE_THAN_A_SHORT_LIST]
        optimizer = AdEMAMix(params, **options)
        optimizer.init_state()
        for capability in capabilities:
            with _only_compiling(capability):
                optimizer._plan_cache.plan.load_kernels(grad_dtype, device_type="cpu")
    folder.chmod(0o755)
    for file in folder.glob("*.bin"):
        file.chmod(0o644)


def capability_of(text: str) -> int:
    """Of "sm_90", "90" or "9.0": 90.

    >>> [capability_of(text) for text in ("sm_90", "120", "8.6")]
    [90, 120, 86]
    """
    digits = text.removeprefix("sm_").replace(".", "")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture; sm_90, 90 and 9.0 are")
    return int(digits)


def option_of(text: str) -> tuple[str, Any]:
    """Of "optim_bits=8" the name and the value.

    >>> option_of("optim_bits=8"), option_of("master_weights=remainder")
    (('optim_bits', 8), ('master_weights', 'remainder'))
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no option of AdEMAMix; write optim_bits=8, for example")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_ademamix compile", description=__doc__)
    parser.add_argument("options", nargs="*", type=option_of, metavar="OPTION=VALUE", help="of AdEMAMix: optim_bits=8")
    parser.add_argument("--arch", nargs="+", type=capability_of, required=True, help="sm_90, for example")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the parameters")
    parser.add_argument("--grad-dtype", choices=DTYPES, help="of the gradients; the parameters' if left out")
    parser.add_argument("--folder", type=Path, default=cuda.cache_folder())
    chosen = parser.parse_args(arguments)
    try:
        precompile(
            chosen.arch,
            chosen.folder,
            [DTYPES[name] for name in chosen.dtype],
            DTYPES.get(chosen.grad_dtype),
            **dict(chosen.options),
        )
    except (RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    kept = list(chosen.folder.glob("*.bin"))
    print(f"{len(kept)} kernels, {sum(file.stat().st_size for file in kept) / 1e6:.1f} MB, in {chosen.folder}")
    print(f"{cuda.PRECOMPILED_VARIABLE}={chosen.folder} makes processes use them")

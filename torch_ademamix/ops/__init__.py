"""The custom ops: their kernels, fakes and the in-place rule; their schemas are in schemas.py.

By dispatch key, an op has native kernels (CPU, and CUDA if there is a GPU); the reference for any other device, and for
every device if the package was built without native code; and a fake for tracing. One that writes in place consists of
two: that of the kernels, and the in-place rule that calls it.
"""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from torch_ademamix.numerics import blockwise, pairs, reference_step
from torch_ademamix.numerics.blockwise import CODE_DTYPES, Format, block_count
from torch_ademamix.numerics.hyperparameters import HyperparameterRows, Hyperparameters
from torch_ademamix.ops import compiled_reference, cuda, offsets, schemas
from torch_ademamix.ops.arguments import check_blockwise_step, check_dequantize, check_quantize, check_step
from torch_ademamix.ops.schemas import SCALER

OpCall = tuple[Callable[..., None], Sequence[Any], dict[str, Any]]  # with its lists and options

FORMATS = tuple(CODE_DTYPES)

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_library = torch.library.Library("torch_ademamix", "DEF")


def _load_native() -> ModuleType | None:
    """Loads the kernels for this processor's instruction set, as torch itself chooses it."""
    try:
        native = import_module("torch_ademamix._native")
    except ImportError:
        warnings.warn(
            "torch_ademamix was built without its native kernels and runs on the reference ones, which are "
            "much slower; install a C++ compiler and reinstall it "
            "(`python -m torch_ademamix` shows the build)",
            stacklevel=2,
        )
        return None
    torch.ops.load_library(_cpu_library(native))
    return native


def _cpu_library(native: ModuleType) -> Path:
    return Path(__file__).parents[1] / f"_cpu_{cpu_capability(native)}.so"


def cpu_capability(native: ModuleType) -> str:
    """The instruction set of the CPU kernels in use: "avx512", "avx2" or "default"."""
    wanted = torch.backends.cpu.get_cpu_capability().lower().split("_")[0]
    return wanted if wanted in native.cpu_capabilities.split() else "default"


def _define_in_place(schema: str, *, fake: Callable[..., None], kernel: Callable[..., None]) -> Callable[..., None]:
    """Registers an in-place op, and returns its Python function, which skips the dispatcher.

    The kernels belong to a second op, whose name begins with an underscore. They don't bump the version counters of
    what they change, so a backward pass after them would silently use the new values; this op does, and torch raises.
    A traced graph has the second op: AOTAutograd counts versions itself, and a rule at the dispatch key ADInplaceOrView
    would take every call through Python.
    """
    kernels = _define(f"_{schema}", fake, kernel)
    arguments = torch._C.parse_schema(f"torch_ademamix::{schema}").arguments
    mutated = [i for i, argument in enumerate(arguments) if argument.alias_info is not None]

    def op(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            kernels(*args, **kwargs)
        else:
            try:
                with torch._C._AutoDispatchBelowADInplaceOrView():
                    kernels(*args, **kwargs)
            except RuntimeError:
                _raise_reason(fake, args, kwargs)
                raise
        if kwargs.get("dry_run"):
            return
        torch.autograd.graph.increment_version(list(chain.from_iterable(args[i] for i in mutated)))

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.split("(")[0], op, "CompositeImplicitAutograd")
    return op


def _define(schema: str, fake: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.torch_ademamix, packet), overload or "default")
    torch.library.register_fake(op, fake, lib=_library)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    return op  # type: ignore[no-any-return]


def _raise_reason(check: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises the error that says what is wrong with a call's arguments, which native kernels only call invalid.

    Returns if nothing is wrong with them: then the kernel has failed for another reason.
    """
    try:
        check(*args, **kwargs)
    except RuntimeError as error:
        raise error from None


def _reference_step(
    check: Callable[..., None], step: Callable[..., None], parts: Sequence[offsets.ViewFn]
) -> Callable[..., None]:
    """The kernel of an op's overloads; `parts` are those that its lists of state have of arenas."""
    count = len(parts) + len(("params", "grads", "steps", "remainders"))

    def kernel(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        if kwargs.pop("dry_run", False):
            return
        if args[0] and args[0][0].device.type == "cuda":
            _warn_of_reference_on_cuda()
        lists, hyperparameters = args[:count], args[count:]
        views = offsets.views_of_lists(parts, lists, kwargs.pop("offsets"))
        compiled_reference.run(step, views, _rows(*hyperparameters), **{**dict.fromkeys(SCALER), **kwargs})

    return kernel


def _rows(hyperparameters: Tensor | Sequence[float], lrs: Sequence[Tensor] = ()) -> list[Hyperparameters]:
    if isinstance(hyperparameters, Tensor):
        return [Hyperparameters(*row.unbind()) for row in hyperparameters.double().unbind()]
    rows = [Hyperparameters(*row) for row in zip(*[iter(hyperparameters)] * len(Hyperparameters._fields), strict=True)]
    return [row._replace(lr=lr) for row, lr in zip(rows, lrs, strict=True)] if lrs else rows


def _functions(native: ModuleType) -> ctypes.PyDLL:
    """The functions of the CPU library that aren't ops."""
    library = ctypes.PyDLL(str(_cpu_library(native)))
    for function in (library.ademamix_unmoved, library.ademamix_unwatch):
        function.argtypes = [ctypes.c_int64]
    return library


@cache
def _warn_of_reference_on_cuda() -> None:
    warnings.warn(
        f"{without_cuda}: CUDA tensors are served by torch_ademamix's reference kernels, which are much "
        "slower (`python -m torch_ademamix` shows which kernels each device uses)",
        stacklevel=2,
    )


@cache
def _warn_of_ordinary_memory(device: torch.device) -> None:
    warnings.warn(f"{device} has no managed memory: paged state is ordinary memory there", stacklevel=3)


def _fake_quantize(
    x: Tensor, format: int, *, seed: int | None = None, step: int = 0, subsequence: int = 0
) -> tuple[Tensor, Tensor]:
    checked = check_quantize(x, format, seed is not None)
    codes = torch.empty(x.shape, dtype=CODE_DTYPES[checked], device=x.device)
    return codes, x.new_empty(block_count(x.numel()))


def _fake_dequantize(codes: Tensor, absmax: Tensor, format: int) -> Tensor:
    check_dequantize(codes, absmax, format)
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


def _ordinary_empty(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(numel, dtype=dtype)


def _reference_quantize(
    x: Tensor, format: int, *, seed: int | None = None, step: int = 0, subsequence: int = 0
) -> tuple[Tensor, Tensor]:
    checked = check_quantize(x, format, seed is not None)
    return blockwise.quantize(x, checked, seed=seed, step=step, subsequence=subsequence)


def _reference_dequantize(codes: Tensor, absmax: Tensor, format: int) -> Tensor:
    return blockwise.dequantize(codes, absmax, check_dequantize(codes, absmax, format))


_steps = [
    _define_in_place(
        schema,
        fake=check_step,
        kernel=_reference_step(check_step, reference_step.ademamix_step_, offsets.STEP_VIEWS),
    )
    for schema in schemas.overloads(schemas.STEP)
]
_blockwise_steps = [
    _define_in_place(
        schema,
        fake=check_blockwise_step,
        kernel=_reference_step(check_blockwise_step, reference_step.ademamix_blockwise_step_, offsets.BLOCKWISE_VIEWS),
    )
    for schema in schemas.overloads(schemas.BLOCKWISE_STEP)
]
_quantize = _define(
    "quantize_blockwise(Tensor x, int format, *, int? seed=None, int step=0, int subsequence=0) -> (Tensor, Tensor)",
    fake=_fake_quantize,
    kernel=_reference_quantize,
)
_dequantize = _define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, int format) -> Tensor",
    fake=_fake_dequantize,
    kernel=_reference_dequantize,
)
_paged_empty = _define(
    "paged_empty(Tensor like, int numel, ScalarType dtype) -> Tensor",
    fake=_ordinary_empty,
    kernel=_ordinary_empty,
)
page_out = _define(
    "page_out(Tensor tensor) -> ()",
    fake=lambda tensor: None,
    kernel=lambda tensor: None,
)
_library.define("_watch(Tensor[] tensors) -> int")  # see torch_ademamix/state/watch.py
native = _load_native()
library = None if native is None else _functions(native)
without_cuda = cuda.load()  # why CUDA tensors are served by the reference kernels; None if they aren't


def _python_op(overloads: Sequence[Callable[..., None]], doc: str) -> Callable[..., None]:
    """An op as Python calls it: with scalars on any device, and with complex parameters."""
    with_numbers, with_tensor = overloads

    def op(*lists: Sequence[Any], hyperparameters: HyperparameterRows, **options: Any) -> None:
        params = lists[0]
        device = params[0].device if params else None
        for name in SCALER:
            if options.get(name) is not None:
                options[name] = _on_device(options[name], device)
        rows, of_params = hyperparameters
        arguments: tuple[Any, ...]
        if isinstance(rows, Tensor):
            overload, arguments = with_tensor, (_on_device(rows, device),)
        else:
            lrs = [_on_device(row.lr, device) for row in rows if isinstance(row.lr, Tensor)]
            numbers = [x for row in rows for x in (0.0, *row[1:])] if lrs else [*chain.from_iterable(rows)]
            overload, arguments = with_numbers, (numbers, lrs)
        if params and params[0].is_complex():
            pairs.call(overload, lists, *arguments, rows=of_params, **options)
        else:
            overload(*lists, *arguments, rows=of_params, **options)

    op.__doc__ = doc
    return op


ademamix_step_ = _python_op(
    _steps,
    """The op `ademamix_step_`, which takes lists of one dtype and device; complex tensors as pairs of reals.

    Args:
        lists: the op's.
        hyperparameters: those of the parameters.
        options: the op's. Tensors of one element may be on another device.
    """,
)
ademamix_blockwise_step_ = _python_op(_blockwise_steps, """The op `ademamix_blockwise_step_`, in the same way.""")


def run(calls: Sequence[OpCall]) -> None:
    """Calls step ops, each with its lists and options; raises before the first of them has written anything.

    A call checks its own arguments, so all but the first are checked here. No graph has these dry runs: Dynamo checks
    a call when it traces it, and make_fx doesn't record them.
    """
    if len(calls) > 1 and not torch.compiler.is_compiling():
        if torch._C._len_torch_dispatch_stack() or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
            with disable_proxy_modes_tracing():
                _dry_run(calls[1:])
        else:
            _dry_run(calls[1:])
    for op, lists, options in calls:
        op(*lists, **options)


def _dry_run(calls: Sequence[OpCall]) -> None:
    for op, lists, options in calls:
        op(*lists, **options, dry_run=True)


def _on_device(scalar: Tensor, device: torch.device | None) -> Tensor:
    if device is None or scalar.device == device:
        return scalar
    # A copy to the GPU needn't be waited for: of ordinary memory, the driver takes it before the call returns.
    is_taken = device.type == "cuda" and scalar.device.type == "cpu" and not torch.compiler.is_compiling()
    return scalar.to(device, non_blocking=is_taken and not scalar.is_pinned())


def _explained(op: Callable[..., Any], check: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls an op; if its arguments are invalid, the error says what is wrong with them."""
    try:
        return op(*args, **kwargs)
    except RuntimeError:
        _raise_reason(check, args, kwargs)
        raise


def _format_index(format: Format) -> int:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, but must be one of {', '.join(FORMATS)}")
    return FORMATS.index(format)


def quantize_blockwise(
    x: Tensor, format: Format, *, seed: int | None = None, step: int = 0, subsequence: int = 0
) -> tuple[Tensor, Tensor]:
    """:func:`torch_ademamix.blockwise.quantize` as an op, with native kernels."""
    quantized = _explained(
        _quantize, _fake_quantize, x, _format_index(format), seed=seed, step=step, subsequence=subsequence
    )
    return quantized  # type: ignore[no-any-return]


def dequantize_blockwise(codes: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """:func:`torch_ademamix.blockwise.dequantize` as an op, with native kernels."""
    values = _explained(_dequantize, _fake_dequantize, codes, absmax, _format_index(format))
    return values  # type: ignore[no-any-return]


def paged_empty(like: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of `numel` elements on the device of `like`, in managed memory if there is some.

    Raises torch.OutOfMemoryError if neither the GPU nor the host has room for it.
    """
    if cuda.lacks_managed_memory(like.device):
        _warn_of_ordinary_memory(like.device)
    try:
        return _paged_empty(like, numel, dtype)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "CUDA_ERROR_OUT_OF_MEMORY" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise

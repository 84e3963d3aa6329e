"""The reference kernels through torch.compile, for devices without native ones.

In single tensor operations a step goes through memory some thirty times, compiled once. Parameters are taken one by
one, flattened and with a dynamic length, so that one compilation serves every shape of the same dtypes.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.numerics.hyperparameters import Hyperparameters
from torch_ademamix.numerics.reference_step import ademamix_blockwise_step_

MIN_NUMEL = 2**16  # elements of a call, below which it isn't worth seconds of compiling

# How many combinations of dtypes and options may be compiled; Dynamo's own limit is made for one model's code.
RECOMPILE_LIMIT = 256

_unable: set[str] = set()  # types of devices


def run(
    step: Callable[..., None],
    lists: Sequence[Sequence[Tensor]],
    hyperparameters: Sequence[Hyperparameters],
    rows: Sequence[int],
    *,
    seed: int,
    subsequences: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **options: Any,
) -> None:
    """`step`, one of the reference kernels, compiled where that is worth it and torch.compile serves the device.

    Args:
        lists: the lists of tensors of an op call; the last are the remainders.
        hyperparameters: the call's rows.
        rows: each parameter's; empty where all have the first.
    """
    params = lists[0]
    given = tuple(len(tensors) > 0 for tensors in lists)
    rows = rows or [0] * len(params)
    device = params[0].device if params else None
    if device is None or device.type in _unable or sum(p.numel() for p in params) < MIN_NUMEL:
        scaler = {"grad_scale": grad_scale, "found_inf": found_inf}
        return step(
            *lists, [hyperparameters[row] for row in rows], seed=seed, subsequences=subsequences, **scaler, **options
        )

    numbers = [_in_one_tensor(row, device) for row in hyperparameters]
    integers = torch.tensor(
        [[_signed(seed), subsequence] for subsequence in subsequences or [0] * len(params)], device=device
    )
    call = partial(_call, device.type)
    for i, tensors in enumerate(zip(*(tensors for tensors in lists if tensors), strict=True)):
        flat = _flat(tensors, in_order=bool(subsequences))
        values = (numbers[rows[i]], integers[i].clone(), grad_scale, found_inf)
        arguments = (step, flat or tensors, given, *values)
        if flat is None or flat[0].numel() == 0:
            _update(*arguments, **options)
        elif step is ademamix_blockwise_step_:  # in stages: of all at once, Inductor makes slower code
            _update(*arguments, **options, call=call)
        else:
            call(_update, *arguments, **options)


def _call(device_type: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls what torch.compile makes of a function, or the function itself where that fails."""
    if device_type not in _unable:
        limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), RECOMPILE_LIMIT)
        try:
            with torch._dynamo.config.patch(limits):
                return _compiled(function)(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            _unable.add(device_type)  # nothing has run yet
            warnings.warn(
                f"torch.compile doesn't serve {device_type} here, so torch_ademamix's reference kernels run "
                f"operation by operation, which takes several times as long ({str(error).splitlines()[0]})",
                stacklevel=2,
            )
    return function(*args, **kwargs)


def _update(
    step: Callable[..., None],
    tensors: Sequence[Tensor],
    given: Sequence[bool],
    numbers: Tensor,
    integers: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **options: Any,
) -> None:
    """A step of one parameter, whose numbers are in tensors: as numbers, they would be compiled in.

    `given` tells which of the op's lists the tensors are of; the others are empty.
    """
    present = iter(tensors)
    lists = [[next(present)] if is_given else [] for is_given in given]
    seed, subsequence = integers.unbind()
    scaler = {"grad_scale": grad_scale, "found_inf": found_inf}
    step(*lists, [Hyperparameters(*numbers.unbind())], seed=seed, subsequences=[subsequence], **scaler, **options)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _in_one_tensor(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    if not any(isinstance(x, Tensor) for x in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64).to(device).reshape(()) for x in numbers])


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)


def _flat(tensors: Sequence[Tensor], in_order: bool) -> list[Tensor] | None:
    """The same memory in one dimension, as tensors that are no views; None where that isn't one order for all.

    Args:
        in_order: whether the order must be row-major, as random bits are drawn.
    """
    p = tensors[0]
    for t in tensors:
        as_p = t.shape == p.shape and t.stride() == p.stride() and not in_order and _is_dense(t)
        if not (as_p or (t.is_contiguous() and (p.is_contiguous() or t.shape != p.shape))):
            return None
    return [_in_one_dimension(t) for t in tensors]


def _in_one_dimension(t: Tensor) -> Tensor:
    flat = torch.empty(0, dtype=t.dtype, device=t.device)
    return flat.set_(t.untyped_storage(), t.storage_offset(), (t.numel(),), (1,))


def _is_dense(t: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(t))

"""bfloat16 parameters that don't lose their updates: what ops/bfloat16.h does, in PyTorch, and its oracle.

Rounded to nearest, an update below half an ulp, which is 0.2 to 0.4% of the weight, is lost. With
``master_weights="remainder"`` what rounding takes away is kept in an int16, which together with the parameter is the
float32 weight. ``master_weights="remainder8"`` keeps the upper half of that in an int8, and rounds the weight
stochastically to these 24 bits; ``param_rounding="stochastic"`` rounds it to the parameter's 16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

REMAINDERS = {"remainder": torch.int16, "remainder8": torch.int8}  # dtypes, by the option `master_weights`

_HALF = 1 << 16
_UNIT = 1 << 8  # of an int8 remainder, in units of an int16 one


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """Returns the float32 weights of parameters and their remainders.

    A weight's bits are the parameter's followed by 16 zeros, plus the signed remainder. If the parameter has been set
    to 0 since, a negative remainder counts as 0.

    Args:
        param: bfloat16, of any shape.
        remainder: int16 or int8, of the same shape.

    >>> join(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-1], dtype=torch.int16)).item()
    0.9999999403953552
    """
    bits = param.view(torch.int16).int()
    rest = remainder.int() * (_UNIT if remainder.dtype == torch.int8 else 1)
    magnitude = ((bits & 0x7FFF) * _HALF + rest).clamp_min(0)
    return torch.where(bits < 0, magnitude | -(1 << 31), magnitude).view(torch.float32)


def split(weight: Tensor, dtype: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
    """Splits weights into parameters, rounded to nearest (ties away from zero), and remainders.

    The remainder of NaN is 0.

    Args:
        weight: float32, of any shape.
        dtype: of the remainders, int16 or int8, for which the weight is rounded to the nearest of 24 bits.

    >>> param, remainder = split(torch.tensor([0.1]))
    >>> param.item(), remainder.item(), join(param, remainder).item() == torch.tensor(0.1).item()
    (0.10009765625, -13107, True)
    """
    bits = weight.view(torch.int32)
    nan = weight.isnan()
    if dtype == torch.int8:
        bits = torch.where(nan, bits, (bits + _UNIT // 2) & -_UNIT)
    upper = (torch.where(nan, bits, bits + _HALF // 2) >> 16).to(torch.int16)
    remainder = torch.where(nan, 0, bits).to(torch.int16)
    return upper.view(torch.bfloat16), remainder if dtype == torch.int16 else (remainder >> 8).to(torch.int8)


def draws(remainders: Sequence[Tensor | None]) -> bool:
    """Whether weights with these remainders are rounded at random."""
    first = remainders[0] if len(remainders) else None
    return first is not None and first.dtype == torch.int8


def converted(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """Remainders of the other width: from int8 exactly, to int8 the nearest.

    >>> converted(torch.tensor([-300, 127, 32767], dtype=torch.int16), torch.int8).tolist()
    [-1, 0, 127]
    """
    if remainder.dtype == dtype:
        return remainder
    if dtype == torch.int16:
        return remainder.to(dtype) * _UNIT
    return ((remainder.int() + _UNIT // 2) >> 8).clamp_max(127).to(dtype)


def round_to_24_bits(weight: Tensor, random: Tensor) -> Tensor:
    """Rounds each weight stochastically to a value whose lowest 8 bits are 0; the expectation is the weight.

    Args:
        weight: float32, of any shape.
        random: integers of the same shape, of which the lowest 8 bits count.

    >>> random = torch.tensor([0, 50, 51])
    >>> round_to_24_bits(torch.full((3,), 0.1), random).view(torch.int32).remainder(256).tolist()
    [0, 0, 0]
    """
    bits = weight.view(torch.int32)
    rounded = (bits + (random % _UNIT).int()) & -_UNIT
    return torch.where(weight.isnan(), bits, rounded).view(torch.float32)


def round_stochastically(weight: Tensor, random: Tensor) -> Tensor:
    """Rounds each weight stochastically to bfloat16; the expectation is the weight.

    Beyond the largest finite value the upper one is infinity.

    Args:
        weight: float32, of any shape.
        random: integers of the same shape, in [0, 65535].

    >>> weight, random = torch.full((3,), 0.1), torch.tensor([0, 13106, 13107])
    >>> round_stochastically(weight, random).tolist()
    [0.099609375, 0.099609375, 0.10009765625]
    """
    bits = weight.view(torch.int32)
    bits = torch.where(weight.isnan(), bits, bits + random.int())
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)

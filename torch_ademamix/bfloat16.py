"""bfloat16 parameters that don't lose their updates: what ops/bfloat16.h does, in PyTorch, and its oracle.

Rounded to nearest, an update below half an ulp, which is 0.2 to 0.4% of the weight, leaves a parameter as it is.
With ``master_weights="remainder"`` what rounding takes away is kept in an int16 beside the parameter, and together
they are the float32 weight; with ``param_rounding="stochastic"`` the weight is rounded up or down at random, and
right on average.
"""

import torch
from torch import Tensor

_HALF = 1 << 16


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights of parameters and their remainders.

    A weight's bits are the parameter's with 16 zeros after them, plus the remainder, which has a sign. Where the
    parameter has been set to 0 since, a negative remainder counts as 0.

    Args:
        param: bfloat16, of any shape.
        remainder: int16, of the same shape.

    >>> join(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-1], dtype=torch.int16)).item()
    0.9999999403953552
    """
    bits = param.view(torch.int16).int()
    magnitude = ((bits & 0x7FFF) * _HALF + remainder.int()).clamp_min(0)
    return torch.where(bits < 0, magnitude | -(1 << 31), magnitude).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters, rounded to nearest and of two equally near values to the larger one in magnitude; and remainders.

    The remainder of NaN is 0.

    Args:
        weight: float32, of any shape.

    >>> param, remainder = split(torch.tensor([0.1]))
    >>> param.item(), remainder.item(), join(param, remainder).item() == torch.tensor(0.1).item()
    (0.10009765625, -13107, True)
    """
    bits = weight.view(torch.int32)
    nan = weight.isnan()
    upper = (torch.where(nan, bits, bits + _HALF // 2) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16), torch.where(nan, 0, bits).to(torch.int16)


def round_stochastically(weight: Tensor, random: Tensor) -> Tensor:
    """One of the two bfloat16 values around each weight, and the weight on average.

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

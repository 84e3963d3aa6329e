"""bitsandbytes' 8-bit formats, in plain PyTorch, for its checkpoints.

Each block of 256 elements in row-major order has a float32 scale, absmax. A code is the index of one of 256 values in
[-1, 1], which are denser near 0; the element is that value times absmax
(``bitsandbytes.functional.create_dynamic_map``).
"""

import torch
from torch import Tensor

from torch_ademamix.numerics.blockwise import blocks_of

SIGNED_ZERO_CODE = 127


def dynamic_map(signed: bool, device: torch.device | str | None = None) -> Tensor:
    """The 256 values of a dynamic map in ascending order, by code.

    Of each decade [0.1, 1] * 10^k it has the centres of 2^e equal parts, with e falling by one from decade to decade,
    and also 0 and 1.

    Args:
        signed: whether to give the signed map (127 negative values, 0 at code 127, 128 positive)
            or the unsigned one (0 at code 0).
        device: where the result goes; the CPU if not given.

    Returns:
        float32 tensor of shape ``(256,)``.

    Example:
        >>> dynamic_map(signed=True)[[0, 127, 255]].tolist()
        [-0.992968738079071, 0.0, 1.0]
    """
    exponents, scale = (range(7), 10.0**7) if signed else (range(1, 8), 10.0**8)
    # In this form numerators and denominators are exact, and the quotient is the exact value, rounded once.
    centres = [(2 ** (e + 1) + 18 * j + 9) * 10**e / (scale * 2 ** (e + 1)) for e in exponents for j in range(2**e)]
    negative = [-centre for centre in reversed(centres)] if signed else []
    return torch.tensor([*negative, 0.0, *centres, 1.0], dtype=torch.float64, device="cpu").float().to(device)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes of the nearest values, uint8 of x's shape, and absmax, float32 of shape ``(ceil(x.numel() / 256),)``.

    x is float32 and finite. Of two equally near values it is the larger in magnitude; in the unsigned map a positive
    value never becomes 0, since the optimizer divides by its root.

    >>> codes, absmax = quantize(torch.tensor([-4.0, 0.0, 4.0]), signed=True)
    >>> codes.tolist(), absmax.tolist(), dequantize(codes, absmax, signed=True).tolist()
    ([0, 127, 255], [4.0], [-3.971874952316284, 0.0, 4.0])
    """
    blocks = blocks_of(x)
    absmax = blocks.abs().amax(1)
    values = dynamic_map(signed, x.device).double().clamp_min(0).unique()
    boundaries = (values[1:] + values[:-1]) / 2
    scaled = (blocks.double() / absmax[:, None]).nan_to_num(0)  # of a block of zeros
    rank = torch.bucketize(scaled.abs(), boundaries, right=True)
    if signed:
        codes = (SIGNED_ZERO_CODE + rank * blocks.sign().long()).clamp_min(0)  # the map has no -1
    else:
        codes = torch.where(blocks > 0, rank.clamp_min(1), 0)
    return codes.to(torch.uint8).view(-1)[: x.numel()].view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values, of the shape of ``codes``, that uint8 codes and their blocks' scales stand for."""
    blocks = blocks_of(dynamic_map(signed, codes.device)[codes.int()])
    return (blocks * absmax.view(-1, 1)).view(-1)[: codes.numel()].view(codes.shape)

"""The formats of quantized state, in plain PyTorch: the oracle of ops/blockwise.h, to the bit.

A tensor is quantized in blocks of 256 elements in logical order, each with one float32 scale, its
absmax; the last block may be shorter. The three formats:

==================  =====  ========================================================  ==============
format              dtype  value of a code, times absmax                             state
==================  =====  ========================================================  ==============
signed_dynamic      uint8  one of 256 in [-0.993, 1], denser near 0                  exp_avg
unsigned_dynamic    uint8  one of 256 in [0, 1], denser near 0                       exp_avg_sq
linear_int16        int16  code / 32767                                              exp_avg_slow
==================  =====  ========================================================  ==============

The dynamic maps are bitsandbytes' (``bitsandbytes.functional.create_dynamic_map``).
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Format = Literal["signed_dynamic", "unsigned_dynamic", "linear_int16"]

BLOCK_SIZE = 256

SIGNED_ZERO_CODE = 127
LINEAR_MAX = 32767

# In the order of the ops' numbers for them (BlockFormat in ops/blockwise.h).
CODE_DTYPES: dict[Format, torch.dtype] = {
    "signed_dynamic": torch.uint8,
    "unsigned_dynamic": torch.uint8,
    "linear_int16": torch.int16,
}

# Philox 4x32 (Salmon et al., SC 2011); 7 rounds are the fewest that pass BigCrush.
PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
RANDOM_GROUP = 8  # elements that share a Philox call, of 128 bits
FIRST_PARAM_GROUP = -(1 << 63)  # 2^63 as an int64: the groups of parameters are none that a tensor's exp_avg_sq has

# Stochastic rounding counts positions of 2^-15 between two codes.
POSITION_BITS = 15

_WORD = 0xFFFFFFFF


def block_count(numel: int) -> int:
    """How many blocks, and so scales, a tensor of so many elements has."""
    return (numel + BLOCK_SIZE - 1) // BLOCK_SIZE


@cache
def _decades(signed: bool) -> tuple[tuple[float, ...], ...]:
    """The positive map values below 1, by decade: centres of 2^e equal parts of [0.1, 1]."""
    exponents = range(7) if signed else range(1, 8)
    scale = 10.0 ** (7 if signed else 8)
    return tuple(
        tuple((2 ** (e + 1) + 18 * j + 9) * 10**e / (scale * 2 ** (e + 1)) for j in range(2**e)) for e in exponents
    )


def _nonnegative_map(signed: bool) -> Tensor:
    values = [0.0, *(value for decade in _decades(signed) for value in decade), 1.0]
    return torch.tensor(values, dtype=torch.float64).float()


def dynamic_map(signed: bool, device: torch.device | str | None = None) -> Tensor:
    """The 256 values of a dynamic map in ascending order, by code.

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
    values = _nonnegative_map(signed)
    if signed:
        values = torch.cat([-values[1:-1].flip(0), values])
    return values.to(device)


def _boundaries(signed: bool) -> Tensor:
    """Midpoints of neighbours in the nonnegative map, exact in float64."""
    values = _nonnegative_map(signed).double()
    return (values[1:] + values[:-1]) / 2


def _lines(signed: bool) -> tuple[Tensor, Tensor]:
    """The corners of the map as a piecewise linear function: values (float32), ranks (int64)."""
    values = _nonnegative_map(signed)
    ranks = [0]
    for decade in _decades(signed):
        ranks += [ranks[-1] + 1, ranks[-1] + len(decade)]
    corners = torch.tensor(sorted({*ranks, ranks[-1] + 1}))  # a decade of one value has one corner
    return values[corners], corners


def philox(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """The four words of Philox 4x32 with 7 rounds, for each counter.

    Args:
        counter: four int64 tensors of one shape, in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        four int64 tensors of that shape, in [0, 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(PHILOX_ROUNDS):
        # The products wrap around int64, which leaves their 64 bits right.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & _WORD, (key1 + PHILOX_KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def random_bits(
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    stream: int,
    first_group: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """16 random bits for each of ``count`` elements.

    The seed is the key of `philox`, low word first. The counter's words are the number of the
    group of 8 elements (two words, low first), the step and the stream's lower half. Element i of
    a group has the low half of the result's word i // 2 if i is even, else the high half.

    Args:
        count: number of elements.
        seed: taken modulo 2^64.
        step: int, or 0-dim tensor of any dtype; taken modulo 2^32.
        stream: which of the streams of that seed and step, as the tensor's number in its
            optimizer, below 2^32. Where the tensor is a part of a larger one, it draws what it
            would draw there if 2^32 times the number of its first group is added.
        first_group: the number of the first group; exp_avg_sq's is 0, and the parameters' is
            ``FIRST_PARAM_GROUP``.
        device: where the result goes; the CPU if not given.

    Returns:
        int64 tensor of shape ``(count,)``, in [0, 65535].

    Example:
        >>> random_bits(3, seed=1, step=1, stream=0).tolist()
        [53345, 31637, 451]
    """
    first_group += (stream >> 32) & _WORD
    group = torch.arange((count + RANDOM_GROUP - 1) // RANDOM_GROUP, device=device) + first_group
    step = torch.as_tensor(step, device=device).long() & _WORD
    counter = [
        group & _WORD,
        (group >> 32) & _WORD,
        step.expand_as(group),
        torch.full_like(group, stream & _WORD),
    ]
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:count]


def encode(x: Tensor, format: Format, random: Tensor | None = None) -> Tensor:
    """Codes of values in [-1, 1].

    Without ``random`` the result is the nearest value of the format; of two equally near ones it
    is the larger in magnitude, and in ``linear_int16`` the even code. With it the result is one of
    the two values around x, and x on average (up to 3e-5 of their distance).

    In ``unsigned_dynamic``, 0 and negative values become code 0, and a positive value never does,
    since the optimizer divides by its root: what lies below the smallest positive value of the map
    (3.25e-7) goes up to it, which is the format's only bias.

    Args:
        x: finite float32 values in [-1, 1], of any shape.
        format: the name of the format.
        random: int64, of x's shape, in [0, 65535]; only for ``unsigned_dynamic``.

    Returns:
        tensor of x's shape, of dtype ``CODE_DTYPES[format]``.

    Raises:
        ValueError: for an unknown format, or for ``random`` with another format.

    Example:
        >>> encode(torch.tensor([-1.0, 0.0, 0.3, 1.0]), "signed_dynamic").tolist()
        [0, 127, 205, 255]
    """
    _check_format(format, random is not None)
    if format == "linear_int16":
        return (x.double() * LINEAR_MAX).round().to(torch.int16)
    signed = format == "signed_dynamic"
    if random is not None:
        rank = _stochastic_rank(x, random)
    else:
        boundaries = _boundaries(signed).to(x.device)
        rank = torch.bucketize(x.double().abs(), boundaries, right=True)
    if signed:
        code = torch.where(x < 0, SIGNED_ZERO_CODE - rank, SIGNED_ZERO_CODE + rank).clamp_min(0)
    else:
        code = torch.where(x > 0, rank.clamp_min(1), 0)
    return code.to(torch.uint8)


def _stochastic_rank(x: Tensor, random: Tensor) -> Tensor:
    values, ranks = (corners.to(x.device) for corners in _lines(signed=False))
    x = x.clamp(min=values[1])
    line = torch.bucketize(x, values[1:-1], right=True)
    distances, heights = values.double().diff(), ranks.diff() << POSITION_BITS
    slope = (heights / distances).float()[line]
    # Exact in float64 and then rounded once, as in the native kernels' fused multiply-add.
    position = ((x - values[line]).double() * slope.double()).round().long()
    position += ranks[line] << POSITION_BITS
    return (2 * position + random) >> (POSITION_BITS + 1)


def decode(codes: Tensor, format: Format) -> Tensor:
    """The codes' values in [-1, 1], of the shape of ``codes`` and float32; inverse of `encode`."""
    _check_format(format)
    if format == "linear_int16":
        return codes.float() * (1 / LINEAR_MAX)
    return dynamic_map(format == "signed_dynamic", codes.device)[codes.int()]


def _blocks(x: Tensor) -> Tensor:
    """x in rows of BLOCK_SIZE, the last one filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def quantize(
    x: Tensor,
    format: Format,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor in blocks of 256 elements.

    A block's scale is the largest magnitude among its finite elements; NaN and infinite elements
    are stored as 0. Rounding is as told at `encode`. Below an absmax of 2^-128 the inverse of the
    scale isn't a float any more, and the values lose their relative precision.

    Args:
        x: float32 tensor of any shape.
        format: the name of the format.
        seed: if given, rounding is stochastic, which only ``unsigned_dynamic`` has. Equal seed,
            step and stream give equal results; see `random_bits` for them.
        step: int, or 0-dim tensor.
        stream: int.

    Returns:
        codes of x's shape and of dtype ``CODE_DTYPES[format]``, and absmax, float32 of shape
        ``(ceil(x.numel() / 256),)``.

    Raises:
        TypeError: if x is not float32.
        ValueError: for an unknown format, or for a seed with another format than
            ``unsigned_dynamic``.

    Example:
        >>> codes, absmax = quantize(torch.tensor([0.5, -2.0, 0.0]), "linear_int16")
        >>> codes.tolist(), absmax.tolist()
        ([8192, -32767, 0], [2.0])
        >>> dequantize(codes, absmax, "linear_int16").tolist()
        [0.5000152587890625, -2.0, 0.0]
    """
    _check_format(format, seed is not None)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, not {x.dtype}")
    blocks = _blocks(torch.where(x.isfinite(), x, 0))
    absmax = blocks.abs().amax(1)
    codes = encode(
        _normalized(blocks, absmax).view(-1)[: x.numel()],
        format,
        None if seed is None else random_bits(x.numel(), seed=seed, step=step, stream=stream, device=x.device),
    )
    if format == "unsigned_dynamic":  # positive values that vanish in the scaling
        positive = blocks.view(-1)[: x.numel()] > 0
        codes = torch.where(positive, codes.clamp_min(1), codes)
    return codes.view(x.shape), absmax


def _normalized(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Blocks divided by absmax, by way of its inverse: finite, and such that nothing passes 1."""
    inverse = absmax.reciprocal().clamp_max(torch.finfo(torch.float32).max)
    too_large = absmax * inverse > 1  # the inverse of a large absmax is denormal, of few digits
    inverse = torch.where(too_large, inverse.nextafter(torch.zeros_like(inverse)), inverse)
    return blocks * inverse[:, None]


def dequantize(codes: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """The float32 values, of the shape of ``codes``, that `quantize` stored.

    Args:
        codes: tensor of any shape, of dtype ``CODE_DTYPES[format]``.
        absmax: float32 of shape ``(ceil(codes.numel() / 256),)``.
        format: the name of the format.

    Raises:
        TypeError: if the codes have another dtype.
        ValueError: for an unknown format, or if absmax has another shape.
    """
    _check_format(format)
    if codes.dtype != CODE_DTYPES[format]:
        raise TypeError(f"codes of {format} must be {CODE_DTYPES[format]}, not {codes.dtype}")
    blocks = _blocks(decode(codes, format))
    if absmax.shape != blocks.shape[:1]:
        raise ValueError(
            f"absmax must have shape {tuple(blocks.shape[:1])} for {codes.numel()} codes, not {tuple(absmax.shape)}"
        )
    return (blocks * absmax[:, None]).view(-1)[: codes.numel()].view(codes.shape)


def _check_format(format: str, stochastic: bool = False) -> None:
    if format not in CODE_DTYPES:
        raise ValueError(f"format must be one of {', '.join(CODE_DTYPES)}, not {format!r}")
    if stochastic and format != "unsigned_dynamic":
        raise ValueError(f"only unsigned_dynamic is rounded stochastically, not {format}")

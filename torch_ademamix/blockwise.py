"""The formats of quantized state, in plain PyTorch: the oracle of ops/blockwise.h, to the bit.

A tensor is quantized in blocks of 256 elements in logical order, each with one float32 scale, its
absmax; the last block may be shorter. The three formats:

=====================  ======================================  ===================================
format                 value of a code                         state
=====================  ======================================  ===================================
``signed_sqrt_int8``   sign(code) * (code / 127)² * absmax     exp_avg, exp_avg_slow in 8 bits
``fourth_root_uint8``  ((code / 255)² * absmax)²               exp_avg_sq
``linear_int16``       code / 32767 * absmax                   exp_avg_slow
=====================  ======================================  ===================================

absmax is a block's largest magnitude; in ``fourth_root_uint8`` that of the elements' square roots.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Format = Literal["signed_sqrt_int8", "fourth_root_uint8", "linear_int16"]

BLOCK_SIZE = 256

# In the order of the ops' numbers for them (BlockFormat in ops/blockwise.h).
CODE_DTYPES: dict[Format, torch.dtype] = {
    "signed_sqrt_int8": torch.int8,
    "fourth_root_uint8": torch.uint8,
    "linear_int16": torch.int16,
}
FORMATS = {dtype: format for format, dtype in CODE_DTYPES.items()}  # by the dtype of codes

LARGEST_CODES: dict[Format, int] = {"signed_sqrt_int8": 127, "fourth_root_uint8": 255, "linear_int16": 32767}

# Of a positive value in fourth_root_uint8. The optimizer divides by its root, so it may neither become 0 nor, by
# chance, much smaller than it is: codes 1 to 3 are as far from each other as from 0, and what is below 4 goes up to it.
SMALLEST_FOURTH_ROOT = 4

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
    first_group = first_group + ((stream >> 32) & _WORD)
    group = torch.arange((count + RANDOM_GROUP - 1) // RANDOM_GROUP, device=device) + first_group
    step = torch.as_tensor(step, device=device).long() & _WORD
    counter = [
        group & _WORD,
        (group >> 32) & _WORD,
        step.expand_as(group),
        torch.as_tensor(stream & _WORD, device=device).expand_as(group),
    ]
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:count]


def blocks_of(x: Tensor) -> Tensor:
    """x in rows of BLOCK_SIZE, the last one filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded to the nearest float32, which torch's own root, where it is MKL's, isn't."""
    return x.double().sqrt().float()


def quantize(
    x: Tensor,
    format: Format,
    *,
    seed: int | None = None,
    step: int | Tensor = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor in blocks of 256 elements.

    A block's scale is the largest magnitude among its finite elements, in ``fourth_root_uint8`` the
    largest square root; NaN and infinite elements are stored as 0, and in that format so are
    negative ones. Codes are rounded to the nearest: of x / absmax, or its signed square root, or of
    √x / absmax the square root. With a seed, ``fourth_root_uint8`` is rounded to one of the two codes
    around, on average to what lies between them. In that format a positive value becomes no code
    below 4, since the optimizer divides by its root.

    Args:
        x: float32 tensor of any shape.
        format: the name of the format.
        seed: if given, rounding is stochastic, which only ``fourth_root_uint8`` has. Equal seed,
            step and stream give equal results; see `random_bits` for them.
        step: int, or 0-dim tensor.
        stream: int.

    Returns:
        codes of x's shape and of dtype ``CODE_DTYPES[format]``, and absmax, float32 of shape
        ``(ceil(x.numel() / 256),)``.

    Raises:
        TypeError: if x is not float32.
        ValueError: for an unknown format, or for a seed with another format than
            ``fourth_root_uint8``.

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
    x = torch.where(x.isfinite(), x, 0)
    if format == "fourth_root_uint8":
        x = _sqrt(x.clamp_min(0))
    blocks = blocks_of(x)
    absmax = blocks.abs().amax(1)
    inverse = absmax.reciprocal().clamp_max(torch.finfo(torch.float32).max)[:, None]
    # One float32 operation after another up to here; then what a fused multiply-add rounds, exact in float64.
    if format == "linear_int16":
        codes = ((blocks * inverse).double() * LARGEST_CODES[format]).round()
    elif format == "signed_sqrt_int8":
        codes = (_sqrt(blocks.abs() * inverse).double() * LARGEST_CODES[format]).round() * blocks.sign()
    else:
        roots = _sqrt((blocks * inverse).clamp_max(1)).double() * LARGEST_CODES[format]
        if seed is None:
            codes = roots.round()
        else:
            positions = (roots * 2**POSITION_BITS).round().long()
            random = random_bits(blocks.numel(), seed=seed, step=step, stream=stream, device=x.device)
            codes = (2 * positions + random.view_as(blocks)) >> (POSITION_BITS + 1)
        codes = torch.where(blocks > 0, codes.clamp_min(SMALLEST_FOURTH_ROOT), 0)
    return codes.to(CODE_DTYPES[format]).view(-1)[: x.numel()].view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """The float32 values, of the shape of ``codes``, that `quantize` stored.

    Quantizing them again gives the same codes and scales: a block's largest code stands for its scale itself. That
    needs float32's full precision, so it holds where a block's largest value is at least 2⁻¹²⁴ (``linear_int16``:
    2⁻¹¹⁸), and for blocks in which the largest code occurs, as in all that `quantize` returns. `decode` is what a step
    computes, in which that code's value may be an ulp off.

    Args:
        codes: tensor of any shape, of dtype ``CODE_DTYPES[format]``.
        absmax: float32 of shape ``(ceil(codes.numel() / 256),)``.
        format: the name of the format.

    Raises:
        TypeError: if the codes have another dtype.
        ValueError: for an unknown format, or if absmax has another shape.

    Example:
        >>> x = torch.randn(1000)
        >>> codes, absmax = quantize(x, "signed_sqrt_int8")
        >>> again = quantize(dequantize(codes, absmax, "signed_sqrt_int8"), "signed_sqrt_int8")
        >>> torch.equal(again[0], codes), torch.equal(again[1], absmax)
        (True, True)
    """
    values = decode(codes, absmax, format)
    scales = (absmax.square() if format == "fourth_root_uint8" else absmax).repeat_interleave(BLOCK_SIZE)
    scales = scales[: codes.numel()].view(codes.shape)
    is_largest = codes.float().abs() == LARGEST_CODES[format]
    return torch.where(is_largest, scales.copysign(codes), values)


def decode(codes: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """The values of codes within a step: `dequantize` but for the last bit of a block's largest code."""
    _check_format(format)
    if codes.dtype != CODE_DTYPES[format]:
        raise TypeError(f"codes of {format} must be {CODE_DTYPES[format]}, not {codes.dtype}")
    blocks = blocks_of(codes.float())
    if absmax.shape != blocks.shape[:1]:
        raise ValueError(
            f"absmax must have shape {tuple(blocks.shape[:1])} for {codes.numel()} codes, not {tuple(absmax.shape)}"
        )
    largest = LARGEST_CODES[format]
    if format == "linear_int16":
        values = blocks * (absmax * (1 / largest))[:, None]
    else:
        values = blocks * blocks.abs() * (absmax * (1 / largest**2))[:, None]
        if format == "fourth_root_uint8":
            values = values.square()
    return values.view(-1)[: codes.numel()].view(codes.shape)


def _check_format(format: str, stochastic: bool = False) -> None:
    if format not in CODE_DTYPES:
        raise ValueError(f"format must be one of {', '.join(CODE_DTYPES)}, not {format!r}")
    if stochastic and format != "fourth_root_uint8":
        raise ValueError(f"only fourth_root_uint8 is rounded stochastically, not {format}")

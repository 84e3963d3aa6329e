"""The formats of quantized state, in PyTorch: the definition that ops/blockwise.h follows bit for bit.

A tensor is quantized in blocks of 256 elements in row-major order, each with one float32 scale, its absmax; the last
block may be shorter. The formats:

=====================  ======================================  ===================================
format                 value of a code                         state
=====================  ======================================  ===================================
``signed_sqrt_int8``   sign(code) * (code / 127)² * absmax     exp_avg, exp_avg_slow in 8 bits
``fourth_root_uint8``  ((code / 255)² * absmax)²               exp_avg_sq
``linear_int16``       code / 32767 * absmax                   exp_avg_slow
``linear_int12``       code / 2047 * absmax                    exp_avg_slow in 12 bits
``signed_sqrt_int4``   sign(code) * (code / 7)² * absmax       exp_avg next to these
``fourth_root_uint4``  ((code / 15)² * absmax)²                exp_avg_sq next to these
=====================  ======================================  ===================================

absmax is the largest magnitude of a block; for the fourth roots, that of the elements' square roots. The last two
share an int16 word with ``linear_int12``: :func:`torch_ademamix.blockwise.pack`.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Format = Literal[
    "signed_sqrt_int8", "fourth_root_uint8", "linear_int16", "linear_int12", "signed_sqrt_int4", "fourth_root_uint4"
]

BLOCK_SIZE = 256

# In the order of the ops' numbers for them (BlockFormat in ops/blockwise.h).
CODE_DTYPES: dict[Format, torch.dtype] = {
    "signed_sqrt_int8": torch.int8,
    "fourth_root_uint8": torch.uint8,
    "linear_int16": torch.int16,
    "linear_int12": torch.int16,
    "signed_sqrt_int4": torch.int8,
    "fourth_root_uint4": torch.uint8,
}
# The formats whose codes use all bits of their dtype.
FORMATS: dict[torch.dtype, Format] = {
    torch.int8: "signed_sqrt_int8",
    torch.uint8: "fourth_root_uint8",
    torch.int16: "linear_int16",
}

LARGEST_CODES: dict[Format, int] = {
    "signed_sqrt_int8": 127,
    "fourth_root_uint8": 255,
    "linear_int16": 32767,
    "linear_int12": 2047,
    "signed_sqrt_int4": 7,
    "fourth_root_uint4": 15,
}

# The smallest codes of positive values. The optimizer divides by the root of ν, so ν may neither become 0 nor, by
# chance, much smaller than it is: codes 1 to 3 of 255 are as far from each other as from 0, so values below 4 are
# rounded up.
SMALLEST_FOURTH_ROOTS: dict[Format, int] = {"fourth_root_uint8": 4, "fourth_root_uint4": 1}

# Philox 4x32 (Salmon et al., SC 2011); 7 rounds are the fewest that pass BigCrush.
PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
RANDOM_BITS = 16  # of an element
RANDOM_GROUP = 8  # elements that share a Philox call, of 128 bits
FIRST_PARAM_GROUP = -(1 << 63)  # 2^63 as an int64: the groups of parameters are none that a tensor's exp_avg_sq has

# Stochastic rounding counts positions of 2^-bits between two codes, by bits: as fine as float32 has them next to a
# number with which a code's bits begin at one place.
POSITION_BITS: dict[Format, int] = {
    "fourth_root_uint8": 15,
    "signed_sqrt_int4": 16,
    "fourth_root_uint4": 16,
}

# What a magnitude in signed_sqrt_int4 would gain on average, relative to absmax, where its root is rounded
# stochastically: with a fraction f of a code, its square gains f * (1 - f) / 7². It is taken away before, but for the
# largest magnitude.
ROOT_GAIN = 1 / 256

# Two codes of an element are rounded independently, with bits of one Philox call: exp_avg's takes those that
# exp_avg_sq's of another element takes. Element i of a group has those of element i ^ number.
RANDOM_ELEMENT: dict[Format, int] = {"signed_sqrt_int4": 4}

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
    subsequence: int,
    first_group: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """16 random bits for each of ``count`` elements.

    The seed is the key of `philox`, low word first. The counter's words are the index of the group of 8 elements (two
    words, low first), the step and the lower half of ``subsequence``. Element i of a group gets the low half of the
    result's word i // 2 if i is even, else the high half.

    Args:
        count: number of elements.
        seed: taken modulo 2^64.
        step: int, or 0-dim tensor of any dtype; taken modulo 2^32.
        subsequence: the RNG subsequence of that seed and step: the tensor's index in its optimizer, below 2^32. For a
            slice of a larger tensor, add 2^32 times the index of its first group, so that it draws the same bits there.
        first_group: the index of the first group; exp_avg_sq's is 0, and the parameters' is ``FIRST_PARAM_GROUP``.
        device: where the result goes; the CPU if not given.

    Returns:
        int64 tensor of shape ``(count,)``, in [0, 65535].

    Example:
        >>> random_bits(3, seed=1, step=1, subsequence=0).tolist()
        [53345, 31637, 451]
    """
    first_group = first_group + ((subsequence >> 32) & _WORD)
    group = torch.arange((count + RANDOM_GROUP - 1) // RANDOM_GROUP, device=device) + first_group
    step = torch.as_tensor(step, device=device).long() & _WORD
    counter = [
        group & _WORD,
        (group >> 32) & _WORD,
        step.expand_as(group),
        torch.as_tensor(subsequence & _WORD, device=device).expand_as(group),
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
    subsequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor in blocks of 256 elements.

    A block's scale is the largest magnitude among its finite elements; for the fourth roots, the largest square root.
    NaN and infinite elements are stored as 0, and in the fourth roots so are negative ones. A code is x / absmax, its
    signed square root, or the square root of √x / absmax, times the largest code and rounded to nearest. With a seed,
    formats in ``POSITION_BITS`` are rounded stochastically instead. In the fourth roots a positive value never gets a
    code below ``SMALLEST_FOURTH_ROOTS``, since the optimizer divides by its root.

    Args:
        x: float32 tensor of any shape.
        format: the name of the format.
        seed: if given, rounding is stochastic. Equal seed, step and subsequence give equal results; see `random_bits`.
        step: int, or 0-dim tensor.
        subsequence: int.

    Returns:
        codes of x's shape and of dtype ``CODE_DTYPES[format]``, and absmax, float32 of shape
        ``(ceil(x.numel() / 256),)``.

    Raises:
        TypeError: if x is not float32.
        ValueError: for an unknown format, or for a seed with a format without stochastic rounding.

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
    is_root = format in SMALLEST_FOURTH_ROOTS
    if is_root:
        x = _sqrt(x.clamp_min(0))
    blocks = blocks_of(x)
    absmax = blocks.abs().amax(1)
    inverse = absmax.reciprocal().clamp_max(torch.finfo(torch.float32).max)[:, None]
    # One float32 operation after another up to here; then what a fused multiply-add rounds, exact in float64.
    if format.startswith("linear"):
        fractions = blocks * inverse
    elif is_root:
        fractions = _sqrt((blocks * inverse).clamp_max(1))
    else:
        fractions = blocks.abs() * inverse
        if seed is not None:
            fractions = (fractions.double() * (1 + ROOT_GAIN) - ROOT_GAIN).float().clamp_min(0)
        fractions = _sqrt(fractions).copysign(blocks)
    exact = fractions.double() * LARGEST_CODES[format]
    if seed is None:
        codes = exact.round()
    else:
        bits = POSITION_BITS[format]
        random = random_bits(blocks.numel(), seed=seed, step=step, subsequence=subsequence, device=x.device)
        random = random.view(-1, RANDOM_GROUP)[:, torch.arange(RANDOM_GROUP) ^ RANDOM_ELEMENT.get(format, 0)]
        positions = (exact * 2**bits).round().long() << (RANDOM_BITS - bits)
        codes = (positions + random.view_as(blocks)) >> RANDOM_BITS
    if is_root:
        codes = torch.where(blocks > 0, codes.clamp_min(SMALLEST_FOURTH_ROOTS[format]), 0)
    return codes.to(CODE_DTYPES[format]).view(-1)[: x.numel()].view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, format: Format) -> Tensor:
    """Returns the float32 values, of the shape of ``codes``, that `quantize` stored.

    Quantizing them again gives the same codes and scales: a block's largest code is decoded to the scale itself. That
    needs float32's full precision, so it holds if a block's largest value is at least 2⁻¹²⁴ (``linear_int16``:
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
    scales = (absmax.square() if format in SMALLEST_FOURTH_ROOTS else absmax).repeat_interleave(BLOCK_SIZE)
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
    if format.startswith("linear"):
        values = blocks * (absmax * (1 / largest))[:, None]
    else:
        values = blocks * blocks.abs() * (absmax * (1 / largest**2))[:, None]
        if format in SMALLEST_FOURTH_ROOTS:
            values = values.square()
    return values.view(-1)[: codes.numel()].view(codes.shape)


def pack(slow: Tensor, other: Tensor) -> Tensor:
    """Packs ``linear_int12`` codes and 4-bit codes, ``signed_sqrt_int4`` or ``fourth_root_uint4``, into words.

    Args:
        slow: int16 tensor of any shape.
        other: int8 or uint8 tensor of that shape.

    Returns:
        int16 tensor of that shape.

    >>> words = pack(torch.tensor([-2047, 1], dtype=torch.int16), torch.tensor([7, -1], dtype=torch.int8))
    >>> words.tolist(), [codes.tolist() for codes in unpack(words, "signed_sqrt_int4")]
    ([-32745, 31], [[-2047, 1], [7, -1]])
    """
    return (slow << 4) | (other.to(torch.int16) & 15)


def unpack(words: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The two codes of words, of which the second's format is given; see :func:`torch_ademamix.blockwise.pack`."""
    dtype = CODE_DTYPES[format]
    other = words & 15 if dtype == torch.uint8 else (words << 12) >> 12
    return words >> 4, other.to(dtype)


def _check_format(format: str, stochastic: bool = False) -> None:
    if format not in CODE_DTYPES:
        raise ValueError(f"format must be one of {', '.join(CODE_DTYPES)}, not {format!r}")
    if stochastic and format not in POSITION_BITS:
        raise ValueError(f"only {', '.join(POSITION_BITS)} are rounded stochastically, not {format}")

"""How a parameter's three EMAs, its moments, are stored: their formats, the entries of state, an op call's lists."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.numerics.blockwise import CODE_DTYPES, Format, pack, unpack

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

SCALES = "_absmax"  # ends the names of scales, of which there is one per block

# The entries with words of two codes: of exp_avg_slow in 12 bits, and of another moment in a format of 4 bits.
WORDS: dict[Format | None, str] = {
    "signed_sqrt_int4": "exp_avg_slow_and_exp_avg",
    "fourth_root_uint4": "exp_avg_slow_and_exp_avg_sq",
}

Formats = Mapping[str, Format | None]  # of the moments that a parameter's state has: None is unquantized

# Formats of quantized state by `slow_ema_bits`. At 12, the words' other 4 bits are exp_avg's, or
# exp_avg_sq's without it.
QUANTIZED: dict[int, Formats] = {
    16: {"exp_avg": "signed_sqrt_int8", "exp_avg_slow": "linear_int16", "exp_avg_sq": "fourth_root_uint8"},
    12: {"exp_avg": "signed_sqrt_int4", "exp_avg_slow": "linear_int12", "exp_avg_sq": "fourth_root_uint8"},
    8: {"exp_avg": "signed_sqrt_int8", "exp_avg_slow": "signed_sqrt_int8", "exp_avg_sq": "fourth_root_uint8"},
}
WITHOUT_EXP_AVG: dict[int, Formats] = {
    16: {"exp_avg_slow": "linear_int16", "exp_avg_sq": "fourth_root_uint8"},
    12: {"exp_avg_slow": "linear_int12", "exp_avg_sq": "fourth_root_uint4"},
    8: {"exp_avg_slow": "signed_sqrt_int8", "exp_avg_sq": "fourth_root_uint8"},
}


def quantized_formats(slow_ema_bits: int, has_exp_avg: bool) -> Formats:
    return (QUANTIZED if has_exp_avg else WITHOUT_EXP_AVG)[slow_ema_bits]


def packed_moment(formats: Formats) -> str | None:
    """The moment whose codes are in one word with exp_avg_slow's, if there is one."""
    return next((name for name, format in formats.items() if format in WORDS), None)


def entries(formats: Formats, unquantized: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
    """The entries of a parameter's state besides its step and remainder, and their dtypes.

    >>> list(entries(WITHOUT_EXP_AVG[16]))
    ['exp_avg_slow', 'exp_avg_slow_absmax', 'exp_avg_sq', 'exp_avg_sq_absmax']
    >>> list(entries(WITHOUT_EXP_AVG[12]))
    ['exp_avg_slow_and_exp_avg_sq', 'exp_avg_slow_absmax', 'exp_avg_sq_absmax']
    """
    packed = packed_moment(formats)
    result = {}
    for name, format in formats.items():
        if packed is None or name not in (packed, "exp_avg_slow"):
            result[name] = unquantized if format is None else CODE_DTYPES[format]
        elif name == "exp_avg_slow":
            result[WORDS[formats[packed]]] = torch.int16
        if format is not None:
            result[f"{name}{SCALES}"] = torch.float32
    return result


def formats_of(state: Mapping[str, Any]) -> Formats:
    """How the moments of a state are stored, by its entries; of one that lacks some, what it comes nearest to."""
    has_exp_avg = "exp_avg" in state or f"exp_avg{SCALES}" in state
    first = "exp_avg" if has_exp_avg else "exp_avg_slow"
    if any(words in state for words in WORDS.values()):
        return quantized_formats(12, has_exp_avg)
    if f"{first}{SCALES}" not in state:
        return dict.fromkeys(quantized_formats(16, has_exp_avg))
    return quantized_formats(8 if getattr(state.get("exp_avg_slow"), "dtype", None) == torch.int8 else 16, has_exp_avg)


def op_entries(formats: Formats) -> tuple[str | None, ...]:
    """The entries that the lists of a step's op have, in their order; None for a list that is empty.

    >>> op_entries(WITHOUT_EXP_AVG[12])[2:6]
    ('exp_avg_slow_and_exp_avg_sq', 'exp_avg_slow_absmax', None, 'exp_avg_sq_absmax')
    """
    own, packed, names = entries(formats), packed_moment(formats), list[str]()
    for name in MOMENTS:
        entry = WORDS[formats[packed]] if packed and name == "exp_avg_slow" else name
        names += (entry, f"{name}{SCALES}") if any(formats.values()) else (entry,)
    return (*(name if name in own else None for name in names), "step")


def op_formats(
    exp_avgs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
) -> Formats:
    """The formats of lists of the op `ademamix_blockwise_step_`: 12 bits where one that has scales has no codes."""
    if exp_avg_absmaxs and not exp_avgs:
        return quantized_formats(12, has_exp_avg=True)
    has_exp_avg = len(exp_avgs) > 0
    if exp_avg_slows and not exp_avg_sqs and not has_exp_avg:
        return quantized_formats(12, has_exp_avg)
    return quantized_formats(8 if exp_avg_slows and exp_avg_slows[0].dtype == torch.int8 else 16, has_exp_avg)


Codes = Mapping[str, tuple[Tensor, Tensor]]  # of quantized moments, each with its scales


def codes_in(state: Mapping[str, Tensor], formats: Formats) -> Codes:
    """The codes and scales of the moments in state of these formats."""
    codes = {name: state[name] for name in formats if name in state}
    packed = packed_moment(formats)
    if packed and (format := formats[packed]):
        codes["exp_avg_slow"], codes[packed] = unpack(state[WORDS[format]], format)
    return {name: (codes[name], state[f"{name}{SCALES}"]) for name in formats}


def entries_of(codes: Codes, formats: Formats) -> dict[str, Tensor]:
    """The entries of state that have these codes and scales; the reverse of :func:`codes_in`."""
    state = {f"{name}{SCALES}": absmax for name, (_, absmax) in codes.items()}
    own = {name: values for name, (values, _) in codes.items()}
    if packed := packed_moment(formats):
        state[WORDS[formats[packed]]] = pack(own.pop("exp_avg_slow"), own.pop(packed))
    return state | own

"""One parameter's saved state: checked, and converted to the formats in which an optimizer keeps it."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import block_count
from torch_ademamix.numerics.moments import (
    MOMENTS,
    SCALES,
    WITHOUT_EXP_AVG,
    Formats,
    codes_in,
    entries,
    entries_of,
    formats_of,
)
from torch_ademamix.numerics.reference_step import state_dtype
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise
from torch_ademamix.ops.check import in_place_problem
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import remainder_dtype
from torch_ademamix.state.arenas import MASTER_REMAINDER, NAMES

# An entry that only another implementation's state has, and what to do then.
BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"  # where bitsandbytes nests most of a parameter's state
FOREIGN_STATE = {
    BITSANDBYTES_STATE: "; load bitsandbytes' state with torch_ademamix.checkpoint.from_bitsandbytes",
    "exp_avg_fast": "; load Apple's state with torch_ademamix.checkpoint.from_apple, the Apertus fork's with "
    "from_apertus",
}


def convert_saved(
    p: Tensor, saved: Mapping[str, Any], target: Formats, group: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """A parameter's saved state in the formats of `target`, on the devices on which it was saved.

    State in another format is converted, with rounding to nearest. An exp_avg that wasn't saved is zero. A parameter
    without a saved remainder is its own master weight. A DTensor parameter takes DTensors with its placement, or the
    full state as regular tensors, of which each process keeps its shard.

    Args:
        group: the optimizer's group, whose `master_weights` are used.
        where: begins the messages.

    Raises:
        ValueError: something is missing, unknown, or of another shape, dtype or placement.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is a {type(saved).__name__}, but must be a dict")
    if lost := [name for name, value in saved.items() if isinstance(value, Mapping) and not value]:
        raise ValueError(f"{where} has no {', '.join(lost)}: the flat state dict that torch made it of hasn't either")
    like, entries, distribute = sharding.localize(p, saved, where)
    wanted_remainder = remainder_dtype(like, group)
    entries = _expect_entries(like, entries, wanted_remainder, where)
    converted = {"step": entries["step"]} | _convert_moments(like, entries, target)
    if wanted_remainder is not None:
        converted[MASTER_REMAINDER] = _convert_remainder(like, entries.get(MASTER_REMAINDER), wanted_remainder)
    return distribute(converted)


def _expect_entries(
    p: Tensor, saved: Mapping[str, Any], wanted_remainder: torch.dtype | None, where: str
) -> dict[str, Tensor]:
    """The entries of state that AdEMAMix has, of which each is as it has to be; `step` has no dimensions."""
    hints = [hint for entry, hint in FOREIGN_STATE.items() if entry in saved]
    own = {name: saved[name] for name in NAMES if name in saved} if not hints else dict(saved)
    remainder = own.pop(MASTER_REMAINDER, None)
    source = formats_of(own)
    quantized = any(source.values())
    if quantized and p.is_complex():
        raise ValueError(f"{where} is quantized, but the state of a complex parameter can't be; save it in 32 bits")
    expected = {"step", *entries(source)}
    if own.keys() != expected:
        raise ValueError(f"{where} has entries {sorted(own)}, but must have {sorted(expected)}{''.join(hints[:1])}")
    own["step"] = expect_step(own["step"], f"{where}['step']")
    if not _finite_and_not_negative(own["step"]):
        raise ValueError(f"{where}['step'] is {own['step'].item():g}, but must be finite and at least 0")
    for name, dtype in entries(source, state_dtype(p.dtype)).items():
        entry = f"{where}[{name!r}]"
        if name.endswith(SCALES):
            _expect_scales(p, own[name], dtype, entry)
        else:
            # The dtype of exp_avg_slow's codes tells their format.
            dtypes = (torch.int16, torch.int8) if name == "exp_avg_slow" and quantized else (dtype,)
            expect_tensor(own[name], entry, p.shape, *dtypes)
    if remainder is not None and wanted_remainder is None:
        raise ValueError(
            f"{where} has {MASTER_REMAINDER!r}, a part of the float32 weights, which would be lost; load it with "
            "master_weights='remainder' (or 'remainder8') and bfloat16 parameters, or delete the entry"
        )
    if remainder is not None:
        entry = f"{where}[{MASTER_REMAINDER!r}]"
        own[MASTER_REMAINDER] = expect_tensor(remainder, entry, p.shape, *bfloat16.REMAINDERS.values())
    return own


def _expect_scales(p: Tensor, absmax: Any, dtype: torch.dtype, entry: str) -> None:
    expect_tensor(absmax, entry, None, dtype)
    if absmax.shape != (block_count(p.numel()),):  # the scales in a row, as other implementations have them
        expect_tensor(absmax, entry, sharding.scales_shape(p))
    if not _finite_and_not_negative(absmax):
        raise ValueError(f"{entry} has scales that aren't finite or are below 0")


def _convert_moments(p: Tensor, saved: Mapping[str, Tensor], target: Formats) -> dict[str, Tensor]:
    """The moments of saved state as entries in the formats of `target`."""
    source = formats_of(saved)
    quantized = any(source.values())
    codes = codes_in({name: saved[name].contiguous() for name in entries(source)}, source) if quantized else {}
    unquantized: dict[str, Tensor] = {}
    converted: dict[str, tuple[Tensor, Tensor]] = {}
    for name, format in target.items():
        if name not in source:
            like = next(saved[entry] for entry in entries(source) if not entry.endswith(SCALES))
            values = torch.zeros_like(like, dtype=state_dtype(p.dtype))
        elif (own_format := source[name]) is None:
            values = saved[name].contiguous() if in_place_problem(saved[name]) else saved[name]  # a converter's zeros
        elif own_format == format:
            own, absmax = codes[name]
            converted[name] = own, _shaped(absmax.flatten(), p)
            continue
        else:
            own, absmax = codes[name]
            values = dequantize_blockwise(own, absmax.flatten(), own_format)
        if format is None:
            unquantized[name] = values.to(state_dtype(p.dtype))
        else:
            own, absmax = quantize_blockwise(values.float().contiguous(), format)
            converted[name] = own, _shaped(absmax, p)
    return unquantized | (entries_of(converted, target) if converted else {})


def _convert_remainder(p: Tensor, saved: Tensor | None, dtype: torch.dtype) -> Tensor:
    if saved is None:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    remainder = bfloat16.converted(saved, dtype)
    return remainder.contiguous() if in_place_problem(remainder) else remainder


def expect_precision(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    """Checks that state isn't that of a distributed checkpoint of another precision, copied into it.

    Its loader compares shapes only, and copies codes into tensors of any dtype. `group` has the saved options.

    Raises:
        ValueError: with `where` at its beginning.
    """
    hint = "load the checkpoint with the optim_bits, slow_ema_bits and min_8bit_size that it was saved with"
    otherwise = "or, if the group's option was changed after the state was made, set it back in the state dict"
    kept, wanted = saved.get(MASTER_REMAINDER), bfloat16.REMAINDERS.get(group.get("master_weights", ""))
    if isinstance(kept, Tensor) and wanted is not None and kept.dtype != wanted:
        text = f"{where}[{MASTER_REMAINDER!r}] has dtype {kept.dtype}, but its group has"
        hint = "load the checkpoint with the master_weights that it was saved with"
        raise ValueError(f"{text} master_weights={group['master_weights']!r}: {hint}, {otherwise}")
    if "exp_avg_slow" in saved and "exp_avg_slow_absmax" in saved:
        dtype, bits = saved["exp_avg_slow"].dtype, group.get("slow_ema_bits")
        if bits in WITHOUT_EXP_AVG and bits != 8 * dtype.itemsize:
            text = f"{where}['exp_avg_slow'] has dtype {dtype}, but its group has slow_ema_bits={bits}"
            raise ValueError(f"{text}: {hint}, {otherwise}")
    elif (
        "exp_avg_slow_absmax" not in saved
        and group.get("optim_bits") == 8
        and saved["exp_avg_sq"].numel() >= group.get("min_8bit_size", 0)
    ):
        moments = [sharding.local(saved[name]) for name in MOMENTS if name in saved]
        if any(map(_has_no_values, moments)):
            return
        if any(m.any() for m in moments) and all((m == m.round()).all() for m in moments):
            raise ValueError(f"{where} has codes of 8-bit state where its values should be: {hint}")


def _finite_and_not_negative(x: Tensor) -> bool:
    return _has_no_values(x) or bool(((x >= 0) & x.isfinite()).all())


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _shaped(absmax: Tensor, p: Tensor) -> Tensor:
    shape = sharding.scales_shape(p)
    return absmax if shape is None else absmax.view(shape)


def expect_step(step: Any, where: str) -> Tensor:
    """A step count, a number or a tensor of one element, as a float32 tensor without dimensions; else a ValueError."""
    if not isinstance(step, (Tensor, Real)):
        raise ValueError(f"{where} is a {type(step).__name__}, but must be a number or a tensor")
    device = step.device if isinstance(step, Tensor) else "cpu"
    tensor = torch.as_tensor(step, dtype=torch.float32, device=device)
    if tensor.numel() != 1:
        raise ValueError(f"{where} has shape {list(tensor.shape)}, but must hold one element")
    return tensor.reshape(())


def expect_tensor(value: Any, where: str, shape: Sequence[int] | None, *dtypes: torch.dtype) -> Tensor:
    """`value`, if it is a tensor of that shape and one of these dtypes (None and none are any); else a ValueError."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, but must be a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{where} has layout {value.layout}, but must be dense")
    if shape is not None and value.shape != tuple(shape):
        raise ValueError(f"{where} has shape {list(value.shape)}, but must have {list(shape)}")
    if dtypes and value.dtype not in dtypes:
        raise ValueError(f"{where} has dtype {value.dtype}, but must be {' or '.join(map(str, dtypes))}")
    return value

"""What the optimizer keeps per parameter: names, shapes and dtypes, made, checked and converted here."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import dynamic_map, paging, sharding
from torch_ademamix.arenas import (
    MASTER_REMAINDER,
    MOMENTS,
    NAMES,
    QUANTIZED_STATE,
    SCALES,
    OptimizerState,
    Storage,
    allocate,
)
from torch_ademamix.blockwise import CODE_DTYPES, FORMATS, Format, block_count
from torch_ademamix.check import in_place_problem
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise
from torch_ademamix.reference import compute_dtype

# The options of a group that say how state is stored. They are the optimizer's own: a checkpoint that was stored
# otherwise is converted when it is loaded.
STORAGE_OPTIONS = ("optim_bits", "slow_ema_bits", "min_8bit_size", "is_paged", "master_weights")

# An entry that only another implementation's state has, and what to do then.
BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"  # where bitsandbytes nests most of a parameter's state
FOREIGN_STATE = {
    BITSANDBYTES_STATE: "; load bitsandbytes' state with torch_ademamix.checkpoint.from_bitsandbytes",
    "exp_avg_fast": "; load Apple's state with torch_ademamix.checkpoint.from_apple",
}

# What quantized state may be stored as: first the default, then what `slow_ema_bits=8` gives.
ALLOWED_FORMATS: dict[str, tuple[Format, ...]] = {
    "exp_avg": ("signed_sqrt_int8",),
    "exp_avg_slow": ("linear_int16", "signed_sqrt_int8"),
    "exp_avg_sq": ("fourth_root_uint8",),
}

# Version 0.1.0 had unsigned codes of dynamic maps in their place, of which exp_avg's dtype tells.
DTYPES_0_1: dict[str, tuple[torch.dtype, ...]] = {
    "exp_avg": (torch.uint8,),
    "exp_avg_slow": (torch.int16, torch.uint8),
    "exp_avg_sq": (torch.uint8,),
}


def formats(p: Tensor, group: Mapping[str, Any]) -> dict[str, Format | None]:
    """How each moment of a parameter is stored: None is unquantized."""
    if group["optim_bits"] == 32 or p.numel() < group["min_8bit_size"] or sharding.scales_shape(p) is None:
        return dict.fromkeys(MOMENTS)
    return {
        name: allowed[-1] if group["slow_ema_bits"] == 8 else allowed[0] for name, allowed in ALLOWED_FORMATS.items()
    }


def has_remainder(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether master weights keep what is rounded away from this parameter."""
    return group["master_weights"] == "remainder" and p.dtype == torch.bfloat16


def storage(p: Tensor, number: int, group: Mapping[str, Any]) -> Storage:
    """How the state of a parameter is stored, in a group of that number."""
    entries: list[tuple[str, torch.dtype]] = []
    for name, format in formats(p, group).items():
        if format is None:
            entries.append((name, compute_dtype(p.dtype)))
        else:
            entries += [(name, CODE_DTYPES[format]), (f"{name}{SCALES}", torch.float32)]
    if has_remainder(p, group):
        entries.append((MASTER_REMAINDER, torch.int16))
    return Storage(number, p.device, paging.is_paged(p, group), tuple(entries))


@torch.no_grad()
def make_state(state: OptimizerState, members: Sequence[tuple[Tensor, Storage]]) -> None:
    """Gives parameters state as it is before the first step, in one arena for each kind of storage."""
    by_storage: dict[Storage, list[Tensor]] = {}
    for p, kind in members:
        by_storage.setdefault(kind, []).append(p)
    for kind, params in by_storage.items():
        parts = allocate([sharding.local(p.detach()) for p in params], kind)
        for p, part in zip(params, parts, strict=True):
            state[p].place(part, sharding.sharded(part.views, p))


@torch.no_grad()
def take_state(state: OptimizerState, entries: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes `entries` what is in an optimizer's state: where its tensors are of the right form, they take the values.

    A parameter that has state, but no entries, is as before its first step then.
    """
    params = {p: (number, group) for number, group in enumerate(groups) for p in group["params"]}
    for key in [key for key in state if key not in entries and key not in params]:
        del state[key]
    fresh, values = [], {}
    for p, (number, group) in params.items():
        if p not in entries and p not in state:
            continue
        new = dict(entries.get(p, ()))
        kind = storage(p, number, group)
        own = {name: new[name] for name in NAMES if name in new}
        if own and not _fits(own, p, kind):  # an older pickle's, say: the step refuses what it can't use
            state[p] = new
            continue
        old = state[p]
        for name in [name for name in old if name not in NAMES]:
            del old[name]
        old.update({name: value for name, value in new.items() if name not in NAMES})
        if own and (old.part is None or old.part.arena.storage != kind):
            fresh.append((p, kind))
        values[p] = own
    make_state(state, fresh)
    for p, own in values.items():
        for name in [name for name in NAMES if name in state[p]]:
            target = sharding.local(state[p][name])
            if own:
                target.copy_(sharding.local(own[name]).reshape(target.shape))
            else:
                target.zero_()
    for key, value in entries.items():
        if key not in params:
            state[key] = value


def _fits(own: Mapping[str, Any], p: Tensor, kind: Storage) -> bool:
    """Whether state is of that kind, so that an arena can take its values."""
    dtypes = {"step": torch.float32, **dict(kind.entries)}
    return {name: value.dtype for name, value in own.items() if isinstance(value, Tensor)} == dtypes and all(
        own[name].shape == p.shape for name in MOMENTS
    )


def loaded_state(p: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """A parameter's saved state in the formats in which the optimizer keeps it, on the devices where it was saved.

    What was stored in another format is converted, rounding to nearest; a parameter without a saved remainder is its
    own master weight. A DTensor parameter takes DTensors that are placed as it is, and the whole state as plain
    tensors, of which each process keeps its part.

    Raises:
        ValueError: something is missing, unknown, or of another shape, dtype or placement; `where` begins the text.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is a {type(saved).__name__}, but must be a dict")
    target = formats(p, group)
    if any(sharding.is_dtensor(value) for value in saved.values()):
        part = sharding.parts(saved, p, where)
        return sharding.sharded(_converted(sharding.local(p), part, target, group, where), p)
    if sharding.is_dtensor(p):
        whole = _converted(sharding.whole(p), saved, target, group, where)
        return sharding.shard({name: value.to(p.device) for name, value in whole.items()}, p)
    return _converted(p, saved, target, group, where)


def check_precision(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    """Refuses loadable state that a distributed checkpoint of another precision was copied into.

    Its loader compares shapes only, and copies codes into tensors of any dtype. `group` has the saved options.

    Raises:
        ValueError: with `where` at its beginning.
    """
    hint = "load the checkpoint with the optim_bits, slow_ema_bits and min_8bit_size that it was saved with"
    if "exp_avg_slow_absmax" in saved:
        dtype, bits = saved["exp_avg_slow"].dtype, group.get("slow_ema_bits")
        if bits in (8, 16) and bits != 8 * dtype.itemsize:
            text = f"{where}['exp_avg_slow'] has dtype {dtype}, but its group has slow_ema_bits={bits}"
            otherwise = "or, if the group's option was changed after the state was made, set it back in the state dict"
            raise ValueError(f"{text}: {hint}, {otherwise}")
    elif group.get("optim_bits") == 8 and saved["exp_avg"].numel() >= group.get("min_8bit_size", 0):
        moments = [sharding.local(saved[name]) for name in MOMENTS]
        if any(m.any() for m in moments) and all((m == m.round()).all() for m in moments):
            raise ValueError(f"{where} has codes of 8-bit state where its values should be: {hint}")


def _converted(
    p: Tensor,
    saved: Mapping[str, Any],
    target: Mapping[str, Format | None],
    group: Mapping[str, Any],
    where: str,
) -> dict[str, Tensor]:
    """:func:`loaded_state` of plain tensors, in the formats of `target`."""
    hints = [hint for entry, hint in FOREIGN_STATE.items() if entry in saved]
    saved = {name: saved[name] for name in NAMES if name in saved} if not hints else dict(saved)
    saved_remainder = saved.pop(MASTER_REMAINDER, None)
    quantized = "exp_avg_absmax" in saved
    is_0_1 = quantized and getattr(saved.get("exp_avg"), "dtype", None) == torch.uint8
    expected = set(QUANTIZED_STATE) if quantized else {*MOMENTS, "step"}
    if saved.keys() != expected:
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}{''.join(hints[:1])}")
    step = torch.as_tensor(saved["step"], dtype=torch.float32)
    if step.numel() != 1:
        raise ValueError(f"{where}['step'] has shape {list(step.shape)}, but must hold one element")
    if not _finite_and_not_negative(step):
        raise ValueError(f"{where}['step'] is {step.item():g}, but must be finite and at least 0")
    state = {"step": step.reshape(())}
    for name, format in target.items():
        if not quantized:
            value = checked(saved[name], f"{where}[{name!r}]", p.shape, compute_dtype(p.dtype))
            if in_place_problem(name, 0, value):  # expanded, as a converter may write zeros
                value = value.contiguous()
            state |= _stored(name, value, format)
            continue
        dtypes = DTYPES_0_1[name] if is_0_1 else [CODE_DTYPES[allowed] for allowed in ALLOWED_FORMATS[name]]
        value = checked(saved[name], f"{where}[{name!r}]", p.shape, *dtypes)
        absmax_name = f"{name}_absmax"
        absmax = checked(saved[absmax_name], f"{where}[{absmax_name!r}]", None, torch.float32)
        if absmax.shape != (block_count(p.numel()),):  # the scales in a row, as other implementations have them
            checked(absmax, f"{where}[{absmax_name!r}]", sharding.scales_shape(p))
        if not _finite_and_not_negative(absmax):
            raise ValueError(f"{where}[{absmax_name!r}] has scales that aren't finite or are below 0")
        value, absmax = value.contiguous(), absmax.contiguous().flatten()
        if is_0_1 and value.dtype == torch.uint8:
            values = dynamic_map.dequantize(value, absmax, signed=name != "exp_avg_sq")
        elif FORMATS[value.dtype] == format:
            state |= {name: value, f"{name}_absmax": _shaped(absmax, p)}
            continue
        else:
            values = dequantize_blockwise(value, absmax, FORMATS[value.dtype])
        state |= _stored(name, values.to(compute_dtype(p.dtype)), format)
    if saved_remainder is not None and not has_remainder(p, group):
        raise ValueError(
            f"{where} has {MASTER_REMAINDER!r}, a part of the float32 weights, which would be lost; load it with "
            "master_weights='remainder' and bfloat16 parameters, or delete the entry"
        )
    if saved_remainder is not None:
        remainder = checked(saved_remainder, f"{where}[{MASTER_REMAINDER!r}]", p.shape, torch.int16)
        if in_place_problem(MASTER_REMAINDER, 0, remainder):
            remainder = remainder.contiguous()
        state[MASTER_REMAINDER] = remainder
    elif has_remainder(p, group):
        state[MASTER_REMAINDER] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    return state


def _finite_and_not_negative(x: Tensor) -> bool:
    return x.is_meta or bool(((x >= 0) & x.isfinite()).all())  # a meta tensor has no values


def _stored(name: str, values: Tensor, format: Format | None) -> dict[str, Tensor]:
    if format is None:
        return {name: values}
    codes, absmax = quantize_blockwise(values.float().contiguous(), format)
    return {name: codes, f"{name}_absmax": _shaped(absmax, values)}


def _shaped(absmax: Tensor, p: Tensor) -> Tensor:
    shape = sharding.scales_shape(p)
    return absmax if shape is None else absmax.view(shape)


def checked(value: Any, where: str, shape: Sequence[int] | None, *dtypes: torch.dtype) -> Tensor:
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

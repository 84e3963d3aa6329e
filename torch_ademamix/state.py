"""What the optimizer keeps per parameter: names, shapes and dtypes, made, checked and converted here."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import paging
from torch_ademamix.blockwise import CODE_DTYPES, Format, block_count
from torch_ademamix.check import in_place_problem
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise
from torch_ademamix.reference import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

# The entries of a parameter's quantized state, in the order of ademamix_blockwise_step_'s lists.
QUANTIZED_STATE = (*(entry for name in MOMENTS for entry in (name, f"{name}_absmax")), "step")

# The options of a group that say how state is stored. They are the optimizer's own: a checkpoint that was stored
# otherwise is converted when it is loaded.
STORAGE_OPTIONS = ("optim_bits", "slow_ema_bits", "min_8bit_size", "is_paged")

# An entry that only another implementation's state has, and what to do then.
BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"  # where bitsandbytes nests most of a parameter's state
FOREIGN_STATE = {
    BITSANDBYTES_STATE: "; load bitsandbytes' state with torch_ademamix.checkpoint.from_bitsandbytes",
    "exp_avg_fast": "; load Apple's state with torch_ademamix.checkpoint.from_apple",
}

# What quantized state may be stored as: first the default, then what `slow_ema_bits=8` gives.
ALLOWED_FORMATS: dict[str, tuple[Format, ...]] = {
    "exp_avg": ("signed_dynamic",),
    "exp_avg_slow": ("linear_int16", "signed_dynamic"),
    "exp_avg_sq": ("unsigned_dynamic",),
}


def formats(p: Tensor, group: Mapping[str, Any]) -> dict[str, Format | None]:
    """How each moment of a parameter is stored: None is unquantized."""
    if group["optim_bits"] == 32 or p.numel() < group["min_8bit_size"]:
        return dict.fromkeys(MOMENTS)
    return {
        name: allowed[-1] if group["slow_ema_bits"] == 8 else allowed[0] for name, allowed in ALLOWED_FORMATS.items()
    }


def new_state(p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for name, format in formats(p, group).items():
        zeros = paging.zeros_like(p, compute_dtype(p.dtype), group)
        stored = _stored(name, zeros, format)
        state |= stored if format is None else paging.placed(stored, p, group)
    return state


def mark_static(state: Mapping[str, Tensor]) -> None:
    """Tells torch.compile that these tensors keep their addresses, so that a CUDA graph may write to them."""
    if torch.compiler.is_compiling():  # state that a traced step makes has no address yet
        return
    for tensor in state.values():
        torch._dynamo.mark_static_address(tensor, guard=True)


def loaded_state(p: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """A parameter's saved state as the optimizer keeps it: the saved values, on the parameter's device.

    What was stored in another format is converted, rounding to nearest.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype; `where` begins the text.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is a {type(saved).__name__}, but must be a dict")
    quantized = "exp_avg_absmax" in saved
    expected = set(QUANTIZED_STATE) if quantized else {*MOMENTS, "step"}
    if saved.keys() != expected:
        hints = [hint for entry, hint in FOREIGN_STATE.items() if entry in saved]
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}{''.join(hints[:1])}")
    step = torch.as_tensor(saved["step"], dtype=torch.float32)
    if step.numel() != 1:
        raise ValueError(f"{where}['step'] has shape {list(step.shape)}, but must hold one element")
    if not _finite_and_not_negative(step):
        raise ValueError(f"{where}['step'] is {step.item():g}, but must be finite and at least 0")
    state = {"step": step.reshape(()).to(p.device, copy=True)}  # one saved tensor may be many parameters' step
    for name, format in formats(p, group).items():
        if not quantized:
            value = checked(saved[name], f"{where}[{name!r}]", p.shape, compute_dtype(p.dtype)).to(p.device)
            if in_place_problem(name, 0, value):  # expanded, as a converter may write zeros
                value = value.contiguous()
            state |= _stored(name, value, format)
            continue
        allowed = {CODE_DTYPES[allowed]: allowed for allowed in ALLOWED_FORMATS[name]}
        value = checked(saved[name], f"{where}[{name!r}]", p.shape, *allowed)
        saved_format = allowed[value.dtype]
        absmax_name = f"{name}_absmax"
        absmax = checked(saved[absmax_name], f"{where}[{absmax_name!r}]", (block_count(p.numel()),), torch.float32)
        if not _finite_and_not_negative(absmax):
            raise ValueError(f"{where}[{absmax_name!r}] has scales that aren't finite or are below 0")
        value, absmax = value.to(p.device).contiguous(), absmax.to(p.device).contiguous()
        if saved_format == format:
            state |= {name: value, f"{name}_absmax": absmax}
        else:
            values = dequantize_blockwise(value, absmax, saved_format).to(compute_dtype(p.dtype))
            state |= _stored(name, values, format)
    return paging.placed(state, p, group)


def _finite_and_not_negative(x: Tensor) -> bool:
    return x.is_meta or bool(((x >= 0) & x.isfinite()).all())  # a meta tensor has no values


def _stored(name: str, values: Tensor, format: Format | None) -> dict[str, Tensor]:
    if format is None:
        return {name: values}
    codes, absmax = quantize_blockwise(values.float().contiguous(), format)
    return {name: codes, f"{name}_absmax": absmax}


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

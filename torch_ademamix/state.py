"""What the optimizer keeps per parameter: names, shapes and dtypes, made and checked here."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.reference import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")


def new_state(p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for name in MOMENTS:
        state[name] = torch.zeros_like(
            p, dtype=compute_dtype(p.dtype), memory_format=torch.preserve_format
        )
    return state


def mark_static(state: Mapping[str, Tensor]) -> None:
    """Tells torch.compile that these tensors keep their addresses, so that a CUDA graph may write to them."""
    for tensor in state.values():
        torch._dynamo.mark_static_address(tensor, guard=True)


def loaded_state(p: Tensor, saved: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """A parameter's saved state as the optimizer keeps it: the saved values, on the parameter's device.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype; `where` begins the text.
    """
    expected = {"step", *MOMENTS}
    if saved.keys() != expected:
        hint = "; see torch_ademamix.checkpoint for bitsandbytes' format" if "state1" in saved else ""
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}{hint}")
    step = torch.as_tensor(saved["step"], dtype=torch.float32)
    if step.numel() != 1:
        raise ValueError(f"{where}['step'] has shape {list(step.shape)}, but must hold one element")
    state = {"step": step.reshape(()).to(p.device)}
    for name in MOMENTS:
        value = saved[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}[{name!r}] is a {type(value).__name__}, but must be a tensor")
        if value.shape != p.shape:
            raise ValueError(
                f"{where}[{name!r}] has shape {list(value.shape)}, but its parameter has shape {list(p.shape)}"
            )
        if value.dtype != compute_dtype(p.dtype):
            raise ValueError(
                f"{where}[{name!r}] has dtype {value.dtype}, but must be {compute_dtype(p.dtype)}"
            )
        state[name] = value.to(p.device)
    return state

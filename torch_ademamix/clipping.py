"""Gradient clipping without a write to the gradients: their norm, and what the step divides them by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_ademamix.numerics.pairs import as_real
from torch_ademamix.state.sharding import is_dtensor

# torch.nn.utils.clip_grad_norm_ adds this to the norm.
_EPS = 1e-6


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Returns the norm of all gradients as one vector, of sharded ones over all ranks.

    Args:
        grads: at least one tensor; of any floating dtypes, devices and device meshes.
        norm_type: p of the p-norm.

    Returns:
        a 0-dim float64 tensor (float32 if the device has no float64), on the first gradient's device. Norms of 16-bit
        gradients are computed in float32; :func:`torch.nn.utils.get_total_norm` rounds each to the gradient's dtype.

    >>> total_norm([torch.tensor([3.0, 0.0]), torch.tensor(4.0, dtype=torch.bfloat16)]).item()
    5.0
    """
    batches: dict[object, list[Tensor]] = {}
    for grad in grads:
        mesh = grad.device_mesh if is_dtensor(grad) else None
        grad = as_real(grad.resolve_conj()) if mesh is None and grad.is_complex() else grad
        batches.setdefault((mesh, grad.device, grad.dtype), []).append(grad)
    device = grads[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    norms = []
    for batch in batches.values():
        norm_dtype = torch.float32 if batch[0].dtype in (torch.bfloat16, torch.float16) else None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(batch, norm_type, dtype=norm_dtype)), norm_type)
        if is_dtensor(norm):
            norm = norm.full_tensor()
        norms.append(norm.to(device, dtype))
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)  # type: ignore[no-any-return]


def check_max_norm(max_norm: float | None) -> None:
    """Refuses a `max_grad_norm` that isn't one."""
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_grad_norm is {max_norm!r}, but must be positive or None")


def clipping_grad_scale(
    grads: Sequence[Tensor], grad_scale: Tensor | None, max_norm: float, norm_out: Tensor
) -> Tensor:
    """Returns what gradients are divided by to unscale and clip them; writes their unscaled norm to `norm_out`."""
    norm = total_norm(grads)
    scale = None if grad_scale is None else grad_scale.to(norm.device).reshape(())
    if scale is not None:
        norm = norm / scale
    norm_out.copy_(norm)
    excess = clip_scale(norm, max_norm)
    return excess if scale is None else excess * scale


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Returns what gradients of this norm are divided by to clip it at `max_norm`; 1 if it isn't above.

    >>> clip_scale(torch.tensor([1.0, 4.0]), max_norm=2.0)
    tensor([1.0000, 2.0000])
    """
    return ((norm + _EPS) / max_norm).clamp_min(1)

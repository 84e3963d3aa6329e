"""State that may leave the GPU when that is full: CUDA managed memory, behind ordinary CUDA tensors.

It stays on the GPU while there is room, and moves to host memory page by page if others need the room. A step
prefetches it on a stream of its own, ahead of the kernels that use it; a captured step doesn't, and the kernels'
accesses bring the pages. The memory is freed with its tensor. On a machine without CUDA, paged state is ordinary
memory.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from torch_ademamix import ops
from torch_ademamix.ops import cuda
from torch_ademamix.state.sharding import local

# bitsandbytes' bound. An allocation takes whole pages of up to 2 MB, and a prefetch some microseconds.
MIN_PAGED_SIZE = 100_000  # elements


class Statistics(NamedTuple):
    """This process's tensors in managed memory, their bytes, and the bytes that were prefetched to a GPU."""

    tensors: int
    bytes: int
    prefetched_bytes: int


def statistics() -> Statistics:
    """How much managed memory this process uses; all 0 if CUDA isn't in use.

    >>> statistics()
    Statistics(tensors=0, bytes=0, prefetched_bytes=0)
    """
    return Statistics(*cuda.managed_memory())


def is_paged(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter (of a DTensor, its local tensor) is paged with these options."""
    return bool(group["is_paged"]) and p.device.type == "cuda" and local(p.detach()).numel() >= MIN_PAGED_SIZE


def page_out(tensor: Tensor) -> None:
    """Moves a paged state tensor to host memory now, for a phase without steps; does nothing to other tensors.

    >>> import torch
    >>> page_out(torch.zeros(3))
    """
    ops.page_out(tensor)

"""Where a parameter's state lies in arenas, the flat tensors that parameters share: the argument `offsets` of the ops.

It has three numbers for each parameter: the index of its arena in each list of state, the offset of its slice there, a
multiple of BLOCK_SIZE, and the index of its step in that arena of steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count

OFFSETS_PER_PARAM = 3

# Gives the view of an arena that a parameter of that form has from an offset on.
ViewFn = Callable[[Tensor, Tensor, int], Tensor]


def state_view(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of a parameter's unquantized state, of its shape.

    Its elements lie in the parameter's own order in memory, if it has no gaps there, else in row-major order.

    >>> state_view(torch.arange(512), torch.ones(3, 2).t(), 256)
    tensor([[256, 258, 260],
            [257, 259, 261]])
    """
    view = code_view(arena, param, first)
    if not torch.ops.aten.is_non_overlapping_and_dense(param):
        return view
    return view.as_strided(param.shape, param.stride(), view.storage_offset())


def code_view(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of a parameter's codes, of its shape, in row-major order."""
    return arena[first : first + param.numel()].view(param.shape)


def absmax_view(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of the scales of a parameter's codes, one per block."""
    first_block = first // BLOCK_SIZE
    return arena[first_block : first_block + block_count(param.numel())]


STEP_VIEWS = (state_view,) * 3
BLOCKWISE_VIEWS = (code_view, absmax_view) * 3


def views_of_lists(
    view_fns: Sequence[ViewFn], lists: Sequence[Sequence[Tensor]], offsets: Sequence[int]
) -> Sequence[Sequence[Tensor]]:
    """An op's lists with a view for each parameter instead of the arenas.

    Args:
        view_fns: one for each list of moments.
    """
    if not offsets:
        return lists
    params, grads, *state, steps, remainders = lists
    arenas, firsts, indices = (offsets[i::OFFSETS_PER_PARAM] for i in range(OFFSETS_PER_PARAM))

    def views(view_fn: ViewFn, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors:  # state that these parameters don't have
            return []
        return [view_fn(tensors[k], p, first) for k, p, first in zip(arenas, params, firsts, strict=True)]

    moments = [views(view_fn, tensors) for view_fn, tensors in zip(view_fns, state, strict=True)]
    own_steps = [steps[k][i] for k, i in zip(arenas, indices, strict=True)]
    return [params, grads, *moments, own_steps, views(state_view, remainders)]

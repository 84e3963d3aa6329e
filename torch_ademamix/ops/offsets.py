"""Where state lies in flat tensors that parameters share, the arenas: the argument `places` of the ops.

For each parameter `places` has three numbers: which arena of each list of state has its part, the part's first element
there, a multiple of BLOCK_SIZE, and the element of that arena of steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count

PLACE_NUMBERS = 3

Part = Callable[[Tensor, Tensor, int], Tensor]  # of an arena, the one of a parameter that begins at a place


def state_part(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of a parameter's unquantized state, of its shape.

    Its elements lie in the parameter's own order in memory, if it has no gaps there, else in row-major order.

    >>> state_part(torch.arange(512), torch.ones(3, 2).t(), 256)
    tensor([[256, 258, 260],
            [257, 259, 261]])
    """
    part = code_part(arena, param, first)
    if not torch.ops.aten.is_non_overlapping_and_dense(param):
        return part
    return part.as_strided(param.shape, param.stride(), part.storage_offset())


def code_part(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of a parameter's codes, of its shape, in row-major order."""
    return arena[first : first + param.numel()].view(param.shape)


def absmax_part(arena: Tensor, param: Tensor, first: int) -> Tensor:
    """A view of the scales of a parameter's codes, one per block."""
    first_block = first // BLOCK_SIZE
    return arena[first_block : first_block + block_count(param.numel())]


STEP_PARTS = (state_part,) * 3
BLOCKWISE_PARTS = (code_part, absmax_part) * 3


def one_for_each(
    parts: Sequence[Part], lists: Sequence[Sequence[Tensor]], places: Sequence[int]
) -> Sequence[Sequence[Tensor]]:
    """An op's lists, with views for each parameter in place of the arenas, which `parts` are of."""
    if not places:
        return lists
    params, grads, *state, steps, remainders = lists
    arenas, firsts, indices = (places[i::PLACE_NUMBERS] for i in range(PLACE_NUMBERS))

    def views(part: Part, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors:  # state that these parameters don't have
            return []
        return [part(tensors[k], p, first) for k, p, first in zip(arenas, params, firsts, strict=True)]

    placed = [views(part, tensors) for part, tensors in zip(parts, state, strict=True)]
    placed_steps = [steps[k][i] for k, i in zip(arenas, indices, strict=True)]
    return [params, grads, *placed, placed_steps, views(state_part, remainders)]

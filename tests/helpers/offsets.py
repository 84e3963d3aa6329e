"""State in flat tensors that parameters share, as an op call may have it, made of the lists of one that has none."""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tests.helpers.config import StepLists, assert_identical
from tests.helpers.quantized import BlockwiseLists, subsequences_of
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count

FILLING = 77  # of the elements that no parameter has


@dataclass
class Arenas:
    """The arguments of an op call with offsets."""

    lists: list[list[Tensor]]
    remainders: list[Tensor]
    offsets: list[int]

    def __iter__(self) -> Any:
        return iter(self.lists)

    @property
    def subsequences(self) -> list[int]:
        return subsequences_of(self.lists[0])

    @property
    def options(self) -> dict[str, Any]:
        return {"offsets": self.offsets, "remainders": self.remainders}

    def clone(self) -> "Arenas":
        return copy.deepcopy(self)

    def assert_holds(self, expected: StepLists | BlockwiseLists, remainders: list[Tensor]) -> None:
        """That these are the values, and nothing has been written beside them."""
        wanted = in_arenas(expected, remainders, len(self.lists[-1]))
        assert_identical(self.lists, wanted.lists)
        assert_identical(self.remainders, wanted.remainders)


def in_arenas(lists: StepLists | BlockwiseLists, remainders: list[Tensor] = [], count: int = 2) -> Arenas:  # noqa: B006
    """Parameters are dealt out to `count` arenas, from the last on, with gaps of a block between some."""
    numels = [p.numel() for p in lists.params]
    arenas = [i % count for i in range(len(numels))]
    firsts, indices = [0] * len(numels), [0] * len(numels)
    ends, steps = [BLOCK_SIZE] * count, [1] * count
    for i in reversed(range(len(numels))):
        k = arenas[i]
        firsts[i], indices[i] = ends[k], steps[k]
        ends[k] += BLOCK_SIZE * (block_count(numels[i]) + i % 2)
        steps[k] += 1 + i % 2

    def flat(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        if name == "steps":
            sizes, starts = steps, indices
        elif name.endswith("absmaxs"):
            sizes, starts = [end // BLOCK_SIZE for end in ends], [first // BLOCK_SIZE for first in firsts]
        else:
            sizes, starts = ends, firsts
        result = [torch.full((size,), FILLING, dtype=tensors[0].dtype, device=tensors[0].device) for size in sizes]
        for p, tensor, k, start in zip(lists.params, tensors, arenas, starts, strict=True):
            row_major = isinstance(lists, BlockwiseLists) and name != "remainders"
            elements = tensor.flatten() if row_major or name == "steps" else in_order_of(p, tensor)
            result[k][start : start + tensor.numel()] = elements
        return result

    state = [flat(field.name, getattr(lists, field.name)) for field in fields(lists)[2:]] if numels else []
    offsets = [number for place in zip(arenas, firsts, indices, strict=True) for number in place]
    lists_in_arenas = [lists.params, lists.grads, *(state or [[] for _ in fields(lists)[2:]])]
    return Arenas(lists_in_arenas, flat("remainders", remainders), offsets)


def in_order_of(param: Tensor, tensor: Tensor) -> Tensor:
    """The elements of `tensor` as those of the parameter lie in memory, if that has no gaps; else row-major."""
    order = sorted(range(param.dim()), key=lambda d: (-param.stride(d), d))
    permuted = param.permute(order)
    return tensor.permute(order).flatten() if permuted.is_contiguous() else tensor.flatten()

"""A batch in parts, whose gradients are accumulated for one update."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_ademamix.state import sharding

MicroBatch = tuple[Sequence[Any], Mapping[str, Any]]  # the arguments of loss_fn after the model

# Leaves of a batch that have no rows.
PLAIN = (int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)


def check_leaves(leaves: Sequence[Any], *allowed: type) -> None:
    """Checks that each leaf of a batch is a tensor, plain, or of an allowed type: what others hold isn't known.

    Raises:
        TypeError: a leaf is something else, such as a mapping that pytree doesn't open.
    """
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, (Tensor, *PLAIN, *allowed)):
            raise TypeError(
                f"leaf {i} of the batch is a {type(leaf).__name__}, but must be a tensor, a number, a string or "
                "None, in dicts, lists and tuples; of another mapping (BatchEncoding, UserDict) pass dict(batch), of "
                "an object its tensors, and let loss_fn refer to what isn't part of the batch"
            )


def micro_batches(args: Sequence[Any], kwargs: Mapping[str, Any], n: int) -> list[MicroBatch]:
    """The `n` parts of a batch, of which each tensor is split along its first dimension.

    Raises:
        TypeError: the batch has something in it that may hold tensors, but can't be opened.
        ValueError: a tensor can't be split into so many equal parts, or tensors have different numbers of rows.
    """
    if n == 1:
        return [(args, kwargs)]
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    check_leaves(leaves, nn.Module)
    split: list[Sequence[Any]] = []
    first: tuple[int, int, object] | None = None  # a leaf, its rows, and how these are divided over processes
    for i, leaf in enumerate(leaves):
        if not (isinstance(leaf, Tensor) and leaf.dim() > 0):
            split.append([leaf] * n)
            continue
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise ValueError(
                f"leaf {i} of the batch is a {'nested' if leaf.is_nested else leaf.layout} tensor, which "
                f"accumulate={n} can't split; pass its values and offsets as padded or packed tensors, or accumulate "
                "in a standard training loop"
            )
        shards, division = sharding.rows(leaf)
        if leaf.shape[0] % (n * shards) != 0:
            raise ValueError(
                f"leaf {i} of the batch has shape {list(leaf.shape)}, whose first dimension isn't a multiple of "
                f"accumulate={n}" + (f" times its {shards} shards" if shards > 1 else "")
            )
        first = first or (i, leaf.shape[0], division)
        if leaf.shape[0] != first[1]:
            raise ValueError(
                f"leaves {first[0]} and {i} of the batch have {first[1]} and {leaf.shape[0]} rows, but "
                f"accumulate={n} splits each tensor along its first dimension; let loss_fn refer to tensors that have "
                "no row per example, such as class weights"
            )
        if division != first[2]:
            raise ValueError(
                f"leaves {first[0]} and {i} of the batch are sharded differently along their first dimension, but "
                f"with accumulate={n} each process splits the rows that it has"
            )
        split.append(sharding.split_rows(leaf, n))
    return [tree_unflatten(list(part), spec) for part in zip(*split, strict=True)]

"""A batch in parts, whose gradients are accumulated for one update."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_ademamix import sharding

MicroBatch = tuple[Sequence[Any], Mapping[str, Any]]  # the arguments of loss_fn after the model


def micro_batches(args: Sequence[Any], kwargs: Mapping[str, Any], n: int) -> list[MicroBatch]:
    """The `n` parts of a batch, of which each tensor is split along its first dimension."""
    if n == 1:
        return [(args, kwargs)]
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    split: list[Sequence[Any]] = []
    rows: tuple[int, object] | None = None  # a leaf, and how its rows are divided over processes
    for i, leaf in enumerate(leaves):
        if not (isinstance(leaf, Tensor) and leaf.dim() > 0):
            split.append([leaf] * n)
            continue
        shards, division = sharding.rows(leaf)
        if leaf.shape[0] % (n * shards) != 0:
            raise ValueError(
                f"leaf {i} of the batch has shape {list(leaf.shape)}, whose first dimension isn't a multiple of "
                f"accumulate={n}" + (f" times its {shards} shards" if shards > 1 else "")
            )
        rows = rows or (i, division)
        if division != rows[1]:
            raise ValueError(
                f"leaves {rows[0]} and {i} of the batch are sharded differently along their first dimension, but "
                f"with accumulate={n} each process splits the rows that it has"
            )
        split.append(sharding.split_rows(leaf, n))
    return [tree_unflatten(list(part), spec) for part in zip(*split, strict=True)]

"""Whether tensors still are what they were when a step was planned.

Frameworks may exchange the memory behind a tensor (`tensor.data = other`), of which nothing hears. So every step asks,
and with hundreds of small parameters the answer has to be quick.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from torch_ademamix import ops


def watch(located: Sequence[Tensor], formed: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that tells whether nothing has changed since now.

    Args:
        located: tensors that have to lie where they do.
        formed: tensors whose dtype and strides have to stay.
    """
    if ops.library is not None and all(type(t) in (Tensor, Parameter) for t in (*located, *formed)):
        return _NativeWatch(located, formed)
    return _Watch(located, formed)


class _Watch:
    def __init__(self, located: Sequence[Tensor], formed: Sequence[Tensor]) -> None:
        self._located, self._formed = located, formed
        self._before = self._now()

    def __call__(self) -> bool:
        return self._before == self._now()

    def _now(self) -> tuple[list[int], list[torch.dtype], list[tuple[int, ...]]]:
        formed = self._formed
        return [t.data_ptr() for t in self._located], [t.dtype for t in formed], [t.stride() for t in formed]


class _NativeWatch:
    def __init__(self, located: Sequence[Tensor], formed: Sequence[Tensor]) -> None:
        assert ops.library is not None
        self._unchanged, self._unwatch = ops.library.ademamix_unchanged, ops.library.ademamix_unwatch
        self._tensors = [*located, *formed]  # with what Python knows of them
        with torch._C._DisableTorchDispatch():  # it is no part of a graph that a step is traced to
            self._handle = torch.ops.torch_ademamix._watch(list(located), list(formed))

    def __call__(self) -> bool:
        return bool(self._unchanged(self._handle))

    def __del__(self) -> None:
        self._unwatch(self._handle)

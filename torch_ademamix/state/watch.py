"""Whether state still lies where it did when a step was planned.

Frameworks may exchange the memory behind a tensor (`tensor.data = other`), of which nothing hears. So every step asks,
and with hundreds of small parameters the answer has to be quick.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from torch_ademamix import ops


def watch(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """A function that tells whether all tensors lie where they do now.

    Only for state: `torch.utils.swap_tensors`, by which a module may convert its parameters, raises for tensors that
    are watched.
    """
    if ops.library is not None and all(type(t) in (Tensor, Parameter) for t in tensors):
        return _NativeWatch(tensors)
    addresses = [t.data_ptr() for t in tensors]
    return lambda: [t.data_ptr() for t in tensors] == addresses


class _NativeWatch:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert ops.library is not None
        self._unmoved, self._unwatch = ops.library.ademamix_unmoved, ops.library.ademamix_unwatch
        self._tensors = tensors  # with what Python knows of them
        with torch._C._DisableTorchDispatch():  # it is no part of a graph that a step is traced to
            self._handle = torch.ops.torch_ademamix._watch(list(tensors))

    def __call__(self) -> bool:
        return bool(self._unmoved(self._handle))

    def __del__(self) -> None:
        self._unwatch(self._handle)

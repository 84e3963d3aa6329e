"""Whether state still lies where it did when a step was planned.

Frameworks may exchange the memory behind a tensor (`tensor.data = other`), which nothing tells us. So every step
compares addresses, and with hundreds of small parameters that has to be quick.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from torch_ademamix import ops


class Watch:
    """Tensors, and whether all of them still lie where they did: `unmoved()`."""

    unmoved: Callable[[], bool]


def watch(tensors: Sequence[Tensor]) -> Watch:
    """Remembers where tensors lie.

    Only for state: `torch.utils.swap_tensors`, by which a module may convert its parameters, raises for tensors that
    are watched.
    """
    if ops.library is not None and all(type(t) in (Tensor, Parameter) for t in tensors):
        return _NativeWatch(tensors)
    return _PythonWatch(tensors)


class _PythonWatch(Watch):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        addresses = [t.data_ptr() for t in tensors]
        self.unmoved = lambda: [t.data_ptr() for t in tensors] == addresses


class _NativeWatch(Watch):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert ops.library is not None
        self._unwatch = ops.library.ademamix_unwatch
        self._tensors = tensors  # keeps them alive as Python objects
        with torch._C._DisableTorchDispatch():  # it is no part of a graph that a step is traced to
            self._handle = torch.ops.torch_ademamix._watch(list(tensors))
        self.unmoved = partial(ops.library.ademamix_unmoved, self._handle)

    def __del__(self) -> None:
        self._unwatch(self._handle)

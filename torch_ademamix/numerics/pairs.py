"""Complex parameters: the ops update them as pairs of reals, as torch.optim does.

State is complex in `optimizer.state`, with the real and imaginary parts' own second moments as those of `exp_avg_sq`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

COMPLEX_DTYPES = (torch.complex64, torch.complex128)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of reals, of shape [..., 2]; any other tensor itself.

    >>> as_real(torch.tensor([1 + 2j]))
    tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def call(op: Callable[..., None], lists: Sequence[Sequence[Any]], *args: Any, **kwargs: Any) -> None:
    """Calls an op that updates parameters, the first of `lists`, by gradients, the second; complex ones as reals."""
    params, grads, *state = lists
    if not params or params[0].dtype not in COMPLEX_DTYPES or not all(map(Tensor.is_complex, grads)):
        return op(*lists, *args, **kwargs)  # which raises if there is a complex tensor
    updated = [params, *state]
    reals = [[as_real(t) for t in tensors] for tensors in updated]
    # torch.compile mishandles ops that write to real views of complex tensors (tools/complex_views.py shows it).
    is_traced = torch.compiler.is_compiling()
    if is_traced:
        reals = [
            [real.clone() if t.is_complex() else real for t, real in zip(*both, strict=True)]
            for both in zip(updated, reals, strict=True)
        ]
    real_grads = [as_real(grad.resolve_conj()) for grad in grads]
    op(reals[0], real_grads, *reals[1:], *args, **kwargs)
    if is_traced:
        for tensors, copies in zip(updated, reals, strict=True):
            for t, copy in zip(tensors, copies, strict=True):
                if t.is_complex():
                    t.copy_(torch.view_as_complex(copy))

"""Steps during the backward pass: each parameter is updated as soon as its gradient is there."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_ademamix.ops.schemas import SCALER
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.training.step_method import check_step_not_replaced, overrides_step


def release_gradients(model: nn.Module, optimizer: AdEMAMix) -> "GradientRelease":
    """Updates each parameter as soon as backward has its gradient, and frees that: they never exist all at once.

    The training loop stays as it is: `optimizer.step()` after each backward pass updates only parameters that aren't
    the model's, and ends the step for LR schedulers and hooks. Results equal those of the standard loop bit for bit, as
    long as no option changes between backward and step. With `fully_shard`, shards are updated and freed.

    Clipping by the norm, `GradScaler` and accumulation over several backward passes need all gradients before the first
    update, so they raise. Clipping by other code can't be detected.

    Args:
        model: the module whose parameters' gradients are released.
        optimizer: the optimizer of parameters of `model`, which require a gradient now.

    Returns:
        a handle, whose `remove()` restores the standard loop.

    Raises:
        ValueError: the optimizer clips gradients; the model is in `DistributedDataParallel`, which reduces gradients
            after they have been released; the model has none of the optimizer's parameters; or the optimizer's class
            overrides `step()`, or `optimizer.step` was replaced, since the updates don't go through it.
        TypeError: the optimizer is another one, or a wrapper of one.
        RuntimeError: in the backward pass or in step(), if it turns out that gradients are scaled or accumulated.

    >>> model = nn.Linear(8, 1)
    >>> optimizer = AdEMAMix(model.parameters(), lr=1e-2)
    >>> handle = release_gradients(model, optimizer)
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> model.weight.grad is None, optimizer.state[model.weight]["step"].item()
    (True, 1.0)
    >>> optimizer.step()
    >>> handle.remove()
    """
    expect_ademamix(optimizer)
    return GradientRelease(model, optimizer)


class GradientRelease:
    """The handle of :func:`torch_ademamix.release_gradients`."""

    def __init__(self, model: nn.Module, optimizer: AdEMAMix) -> None:
        _expect_no_clipping(optimizer, ValueError)
        check_step_not_replaced(optimizer)
        if overrides_step(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} overrides step(), but gradients that are released as they arrive are "
                "updated without it: keep the standard training loop, or do in gradient hooks (register_hook of a "
                "parameter) what step() does"
            )
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError("gradients can't be released under DistributedDataParallel; fully_shard allows it")
        of_model = set(model.parameters())
        params = [p for group in optimizer.param_groups for p in group["params"] if p in of_model and p.requires_grad]
        if not params:
            raise ValueError("the optimizer has no parameter of the model that requires a gradient")
        self._optimizer = ref(optimizer)  # parameters keep their hooks, which keep nothing alive
        self._updated: set[int] = set()  # since the last step(), by identity
        self._handles = [p.register_post_accumulate_grad_hook(self._release) for p in params]
        self._handles.append(optimizer.register_step_pre_hook(self._end_step))

    def remove(self) -> None:
        """Leaves gradients to `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _release(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:  # gradients are someone else's now
            return
        _expect_no_clipping(optimizer, RuntimeError)
        if id(p) in self._updated:
            raise RuntimeError(
                "a second backward pass before optimizer.step(): gradients that are released as they arrive can't be "
                "accumulated"
            )
        if not self._updated:
            check_step_not_replaced(optimizer)
            optimizer._prepare()
        optimizer._update_param(p)
        self._updated.add(id(p))
        p.grad = None

    def _end_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(getattr(optimizer, name, None) is not None for name in SCALER):
            raise RuntimeError("gradients that are released as they arrive can't be unscaled by GradScaler")
        self._updated.clear()


def _expect_no_clipping(optimizer: AdEMAMix, error: type[Exception]) -> None:
    if optimizer.max_grad_norm is not None:
        raise error("gradients that are released as they arrive can't be clipped by their norm: max_grad_norm is set")


def expect_ademamix(optimizer: object) -> None:
    """Checks that this is the optimizer itself: its update is called without its step()."""
    if not isinstance(optimizer, AdEMAMix):
        name = type(optimizer).__name__
        raise TypeError(f"optimizer is a {name}, but must be an AdEMAMix; of a wrapper, give what it wraps")

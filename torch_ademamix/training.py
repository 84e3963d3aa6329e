"""Whole training steps as one compiled graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torch_ademamix.optimizer import AdEMAMix, make_lr_tensor


def compile_train_step(
    model: nn.Module,
    optimizer: AdEMAMix,
    loss_fn: Callable[..., Tensor],
    **compile_options: Any,
) -> Callable[..., Tensor]:
    """Compiles forward, backward, update and the clearing of gradients into one graph.

    The optimizer's state is made now. Its learning rates become tensors, so that LR schedulers, made before or
    after, change them without a recompilation: call `scheduler.step()` after the step as ever.

    Args:
        model: the module to train.
        optimizer: an optimizer of parameters of `model`; several groups and frozen parameters are fine.
        loss_fn: `loss_fn(model, *batch)` returns the loss, a tensor of one element.
        compile_options: further arguments of :func:`torch.compile`, such as `mode` or `backend`.

    Returns:
        `step(*batch)`, which trains on one batch and returns the loss, detached.

    >>> model = nn.Linear(8, 1)
    >>> optimizer = AdEMAMix(model.parameters(), lr=1e-2)
    >>> def loss_fn(model, x, y):
    ...     return (model(x) - y).square().mean()
    >>> step = compile_train_step(model, optimizer, loss_fn, backend="aot_eager")
    >>> x, y = torch.ones(4, 8), torch.zeros(4, 1)
    >>> first = step(x, y)
    >>> bool(step(x, y) < first)
    True
    """
    optimizer.init_state()

    def train_step(has_hooks: bool, *batch: Any) -> Tensor:
        loss = loss_fn(model, *batch)
        loss.backward()
        if has_hooks:
            type(optimizer).step(optimizer)  # an LR scheduler hides optimizer.step behind what can't be traced
        else:  # without torch's profiling around it, of which Dynamo warns
            with torch.no_grad():
                optimizer._update()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        return loss.detach()

    compiled = torch.compile(train_step, fullgraph=True, **compile_options)

    def step(*batch: Any) -> Tensor:
        for group in optimizer.param_groups:
            make_lr_tensor(group)  # also after load_state_dict
        optimizer._opt_called = True  # type: ignore[attr-defined]  # by which LR schedulers know of a step
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # .backward() inside the graph
            return compiled(_has_step_hooks(optimizer), *batch)

    return step


def _has_step_hooks(optimizer: AdEMAMix) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )

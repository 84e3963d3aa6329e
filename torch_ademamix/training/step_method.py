"""What an optimizer's `step()` is, for full training steps and gradient release, which may call the update itself."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from torch_ademamix.optimizer import AdEMAMix


def _undecorated(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `step()` without what torch wraps around it (profiling and hooks, no_grad), but with what others do."""
    # functools.wraps copies `__module__`, but not where a function finds its globals.
    while hasattr(step, "__wrapped__") and _module(step).startswith("torch."):
        step = step.__wrapped__
    return step


def _module(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


_ADEMAMIX_STEP = _undecorated(AdEMAMix.step)


def overrides_step(optimizer: AdEMAMix) -> bool:
    """Whether the optimizer's class has a `step()` of its own, which may do more than update the parameters."""
    return _undecorated(type(optimizer).step) is not _ADEMAMIX_STEP


def check_step_not_replaced(optimizer: Optimizer) -> None:
    """Checks that `optimizer.step` is the class's method, or an LR scheduler's wrapper of it.

    Raises:
        ValueError: something else was assigned to the instance.
    """
    assigned = vars(optimizer).get("step")
    if assigned is None:
        return
    function = getattr(assigned, "__func__", assigned)
    if getattr(function, "_wrapped_by_lr_sched", False) and _module(function) == "torch.optim.lr_scheduler":
        function = function.__wrapped__
    if function is type(optimizer).step:
        return
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"
    raise ValueError(
        f"optimizer.step was replaced on the instance (by {name}), and would not be called: remove it with "
        "`del optimizer.step`, and override step() in a subclass instead, or use register_step_pre_hook and "
        "register_step_post_hook; otherwise keep the standard training loop"
    )

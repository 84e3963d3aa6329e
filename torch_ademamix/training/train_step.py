"""What a full training step does, for compiled and captured steps alike: the standard training loop, in its order::

optimizer.zero_grad()
loss = loss_fn(model, *batch)
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_map_only

from torch_ademamix import tracing
from torch_ademamix.clipping import total_norm
from torch_ademamix.ops.schemas import SCALER
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.state import sharding
from torch_ademamix.state.options import HyperparameterTables
from torch_ademamix.training.micro_batches import MicroBatch
from torch_ademamix.training.release import GradientRelease, expect_ademamix
from torch_ademamix.training.step_method import check_step_not_replaced, overrides_step

# A parameter's index in TrainStep.params, the hooks of its gradient, and its hooks after accumulation.
ParamHooks = tuple[int, tuple[Callable[..., Any], ...], tuple[Callable[..., Any], ...]]


class TrainStep:
    """A model, its optimizers and its loss, and one step with them.

    Args:
        optimizers: an AdEMAMix, or several optimizers in the order of their steps, one of them an AdEMAMix.
        accumulate: micro-batches per update.
        average: whether an update's loss is the mean of theirs, else the sum.
        scaler: scales the loss; None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        loss_fn: Callable[..., Any],
        accumulate: int,
        average: bool,
        scaler: GradScaler | None,
    ) -> None:
        self.optimizers: list[Optimizer] = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        self.optimizer = _ademamix_of(self.optimizers)
        _expect_no_reducing(model)
        if not (isinstance(accumulate, int) and accumulate >= 1):
            raise ValueError(f"accumulate is {accumulate!r}, but must be an int of at least 1")
        self.model, self.loss_fn = model, loss_fn
        self.accumulate, self.average = accumulate, average
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._tables = HyperparameterTables()
        self._found_inf: Tensor | None = None
        self._shared: set[Tensor] = set()  # the optimizers' parameters that are the model's
        self._warned_of_untrained = False
        self.has_other_leaves = False  # in a graph of the step: gradients go to tensors that aren't in `params`
        self.left: list[tuple[int, str]] = []  # attributes of `modules` that the forward pass leaves with a history
        self._name = tracing.register(self)
        self._look()
        if not any(p.requires_grad for p in self._shared.intersection(_params([self.optimizer]))):
            raise ValueError("the optimizer has no parameter of the model that requires a gradient")

    def _look(self) -> None:
        """Finds the parameters there are.

        Raises:
            RuntimeError: some of the optimizers' aren't the model's any more.
        """
        of_model = dict.fromkeys(self.model.parameters())
        self.of_optimizers = _params(self.optimizers)
        of_optimizers = dict.fromkeys(self.of_optimizers)
        if lost := sum(p in self._shared and p not in of_model for p in of_optimizers):
            raise RuntimeError(
                f"{lost} of the optimizer's parameters are no longer the model's: others have replaced them "
                "(load_state_dict(assign=True) does that, or assigning a module); create an optimizer of the "
                "parameters that the model has now, and a new training step"
            )
        self._shared = {p for p in of_optimizers if p in of_model}
        self._others = [p for p in of_model if p not in of_optimizers]
        self.params = [*of_optimizers, *self._others]
        of_rest = set(_params(self.rest))
        self.kept = [p for p in of_optimizers if p in of_rest]  # whose gradients other optimizers' steps need
        self._share_params = len(of_optimizers) < len(self.of_optimizers)
        self._own = [p for p in self.params if p not in of_rest]
        self._sharded = any(map(sharding.is_dtensor, self.params))
        self.modules = list(self.model.modules())
        self._structure = _Structure(self.modules)
        self._plan = self.optimizer._plan_cache.plan
        self._warn_of_untrained()

    def _warn_of_untrained(self) -> None:
        others = set(self._others)
        untrained = [name for name, p in self.model.named_parameters() if p in others and p.requires_grad]
        if untrained and not self._warned_of_untrained:
            self._warned_of_untrained = True
            warnings.warn(
                f"{len(untrained)} parameters of the model (such as {untrained[0]}) require a gradient, but belong to "
                "no optimizer of this training step, which clears their gradients: neither it nor an optimizer that is "
                "stepped after it trains them. Pass all optimizers as a list, as in compile_train_step(model, [muon, "
                "ademamix], loss_fn), or freeze what another training step trains with requires_grad_(False)",
                stacklevel=5,
            )

    @property
    def rest(self) -> list[Optimizer]:
        return [optimizer for optimizer in self.optimizers if optimizer is not self.optimizer]

    def in_graph(self) -> bool:
        """Whether the graph has AdEMAMix's update; else its `step()` is called after it, in its turn.

        That may only come before the steps of optimizers that stand before it where nothing can tell the difference.
        """
        if overrides_step(self.optimizer):
            return False
        first = self.optimizers[0] is self.optimizer
        return first or not (self._share_params or any(map(_step_hooks, self.optimizers)))

    @contextmanager
    def around(self) -> Iterator[None]:
        """What a step does outside of its graph.

        Raises:
            RuntimeError: what a graph can't do is asked of it.
        """
        if torch.is_anomaly_enabled():
            raise RuntimeError(
                "anomaly detection is on, which checks a backward pass op by op, but a full training step is one "
                "graph; look for the anomaly with the standard training loop, or call the step outside of "
                "detect_anomaly"
            )
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the training step was called under torch.no_grad or torch.inference_mode, but it computes gradients; "
                "call it outside, or within torch.enable_grad (and inference_mode(False))"
            )
        check_step_not_replaced(self.optimizer)
        with self.optimizer._reading(self._tables):
            if not self._is_up_to_date():
                self._look()
            self.clear_gradients()
            with self._scaling():
                yield

    def _is_up_to_date(self) -> bool:
        if self.optimizer._plan_cache.plan is not self._plan or not self._structure.holds():
            return False
        if len(self.optimizers) == 1:
            return True
        params = _params(self.optimizers)
        return len(params) == len(self.of_optimizers) and all(map(is_, params, self.of_optimizers))

    def clear_gradients(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad = None

    def step_rest(self, in_graph: bool) -> None:
        """Calls `step()` of the optimizers whose update the graph doesn't have, as the standard training loop does.

        Args:
            in_graph: whether it has that of AdEMAMix.
        """
        optimizers = self.rest if in_graph else self.optimizers
        for optimizer in optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if optimizers:
            self.clear_gradients()

    def _scaling(self) -> AbstractContextManager[None]:
        """The optimizer has what `scaler.step(optimizer)` gives it."""
        if self.scaler is None:
            return nullcontext()
        if self.scaler._per_optimizer_states[id(self.optimizer)]["stage"] is not OptState.READY:
            raise RuntimeError("scaler.update() must be called after each step")
        if self._found_inf is None:
            device = self.params[0].device
            self.scaler.scale(torch.ones((), device=device))  # which makes the scaler's tensors
            self._found_inf = torch.zeros((), device=device, dtype=torch.float32)
            torch._dynamo.mark_static_address(self._found_inf)
        return scaler_attributes(self.optimizer, self.scaler._scale, self._found_inf)

    def record_step(self) -> None:
        """Lets schedulers and the scaler know that a step was made."""
        self.optimizer._opt_called = True
        if self.scaler is not None and self._found_inf is not None:
            record = self.scaler._per_optimizer_states[id(self.optimizer)]
            record["found_inf_per_device"] = {self._found_inf.device: self._found_inf}
            record["stage"] = OptState.STEPPED

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        step: Callable[[], Any] | None,
        hooks: Sequence[ParamHooks] = (),
    ) -> tuple[bool, Any]:
        """What a step does inside of its graph.

        Args:
            step: updates AdEMAMix's parameters by their gradients; None leaves all gradients of optimizers.
            hooks: those that are called here, where autograd doesn't.

        Returns:
            True and what the step returns, or False and the type of what can't be a loss.
        """
        losses, more = [], []
        for args, kwargs in micro_batches:
            result = self.loss_fn(self.model, *args, **kwargs)
            loss, *others = result if type(result) is tuple else (result,)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                return False, type(result).__name__
            if self.accumulate > 1 and self.average:
                loss = loss / self.accumulate
            self._backward(loss, hooks)
            losses.append(loss.detach())
            more.append(tree_map_only(Tensor, torch.Tensor.detach, others))
        if step is not None:
            if self.scaler is not None:
                self._look_for_inf()
            step()
        # Dynamo has guarded the plan's lists of parameters already, for the update.
        done = (*self.optimizer._plan_cache.plan.params, self._others) if len(self.optimizers) == 1 else (self._own,)
        for params in done if step is not None else (self._others,):
            for p in params:
                p.grad = None
        loss = sum(losses[1:], start=losses[0])
        if not more[0]:
            return True, loss
        return True, (loss, *(more[0] if self.accumulate == 1 else map(list, zip(*more, strict=True))))

    def _backward(self, loss: Tensor, hooks: Sequence[ParamHooks]) -> None:
        from torch._dynamo.comptime import comptime

        if self.scaler is not None:
            loss = loss * self.optimizer.grad_scale  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():
            loss.backward()
            return
        # The two functions run while this frame is traced, and read its local variables `params` and `name`.
        params, name = [p for p in self.params if p.requires_grad], self._name  # noqa: F841
        comptime(tracing.detect_other_leaves)
        comptime(tracing.detect_left_tensors)
        for i, attribute in self.left:
            value = getattr(self.modules[i], attribute)
            setattr(self.modules[i], attribute, tree_map_only(Tensor, torch.Tensor.detach, value))
        # A traced loss.backward() finds every leaf. But it copies each gradient, calls no hooks, and redistributes
        # gradients of DTensors, which would reduce those of replicated parameters at each micro-batch.
        if self.has_other_leaves and not hooks and not self._sharded:
            loss.backward()
            return
        # These are new tensors. If None were stored in p.grad and read again here, Dynamo could take this parameter's
        # gradient for None in what it traces later.
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        functions = {self.params[i]: (of_grad, after) for i, of_grad, after in hooks}
        for p, grad in zip(params, grads, strict=True):
            if grad is None:
                continue
            of_grad, after = functions.get(p, ((), ()))
            for hook in of_grad:
                replaced = hook(grad)
                grad = grad if replaced is None else replaced
            p.grad = grad if p.grad is None else p.grad + grad
            for hook in after:
                hook(p)

    def _look_for_inf(self) -> None:
        """Tells the update whether to skip, as `scaler.step(optimizer)` does."""
        grads = []
        for bucket, chosen, some_grads in self.optimizer._plan_cache.plan.work():
            grads += some_grads
            if bucket.sharded:  # the update finds them redistributed already
                for i, grad in zip(chosen, some_grads, strict=True):
                    bucket.params[i].grad = grad
        found_inf: Tensor = self.optimizer.found_inf  # type: ignore[attr-defined]
        # A process's part of a gradient may be empty, which has no greatest element.
        parts = [part for part in map(sharding.local_grad, grads) if part.numel() > 0]
        found = ~total_norm(parts, math.inf).isfinite() if parts else torch.zeros_like(found_inf)
        found_inf.copy_(sharding.greatest(found.to(found_inf), grads))

    def param_hooks(self) -> tuple[ParamHooks, ...]:
        """The hooks of parameters, for a graph in which autograd doesn't call them."""
        return tuple(
            (i, _functions(p._backward_hooks), _functions(p._post_accumulate_grad_hooks))
            for i, p in enumerate(self.params)
            if p._backward_hooks or p._post_accumulate_grad_hooks
        )

    def step_hooks(self) -> list[Callable[..., Any]]:
        return _step_hooks(self.optimizer)


def _step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]]:
    return [
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *_global_optimizer_pre_hooks.values(),
        *_global_optimizer_post_hooks.values(),
    ]


def _params(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _ademamix_of(optimizers: Sequence[Optimizer]) -> AdEMAMix:
    """The one AdEMAMix of a training step's optimizers.

    Raises:
        TypeError: there is none, or something isn't an optimizer.
        ValueError: there are several, one needs a closure, or something was put in place of AdEMAMix's `step()`.
    """
    if len(optimizers) == 1:
        expect_ademamix(optimizers[0])
    for i, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizers[{i}] is a {type(optimizer).__name__}, but must be a torch.optim.Optimizer")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"optimizers[{i}] is a {type(optimizer).__name__}, whose step() needs a closure that evaluates the "
                "model again; keep the standard training loop for it"
            )
    found = [optimizer for optimizer in optimizers if isinstance(optimizer, AdEMAMix)]
    if not found:
        raise TypeError("there is no AdEMAMix among the optimizers; of a wrapper, give what it wraps")
    if len(found) > 1:
        raise ValueError(
            f"there are {len(found)} AdEMAMix among the optimizers, but a step takes one: make parameter groups of one "
            "optimizer, or, for several losses, a training step for each"
        )
    check_step_not_replaced(found[0])
    return found[0]


class _Structure:
    """The modules and parameters of a model, by which to tell that one has been replaced."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        dicts = (d for module in modules for d in (module._modules, module._parameters))
        self._members: list[tuple[dict[str, Any], list[Any]]] = [(d, list(d.values())) for d in dicts]

    def holds(self) -> bool:
        return all(len(d) == len(seen) and all(map(is_, d.values(), seen)) for d, seen in self._members)


@contextmanager
def scaler_attributes(optimizer: AdEMAMix, *values: Tensor | None) -> Iterator[None]:
    """The optimizer has these values of SCALER, for a while."""
    for name, value in zip(SCALER, values, strict=True):
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in SCALER:
            delattr(optimizer, name)


def unwrap_loss(outcome: tuple[bool, Any]) -> Any:
    """What :meth:`TrainStep.run` returns for the step, if the loss was one.

    Raises:
        TypeError: it wasn't; nothing has been written then.
    """
    is_loss, result = outcome
    if not is_loss:
        raise TypeError(
            "loss_fn must return the loss, a tensor of one element that requires a gradient, or a tuple that begins "
            f"with it; it returned a {result}"
        )
    return result


def _functions(hooks: Mapping[Any, Callable[..., Any]] | None) -> tuple[Callable[..., Any], ...]:
    functions = tuple((hooks or {}).values())
    if any(isinstance(getattr(function, "__self__", None), GradientRelease) for function in functions):
        raise ValueError(
            "release_gradients is in effect, whose updates can't be part of one graph; remove() its handle first"
        )
    return functions


def _expect_no_reducing(model: nn.Module) -> None:
    kinds: list[type[nn.Module]] = [DistributedDataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # seconds to import, for those who don't shard
        kinds += [fsdp.FSDPModule, fsdp.FullyShardedDataParallel]
    for kind in kinds:
        if any(isinstance(module, kind) for module in model.modules()):
            raise ValueError(
                f"the model is a {kind.__name__}, whose hooks can't be part of one graph; compile the model and the "
                "optimizer's step separately, or make the parameters DTensors: docs/distributed.md, "
                '"Data parallelism in one graph"'
            )

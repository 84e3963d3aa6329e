"""Whole training steps as one graph, compiled or captured on a GPU; and steps during the backward pass."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from torch_ademamix.ops import SCALER
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.options import HyperparameterTensors


def compile_train_step(
    model: nn.Module,
    optimizer: AdEMAMix,
    loss_fn: Callable[..., Tensor],
    **compile_options: Any,
) -> Callable[..., Tensor]:
    """Compiles forward, backward, update and the clearing of gradients into one graph.

    The optimizer's state is made now. The graph reads learning rates, betas, α, the warm-ups, eps and weight decay
    anew at each step, so that schedulers, made before or after, change them without a recompilation: call
    `scheduler.step()` after the step as ever.

    Args:
        model: the module to train.
        optimizer: an optimizer of parameters of `model`; several groups and frozen parameters are fine.
        loss_fn: `loss_fn(model, *batch)` returns the loss, a tensor of one element.
        compile_options: further arguments of :func:`torch.compile`, such as `mode` or `backend`.

    Returns:
        `step(*batch)`, which trains on one batch and returns the loss, detached.

    Raises:
        TypeError: the optimizer is another one, or a wrapper of one.
        ValueError: gradients are reduced by `DistributedDataParallel`, `fully_shard` or FSDP1, in hooks that have no
            place in a graph. Tensor parallelism has none.

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
    _refuse_wrapped(optimizer)
    _refuse_reducing(model)
    optimizer.init_state()

    def train_step(has_hooks: bool, *batch: Any) -> Tensor:
        loss = loss_fn(model, *batch)
        loss.backward()
        if has_hooks:
            type(optimizer).step(optimizer)  # an LR scheduler hides optimizer.step behind what can't be traced
        else:  # without torch's profiling around it, of which Dynamo warns
            with torch.no_grad():
                optimizer._update()
        for params in optimizer._layout.plan.params:
            for p in params:
                p.grad = None
        return loss.detach()

    compiled = torch.compile(train_step, fullgraph=True, **compile_options)

    tensors = HyperparameterTensors()

    def step(*batch: Any) -> Tensor:
        optimizer._opt_called = True  # by which LR schedulers know of a step
        # .backward() is inside the graph
        with optimizer._reading(tensors), torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(_has_step_hooks(optimizer), *batch)

    return step


def _refuse_wrapped(optimizer: object) -> None:
    if not isinstance(optimizer, AdEMAMix):
        name = type(optimizer).__name__
        raise TypeError(f"optimizer is a {name}, but must be an AdEMAMix; of a wrapper, give what it wraps")


def _refuse_reducing(model: nn.Module) -> None:
    kinds: list[type[nn.Module]] = [DistributedDataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # seconds to import, for those who don't shard
        kinds += [fsdp.FSDPModule, fsdp.FullyShardedDataParallel]
    for kind in kinds:
        if any(isinstance(module, kind) for module in model.modules()):
            raise ValueError(
                f"the model is a {kind.__name__}, whose hooks can't be part of one graph; compile the model, and the "
                "optimizer's step, each by itself"
            )


def _has_step_hooks(optimizer: AdEMAMix) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


WARM_UP_STEPS = 3  # what torch.cuda.make_graphed_callables does: libraries choose kernels and make their workspaces


def capture_train_step(
    model: nn.Module, optimizer: AdEMAMix, loss_fn: Callable[..., Tensor], sample_batch: Sequence[Any]
) -> Callable[..., Tensor]:
    """Captures forward, backward, update and the clearing of gradients in one CUDA graph, and replays it.

    Nothing is trained by this call: the warm-up before the capture leaves parameters, buffers, state and random
    numbers as they are. The graph reads learning rates, betas, α, the warm-ups, eps and weight decay anew at each
    replay, so that schedulers, made before or after, change them, and the schedules of α and β3 advance; every other
    option is captured as it is. State that is loaded is written into the tensors of the graph; where state has been
    replaced otherwise, the next step captures anew. Step hooks run while the graph is captured, only.

    Args:
        model: the module to train, on one CUDA device.
        optimizer: an optimizer of parameters of `model`.
        loss_fn: `loss_fn(model, *batch)` returns the loss, a tensor of one element, without waiting for the GPU.
        sample_batch: arguments like those of every later batch: the same shapes and dtypes, and what isn't a
            tensor is equal.

    Returns:
        `step(*batch)`, which trains on one batch and returns the loss, detached.

    Raises:
        ValueError: the parameters are not on one CUDA device, or a batch isn't like the sample.
        TypeError: the optimizer is another one, or a wrapper of one.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    _refuse_wrapped(optimizer)
    return _CapturedTrainStep(model, optimizer, loss_fn, sample_batch)


class _CapturedTrainStep:
    def __init__(
        self, model: nn.Module, optimizer: AdEMAMix, loss_fn: Callable[..., Tensor], sample_batch: Sequence[Any]
    ) -> None:
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        if len(devices) != 1 or (device := devices.pop()).type != "cuda":
            raise ValueError("capture_train_step needs all parameters on one CUDA device; see compile_train_step")
        self._model, self._optimizer, self._loss_fn, self._device = model, optimizer, loss_fn, device
        leaves, self._spec = tree_flatten(tuple(sample_batch))
        self._inputs = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._tensors = HyperparameterTensors()
        with optimizer._reading(self._tensors):
            self._capture()

    def __call__(self, *batch: Any) -> Tensor:
        self._take(*tree_flatten(batch))
        with self._optimizer._reading(self._tensors):
            if self._optimizer._layout.plan is not self._plan:  # other tensors than those of the graph
                self._capture()
            self._graph.replay()
        self._optimizer._opt_called = True  # by which LR schedulers know of a step
        return self._loss.clone()

    def _take(self, leaves: list[Any], spec: TreeSpec) -> None:
        if spec != self._spec:
            raise ValueError(f"the batch is {spec}, but the sample was {self._spec}")
        for i, (leaf, expected) in enumerate(zip(leaves, self._inputs, strict=True)):
            if not isinstance(expected, Tensor):
                if leaf != expected:
                    raise ValueError(f"leaf {i} of the batch is {leaf!r}, but was {expected!r} in the sample")
            elif not isinstance(leaf, Tensor) or leaf.shape != expected.shape or leaf.dtype != expected.dtype:
                raise ValueError(f"leaf {i} of the batch is {_kind(leaf)}, but was {_kind(expected)} in the sample")
        for leaf, target in zip(leaves, self._inputs, strict=True):
            if isinstance(target, Tensor):
                target.copy_(leaf, non_blocking=True)

    def _capture(self) -> None:
        optimizer = self._optimizer
        self._clear_grads()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), self._without_effect():
                for _ in range(WARM_UP_STEPS):
                    self._forward_and_backward()
                    with torch.no_grad():
                        optimizer._update()
                    self._clear_grads()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._forward_and_backward()
                type(optimizer).step(optimizer)
                self._clear_grads()
        self._plan = optimizer._layout.plan

    def _forward_and_backward(self) -> Tensor:
        loss = self._loss_fn(self._model, *tree_unflatten(self._inputs, self._spec))
        loss.backward()
        return loss.detach()

    def _clear_grads(self) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    @contextmanager
    def _without_effect(self) -> Iterator[None]:
        """Steps change nothing, as GradScaler prevents them; buffers and random numbers are put back."""
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        self._optimizer.found_inf = torch.ones((), device=self._device)
        try:
            with torch.random.fork_rng(devices=[self._device]):
                yield
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return repr(value)


def release_gradients(model: nn.Module, optimizer: AdEMAMix) -> "GradientRelease":
    """Updates each parameter as soon as backward has its gradient, and frees that: they are never all there at once.

    The loop stays as it is: `optimizer.step()` after each backward pass finds nothing left to update but parameters
    that aren't the model's, and marks the end of a step, for LR schedulers and hooks. Results are those of the
    ordinary loop bit for bit, as long as no option changes between backward and step. With `fully_shard`, shards are
    updated and freed.

    What needs all gradients before the first update can't work: clipping by the norm, `GradScaler`, and
    accumulation over several backward passes. All are refused where they can be known; that gradients are clipped by
    other code can't.

    Args:
        model: the module whose parameters' gradients are released.
        optimizer: the optimizer of parameters of `model`, which require a gradient now.

    Returns:
        a handle, whose `remove()` brings the ordinary loop back.

    Raises:
        ValueError: the optimizer clips gradients, the model is replicated by `DistributedDataParallel` (which reduces
            gradients after they have been released), or it has none of the optimizer's parameters.
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
    _refuse_wrapped(optimizer)
    return GradientRelease(model, optimizer)


class GradientRelease:
    """The handle of :func:`release_gradients`."""

    def __init__(self, model: nn.Module, optimizer: AdEMAMix) -> None:
        self._optimizer = optimizer
        self._refuse_clipping(ValueError)
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError("gradients can't be released under DistributedDataParallel; fully_shard allows it")
        of_model = set(model.parameters())
        self._updated: set[Tensor] = set()  # since the last step()
        params = [p for group in optimizer.param_groups for p in group["params"] if p in of_model and p.requires_grad]
        if not params:
            raise ValueError("the optimizer has no parameter of the model that requires a gradient")
        self._handles = [p.register_post_accumulate_grad_hook(self._release) for p in params]
        self._handles.append(optimizer.register_step_pre_hook(self._end_step))

    def remove(self) -> None:
        """Leaves gradients to `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _release(self, p: Tensor) -> None:
        self._refuse_clipping(RuntimeError)
        if p in self._updated:
            raise RuntimeError(
                "a second backward pass before optimizer.step(): gradients that are released as they arrive can't be "
                "accumulated"
            )
        if not self._updated:
            self._optimizer._prepare()
        self._optimizer._update_param(p)
        self._updated.add(p)
        p.grad = None

    def _end_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(getattr(optimizer, name, None) is not None for name in SCALER):
            raise RuntimeError("gradients that are released as they arrive can't be unscaled by GradScaler")
        self._updated.clear()

    def _refuse_clipping(self, error: type[Exception]) -> None:
        if self._optimizer.max_grad_norm is not None:
            raise error(
                "gradients that are released as they arrive can't be clipped by their norm: max_grad_norm is set"
            )

"""A training step as one CUDA graph, and what to compare at each replay for that to be right."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.state import sharding
from torch_ademamix.state.options import CONSTANT_OPTIONS
from torch_ademamix.training.micro_batches import check_leaves, micro_batches
from torch_ademamix.training.train_step import TrainStep, scaler_attributes, unwrap_loss

WARM_UP_STEPS = 3  # what torch.cuda.make_graphed_callables does: libraries choose kernels and make their workspaces


def capture_train_step(
    model: nn.Module,
    optimizer: AdEMAMix | Sequence[Optimizer],
    loss_fn: Callable[..., Any],
    sample_batch: Sequence[Any],
    sample_kwargs: Mapping[str, Any] | None = None,
    *,
    accumulate: int = 1,
    average: bool = True,
    scaler: GradScaler | None = None,
) -> Callable[..., Any]:
    """Captures forward, backward, update and the clearing of gradients in one CUDA graph, and replays it.

    This call trains nothing: the warm-up before the capture leaves parameters, buffers, state and random numbers as
    they are. Loading state writes into the tensors of the graph. Each step compares what the graph can't change: the
    memory of parameters, buffers and state, which parameters are frozen, training mode, autocast, hooks, and options
    that aren't numbers. If any of these has changed, the step re-captures the graph. Python code, including that of
    hooks, runs during the capture only.

    Args:
        model: the module to train, on one CUDA device.
        optimizer: an optimizer of parameters of `model`.
        loss_fn: as for :func:`compile_train_step`, and without waiting for the GPU.
        sample_batch: positional arguments like those of every later batch: tensors of the same shapes and dtypes, and
            equal values for everything else.
        sample_kwargs: keyword arguments, in the same way.
        accumulate: as for :func:`compile_train_step`.
        average: as for :func:`compile_train_step`.
        scaler: as for :func:`compile_train_step`.

    Returns:
        `step(*batch, **more)`, which trains on one batch and returns what `loss_fn` does, detached. A batch may be
        written to as soon as that returns.

    Raises:
        ValueError: the parameters are not on one CUDA device, a batch isn't like the sample, or what
            :func:`compile_train_step` raises for.
        TypeError: the optimizer is another one, or a wrapper of one; `loss_fn` returns no loss; or a batch contains
            something other than tensors, numbers, strings and None in dicts, lists and tuples.
        RuntimeError: as :func:`compile_train_step`, here and in `step`.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    body = TrainStep(model, optimizer, loss_fn, accumulate, average, scaler)
    return CapturedTrainStep(body, sample_batch, sample_kwargs or {})


class CapturedTrainStep:
    """The step of :func:`torch_ademamix.capture_train_step`. The graph and its memory are free with it."""

    def __init__(self, body: TrainStep, sample_batch: Sequence[Any], sample_kwargs: Mapping[str, Any]) -> None:
        self._body = body
        self._device = _one_cuda_device(body)
        leaves, self._spec = _flatten(sample_batch, sample_kwargs)
        check_leaves(leaves)
        self._inputs = [
            leaf.detach().to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        args, kwargs = tree_unflatten(self._inputs, self._spec)
        self._micro_batches = micro_batches(args, kwargs, body.accumulate)
        self._graph: torch.cuda.CUDAGraph | None = None
        with body.around():
            self._capture()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = _flatten(args, kwargs)
        self._check(leaves, spec)
        with self._body.around():
            if self._graph is None or self._constants() != self._captured:
                self._capture()
            self._take(leaves)
            self._graph.replay()  # type: ignore[union-attr]
        result = tree_map_only(Tensor, Tensor.clone, self._result)
        if self._in_graph:
            self._body.record_step()
        for p, grad in self._grads:
            p.grad = grad
        self._body.step_rest(self._in_graph)
        return result

    def _check(self, leaves: list[Any], spec: TreeSpec) -> None:
        if spec != self._spec:
            raise ValueError(f"the batch is {spec}, but the sample was {self._spec}")
        for i, (leaf, expected) in enumerate(zip(leaves, self._inputs, strict=True)):
            if not isinstance(expected, Tensor):
                if type(leaf) is not type(expected) or leaf != expected:
                    raise ValueError(f"leaf {i} of the batch is {leaf!r}, but was {expected!r} in the sample")
            elif not isinstance(leaf, Tensor) or leaf.shape != expected.shape or leaf.dtype != expected.dtype:
                raise ValueError(f"leaf {i} of the batch is {_kind(leaf)}, but was {_kind(expected)} in the sample")

    @torch.no_grad()
    def _take(self, leaves: list[Any]) -> None:
        for leaf, target in zip(leaves, self._inputs, strict=True):
            if isinstance(target, Tensor):
                # A copy from pinned memory may be under way when the call returns, and others write there.
                target.copy_(leaf, non_blocking=not (leaf.device.type == "cpu" and leaf.is_pinned()))

    def _constants(self) -> list[Any]:
        """What the graph can't change, besides its inputs."""
        body, optimizer = self._body, self._body.optimizer
        buffers = (buffer for module in body.modules for buffer in module._buffers.values() if buffer is not None)
        return [
            [(p.data_ptr(), p.requires_grad) for p in body.params],
            [buffer.data_ptr() for buffer in buffers],
            [bucket.addresses() for bucket in optimizer._plan_cache.plan.buckets],
            [table.data_ptr() for table in optimizer._hyperparameters.values()],  # type: ignore[union-attr]
            [module.training for module in body.modules],
            [[group[name] for name in CONSTANT_OPTIONS] for group in optimizer.param_groups],
            optimizer.max_grad_norm,
            body.param_hooks(),
            body.step_hooks(),
            body.in_graph(),
            list(map(id, body.kept)),
            (torch.is_autocast_enabled(self._device.type), torch.get_autocast_dtype(self._device.type)),
        ]

    def _capture(self) -> None:
        optimizer = self._body.optimizer
        self._graph = self._result = None  # an earlier one's memory is free for this one
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._in_graph = self._body.in_graph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), self._without_effect():
                for _ in range(WARM_UP_STEPS):
                    self._run(self._skip_update)
                    self._body.clear_gradients()
            torch.cuda.current_stream().wait_stream(stream)
            # Autocast around the step caches weights in low precision: those of the warm-up would be the graph's for
            # good, and those of the graph would be used outside of it.
            torch.clear_autocast_cache()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin the next batch, may go on. The stream is of the parameters' device,
            # where torch's own for captures is of the device that first had one.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result, grads = self._run(lambda: type(optimizer).step(optimizer))
            torch.clear_autocast_cache()
        # Gradients that the graph leaves to other optimizers lie in its memory: each replay writes them again.
        self._grads = list(zip(self._kept(), grads, strict=True))
        self._body.clear_gradients()
        self._graph, self._result, self._captured = graph, result, self._constants()

    def _run(self, step: Callable[[], Any]) -> tuple[Any, list[Tensor | None]]:
        """What the step returns, and the gradients that the graph leaves."""
        result = unwrap_loss(self._body.run(self._micro_batches, step if self._in_graph else None))
        return result, [p.grad for p in self._kept()]

    def _kept(self) -> list[Tensor]:
        return self._body.kept if self._in_graph else self._body.of_optimizers

    @torch.no_grad()
    def _skip_update(self) -> None:
        self._body.optimizer.found_inf.fill_(1)  # type: ignore[attr-defined]
        self._body.optimizer._update()

    @contextmanager
    def _without_effect(self) -> Iterator[None]:
        """Restores what a step writes besides parameters and state."""
        optimizer = self._body.optimizer
        written = [*self._body.model.buffers(), *([] if optimizer.grad_norm is None else [optimizer.grad_norm])]
        before = [tensor.clone() for tensor in written]
        scaling: AbstractContextManager[None] = nullcontext()
        if self._body.scaler is None:
            scaling = scaler_attributes(optimizer, None, torch.zeros((), device=self._device))
        try:
            with scaling, torch.random.fork_rng(devices=[self._device]):
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(written, before, strict=True):
                    tensor.copy_(value)


def _one_cuda_device(body: TrainStep) -> torch.device:
    params = [p for group in body.optimizer.param_groups for p in group["params"]]
    device: torch.device = params[0].device
    if device.type != "cuda" or any(p.device != device for p in params):
        raise ValueError("capture_train_step needs all parameters on one CUDA device; see compile_train_step")
    if any(map(sharding.is_dtensor, params)):
        raise ValueError("capture_train_step can't have parameters that are DTensors; see compile_train_step")
    return device


def _flatten(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], TreeSpec]:
    return tree_flatten((tuple(args), dict(sorted(kwargs.items()))))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return repr(value)

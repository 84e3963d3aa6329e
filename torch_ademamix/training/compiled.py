"""A full training step, compiled."""

import gc
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.training.micro_batches import MicroBatch, micro_batches
from torch_ademamix.training.train_step import ParamHooks, TrainStep, unwrap_loss

_numbers = itertools.count()


def compile_train_step(
    model: nn.Module,
    optimizer: AdEMAMix | Sequence[Optimizer],
    loss_fn: Callable[..., Any],
    *,
    accumulate: int = 1,
    average: bool = True,
    scaler: GradScaler | None = None,
    **compile_options: Any,
) -> Callable[..., Any]:
    """Compiles forward, backward, update and the clearing of gradients into one graph.

    This call creates the optimizer's state. Changing a number in an option or loading state doesn't recompile; a batch
    of another shape does, and another set of parameters with gradients.

    Args:
        model: the module to train.
        optimizer: an optimizer of parameters of `model`; several groups and frozen parameters are fine. Or a list of
            optimizers, one of them an AdEMAMix, others any of torch.optim, in the order of their steps.
        loss_fn: `loss_fn(model, *batch, **more)` returns the loss, a tensor of one element, or a tuple that begins
            with it.
        accumulate: micro-batches per update. Each tensor of a batch is split along its first dimension into this many
            equal chunks (a DTensor along the rows of each process). Each micro-batch gets all numbers, strings,
            modules, and tensors without dimensions.
        average: whether to average the losses of the micro-batches. False sums them, for a `loss_fn` that divides by a
            number of the full batch, such as its number of tokens.
        scaler: scales the loss, for float16. Call `scaler.update()` after the step as usual.
        compile_options: further arguments of :func:`torch.compile`, such as `mode` or `backend`.

    Returns:
        `step(*batch, **more)`, which trains on one batch and returns what `loss_fn` does, detached. With `accumulate`,
        what follows the loss in a tuple becomes a list with an entry per micro-batch.

    Raises:
        TypeError: the optimizer is another one, or a wrapper of one, or there is no AdEMAMix among several; in `step`,
            if `loss_fn` returns no loss, or with `accumulate`, if a batch has something in it that can't be opened,
            such as a `UserDict` or an object: pass `dict(batch)`, or the object's tensors.
        ValueError: `DistributedDataParallel`, `fully_shard` or FSDP1 reduces the gradients, in hooks that can't be
            part of a graph (docs/distributed.md, "Data parallelism in one graph", says what can), or
            :func:`torch_ademamix.release_gradients` releases them; the optimizer has no parameter of the model;
            `fullgraph` is False; `optimizer.step` was replaced; there are several AdEMAMix; in `step`, if `accumulate`
            doesn't divide a batch, or its tensors have different numbers of rows.
        RuntimeError: in `step`, if the optimizer's parameters have been replaced in the model, under
            :func:`torch.no_grad`, or in :func:`torch.autograd.detect_anomaly`.

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
    if not compile_options.setdefault("fullgraph", True):
        raise ValueError(
            "fullgraph is False, but a full training step is one graph; if that isn't possible, compile the model and "
            "the optimizer's step separately"
        )
    config: dict[str, Any] = {
        "trace_autograd_ops": True,  # .backward() is inside the graph
        "allow_unspec_int_on_nn_module": True,  # counters of calls, as some layers have them
    }
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # since torch 2.13
    if isolates:
        compile_options.setdefault("isolate_recompiles", True)
        # Before, Dynamo couldn't put such a configuration into its metrics, and said so at each compilation.
        ignored = torch._dynamo.config.ignore_logging_functions
        config["ignore_logging_functions"] = {*ignored, *_logging_methods()}
    body = TrainStep(model, optimizer, loss_fn, accumulate, average, scaler)
    ademamix = body.optimizer
    body.param_hooks()
    ademamix.init_state()

    def train_step(parts: list[MicroBatch], in_graph: bool, has_step_hooks: bool, hooks: tuple[ParamHooks, ...]) -> Any:
        def update() -> None:
            if has_step_hooks:
                type(ademamix).step(ademamix)  # an LR scheduler hides optimizer.step behind what can't be traced
            else:  # without torch's profiling around it, of which Dynamo warns
                with torch.no_grad():
                    ademamix._update()

        return body.run(parts, update if in_graph else None, hooks)

    # Dynamo counts recompilations per code object, and remembers by its name which shapes vary. Each step has its own.
    code = train_step.__code__.replace(co_name=f"train_step_{next(_numbers)}")
    train_step = FunctionType(code, train_step.__globals__, closure=train_step.__closure__)
    compiled = torch.compile(train_step, **compile_options)
    first = True

    def step(*batch: Any, **more: Any) -> Any:
        nonlocal first
        parts = micro_batches(batch, more, body.accumulate)
        in_graph = body.in_graph()
        with body.around(), _configured(config), _collecting_no_garbage() if first else nullcontext():
            run = train_step if _compiling_is_disabled() else compiled
            result = unwrap_loss(run(parts, in_graph, bool(body.step_hooks()), body.param_hooks()))
        first = False
        if in_graph:
            body.record_step()
        body.step_rest(in_graph)
        return result

    return step


def _compiling_is_disabled() -> bool:
    """Whether torch.compile is switched off (TORCH_COMPILE_DISABLE=1): with `fullgraph=True` it would raise."""
    return bool(torch._dynamo.config.disable) or torch._dynamo.eval_frame._stance.stance == "force_eager"


@contextmanager
def _configured(dynamo: dict[str, Any]) -> Iterator[None]:
    """Settings for compiling a full training step.

    A tensor that is computed from two others and used twice is kept in memory, as residuals between forward and
    backward are. By default, Inductor would recompute it for each use, from up to four tensors. Then no two layers have
    equal kernels, and a deep model takes a quarter longer to compile.
    """
    with torch._dynamo.config.patch(dynamo), torch._inductor.config.patch(realize_reads_threshold=1):
        yield


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """For the call that compiles: Python's collector would take a tenth of its time, and find next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _logging_methods() -> set[Callable[..., Any]]:
    """Logging methods, which would break a graph; also those that others add, such as transformers' warning_once."""
    levels = ("debug", "info", "warning", "error", "critical", "exception", "log")
    return {method for name, method in vars(logging.Logger).items() if name.startswith(levels)}

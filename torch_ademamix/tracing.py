"""What a traced step leaves to Python: checks, state and the plan are made while the step is traced.

These functions take a string key, not the object: Dynamo specializes on strings once, but turns ints into symbolic
values when it recompiles.
"""

import itertools
import json
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

_numbers = itertools.count()
_registered: "WeakValueDictionary[str, Any]" = WeakValueDictionary()

_MARK = "_dynamo_static_input_type"  # what mark_static_address writes
_marks: "WeakKeyDictionary[Any, list[tuple[torch.Tensor, Any]]]" = WeakKeyDictionary()  # of parameters, those before


def register(known: Any) -> str:
    """Gives an object a name, by which the functions of this module find it while it lives."""
    _mark_constants()
    name = f"{type(known).__name__} {next(_numbers)}"
    _registered[name] = known
    return name


def begin_step(name: str) -> None:
    """Checks the options of the optimizer of that name, and makes what its step needs.

    If the step is compiled alone, its parameters are guarded by identity, as those of torch.optim are, which takes half
    the time. A change of a parameter's shape still recompiles, through the guard on its gradient.
    """
    optimizer = _registered[name]
    _unmark(optimizer)  # if an error ended an earlier trace
    optimizer._prepare()
    alone = optimizer._hyperparameters is None
    params = [p for bucket in optimizer._plan_cache.plan.buckets for p in bucket.params] if alone else []
    _marks[optimizer] = [(p, getattr(p, _MARK, None)) for p in params]
    for p in params:
        torch._dynamo.mark_static_address(p, guard=True)


def end_step(name: str) -> None:
    """Removes the marks, so that other compilations guard these parameters in their own way."""
    _unmark(_registered[name])


def _unmark(optimizer: Any) -> None:
    for p, mark in _marks.pop(optimizer, ()):
        if mark is None:
            delattr(p, _MARK)
        else:
            setattr(p, _MARK, mark)


def read_grads(context: Any) -> None:
    """Sets `grads` to the gradients of `params`, with guards that take half as long as those of `p.grad`.

    For each `p.grad` Dynamo installs two guards that read it through Python. A GradSource, as in the steps of
    torch.optim, is read once and in C++. No public function makes one: where it can't be had, `grads` stays as it is.

    Args:
        context: Dynamo's, where `params` (of `bucket`) and `grads` are local variables.
    """
    try:
        from torch._dynamo.guards import install_guard
        from torch._dynamo.source import GradSource
        from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
        from torch._dynamo.variables.lists import ListVariable

        translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        params = [variable.realize() for variable in translator.symbolic_locals["params"].realize().items]
        effects = translator.output.side_effects
        if any(p.source is None or effects.has_pending_mutation_of_attr(p, "grad") for p in params):
            return  # gradients that the graph itself has computed
        grads = []
        for variable, p in zip(params, translator.symbolic_locals["bucket"].realize().value.params, strict=True):
            source = GradSource(variable.source)
            grads.append(VariableTracker.build(translator, p.grad, source).realize())
            if p.grad is not None:
                install_guard(source.make_guard(_match_grad))
        translator.symbolic_locals["grads"] = ListVariable(grads, mutation_type=ValueMutationNew())
    except (ImportError, AttributeError, TypeError):  # another torch's internals
        return


def _match_grad(builder: Any, guard: Any) -> None:
    """Installs a guard of a gradient's type, dtype, device, shape and strides."""
    from torch._dynamo.guards import GuardBuilder

    GuardBuilder.TENSOR_MATCH(_FormOnly(builder), guard)


class _FormOnly:
    """Dynamo's GuardBuilder without two of TENSOR_MATCH's guards, which don't matter for what a step only reads.

    They are that no other input is the same tensor, and that no size was marked as dynamic.
    """

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.no_tensor_aliasing_names: list[str] = []
        self.no_tensor_aliasing_sources: list[Any] = []
        self.no_tensor_aliasing_guard_managers: list[Any] = []

    def get_guard_manager(self, guard: Any) -> Any:
        return _Unmarked(self._builder.get_guard_manager(guard))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)


class _Unmarked:
    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def add_dimension_marking_guard(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def detect_other_leaves(context: Any) -> None:
    """Tells the training step of that name if the graph so far has leaves besides `params` that require a gradient.

    Args:
        context: Dynamo's, where `name` and `params` are local variables.
    """
    own = {proxy.node for proxy in context.get_local("params").as_proxy()}
    others = (node for node in context.graph().find_nodes(op="placeholder") if node not in own)
    if any(isinstance(t := node.meta["example_value"], torch.Tensor) and t.requires_grad for node in others):
        _registered[context.get_local("name").as_python_constant()].has_other_leaves = True


def detect_left_tensors(context: Any) -> None:
    """Adds to `left` of the training step of that name the attributes of modules that the graph so far gives a history.

    Dynamo has no public way to ask for what a traced function has assigned; what isn't found here, it rejects itself.
    """
    step = _registered[context.get_local("name").as_python_constant()]
    assigned = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    numbers = {id(module): i for i, module in enumerate(step.modules)}
    for variable, attributes in assigned.store_attr_mutations.items():
        if (i := numbers.get(id(getattr(variable, "value", None)))) is None:
            continue
        for name, value in attributes.items():
            if (i, name) not in step.left and _has_history(value):
                step.left.append((i, name))


def _has_history(variable: Any) -> bool:
    """Whether a variable of Dynamo's is a tensor that autograd has a history of, or a list or dict of some."""
    from torch._dynamo.variables.dicts import ConstDictVariable
    from torch._dynamo.variables.lists import BaseListVariable
    from torch._dynamo.variables.tensor import TensorVariable

    if isinstance(variable, BaseListVariable):
        return any(map(_has_history, variable.items))
    if isinstance(variable, ConstDictVariable):
        return any(map(_has_history, variable.items.values()))
    if not isinstance(variable, TensorVariable):
        return False
    example = variable.proxy.node.meta["example_value"]
    return isinstance(example, torch.Tensor) and example.grad_fn is not None


def decoded(text: str) -> Any:
    """The value of a JSON string. Dynamo guards the string, not each of the numbers in it."""
    return json.loads(text)


@cache
def _mark_constants() -> None:
    """Makes Dynamo call these functions while it traces.

    As decorators they would import Dynamo together with the package, which takes longer than importing torch.
    """
    for function in (begin_step, end_step, decoded):
        torch._dynamo.assume_constant_result(function)

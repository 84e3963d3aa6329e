"""Steps traced by make_fx, as torchtitan's graph trainer does it: state, parameters and gradients are the inputs."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

CAN_SWAP = hasattr(torch.optim, "swap_in_optimizer_params_and_state")


def step_nodes(graph):
    """The calls of step ops in a graph."""
    return [node for node in graph.graph.nodes if "ademamix" in str(node.target)]


def trace(optimizer):
    """The graph of a step, made with fake tensors, and the plain tensors to call it with."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values, spec = tree_flatten((params, [p.grad for p in params], optimizer.state_dict()))
    unwrapped = [_unwrap(value) for value in values]

    def step(*tensors):
        remaining = iter(tensors)
        swapped, grads, state = tree_unflatten([wrap(remaining) for _, wrap in unwrapped], spec)
        for p, grad in zip(swapped, grads, strict=True):
            p.grad = grad
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, dict(enumerate(swapped)), state):
            optimizer.step()
        return ()

    tensors = [tensor for inner, _ in unwrapped for tensor in inner]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        graph = make_fx(step)(*map(mode.from_tensor, tensors))
    return graph, tensors


def _unwrap(value):
    """The plain tensors of a DTensor, and what puts it together from an iterator over some; other values stay."""
    if not isinstance(value, torch.Tensor):
        return [], lambda _: value
    if not is_traceable_wrapper_subclass(value):
        return [value], next
    names, context = value.__tensor_flatten__()
    parts = {name: _unwrap(getattr(value, name)) for name in names}

    def wrap(remaining):
        inner = {name: wrap_inner(remaining) for name, (_, wrap_inner) in parts.items()}
        return type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())

    return [tensor for inner, _ in parts.values() for tensor in inner], wrap

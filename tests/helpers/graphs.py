"""What compiled steps look like: their graphs, and the code that inductor makes of them."""

import re

import torch
from torch._dynamo.utils import ReinplaceCounters
from torch.utils._dtype_abbrs import dtype_abbrs

OP_CALL = re.compile(r"torch\.ops\.torch_ademamix\._ademamix_\w*step_\.\w+\(")
# What else a line of the generated function may be: no clone, no copy, no kernel, no new buffer.
HARMLESS = re.compile(
    r"def call|args\.clear|return \(\)|#|del arg|assert_size_stride(_grouped)?\(|arg\w+(, arg\w+)* = args$"
)


def describe(graph):
    """The calls of a graph, each tensor written as its type."""

    def write(x):
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(map(write, x))}]"
        if not isinstance(x, torch.fx.Node):
            return repr(x)
        value = x.meta["example_value"]
        return f"{dtype_abbrs[value.dtype]}{list(value.shape)}"

    lines = []
    for node in graph.nodes:
        if node.op.startswith("call"):
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            arguments = [*map(write, node.args), *(f"{k}={write(v)}" for k, v in node.kwargs.items())]
            lines.append(f"{target}(" + "".join(f"\n    {argument}" for argument in arguments) + ")")
    return "\n".join(lines)


def op_calls(code):
    """The calls of a step op in generated code."""
    return OP_CALL.findall(code)


def assert_only_op_calls(code, calls):
    """That the generated code of a step does nothing else than call a step op so many times."""
    body = code[code.index("def call(") : code.index("runner = ")].splitlines()
    lines = [line.strip() for line in body if line.strip() and not HARMLESS.match(line.strip())]
    assert [bool(OP_CALL.match(line)) for line in lines] == [True] * calls, lines
    assert not ReinplaceCounters._values

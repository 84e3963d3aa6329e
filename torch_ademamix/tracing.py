"""What of a step can't be traced: Python itself does it while the step is traced, which then finds its state's place.

It is called with a name, for Dynamo takes a text for a constant, and a number for one only at first.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

_numbers = itertools.count()
_optimizers: "WeakValueDictionary[str, Any]" = WeakValueDictionary()


def enter(optimizer: Any) -> str:
    """Remembers an optimizer, while it lives, by the name that is returned."""
    name = f"optimizer {next(_numbers)}"
    _optimizers[name] = optimizer
    return name


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def prepare(name: str) -> None:
    """Checks the options, and makes what the step of the optimizer of that name needs."""
    _optimizers[name]._prepare()

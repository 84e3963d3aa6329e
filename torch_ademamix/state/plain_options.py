"""Options as Python's own numbers and tuples: `torch.load` and Dynamo take no others."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """A number of numpy's, or of another library, as Python's own; anything else as it is.

    >>> import numpy
    >>> plain(numpy.float64(0.5)), plain(numpy.int64(3)), plain("nearest")
    (0.5, 3, 'nearest')
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:  # a bool, or an array of one element
        return value.item()
    return value


def plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with plain numbers; betas of a configuration's list (OmegaConf's, say) become a tuple."""
    options = {name: value if name == "params" else plain(value) for name, value in group.items()}
    betas = options.get("betas")
    exact = isinstance(betas, (tuple, list)) and type(betas) in (tuple, list)  # no subclass, as OmegaConf's is
    is_plain = exact and all(type(beta) in _PLAIN for beta in list(betas or ()))
    if isinstance(betas, Iterable) and not is_plain and not isinstance(betas, (str, Tensor, Mapping)):
        options["betas"] = tuple(map(plain, betas))
    return options

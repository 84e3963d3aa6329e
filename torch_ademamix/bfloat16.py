"""Public path of :mod:`torch_ademamix.numerics.bfloat16`."""

from torch_ademamix.numerics.bfloat16 import *  # noqa: F403

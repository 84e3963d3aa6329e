"""Public path of :mod:`torch_ademamix.numerics.blockwise`."""

from torch_ademamix.numerics.blockwise import *  # noqa: F403

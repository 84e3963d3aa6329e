"""Public path of :mod:`torch_ademamix.numerics.schedules`."""

from torch_ademamix.numerics.schedules import *  # noqa: F403

"""Public path of :mod:`torch_ademamix.state.paging`."""

from torch_ademamix.state.paging import *  # noqa: F403

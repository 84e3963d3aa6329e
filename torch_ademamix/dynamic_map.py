"""Public path of :mod:`torch_ademamix.checkpoint.dynamic_map`."""

from torch_ademamix.checkpoint.dynamic_map import *  # noqa: F403

"""The numbers of a step, from a parameter group to the ops."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Number = Tensor | float  # a tensor: float64, without dimensions


class Hyperparameters(NamedTuple):
    """The numbers of one parameter group (ops/ademamix.h has the same order)."""

    lr: Number
    beta1: Number
    beta2: Number
    beta3: Number
    alpha: Number
    t_alpha: Number  # 0 for no warm-up
    t_beta3: Number
    schedule_start: Number
    eps: Number
    weight_decay: Number
    delta: Number  # 0 for a β3 that isn't in logarithmic time
    log_time_beta2: Number  # 0 or 1
    kappa: Number  # 0 for none
    t_weight_decay: Number  # 0 for a constant weight decay


HYPERPARAMETERS = Hyperparameters._fields


def hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Those of a parameter group, whose lr may be a tensor."""
    beta1, beta2, beta3 = map(float, group["betas"])
    return Hyperparameters(
        group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
        beta1,
        beta2,
        beta3,
        float(group["alpha"]),
        float(group["t_alpha"] or 0),
        float(group["t_beta3"] or 0),
        float(group["schedule_start"]),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["delta"] or 0),
        float(group["log_time_beta2"]),
        float(group["kappa"] or 0),
        float(group["t_weight_decay"] or 0),
    )


class HyperparameterRows(NamedTuple):
    """The hyperparameters of the parameters of an op call.

    Attributes:
        rows: one for each group; or a float64 tensor of shape [rows, numbers], which an op reads at each call, and a
            CUDA graph at each replay.
        of_params: each parameter's row; empty if all have the first.
    """

    rows: Sequence[Hyperparameters] | Tensor
    of_params: Sequence[int] = ()

"""The warm-up schedules of α and β3 (arXiv 2409.03137, section 3)."""

import torch
from torch import Tensor


def alpha_schedule(step: Tensor | float, alpha: float, t_alpha: float | None) -> Tensor:
    """α(t) = min(t·α/t_alpha, α): linear from 0 to α.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        alpha: the final α.
        t_alpha: steps of warm-up; None for a constant α.

    Returns:
        A float64 tensor of step's shape.

    >>> alpha_schedule(50, alpha=8.0, t_alpha=100).item()
    4.0
    """
    t = torch.as_tensor(step).double()
    if t_alpha is None:
        return torch.full_like(t, alpha)
    return (t * alpha / t_alpha).clamp(max=alpha)


def beta3_schedule(step: Tensor | float, beta1: float, beta3: float, t_beta3: float | None) -> Tensor:
    """β3(t): from β1 to β3, linear in the half-life of the slow EMA.

    A half-life is proportional to 1/ln β, so with s = t/t_beta3 this is
    ln β3(t) = 1/((1−s)/ln β1 + s/ln β3), the paper's equation in a form that also holds at β1 = 0,
    where 1/ln β1 is 0.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        beta1: the β that the schedule starts from.
        beta3: the final β3.
        t_beta3: steps of warm-up; None for a constant β3.

    Returns:
        A float64 tensor of step's shape.

    >>> round(beta3_schedule(1000, beta1=0.9, beta3=0.9999, t_beta3=100_000).item(), 10)
    0.9909001624
    """
    t = torch.as_tensor(step).double()
    if t_beta3 is None:
        return torch.full_like(t, beta3)
    start, end = torch.tensor([beta1, beta3], dtype=torch.float64, device=t.device).log().reciprocal()
    s = t / t_beta3
    warming_up = torch.exp(1 / ((1 - s) * start + s * end)).clamp(max=beta3)
    return torch.where(t < t_beta3, warming_up, beta3)

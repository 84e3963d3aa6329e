"""The schedules: warm-ups of α and β3 (arXiv 2409.03137, section 3), and logarithmic time (arXiv 2602.05298)."""

import torch
from torch import Tensor


def alpha_schedule(step: Tensor | float, alpha: Tensor | float, t_alpha: Tensor | float | None) -> Tensor:
    """α(t) = min(t·α/t_alpha, α): linear from 0 to α.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        alpha: the final α.
        t_alpha: steps of warm-up; None or 0 for a constant α.

    Returns:
        A float64 tensor of step's shape.

    >>> alpha_schedule(50, alpha=8.0, t_alpha=100).item()
    4.0
    """
    t = torch.as_tensor(step, device=getattr(step, "device", "cpu")).double()
    if t_alpha is None or _is_zero(t_alpha):
        return torch.zeros_like(t) + alpha
    warming_up = (t * alpha / t_alpha).clamp(max=alpha)
    return torch.where(t_alpha > 0, warming_up, alpha) if isinstance(t_alpha, Tensor) else warming_up


def beta3_schedule(
    step: Tensor | float, beta1: Tensor | float, beta3: Tensor | float, t_beta3: Tensor | float | None
) -> Tensor:
    """β3(t): from β1 to β3, linear in the half-life of the slow EMA.

    A half-life is proportional to 1/ln β, so with s = t/t_beta3 this is
    ln β3(t) = 1/((1−s)/ln β1 + s/ln β3), the paper's equation in a form that also holds at β1 = 0,
    where 1/ln β1 is 0.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        beta1: the β that the schedule starts from.
        beta3: the final β3.
        t_beta3: steps of warm-up; None or 0 for a constant β3.

    Returns:
        A float64 tensor of step's shape.

    >>> round(beta3_schedule(1000, beta1=0.9, beta3=0.9999, t_beta3=100_000).item(), 10)
    0.9909001624
    """
    t = torch.as_tensor(step, device=getattr(step, "device", "cpu")).double()
    if t_beta3 is None or _is_zero(t_beta3):
        return torch.zeros_like(t) + beta3
    betas = (torch.as_tensor(beta, dtype=torch.float64, device=t.device) for beta in (beta1, beta3))
    start, end = torch.stack([*betas]).log().reciprocal()
    s = t / t_beta3
    warming_up = torch.exp(1 / ((1 - s) * start + s * end)).clamp(max=beta3)
    return torch.where(t < t_beta3, warming_up, beta3)


def log_time_rate(step: Tensor | float, delta: Tensor | float) -> Tensor:
    """1 − β(t) = δ/(δ + t) of an EMA in logarithmic time, which remembers about the last t/δ steps.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        delta: δ.

    Returns:
        A float64 tensor of step's shape.

    >>> log_time_rate(8, delta=8.0).item()
    0.5
    """
    return delta / (delta + torch.as_tensor(step).double())


def growth(step: Tensor | float, kappa: Tensor | float) -> Tensor:
    """(1 + t)^(1 − κ), which ADANA adds to α.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        kappa: κ.

    Returns:
        A float64 tensor of step's shape.

    >>> growth(15, kappa=0.75).item()
    2.0
    """
    return (1 + torch.as_tensor(step).double()) ** (1 - kappa)


def log_time_decay(step: Tensor | float, weight_decay: Tensor | float, t_weight_decay: Tensor | float) -> Tensor:
    """λ(t) = λ/(1 + t/T): weight decay in logarithmic time.

    Args:
        step: t, counting from 1; a tensor of any shape, or a number.
        weight_decay: λ.
        t_weight_decay: T, in steps.

    Returns:
        A float64 tensor of step's shape.

    >>> log_time_decay(300, weight_decay=0.4, t_weight_decay=100).item()
    0.1
    """
    return weight_decay / (1 + torch.as_tensor(step).double() / t_weight_decay)


def _is_zero(steps: Tensor | float) -> bool:
    return not isinstance(steps, Tensor) and steps == 0  # what a tensor holds isn't known to the host

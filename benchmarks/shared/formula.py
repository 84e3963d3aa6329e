"""The update as the paper writes it, for competitors that torch.compile makes of it; no schedule, no rounding."""

from torch import Tensor

BETA1, BETA2, BETA3, ALPHA, LR, EPS, WEIGHT_DECAY = 0.9, 0.999, 0.9999, 5.0, 1e-3, 1e-8, 1e-2


def update(p: Tensor, grad: Tensor, state: tuple[Tensor, Tensor, Tensor], bias1: Tensor, sqrt_bias2: Tensor) -> None:
    """One step of one tensor, in float32; the bias corrections are tensors, since they change with the step."""
    m1, m2, nu = state
    g = grad.float()
    m1.copy_(BETA1 * m1 + (1 - BETA1) * g)
    m2.copy_(BETA3 * m2 + (1 - BETA3) * g)
    nu.copy_(BETA2 * nu + (1 - BETA2) * g * g)
    direction = (m1 / bias1 + ALPHA * m2) / (nu.sqrt() / sqrt_bias2 + EPS)
    p.copy_(p - LR * (direction + WEIGHT_DECAY * p))

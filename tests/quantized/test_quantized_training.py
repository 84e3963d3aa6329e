"""Long runs with quantized state: against float64, and with gradients that come seldom."""

import pytest
import torch

from benchmarks import drift
from torch_ademamix import AdEMAMix, AdEMAMix8bit

# What the design allows after 20,000 steps of noisy gradients; see docs/choosing.md.
DRIFT_BOUNDS = drift.Drift(
    exp_avg=0.05,
    exp_avg_slow=0.005,
    exp_avg_sq=0.12,
    exp_avg_sq_mean=0.015,
    displacement=0.02,
)
# Of exp_avg_slow and the displacement, in 12 bits.
BOUNDS_12 = {
    "8-bit, slow_ema_bits=12": (0.03, 0.025),
    "8-bit, slow_ema_bits=12, beta1=0": (0.03, 0.08),
    "ADANA, 8-bit, slow_ema_bits=12": (0.03, 0.08),
}


@pytest.mark.nightly
@pytest.mark.slow
def test_drift():
    measured = drift.measure()
    for name, bound in vars(DRIFT_BOUNDS).items():
        assert abs(getattr(measured["8-bit"], name)) <= bound, name
    for scheme, (slow, displacement) in BOUNDS_12.items():
        assert measured[scheme].exp_avg_slow <= slow, scheme
        assert measured[scheme].displacement <= displacement, scheme
    # That the bounds tell a bad scheme from a good one.
    nearest = measured[drift.TO_NEAREST]
    assert nearest.exp_avg_slow > 100 * DRIFT_BOUNDS.exp_avg_slow
    assert nearest.displacement > 10 * DRIFT_BOUNDS.displacement


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "beside dense"])
@pytest.mark.parametrize("smallest", [1.0, 0.01])
@pytest.mark.parametrize("width", [16, 64, 1000])
def test_rows_with_a_gradient_every_100th_step(width, smallest, dense):
    """No update passes 1.5 times the largest one of 32-bit state.

    A row of exp_avg_sq decays for 99 steps beside rows of its block that don't, and that may have gradients
    1 / smallest as large: were it rounded to 0, exp_avg / eps would be the next update.
    """
    rows, every = 256, 100
    phase = torch.randint(every, (rows,))
    scale = smallest ** torch.rand(rows, 1)
    params = [torch.zeros(rows, width, requires_grad=True) for _ in range(2)]
    classes = (AdEMAMix, AdEMAMix8bit)
    optimizers = [cls([p], lr=1.0, weight_decay=0.0) for cls, p in zip(classes, params, strict=True)]
    largest = [0.0, 0.0]
    for t in range(2000):
        has_grad = phase == t % every
        if dense:
            has_grad[::4] = True
        grad = torch.randn(rows, width) * scale * has_grad[:, None]
        for i, (p, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            before = p.detach().clone()
            p.grad = grad
            optimizer.step()
            largest[i] = max(largest[i], (p.detach() - before).abs().max().item())
    assert largest[1] <= 1.5 * largest[0]

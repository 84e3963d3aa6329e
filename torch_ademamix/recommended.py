"""Settings for a run of a given length."""

from numbers import Integral
from typing import Any

# Neither source says where, between the runs of the one and those of the other, β3 should change: this is our choice.
LONGEST_AT_0999 = 300_000
APERTUS_WARM_UP = 100_000


def recommended(steps: int) -> dict[str, Any]:
    """Settings of AdEMAMix for a run of this many optimizer steps, as arguments of the constructor.

    - Up to 300,000 steps β3 is 0.999, and the warm-ups of α and β3 last the whole run (arXiv 2509.01440).
    - Beyond that β3 is 0.9999, and the warm-ups last 100,000 steps (Apertus, arXiv 2509.14233, in runs of 1 to 2.6
      million steps).

    α is 8 in both. In this project's own comparison, 6,000 steps of a small model, 5 was better (docs/results.md).

    The learning rate, its schedule, weight decay and eps stay yours: search the learning rate first, from AdamW's
    downwards, since α adds to the step. Both sources clip the gradients, at a norm of 0.1 to 0.5 (`max_grad_norm`, or
    your loop's own clipping).

    The settings suit every class with bitsandbytes' name, such as `AdEMAMix8bit`. `ADANA` doesn't need the length of
    the run.

    Args:
        steps: optimizer steps of the whole run, at least 1. With gradient accumulation these are fewer than batches.

    Returns:
        `betas`, `alpha`, `t_alpha` and `t_beta3`. To change one, write ``{**recommended(steps), "alpha": 5.0}``.

    Raises:
        TypeError: `steps` isn't an int.
        ValueError: `steps` is below 1.

    >>> import torch
    >>> from torch_ademamix import AdEMAMix, recommended
    >>> recommended(20_000)
    {'betas': (0.9, 0.999, 0.999), 'alpha': 8.0, 't_alpha': 20000, 't_beta3': 20000}
    >>> recommended(1_000_000)
    {'betas': (0.9, 0.999, 0.9999), 'alpha': 8.0, 't_alpha': 100000, 't_beta3': 100000}
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = AdEMAMix(model.parameters(), lr=1e-3, weight_decay=0.1, **recommended(20_000))
    """
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(
            f"steps is {steps!r}, but must be an int: the optimizer steps of the whole run, such as epochs * "
            "len(batches) // accumulated"
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}, but must be at least 1: the optimizer steps of the whole run")
    beta3, warm_up = (0.999, int(steps)) if steps <= LONGEST_AT_0999 else (0.9999, APERTUS_WARM_UP)
    return {"betas": (0.9, 0.999, beta3), "alpha": 8.0, "t_alpha": warm_up, "t_beta3": warm_up}

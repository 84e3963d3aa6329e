"""Variants of AdEMAMix: those with bitsandbytes' names, which fix how state is stored, and ADANA."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch_ademamix.optimizer import AdEMAMix


def _fixing(defaults: Mapping[str, Any] = {}, **fixed: Any) -> Callable[[type[AdEMAMix]], type[AdEMAMix]]:
    """A class decorator: the arguments are AdEMAMix's, some with other defaults, without those that are fixed."""
    arguments = inspect.signature(AdEMAMix.__init__).parameters.values()
    own = [a.replace(default=defaults.get(a.name, a.default)) for a in arguments if a.name not in fixed]
    signature = inspect.Signature(own)

    def decorate(cls: type[AdEMAMix]) -> type[AdEMAMix]:
        def __init__(*args: Any, **kwargs: Any) -> None:
            AdEMAMix.__init__(**{**defaults, **signature.bind(*args, **kwargs).arguments, **fixed})

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate


@_fixing(optim_bits=32)
class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with float32 state."""


@_fixing(optim_bits=8)
class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with quantized state."""


@_fixing(is_paged=True)
class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged state."""


@_fixing(optim_bits=32, is_paged=True)
class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged float32 state."""


@_fixing(optim_bits=8, is_paged=True)
class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged quantized state."""


# What makes AdEMAMix ADANA, with the paper's α, δ and κ.
ADANA_OPTIONS: dict[str, Any] = {
    "betas": (0.0, 0.999, 0.9999),  # β2 and β3 are in logarithmic time
    "t_alpha": None,
    "t_beta3": None,
    "log_time_beta2": True,
    "alpha": 1.0,
    "delta": 8.0,
    "kappa": 0.85,
}
_CHOSEN = ("alpha", "delta", "kappa")


@_fixing(
    {name: ADANA_OPTIONS[name] for name in _CHOSEN},
    **{name: value for name, value in ADANA_OPTIONS.items() if name not in _CHOSEN},
)
class ADANA(AdEMAMix):
    r"""ADANA (arXiv 2602.05298): one EMA of the gradient in logarithmic time, whose memory grows with the run.

    It is :class:`AdEMAMix` without the fast EMA. `exp_avg_slow` (m) and `exp_avg_sq` (ν) have
    :math:`β(t) = 1 - δ/(δ + t)` and no bias correction, and

    .. math::
        θ = θ - η \left( \frac{g + (α + (1 + t)^{1 - κ}) m}{\sqrt{ν} + ε} + λ θ \right)

    The length of the run need not be known. State is as large as AdamW's: 8 B per parameter, 3.03 B with
    `optim_bits=8`, 2.03 B with `slow_ema_bits=12` too.

    Args:
        lr: η. Expect a lower one than AdamW's, since α grows.
        alpha: α, 1 in the paper.
        delta: δ, 8 in the paper.
        kappa: κ, 0.85 in the paper.
        weight_decay: λ. The paper's is independent of the peak learning rate: give its λ divided by the peak lr.
        t_weight_decay: T of the paper's weight decay in logarithmic time, λ/(1 + t/T).

    The other arguments are :class:`AdEMAMix`'s.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = ADANA(model.parameters(), lr=1e-3, weight_decay=0.1)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[model.bias])
    ['exp_avg_slow', 'exp_avg_sq', 'step']
    """

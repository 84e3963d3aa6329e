"""Variants of AdEMAMix: those with bitsandbytes' names, which fix how state is stored, and ADANA.

Each `__init__` lists its arguments, with :class:`AdEMAMix`'s types and defaults, for type checkers and editors.
"""

from typing import Any, Literal

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from torch_ademamix.optimizer import MIN_8BIT_SIZE, AdEMAMix


def _arguments(local_names: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `__init__`, given its ``locals()``."""
    return {name: value for name, value in local_names.items() if name not in ("self", "__class__")}


class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with float32 state."""

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), optim_bits=32)


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with quantized state."""

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), optim_bits=8)


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged state."""

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: Literal[8, 32] = 32,
        min_8bit_size: int = MIN_8BIT_SIZE,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), is_paged=True)


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged float32 state."""

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), is_paged=True)


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged quantized state."""

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), is_paged=True)


# What makes AdEMAMix ADANA; and the paper's α, δ and κ.
_ADANA_FIXED: dict[str, Any] = {
    "betas": (0.0, 0.999, 0.9999),  # β2 and β3 are in logarithmic time
    "t_alpha": None,
    "t_beta3": None,
    "log_time_beta2": True,
}
_ALPHA, _DELTA, _KAPPA = 1.0, 8.0, 0.85
ADANA_OPTIONS: dict[str, Any] = {**_ADANA_FIXED, "alpha": _ALPHA, "delta": _DELTA, "kappa": _KAPPA}


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

    @_disable_dynamo
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        alpha: float = _ALPHA,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: Literal[8, 32] = 32,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        *,
        schedule_start: int = 0,
        delta: float | None = _DELTA,
        kappa: float | None = _KAPPA,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(**_arguments(locals()), **_ADANA_FIXED)

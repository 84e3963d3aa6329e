"""The step on plain lists of tensors, for people who bring their own loop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import ops
from torch_ademamix.numerics.bfloat16 import draws
from torch_ademamix.numerics.hyperparameters import HyperparameterRows, Hyperparameters


def ademamix(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
    schedule_start: int = 0,
    eps: float,
    weight_decay: float,
    delta: float | None = None,
    log_time_beta2: bool = False,
    kappa: float | None = None,
    t_weight_decay: float | None = None,
    maximize: bool = False,
    remainders: Sequence[Tensor | None] = (),
    stochastic_param_rounding: bool = False,
    seed: int = 0,
    subsequences: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    r"""One AdEMAMix step (arXiv 2409.03137), in place: one op call per device and pair of dtypes.

    With t a parameter's step after its increment, and ν its second moment:

    .. math::
        m_1 &= β_1 m_1 + (1 - β_1) g \\
        m_2 &= β_3(t) m_2 + (1 - β_3(t)) g \\
        ν &= β_2 ν + (1 - β_2) g^2 \\
        θ &= θ - η \left( \frac{m_1 / (1 - β_1^t) + α(t) m_2}{\sqrt{ν / (1 - β_2^t)} + ε} + λ θ \right)

    Args:
        params: parameters of any shapes, float32, bfloat16, float16 or float64; or complex64 or complex128, which are
            updated as pairs of reals.
        grads: their gradients, of the same shapes and devices, in any of these dtypes, complex if their parameter is.
        exp_avgs, exp_avg_slows, exp_avg_sqs: m1, m2 and ν, of the parameters' shapes: float32, float64 for
            float64 parameters, or of a complex parameter's dtype. All zero before the first step. exp_avgs may be
            empty if beta1 is 0: m1 is the gradient then.
        steps: float32 tensors of one element, on the parameters' devices, each parameter's own: the steps done so far.
        lr: the learning rate η; a tensor of one element (float32 or float64, on the parameters' device)
            may change from step to step without a recompilation.
        beta1, beta2, beta3: in [0, 1).
        alpha: the weight α of the slow EMA.
        t_alpha, t_beta3: steps over which α and β3 are warmed up; see :mod:`torch_ademamix.schedules`.
        schedule_start: steps done before these warm-ups begin; at least 0.
        eps: ε, at least 0.
        weight_decay: λ, decoupled, applied to the parameter's old value.
        delta: δ of β3(t) = 1 − δ/(δ + t), instead of `beta3` and its warm-up; see
            :mod:`torch_ademamix.schedules`.
        log_time_beta2: β2 is 1 − δ/(δ + t) too, and ν has no bias correction.
        kappa: κ of α(t) = α + (1 + t)^(1 − κ).
        t_weight_decay: T of λ(t) = λ/(1 + t/T).
        maximize: ascend instead of descend.
        remainders: for each bfloat16 parameter what rounding took away from its float32 weight, a tensor of its
            shape, int16, or int8 for 24 bits of the weight; see :mod:`torch_ademamix.bfloat16`. None for a parameter
            without; empty if all are.
        stochastic_param_rounding: round bfloat16 parameters up or down at random; right on average.
        seed: of the random bits, together with the step, the tensor's subsequence and the element.
        subsequences: the RNG subsequence of each tensor, an int: no two draw the same bits. If empty, their indices in
            the lists.
        grad_scale: gradients are divided by this tensor of one element (float32 or float64).
        found_inf: where this float32 tensor of one element isn't 0, the step changes nothing at all.

    Raises:
        RuntimeError: an argument isn't as above; nothing has been written then.

    >>> import torch
    >>> p, g = torch.ones(3), torch.full((3,), 0.5)
    >>> m1, m2, nu = (torch.zeros(3) for _ in range(3))
    >>> t = torch.zeros(())
    >>> ademamix([p], [g], [m1], [m2], [nu], [t], lr=0.1, beta1=0.9, beta2=0.999, beta3=0.9999,
    ...          alpha=5.0, eps=1e-8, weight_decay=0.0)
    >>> t.item(), round(p[0].item(), 5)
    (1.0, 0.89995)
    """
    numbers = (beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay)
    log_time = (delta, log_time_beta2, kappa, t_weight_decay)
    row = Hyperparameters(
        lr if isinstance(lr, Tensor) else float(lr), *(float(0.0 if x is None else x) for x in (*numbers, *log_time))
    )
    calls = []
    n = len(params)
    lists = (
        params,
        grads,
        exp_avgs,
        exp_avg_slows,
        exp_avg_sqs,
        steps,
        remainders or [None] * n,
        subsequences or range(n),
    )
    for *tensors, some_remainders, some_subsequences in _split(lists):
        given = [remainder for remainder in some_remainders if remainder is not None]
        # float32 and float64 parameters aren't rounded. For float16 ones the op raises.
        is_rounded = len(tensors[0]) > 0 and tensors[0][0].dtype not in (torch.float32, torch.float64)
        stochastic = stochastic_param_rounding and is_rounded
        options: dict[str, Any] = dict(
            hyperparameters=HyperparameterRows([row]),
            maximize=maximize,
            stochastic_param_rounding=stochastic,
            seed=seed,
            subsequences=list(some_subsequences) if stochastic or draws(given) else [],
            offsets=(),
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        calls.append((ops.ademamix_step_, (*tensors, given), options))
    ops.run(calls)


def _split(lists: Sequence[Sequence[Any]]) -> list[Sequence[Sequence[Any]]]:
    """Splits lists that begin with params and grads into those of one op call each, of one device and one dtype each.

    None, which is a remainder that a parameter doesn't have, counts as a dtype.
    """
    params, grads, *_, remainders, _ = lists
    given = [i for i, items in enumerate(lists) if len(items) > 0]  # there may be no exp_avgs
    if any(len(lists[i]) != len(params) for i in given):
        return [lists]  # the op raises
    keys = [
        (p.device, p.dtype, g.dtype, None if remainder is None else remainder.dtype)
        for p, g, remainder in zip(params, grads, remainders, strict=True)
    ]
    if len(set(keys)) <= 1:
        return [lists]
    chosen = {key: [k for k, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)}
    return [[[items[k] for k in some] if len(items) > 0 else items for items in lists] for some in chosen.values()]

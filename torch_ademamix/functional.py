"""The step on plain lists of tensors, for people who bring their own loop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import ops
from torch_ademamix.numerics.bfloat16 import draws
from torch_ademamix.numerics.reference_step import Hyperparameters

Batch = tuple[Sequence[Any], ...]  # the lists of an op call
Rounding = dict[str, Any]  # the arguments of an op call that say how its parameters are rounded


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
    streams: Sequence[int] = (),
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
        t_alpha, t_beta3: steps over which α and β3 are warmed up; see :mod:`torch_ademamix.numerics.schedules`.
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
        seed: of the random bits, together with the step, the tensor's stream and the element.
        streams: a number for each tensor, so that no two draw the same bits; their places in the lists if empty.
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
    row = (lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay)
    log_time = (delta, log_time_beta2, kappa, t_weight_decay)
    options: dict[str, Any] = dict(
        **_one_row(*row, *log_time),
        maximize=maximize,
        seed=seed,
        places=(),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    lists = (params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps)
    remainders, streams = _of_each(params, remainders, streams)
    batches = plain_batches(lists, remainders, streams, stochastic_param_rounding)
    _step_batches(ops.ademamix_step_, batches, options)


def ademamix_blockwise(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_slow_absmaxs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_sq_absmaxs: Sequence[Tensor],
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
    stochastic_rounding: bool = True,
    remainders: Sequence[Tensor | None] = (),
    stochastic_param_rounding: bool = False,
    seed: int = 0,
    streams: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """:func:`ademamix` with quantized moments, in the formats of :mod:`torch_ademamix.numerics.blockwise`.

    The parameters are updated from the moments before these are rounded. An element of which a moment isn't
    finite loses its three moments, and its neighbours nothing.

    Args:
        exp_avgs: codes in ``signed_sqrt_int8``, of the parameters' shapes and contiguous; so are the next two.
            Blocks of 256 elements are counted in row-major order.
            If beta1 is 0, they and their scales may be empty.
        exp_avg_slows: codes in ``linear_int16`` or ``signed_sqrt_int8``.
        exp_avg_sqs: codes in ``fourth_root_uint8``.
        exp_avg_absmaxs, exp_avg_slow_absmaxs, exp_avg_sq_absmaxs: the blocks' scales, float32.
        stochastic_rounding: of exp_avg_sq, which rounding to nearest would bias upwards.

    The other arguments, and what is raised, are :func:`ademamix`'s.

    >>> import torch
    >>> from torch_ademamix.numerics.blockwise import quantize
    >>> p, g = torch.ones(300), torch.full((300,), 0.5)
    >>> m1, m1_absmax = quantize(torch.zeros(300), "signed_sqrt_int8")
    >>> m2, m2_absmax = quantize(torch.zeros(300), "linear_int16")
    >>> nu, nu_absmax = quantize(torch.zeros(300), "fourth_root_uint8")
    >>> t = torch.zeros(())
    >>> ademamix_blockwise([p], [g], [m1], [m1_absmax], [m2], [m2_absmax], [nu], [nu_absmax], [t], lr=0.1,
    ...                    beta1=0.9, beta2=0.999, beta3=0.9999, alpha=5.0, eps=1e-8, weight_decay=0.0)
    >>> t.item(), round(p[0].item(), 5)
    (1.0, 0.89995)
    """
    row = (lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay)
    log_time = (delta, log_time_beta2, kappa, t_weight_decay)
    options: dict[str, Any] = dict(
        **_one_row(*row, *log_time),
        maximize=maximize,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        places=(),
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    lists = (
        params,
        grads,
        exp_avgs,
        exp_avg_absmaxs,
        exp_avg_slows,
        exp_avg_slow_absmaxs,
        exp_avg_sqs,
        exp_avg_sq_absmaxs,
        steps,
    )
    remainders, streams = _of_each(params, remainders, streams)
    batches = blockwise_batches(lists, remainders, streams, stochastic_param_rounding)
    _step_batches(ops.ademamix_blockwise_step_, batches, options)


def _one_row(lr: Tensor | float, *numbers: float | None) -> dict[str, Any]:
    """The arguments of an op call that all its parameters' hyperparameters come from."""
    is_tensor = isinstance(lr, Tensor)
    row = Hyperparameters(0.0 if is_tensor else lr, *(0.0 if x is None else x for x in numbers))
    return {"hyperparameters": list(map(float, row)), "lrs": [lr] if is_tensor else [], "rows": []}


def _of_each(
    params: Sequence[Tensor], remainders: Sequence[Tensor | None], streams: Sequence[int]
) -> tuple[Sequence[Tensor | None], Sequence[int]]:
    n = len(params)
    return remainders if len(remainders) else [None] * n, streams if len(streams) else list(range(n))


def _step_batches(op: Callable[..., None], batches: list[tuple[Batch, Rounding]], options: dict[str, Any]) -> None:
    ops.run([(op, lists, {**options, **rounding}) for lists, rounding in batches])


def plain_batches(
    lists: Sequence[Sequence[Any]], remainders: Sequence[Tensor | None], streams: Sequence[int], stochastic: bool
) -> list[tuple[Batch, Rounding]]:
    """The calls of `ademamix_step_` that step these lists: those of each, and how the parameters are rounded."""
    batches = []
    for *batch, some_remainders, some_streams in _split(*lists, remainders, streams, by=(0, 1, 6)):
        stochastic_here = _rounds_stochastically(batch[0], stochastic)
        given = _those_given(some_remainders)
        random = stochastic_here or draws(given)
        rounding = {"stochastic_param_rounding": stochastic_here, "streams": some_streams if random else []}
        batches.append(((*batch, given), rounding))
    return batches


def blockwise_batches(
    lists: Sequence[Sequence[Any]], remainders: Sequence[Tensor | None], streams: Sequence[int], stochastic: bool
) -> list[tuple[Batch, Rounding]]:
    """The same for `ademamix_blockwise_step_`, in one call of which exp_avg_slows have one dtype too."""
    batches = []
    for *batch, some_remainders, some_streams in _split(*lists, remainders, streams, by=(0, 1, 4, 9)):
        stochastic_here = _rounds_stochastically(batch[0], stochastic)
        rounding = {"stochastic_param_rounding": stochastic_here, "streams": some_streams}
        batches.append(((*batch, _those_given(some_remainders)), rounding))
    return batches


def _rounds_stochastically(params: Sequence[Tensor], stochastic: bool) -> bool:
    # A float32 or float64 parameter isn't rounded; a float16 one is for the op to refuse.
    return stochastic and len(params) > 0 and params[0].dtype not in (torch.float32, torch.float64)


def _those_given(remainders: Sequence[Tensor | None]) -> list[Tensor]:
    return [r for r in remainders if r is not None]


def _split(*lists: Sequence[Any], by: Sequence[int]) -> list[Batch]:
    """Splits lists of equal length, of which the first are params, into those of one op call each.

    A batch has one device, and one dtype in each of the lists at the positions `by`; None counts as a dtype.
    """
    params = lists[0]
    given = [i for i, items in enumerate(lists) if len(items) > 0]  # there may be no exp_avgs
    if any(len(lists[i]) != len(params) for i in given):
        return [lists]  # for the op to refuse
    by = [i for i in by if i in given]

    def dtype(tensor: Tensor | None) -> torch.dtype | None:
        return None if tensor is None else tensor.dtype

    batches: dict[object, Batch] = {}
    if len({p.device for p in params}) <= 1 and all(len({dtype(t) for t in lists[i]}) <= 1 for i in by):
        batches[None] = lists
    else:
        for k, param in enumerate(params):
            key = (param.device, *(dtype(lists[i][k]) for i in by))
            batch = batches.setdefault(key, tuple([] for _ in lists))
            for i in given:
                batch[i].append(lists[i][k])  # type: ignore[attr-defined]
    return list(batches.values())

"""The ops' steps in plain PyTorch: the kernels for devices without native ones, and the oracle of the others."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import FIRST_PARAM_GROUP, POSITION_BITS, Format, decode, quantize, random_bits
from torch_ademamix.numerics.hyperparameters import Hyperparameters, Number
from torch_ademamix.numerics.moments import MOMENTS, codes_in, entries_of, op_entries, op_formats
from torch_ademamix.numerics.schedules import alpha_schedule, beta3_schedule, growth, log_time_decay, log_time_rate


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's arithmetic and, but for complex parameters, of its unquantized state."""
    return torch.float64 if param_dtype in (torch.float64, torch.complex128) else torch.float32


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's unquantized state."""
    dtype = compute_dtype(param_dtype)
    return dtype.to_complex() if param_dtype.is_complex else dtype


def next_step(step: Tensor) -> Tensor:
    """The step after one, in float32, which has every integer up to 2^24 only: then the next number that there is.

    >>> next_step(torch.tensor([0.0, 2**24 - 1, 2**24])).tolist()
    [1.0, 16777216.0, 16777218.0]
    """
    return torch.where(step + 1 > step, step + 1, torch.nextafter(step, torch.full_like(step, torch.inf)))


def step_scalars(step: Tensor, h: Hyperparameters) -> dict[str, Number]:
    """What one step's update needs, in float64; `step` counts from 1."""
    t = step.double().reshape(())
    schedule_t = (t - h.schedule_start).clamp(min=0)
    beta3 = beta3_schedule(schedule_t, h.beta1, h.beta3, h.t_beta3)
    rate3 = _given(h.delta, lambda: log_time_rate(schedule_t, h.delta), 1 - beta3)
    alpha = alpha_schedule(schedule_t, h.alpha, h.t_alpha)
    rate2 = _given(h.log_time_beta2, lambda: log_time_rate(t, h.delta), 1 - h.beta2)
    decay = _given(h.t_weight_decay, lambda: log_time_decay(t, h.weight_decay, h.t_weight_decay), h.weight_decay)
    return {
        "lr": torch.as_tensor(h.lr, dtype=torch.float64, device=t.device).reshape(()),
        "alpha": _given(h.kappa, lambda: alpha + growth(schedule_t, h.kappa), alpha),
        "beta1": h.beta1,
        "one_minus_beta1": 1 - h.beta1,
        "beta2": _given(h.log_time_beta2, lambda: 1 - rate2, h.beta2),
        "one_minus_beta2": rate2,
        "beta3": _given(h.delta, lambda: 1 - rate3, beta3),
        "one_minus_beta3": rate3,
        "bias1": 1 - h.beta1**t,
        "sqrt_bias2": _given(h.log_time_beta2, lambda: torch.ones_like(t), (1 - h.beta2**t).sqrt()),
        "eps": h.eps,
        "weight_decay": decay,
    }


def _given(number: Number, value: Callable[[], Number], otherwise: Number) -> Number:
    """The value where a number isn't 0, which of a tensor the host doesn't know."""
    if isinstance(number, Tensor):
        return torch.where(number != 0, value(), otherwise)
    return value() if number else otherwise


def ademamix_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    hyperparameters: Hyperparameters,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of one parameter, as in the papers; returns the new values and changes nothing.

    param and grad are already in the dtype of the arithmetic; `step` counts from 1.
    """
    numbers = step_scalars(step, hyperparameters)
    s = {name: x.to(param.dtype) if isinstance(x, Tensor) else x for name, x in numbers.items()}
    m1 = grad if exp_avg is None else s["beta1"] * exp_avg + s["one_minus_beta1"] * grad
    m2 = s["beta3"] * exp_avg_slow + s["one_minus_beta3"] * grad
    nu = s["beta2"] * exp_avg_sq + s["one_minus_beta2"] * grad.square()
    update = (m1 / s["bias1"] + s["alpha"] * m2) / (nu.sqrt() / s["sqrt_bias2"] + s["eps"])
    return param - s["lr"] * (update + s["weight_decay"] * param), m1, m2, nu


def or_none(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """A list of state, or a None for each parameter where these don't have it."""
    return tensors if tensors else [None] * len(params)


def ademamix_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    *,
    maximize: bool,
    stochastic_param_rounding: bool,
    seed: int,
    subsequences: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The op `ademamix_step_`, of any device, with each parameter's row of hyperparameters.

    It reads no value back to the host.
    """
    m1s = or_none(exp_avgs, params)
    lists = zip(params, grads, m1s, exp_avg_slows, exp_avg_sqs, steps, hyperparameters, strict=True)
    for i, (param, grad, m1, m2, nu, step, row) in enumerate(lists):
        t = next_step(step)
        p = bfloat16.join(param, remainders[i]) if remainders else param.to(compute_dtype(param.dtype))
        g = grad.to(p.dtype)
        if grad_scale is not None:
            g = (g / grad_scale.reshape(())).to(p.dtype)  # of no dimensions both, g would become float64
        if maximize:
            g = -g
        weight, *moments = ademamix_update(p, g, m1, m2, nu, t, row)
        rounded = [weight]
        random = None
        if stochastic_param_rounding or bfloat16.draws(remainders):
            key: dict[str, Any] = {"seed": seed, "step": t, "subsequence": subsequences[i], "device": p.device}
            random = random_bits(p.numel(), first_group=FIRST_PARAM_GROUP, **key).view(p.shape)
        if remainders:
            exact = weight if random is None else bfloat16.round_to_24_bits(weight, random)
            rounded = [*bfloat16.split(exact, remainders[i].dtype)]
        elif random is not None:
            rounded = [bfloat16.round_stochastically(weight, random)]
        new = (*moments, t, *rounded)
        for old, value in zip((m1, m2, nu, step, param, *remainders[i : i + 1]), new, strict=True):
            if old is None:
                continue
            if found_inf is not None:
                value = torch.where(found_inf.bool().reshape(()), old.to(value.dtype), value)
            old.copy_(value)


def _plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def ademamix_blockwise_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_slow_absmaxs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_sq_absmaxs: Sequence[Tensor],
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor],
    hyperparameters: Sequence[Hyperparameters],
    *,
    stochastic_rounding: bool,
    seed: int,
    subsequences: Sequence[int],
    found_inf: Tensor | None,
    call: Callable[..., Any] = _plainly,
    **options: Any,
) -> None:
    """The op `ademamix_blockwise_step_`, of any device: a step on the dequantized state.

    Args:
        call: calls a stage of it, which is a function, with its arguments (torch_ademamix/ops/compiled_reference.py).
    """
    formats = op_formats(exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_sqs)
    lists = (exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs)
    for i, (p, g, step, row, subsequence) in enumerate(
        zip(params, grads, steps, hyperparameters, subsequences, strict=True)
    ):
        state = {name: tensors[i] for name, tensors in zip(op_entries(formats), lists, strict=False) if name}
        moments = {
            name: call(_moment, codes, absmax, formats[name], compute_dtype(p.dtype))
            for name, (codes, absmax) in codes_in(state, formats).items()
        }
        a, b, c = ([moments[name]] if name in moments else [] for name in MOMENTS)
        more: dict[str, Any] = {"seed": seed, "subsequences": [subsequence], "found_inf": found_inf, **options}
        call(ademamix_step_, [p], [g], a, b, c, [step], remainders[i : i + 1], [row], **more)
        values = dict(zip(moments, call(_finite, *moments.values()), strict=True))
        stochastic = seed if stochastic_rounding else None
        codes = {name: call(_quantized, m, formats[name], stochastic, step, subsequence) for name, m in values.items()}
        for name, new in entries_of(codes, formats).items():
            call(_store, state[name], new, found_inf)


def _moment(codes: Tensor, absmax: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    return decode(codes, absmax.view(-1), format).to(dtype)


def _finite(*moments: Tensor) -> list[Tensor]:
    """In float32. An element of which one moment isn't finite loses all, and no more than that."""
    finite = reduce(torch.logical_and, [m.float().isfinite() for m in moments])
    return [torch.where(finite, m.float(), 0) for m in moments]


def _quantized(m: Tensor, format: Format, seed: int | None, step: Tensor, subsequence: int) -> tuple[Tensor, Tensor]:
    return quantize(m, format, seed=seed if format in POSITION_BITS else None, step=step, subsequence=subsequence)


def _store(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    new = new.view_as(old)
    old.copy_(new if found_inf is None else torch.where(found_inf.bool().reshape(()), old, new))

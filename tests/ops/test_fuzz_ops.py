"""The ops with arguments that Hypothesis draws: against the formula in float64, and against one another."""

import copy

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import float64
from tests.helpers.config import StepLists, assert_identical, hyperparameter_tensor, step
from tests.helpers.fuzzing import (
    GRAD_SCALES,
    effort,
    fuzz,
    gaps,
    laid_out,
    learning_rates,
    param_roundings,
    scalars,
    shapes,
    step_lists,
    step_options,
    values,
)
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import blockwise_step, expected_blockwise_step
from tests.helpers.quantized import quantized as with_quantized_state
from torch_ademamix import ademamix
from torch_ademamix.numerics.blockwise import dequantize, quantize
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise

pytestmark = fuzz

found_infs = st.sampled_from([None, None, 0.0, 1.0]).map(lambda x: None if x is None else torch.tensor(x))


def weight_of(p, remainder):
    return float64.float64(p) if remainder is None else float64.master_weight(p, remainder)


def assert_stepped(lists: StepLists, before: StepLists, lr, grad_scale, options, rounding, before_rounding) -> None:
    names = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    scale = 1.0 if grad_scale is None else float(grad_scale)
    for i, (p, g, m1, m2, nu, t) in enumerate(zip(*before, strict=True)):
        moments = (float64.exactly(float64.float64(m)) for m in (m1, m2, nu))
        old, remainder = (r["remainders"][i] if "remainders" in r else None for r in (before_rounding, rounding))
        following = float(t) + 1 if t < 2**24 else float(np.nextafter(np.float32(t), np.float32(np.inf)))
        weight, *expected = float64.step(
            weight_of(p, old), p.dtype, g, *moments, following, float(lr), grad_scale=scale, **options
        )
        new = lists.params[i]
        if remainder is not None:
            if remainder.dtype == torch.int8:  # to one of two values around, 2^-8 ulps apart
                weight = float64.stored_as(weight, p.dtype, 2.0**-8)
            float64.assert_within(torch.from_numpy(weight_of(new, remainder)), weight, f"weight {i}")
        ulps = 1.0 if "stochastic_param_rounding" in rounding else 0.5
        float64.assert_within(new, float64.stored_as(weight, p.dtype, ulps), f"params[{i}]")
        actual = (lists.exp_avgs[i], lists.exp_avg_slows[i], lists.exp_avg_sqs[i])
        for name, tensor, interval in zip(names, actual, expected, strict=True):
            float64.assert_within(tensor, interval, f"{name}[{i}]")
        assert not (new.isfinite() & ~g.isfinite()).any()
        assert lists.steps[i] == following
    assert_identical(lists.grads, before.grads)


@given(st.data(), step_lists(finite=False), step_options, learning_rates, scalars(GRAD_SCALES), found_infs)
@effort(150)
def test_step(kernel, data, lists, options, lr, grad_scale, found_inf):
    rounding = data.draw(param_roundings(lists))
    before, before_rounding = lists.clone(), copy.deepcopy(rounding)
    written = [*lists, rounding.get("remainders", [])]
    around = [[gaps(t) for t in tensors] for tensors in written]
    step(kernel, lists, lr, grad_scale=grad_scale, found_inf=found_inf, **options, **rounding)
    assert_identical([[gaps(t) for t in tensors] for tensors in written], around)
    if found_inf:
        assert_identical((list(lists), rounding), (list(before), before_rounding))
    else:
        assert_stepped(lists, before, lr, grad_scale, options, rounding, before_rounding)


@given(
    st.data(),
    step_lists(finite=False, plain_state=True),
    step_options,
    learning_rates,
    found_infs,
    st.sampled_from([8, 16]),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
)
@effort(100)
def test_blockwise_step(kernel, data, lists, options, lr, found_inf, slow_ema_bits, stochastic_rounding, seed):
    """Bit for bit a 32-bit step of the decoded state, encoded anew."""
    rounding = data.draw(param_roundings(lists))
    before = with_quantized_state(lists, slow_ema_bits)
    stepped, expected = before.clone(), before
    options = {"seed": seed, **options, "lr": lr, "stochastic_rounding": stochastic_rounding}
    stepped_rounding = copy.deepcopy(rounding)
    blockwise_step(kernel, stepped, found_inf=found_inf, **{**options, **stepped_rounding})
    if not found_inf:
        expected = expected_blockwise_step(kernel, before, **{**options, **rounding})
    assert_identical((list(stepped), stepped_rounding), (list(expected), rounding))


@given(
    st.data(),
    step_lists(finite=False),
    step_options,
    learning_rates,
    found_infs,
    st.sampled_from([None, 8, 16]),
    st.integers(1, 3),
    st.booleans(),
)
@effort(100)
def test_offsets_and_hyperparameters(kernel, data, lists, options, lr, found_inf, slow_ema_bits, arenas, in_tensor):
    """Bit for bit what a call with a tensor for each parameter, and numbers, gives."""
    rounding = data.draw(param_roundings(lists))
    run = step if slow_ema_bits is None else blockwise_step
    plain = lists if slow_ema_bits is None else with_quantized_state(lists, slow_ema_bits)
    placed = in_arenas(plain.clone(), rounding.get("remainders", []), arenas)
    numbers = {**options, "lr": lr}
    others = {"maximize": options["maximize"], "hyperparameters": hyperparameter_tensor(**numbers)}
    run(kernel, plain, found_inf=found_inf, **numbers, **rounding)
    run(
        kernel,
        placed,
        found_inf=found_inf,
        **(others if in_tensor else numbers),
        **{**rounding, **placed.options},
    )
    placed.assert_holds(plain, rounding.get("remainders", []))


FORMATS = ("signed_sqrt_int8", "fourth_root_uint8", "linear_int16")


@given(
    st.data(), st.sampled_from(FORMATS), shapes, st.one_of(st.none(), st.tuples(*[st.integers(-(2**40), 2**40)] * 3))
)
@effort(150)
def test_quantize(data, format, shape, key):
    """The native op, the reference op and NumPy."""
    x = data.draw(values(shape, finite=False, square=format == "fourth_root_uint8")).float()
    x = data.draw(laid_out(x, expanded=True))
    random = (
        dict(zip(("seed", "step", "subsequence"), key or (), strict=False)) if format == "fourth_root_uint8" else {}
    )
    codes, absmax = quantize_blockwise(x, format, **random)
    assert_identical((codes, absmax), quantize(x, format, **random))
    lost = ~np.isfinite(x.numpy())
    exact = float64.exactly(np.where(lost, 0, float64.float64(x)))
    float64.assert_quantized(codes, absmax, exact, format, nearest=not random, lost=lost, where="x")
    decoded = dequantize_blockwise(codes, absmax, format)
    assert_identical(decoded, dequantize(codes, absmax, format))
    float64.assert_within(decoded, float64.decoded(codes, absmax, format), "decoded")


@given(st.data(), st.sampled_from(FORMATS), st.integers(0, 1030))
@effort(100)
def test_dequantize(data, format, n):
    """Of any codes and scales, also such as no quantizing gives."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    dtype = {"signed_sqrt_int8": np.int8, "fourth_root_uint8": np.uint8, "linear_int16": np.int16}[format]
    info = np.iinfo(dtype)
    codes = torch.from_numpy(rng.integers(info.min, info.max, n, dtype, endpoint=True))
    absmax = data.draw(values((-(-n // 256),), finite=False)).float()
    codes, absmax = data.draw(laid_out(codes)), data.draw(laid_out(absmax))
    assert_identical(dequantize_blockwise(codes, absmax, format), dequantize(codes, absmax, format))


@given(st.lists(step_lists(most=2), min_size=1, max_size=4), step_options, learning_rates)
@effort(50)
def test_function_on_mixed_lists(parts, options, lr):
    """As a call for each part."""
    mixed = StepLists(*([t for tensors in lists for t in tensors] for lists in zip(*parts, strict=True)))
    expected = mixed.clone()
    first = 0
    for part in parts:
        n = len(part.params)
        step("native", StepLists(*(tensors[first : first + n] for tensors in expected)), lr, **options)
        first += n
    ademamix(*mixed, lr=lr, **options)
    assert_identical(list(mixed), list(expected))

"""The blockwise step's numbers: every kernel against its 32-bit step and the formats, to the bit."""

import copy

import pytest
import torch

from tests.helpers.config import (
    CONTIGUOUS,
    DTYPES,
    MIXED,
    OPTIONS,
    assert_identical,
    expected_step,
    native_built,
)
from tests.helpers.quantized import (
    SMALL,
    assert_codes_within,
    blockwise_step,
    code_bounds,
    codes_of,
    dequantized,
    expected_blockwise_step,
    make_blockwise,
    moments_of,
)

SLOW_BITS = pytest.mark.parametrize("slow_ema_bits", [8, 12, 16])
STOCHASTIC = pytest.mark.parametrize("stochastic_rounding", [True, False], ids=["stochastic", "nearest"])


def assert_exact(kernel, before, **options):
    after = before.clone()
    blockwise_step(kernel, after, **options)
    assert_identical(list(after), list(expected_blockwise_step(kernel, before, **options)))
    return after


@STOCHASTIC
@SLOW_BITS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(kernel, param_dtype, grad_dtype, slow_ema_bits, stochastic_rounding):
    before = make_blockwise(SMALL, param_dtype, grad_dtype, slow_ema_bits=slow_ema_bits)
    assert_exact(kernel, before, stochastic_rounding=stochastic_rounding)


@STOCHASTIC
@SLOW_BITS
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kernel, options, slow_ema_bits, stochastic_rounding):
    for dtype in DTYPES:
        before = make_blockwise(SMALL, dtype, slow_ema_bits=slow_ema_bits)
        assert_exact(kernel, before, stochastic_rounding=stochastic_rounding, **OPTIONS[options])


@STOCHASTIC
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_state_in_words(kernel, dtype, grad_dtype, stochastic_rounding):
    """At a beta1 of 0, with exp_avg_sq in 4 bits."""
    lists = make_blockwise(SMALL, dtype, grad_dtype, slow_ema_bits=12, has_exp_avg=False)
    assert (lists.exp_avgs, lists.exp_avg_absmaxs, lists.exp_avg_sqs) == ([], [], [])
    for options in ({}, {"maximize": True, "t_beta3": 40, "grad_scale": torch.tensor(8.0)}):
        lists = assert_exact(kernel, lists, stochastic_rounding=stochastic_rounding, beta1=0.0, **options)
    lists.grads[3][0] = torch.nan
    assert_exact(kernel, lists, stochastic_rounding=stochastic_rounding, beta1=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 400])
def test_list_lengths(kernel, length, dtype):
    entries = [*reversed(CONTIGUOUS), *SMALL * 30][:length]
    assert_exact(kernel, make_blockwise(entries, dtype))


@SLOW_BITS
def test_a_run_from_the_first_step_on(kernel, slow_ema_bits):
    lists = make_blockwise(SMALL, slow_ema_bits=slow_ema_bits)
    for i in range(len(lists.params)):
        for codes, absmax in moments_of(lists, i):
            codes.zero_()
            absmax.zero_()
        lists.steps[i].zero_()
    for _ in range(12):
        lists.grads = [torch.randn(p.shape) for p in lists.params]
        lists = assert_exact(kernel, lists, t_alpha=8, t_beta3=8)


@pytest.mark.skipif(not native_built(), reason="built without native kernels")
@STOCHASTIC
@SLOW_BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_kernel_agrees_with_the_reference(dtype, slow_ema_bits, stochastic_rounding):
    """Moments may differ by an ulp, which now and then is a code; parameters as far as the 32-bit op's."""
    before = make_blockwise(MIXED, dtype, slow_ema_bits=slow_ema_bits)
    native, reference = before.clone(), before.clone()
    blockwise_step("native", native, stochastic_rounding=stochastic_rounding)
    blockwise_step("reference", reference, stochastic_rounding=stochastic_rounding)
    for lists in (native, reference):
        for p, expected in zip(lists.params, expected_step(dequantized(before)), strict=True):
            assert ((p.double() - expected.values[0]).abs() <= expected.errors[0]).all()
    for i in range(len(before.params)):
        for (codes, absmax), (other_codes, other_absmax) in zip(
            codes_of(native, i).values(), codes_of(reference, i).values(), strict=True
        ):
            torch.testing.assert_close(absmax, other_absmax, rtol=3e-7, atol=0)
            difference = (codes.int() - other_codes.int()).abs()
            assert (difference <= 1).all()
            # An ulp of the scale is 2^-9 of the distance of two int16 codes, of the others much less.
            assert (difference > 0).sum() <= 2**-9 * difference.numel() + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("found", [1.0, 3.0, float("inf"), float("nan")])
def test_found_inf_skips_the_whole_step(kernel, dtype, found):
    before = make_blockwise(SMALL, dtype)
    before.grads[3].fill_(float("inf"))
    lists = before.clone()
    blockwise_step(kernel, lists, found_inf=torch.tensor([found]))
    assert_identical(list(lists), list(before))


BAD = pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])


def step_with_and_without(kernel, lists, element, gradient):
    """Steps the lists with this gradient of one element, and copies of them with moments and gradient 0 there."""
    without = lists.clone()
    without.grads[0][element] = 0
    for codes, _ in moments_of(without, 0):
        codes[element] = 0
    lists.grads[0][element] = gradient
    blockwise_step(kernel, lists)
    blockwise_step(kernel, without)
    return without


@BAD
@SLOW_BITS
@pytest.mark.parametrize(("size", "element"), [(1, 0), (257, 256), (600, 300), (1027, 1026)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_gradient_stays_in_its_element(kernel, dtype, size, element, bad, slow_ema_bits):
    """In blocks of one element, full ones and ragged ones: neither neighbours nor scales see it."""
    entries = [((size,), "contiguous", "contiguous", "contiguous")]
    lists = make_blockwise(entries, dtype, slow_ema_bits=slow_ema_bits)
    without = step_with_and_without(kernel, lists, element, bad)
    assert not lists.params[0][element].isfinite()
    without.params[0][element] = lists.params[0][element]
    without.grads[0][element] = bad
    assert_identical(list(lists), list(without))


@SLOW_BITS
@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(torch.float32, 1e25), (torch.bfloat16, -1e25), (torch.float64, 1e25), (torch.float64, -1e100)],
)
def test_gradient_too_large_for_exp_avg_sq_costs_its_moments(kernel, dtype, gradient, slow_ema_bits):
    """The update of its parameter is the 32-bit step's: almost none, or where float64 holds the square, a usual one."""
    lists = make_blockwise([((600,), *["contiguous"] * 3)], dtype, slow_ema_bits=slow_ema_bits)
    old = lists.params[0][300].clone()
    without = step_with_and_without(kernel, lists, 300, gradient)
    new = lists.params[0][300].clone()
    assert (new - old).abs() <= 0.02 * (1 + old.abs())
    without.params[0][300] = new
    without.grads[0][300] = gradient
    assert_identical(list(lists), list(without))


@STOCHASTIC
def test_positive_exp_avg_sq_never_becomes_zero(kernel, stochastic_rounding):
    """Beside much larger neighbours; only an element that never had a gradient has exp_avg_sq 0."""
    lists = make_blockwise([((4096,), *["contiguous"] * 3)])
    (codes, absmax), grad = moments_of(lists, 0)[2], lists.grads[0]
    codes.zero_()
    absmax.zero_()
    grad.copy_(torch.logspace(-17, 3, 4096)[torch.randperm(4096)])
    grad[::7] = 0
    seen = grad != 0
    for _ in range(20):
        blockwise_step(kernel, lists, stochastic_rounding=stochastic_rounding)
        assert torch.equal(codes > 0, seen)
        grad.zero_()
    assert lists.params[0].isfinite().all()


@SLOW_BITS
def test_zero_gradients_from_the_first_step_on(kernel, slow_ema_bits):
    """Nothing but weight decay happens; 0/eps isn't NaN and 0/0 scales aren't."""
    lists = make_blockwise(SMALL, slow_ema_bits=slow_ema_bits)
    lists.grads = [torch.zeros(p.shape) for p in lists.params]
    for i in range(len(lists.params)):
        for codes, absmax in moments_of(lists, i):
            codes.zero_()
            absmax.zero_()
    before = lists.clone()
    blockwise_step(kernel, lists, lr=0.5, weight_decay=0.5)
    assert_identical(list(lists)[1:-1], list(before)[1:-1])
    assert_identical(lists.params, [p * 0.75 for p in before.params])
    assert_identical(lists.steps, [t + 1 for t in before.steps])


@pytest.mark.parametrize("slow_ema_bits", [8, 16])
def test_bounds_of_codes(slow_ema_bits: int) -> None:
    """What kernels with approximate roots are held to: few codes have two values, one beside the other."""
    before = make_blockwise(slow_ema_bits=slow_ema_bits)
    bounds = code_bounds(before)
    assert_codes_within(expected_blockwise_step("native", before), bounds)
    for low, high in zip(*bounds, strict=True):
        for a, b in zip(low, high, strict=True):
            if a.dtype in (torch.int8, torch.uint8, torch.int16):
                difference = (a.int() - b.int()).abs()
                assert bool((difference <= 1).all())
                assert difference.count_nonzero() <= 1 + 1e-3 * a.numel()
    beside = copy.deepcopy(before)
    blockwise_step("native", beside)
    max(beside.exp_avgs, key=torch.numel).view(-1)[5] += 1
    with pytest.raises(AssertionError):
        assert_codes_within(beside, bounds)

"""The formats of quantized state, for every implementation of quantize and dequantize."""

import doctest
import math

import pytest
import torch

from tests.helpers.config import assert_identical, native_built
from tests.helpers.quantized import boundaries, neighbours, with_absmax_one
from torch_ademamix import ops
from torch_ademamix.numerics import blockwise
from torch_ademamix.numerics.blockwise import (
    BLOCK_SIZE,
    CODE_DTYPES,
    LARGEST_CODES,
    POSITION_BITS,
    SMALLEST_FOURTH_ROOTS,
    decode,
    dequantize,
    quantize,
)

# Each as blockwise.quantize and blockwise.dequantize.
IMPLEMENTATIONS = {
    "reference": (quantize, dequantize),
    **({"native": (ops.quantize_blockwise, ops.dequantize_blockwise)} if native_built() else {}),
}

FORMATS = tuple(CODE_DTYPES)
FOURTH_ROOTS = tuple(SMALLEST_FOURTH_ROOTS)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


def codes_of(values, format, quantize, **options):
    x, is_value = with_absmax_one(values)
    codes, absmax = quantize(x, format, **options)
    assert (absmax == 1).all()
    return codes[is_value].int()


def exact_codes(values, format):
    """What is rounded to the codes of values in a block whose absmax is 1, in float64."""
    values = values.double()
    if format.startswith("linear"):
        x = values
    elif format.startswith("signed_sqrt"):
        x = values.abs().sqrt() * values.sign()
    else:
        x = values.clamp_min(0).sqrt().sqrt()
    return x * LARGEST_CODES[format]


def all_codes(format):
    largest = LARGEST_CODES[format]
    if format in FOURTH_ROOTS:
        return torch.tensor([0, *range(SMALLEST_FOURTH_ROOTS[format], largest + 1)])
    return torch.arange(-largest, largest + 1)


def value_of(codes, format):
    """In float64, times absmax."""
    x = codes.double() / LARGEST_CODES[format]
    return x if format.startswith("linear") else x**4 if format in FOURTH_ROOTS else x * x.abs()


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_decodes_to_its_value(implementation, format):
    _, dequantize = implementation
    codes = all_codes(format)
    blocks = -(-codes.numel() // BLOCK_SIZE)
    for scale in (1.0, 0.37, 3e4):
        decoded = dequantize(codes.to(CODE_DTYPES[format]), torch.full((blocks,), scale), format)
        power = scale**2 if format in FOURTH_ROOTS else scale
        torch.testing.assert_close(decoded.double(), value_of(codes, format) * power, rtol=5e-7, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_values_of_codes_keep_them(implementation, format):
    quantize, dequantize = implementation
    codes = all_codes(format)
    assert torch.equal(codes_of(value_of(codes, format).float(), format, quantize).long(), codes)
    # Also of other scales, of which the largest value may be an ulp off.
    codes = codes[-BLOCK_SIZE:].to(CODE_DTYPES[format])
    for scale in torch.rand(100) + 0.5:
        assert torch.equal(quantize(dequantize(codes, scale.view(1), format), format)[0], codes)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform", "boundaries"])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_the_nearest(implementation, format, distribution):
    """Of the root, where the format has one; but a positive value never becomes 0."""
    quantize, _ = implementation
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    if distribution == "log_uniform":
        values = torch.exp2(-24 * values)
    if distribution == "boundaries":
        values = neighbours(boundaries(), 3)
    if format not in FOURTH_ROOTS:
        values = torch.cat([values, -values])
    expected = exact_codes(values, format)
    if format in FOURTH_ROOTS:
        expected = torch.where(values > 0, expected.clamp_min(SMALLEST_FOURTH_ROOTS[format]), 0)
    distance = (codes_of(values, format, quantize).double() - expected).abs()
    assert distance.max() <= 0.5 + LARGEST_CODES[format] * 2**-22


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("format", FORMATS)
def test_blocks_have_their_own_scale(implementation, format, size):
    quantize, dequantize = implementation
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    if format in FOURTH_ROOTS:
        x = x.abs()
    codes, absmax = quantize(x, format)
    assert codes.shape == x.shape
    assert codes.dtype == CODE_DTYPES[format]
    largest = torch.stack([block.abs().max() for block in x.split(BLOCK_SIZE)])
    assert torch.equal(absmax, largest.double().sqrt().float() if format in FOURTH_ROOTS else largest)
    # Half the widest gap between two values of the format.
    steps = LARGEST_CODES[format]
    gap = 1 / (steps - 1) if format.startswith("linear") else (4 if format in FOURTH_ROOTS else 2) / steps
    scale = largest.repeat_interleave(BLOCK_SIZE)[:size]
    assert ((dequantize(codes, absmax, format) - x).abs() <= gap / 2 * scale).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7, 5, 11)])
@pytest.mark.parametrize("format", FORMATS)
def test_shapes_are_kept(implementation, format, shape):
    quantize, dequantize = implementation
    x = torch.rand(shape)
    codes, absmax = quantize(x, format)
    assert codes.shape == shape
    assert absmax.shape == (-(-x.numel() // BLOCK_SIZE),)
    assert dequantize(codes, absmax, format).shape == shape


@pytest.mark.parametrize("format", FORMATS)
def test_elements_count_in_logical_order(implementation, format):
    quantize, dequantize = implementation
    x = torch.rand(40, 30).t()
    codes, absmax = quantize(x, format)
    expected, expected_absmax = quantize(x.contiguous(), format)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(
        dequantize(codes.t().contiguous().t(), absmax, format),
        dequantize(expected, absmax, format),
    )


@pytest.mark.parametrize("size", [5, 256, 600])
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(implementation, format, size):
    quantize, dequantize = implementation
    x = torch.zeros(size)
    x[::2] = -0.0
    codes, absmax = quantize(x, format)
    assert (codes == 0).all()
    assert (absmax == 0).all()
    assert (dequantize(codes, absmax, format) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 40, 256, 300])
@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_elements_become_zero_and_leave_the_others(implementation, format, size, bad):
    quantize, _ = implementation
    x = torch.rand(size) + 0.1
    without = x.clone()
    without[size // 2] = 0
    x[size // 2] = bad
    codes, absmax = quantize(x, format)
    expected, expected_absmax = quantize(without, format)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)
    assert codes[size // 2] == 0


@pytest.mark.parametrize("format", FOURTH_ROOTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_positive_values_never_become_zero(implementation, stochastic, format):
    quantize, _ = implementation
    smallest, largest = SMALLEST_FOURTH_ROOTS[format], LARGEST_CODES[format]
    options = {"seed": 0} if stochastic else {}
    values = torch.tensor([1.4e-45, 1e-42, 1e-30, 1e-12, 2e-10, 2.4e-10, 1e-7, 0.0, -0.0, -1e-3])
    for absmax in (1.0, 1e-20, 1e38):
        x = torch.cat([values, torch.tensor([absmax])]).repeat(100)
        codes, _ = quantize(x, format, **options)
        assert (codes[x > 0] >= smallest).all()
        assert (codes[x <= 0] == 0).all()
    codes, _ = quantize(torch.tensor([1.4e-45, 1e-9, 1.0]), format, **options)
    assert codes.tolist() == [smallest, smallest, largest]


# Blocks of denormals and of the largest floats: the inverse of absmax is infinite or denormal.
@pytest.mark.parametrize("scale", [1.4e-45, 1e-42, 2.9e-39, 1e-38, 8e37, 1.8e38, 3.4e38])
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_scales(implementation, format, scale):
    quantize, dequantize = implementation
    x = torch.tensor([scale]) * torch.linspace(0, 1, 300)
    for sign in (1, -1) if format not in FOURTH_ROOTS else (1,):
        codes, absmax = quantize(sign * x, format)
        decoded = dequantize(codes, absmax, format)
        assert decoded.isfinite().all()
        assert (decoded * sign >= 0).all()
        if scale >= 2**-126:
            off = 0.0085 if LARGEST_CODES[format] > 100 else 0.15  # half the widest gap
            torch.testing.assert_close(decoded, sign * x, rtol=0, atol=off * scale)


# The smallest largest value of a block for which float32 has the values of all codes; see `dequantize`.
SMALLEST_EXACT = {format: 2.0 ** (-118 if format.startswith("linear") else -124) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("spread", [1, 30])
def test_dequantizing_and_quantizing_again_gives_the_same_codes_and_scales(implementation, format, spread):
    """With random blocks of every magnitude, some of them denormal, and with stochastic rounding."""
    quantize, dequantize = implementation
    generator = torch.Generator().manual_seed(spread)
    blocks = 4000
    log_scales = torch.linspace(math.log2(SMALLEST_EXACT[format]), 127.5, blocks, dtype=torch.float64)
    log_scales += torch.rand(blocks, generator=generator, dtype=torch.float64).where(log_scales < 126, 0)
    x = torch.randn(blocks, BLOCK_SIZE, generator=generator, dtype=torch.float64)
    x *= torch.exp2(-spread * torch.rand(x.shape, generator=generator, dtype=torch.float64))
    x[:, 7] = 0
    x = (x / x.abs().amax(1, keepdim=True) * torch.exp2(log_scales)[:, None]).float()
    assert x.isfinite().all()
    assert ((x != 0) & (x.abs() < torch.finfo(torch.float32).tiny)).any()  # denormal elements
    if format in FOURTH_ROOTS:
        x = x.abs()
    for options in ({}, {"seed": 1}) if format in POSITION_BITS else ({},):
        codes, absmax = quantize(x, format, **options)
        again = dequantize(codes, absmax, format)
        for _ in range(2):
            assert_identical(quantize(again, format), (codes, absmax))
            again = dequantize(*quantize(again, format), format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_decodes_what_dequantize_returns_but_for_the_largest_code(format):
    codes = all_codes(format)[-BLOCK_SIZE:].to(CODE_DTYPES[format])
    for scale in torch.rand(100) + 0.5:
        exact, decoded = dequantize(codes, scale.view(1), format), decode(codes, scale.view(1), format)
        is_largest = codes.int().abs() == LARGEST_CODES[format]
        assert_identical(exact[~is_largest], decoded[~is_largest])
        assert (exact[is_largest].abs() == (scale.square() if format in FOURTH_ROOTS else scale)).all()
        torch.testing.assert_close(exact, decoded, rtol=3e-7, atol=0)


def test_stochastic_rounding_is_right_on_average(implementation):
    """In codes, whose fourth powers the values are."""
    quantize, _ = implementation
    draws = 100_000
    for code in (4, 5, 10, 63, 64, 127, 128, 200, 254):
        for fraction in (0.03, 0.5, 0.8):
            value = value_of(torch.tensor(code + fraction), "fourth_root_uint8").float()
            up = exact_codes(value, "fourth_root_uint8").item() - code
            codes = codes_of(value.repeat(draws), "fourth_root_uint8", quantize, seed=code)
            assert set(codes.tolist()) == {code, code + 1}
            standard_error = (up * (1 - up) / draws) ** 0.5
            assert abs((codes - code).double().mean().item() - up) < 4 * standard_error + 1e-4


@pytest.mark.parametrize("sign", [1, -1])
def test_exp_avg_in_4_bits_is_right_on_average(implementation, sign):
    """In values, to a hundredth of the largest; where it is alone in its block, exactly; a root alone would gain."""
    quantize, _dequantize = implementation
    draws = 100_000
    for value in (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9):
        codes = codes_of(torch.full((draws,), sign * value), "signed_sqrt_int4", quantize, seed=1)
        mean = value_of(codes, "signed_sqrt_int4").mean().item()
        assert abs(mean - sign * value) < 0.0051, value
    codes = codes_of(torch.full((draws,), sign * 1.0), "signed_sqrt_int4", quantize, seed=1)
    assert (codes == 7 * sign).all()


def test_two_codes_of_an_element_are_rounded_independently(implementation):
    quantize, _ = implementation
    x, is_value = with_absmax_one(torch.full((200_000,), 0.3))
    up = [quantize(x, format, seed=1)[0][is_value].double() for format in ("signed_sqrt_int4", "fourth_root_uint8")]
    assert torch.corrcoef(torch.stack(up))[0, 1].abs() < 0.01


def test_words_hold_two_codes():
    slow = torch.arange(-2047, 2048, dtype=torch.int16)
    for format in ("signed_sqrt_int4", "fourth_root_uint4"):
        for code in all_codes(format).tolist():
            other = torch.full_like(slow, code).to(CODE_DTYPES[format])
            words = blockwise.pack(slow, other)
            assert words.dtype == torch.int16
            assert_identical(blockwise.unpack(words, format), (slow, other))
            assert bool((words[(slow == 0) & (other == 0)] == 0).all())


def test_stochastic_rounding_keeps_the_values_of_codes(implementation):
    """But for what float32 arithmetic is off by: some 2^-15 of a code, and so seldom another one."""
    quantize, _ = implementation
    own = all_codes("fourth_root_uint8").repeat(2000)
    codes = codes_of(value_of(own, "fourth_root_uint8").float(), "fourth_root_uint8", quantize, seed=3)
    difference = (codes - own).abs()
    assert difference.max() <= 1
    assert difference.double().mean() < 1e-4


def test_stochastic_rounding_is_reproducible(implementation):
    quantize, _ = implementation
    x = torch.rand(10_001, generator=torch.Generator().manual_seed(0)).square()
    key = {"seed": 2**63 - 5, "step": 12, "subsequence": 3}

    def codes(x=x, **changes):
        return quantize(x, "fourth_root_uint8", **(key | changes))[0]

    assert torch.equal(codes(), codes())
    assert torch.equal(codes(step=torch.tensor(12.0)), codes())
    # An element's bits go by its number alone, not by how many there are.
    assert torch.equal(codes(x[: 20 * BLOCK_SIZE]), codes()[: 20 * BLOCK_SIZE])
    for changes in ({"seed": 1}, {"seed": 2**63 - 5 - 2**32}, {"step": 13}, {"subsequence": 4}):
        changed = (codes() != codes(**changes)).double().mean()
        assert 0.1 < changed < 0.9


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_agrees_with_the_reference_to_the_bit(name):
    """On values of every magnitude."""
    quantize, dequantize = IMPLEMENTATIONS[name]
    bits = torch.randint(-(2**31), 2**31, (300_007,), generator=torch.Generator().manual_seed(1))
    anything = bits.to(torch.int32).view(torch.float32)
    spread = torch.exp2(torch.linspace(-30, 0, 300_007)) * torch.sign(anything.nan_to_num(1))
    for x in (anything, spread, spread.flip(0) * 1e-35):
        for format in FORMATS:
            for options in ({}, {"seed": 5, "step": 6, "subsequence": 7}):
                if options and format not in POSITION_BITS:
                    continue
                codes, absmax = quantize(x, format, **options)
                expected, expected_absmax = blockwise.quantize(x, format, **options)
                assert torch.equal(codes, expected)
                assert torch.equal(absmax, expected_absmax)
                values = dequantize(codes, absmax, format)
                expected_values = blockwise.dequantize(codes, absmax, format)
                assert torch.equal(values.view(torch.int32), expected_values.view(torch.int32))


# Random123's known answers for philox4x32 with 7 rounds: counter, key, result.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    words = blockwise.philox([torch.tensor([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == expected


def test_random_bits_are_laid_out_as_documented():
    first, key = PHILOX_ANSWERS[0][2], {"seed": 0, "step": 0, "subsequence": 0}
    halves = [half for word in first for half in (word & 0xFFFF, word >> 16)]
    assert blockwise.random_bits(8, **key).tolist() == halves
    words = blockwise.philox([torch.tensor([word]) for word in (1, 0, 9, 4)], (7, 2))
    third = blockwise.random_bits(11, seed=7 + 2 * 2**32, step=9, subsequence=4)[10]
    assert third == words[1].item() & 0xFFFF


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(torch.ones(3), "nf4"), ValueError, "format must be one of .*'nf4'"),
        (
            lambda: quantize(torch.ones(3), "signed_sqrt_int8", seed=1),
            ValueError,
            f"only {', '.join(POSITION_BITS)} are rounded stochastically, not signed_sqrt_int8",
        ),
        (
            lambda: quantize(torch.ones(3).double(), "linear_int16"),
            TypeError,
            r"x must be float32, not torch\.float64",
        ),
        (
            lambda: dequantize(torch.ones(3), torch.ones(1), "linear_int16"),
            TypeError,
            r"codes of linear_int16 must be torch\.int16, not torch\.float32",
        ),
        (
            lambda: dequantize(torch.ones(300).short(), torch.ones(1), "linear_int16"),
            ValueError,
            r"absmax must have shape \(2,\) for 300 codes, not \(1,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_docstring_examples():
    assert doctest.testmod(blockwise).failed == 0

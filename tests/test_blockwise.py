"""The formats of quantized state, for every implementation of quantize and dequantize."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from config import native_built
from quantized import neighbours, with_absmax_one

from torch_ademamix import blockwise, ops
from torch_ademamix.blockwise import BLOCK_SIZE, dequantize, dynamic_map, quantize

# Each as blockwise.quantize and blockwise.dequantize.
IMPLEMENTATIONS = {
    "reference": (quantize, dequantize),
    **({"native": (ops.quantize_blockwise, ops.dequantize_blockwise)} if native_built() else {}),
}

FORMATS = ("signed_dynamic", "unsigned_dynamic", "linear_int16")
MAPS = {"signed_dynamic": True, "unsigned_dynamic": False}
ZERO_CODES = {"signed_dynamic": 127, "unsigned_dynamic": 0, "linear_int16": 0}

GOLDEN = np.load(Path(__file__).parent / "data" / "ademamix_float64.npz")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


def codes_of(values, format, quantize, **options):
    x, is_value = with_absmax_one(values)
    codes, absmax = quantize(x, format, **options)
    assert (absmax == 1).all()
    return codes[is_value].int()


def assert_nearest(values, codes, signed):
    """In exact arithmetic: no other map value is nearer, nor as near and larger in magnitude."""
    table = dynamic_map(signed).double()
    values = values.double()
    chosen = table[codes]
    if not signed:  # positive values never become 0
        assert (codes[values > 0] > 0).all()
        values = torch.where(values > 0, values.clamp_min(table[1].item()), values)
    distance = (values - chosen).abs()
    for other in (table[(codes - 1).clamp_min(0)], table[(codes + 1).clamp_max(255)]):
        other_distance = (values - other).abs()
        assert (distance <= other_distance).all()
        tie = (distance == other_distance) & (other != chosen)
        assert (chosen[tie].abs() > other[tie].abs()).all()


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_the_golden_ones(signed):
    golden = GOLDEN[f"dynamic_map/{'signed' if signed else 'unsigned'}"]
    assert np.array_equal(dynamic_map(signed).numpy(), golden.astype(np.float32))


@pytest.mark.parametrize("format", MAPS)
def test_every_code_decodes_to_its_map_value(implementation, format):
    _, dequantize = implementation
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    scale = torch.tensor([0.37])
    expected = dynamic_map(MAPS[format])
    assert torch.equal(dequantize(codes, torch.ones(1), format), expected)
    assert torch.equal(dequantize(codes, scale, format), expected * scale)


@pytest.mark.parametrize("format", MAPS)
def test_map_values_and_boundaries_encode_to_the_nearest(implementation, format):
    quantize, _ = implementation
    signed = MAPS[format]
    table = dynamic_map(signed)
    table = table[table >= 0]
    middles = ((table[1:].double() + table[:-1].double()) / 2).float()
    values = torch.cat([neighbours(table, 3), neighbours(middles, 3)])
    if signed:
        values = torch.cat([values, -values])
    codes = codes_of(values, format, quantize)
    assert_nearest(values, codes, signed)
    own = torch.arange(256)
    assert torch.equal(codes_of(dynamic_map(signed), format, quantize).long(), own)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
@pytest.mark.parametrize("format", MAPS)
def test_random_values_encode_to_the_nearest(implementation, format, distribution):
    quantize, _ = implementation
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2_500_000, generator=generator)
    if distribution == "log_uniform":
        values = torch.exp2(-24 * values)
    if MAPS[format]:
        values[::2] *= -1
    assert_nearest(values, codes_of(values, format, quantize), MAPS[format])


def test_int16_is_linear(implementation):
    quantize, dequantize = implementation
    values = torch.cat([torch.rand(100_000) * 2 - 1, torch.tensor([-1.0, -0.0, 0.0, 1.0])])
    codes = codes_of(values, "linear_int16", quantize)
    assert torch.equal(codes.double(), (values.double() * 32767).round())

    codes = torch.arange(-32767, 32768, dtype=torch.int32).to(torch.int16)
    absmax = torch.full((256,), 3.0)
    decoded = dequantize(codes, absmax, "linear_int16")
    assert decoded[0] == -3
    assert decoded[-1] == 3
    torch.testing.assert_close(decoded.double(), codes.double() * (3 / 32767), rtol=2e-7, atol=0)
    assert torch.equal(quantize(decoded, "linear_int16")[0][-BLOCK_SIZE + 1 :], codes[-255:])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("format", FORMATS)
def test_blocks_have_their_own_scale(implementation, format, size):
    quantize, dequantize = implementation
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    if format == "unsigned_dynamic":
        x = x.abs()
    codes, absmax = quantize(x, format)
    assert codes.shape == x.shape
    assert codes.dtype == blockwise.CODE_DTYPES[format]
    assert torch.equal(absmax, torch.stack([block.abs().max() for block in x.split(BLOCK_SIZE)]))
    # Half the widest gap between two values of the format, except that the signed map ends early.
    gap = {"signed_dynamic": 0.0145, "unsigned_dynamic": 0.0075, "linear_int16": 1 / 32766}[format]
    scale = absmax.repeat_interleave(BLOCK_SIZE)[:size]
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
    assert (codes == ZERO_CODES[format]).all()
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
    assert codes[size // 2] == ZERO_CODES[format]


@pytest.mark.parametrize("stochastic", [False, True])
def test_positive_values_never_become_zero(implementation, stochastic):
    quantize, _ = implementation
    options = {"seed": 0} if stochastic else {}
    values = torch.tensor([1.4e-45, 1e-42, 1e-30, 1e-9, 1e-7, 1.6e-7, 3.2e-7, 0.0, -0.0, -1e-3])
    for absmax in (1.0, 1e-20, 1e38):
        x = torch.cat([values, torch.tensor([absmax])]).repeat(100)
        codes, _ = quantize(x, "unsigned_dynamic", **options)
        assert (codes[x > 0] > 0).all()
        assert (codes[x <= 0] == 0).all()
    codes, _ = quantize(torch.tensor([1.4e-45, 1e-7, 1.0]), "unsigned_dynamic", **options)
    assert codes.tolist() == [1, 1, 255]


# Blocks of denormals and of the largest floats: the inverse of absmax is infinite or denormal.
@pytest.mark.parametrize("scale", [1.4e-45, 1e-42, 2.9e-39, 1e-38, 8e37, 1.8e38, 3.4e38])
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_scales(implementation, format, scale):
    quantize, dequantize = implementation
    x = torch.tensor([scale]) * torch.linspace(0, 1, 300)
    for sign in (1, -1) if format != "unsigned_dynamic" else (1,):
        codes, absmax = quantize(sign * x, format)
        decoded = dequantize(codes, absmax, format)
        assert decoded.isfinite().all()
        assert (decoded * sign >= 0).all()
        if scale >= 2**-126:
            torch.testing.assert_close(decoded, sign * x, rtol=0, atol=0.0075 * scale)


def test_stochastic_rounding_is_unbiased(implementation):
    """In every decade, between the decades and below 1."""
    quantize, _ = implementation
    draws = 100_000
    table = dynamic_map(signed=False).double()
    corners = [1, 2, 3, 6, 7, 14, 15, 30, 31, 62, 63, 126, 127, 254]
    below = sorted({*corners, *(corner + 20 for corner in corners if 30 < corner < 200)})
    for code in below:
        low, high = table[code].item(), table[code + 1].item()
        for fraction in (0.03, 0.5, 0.8):
            value = torch.tensor(low + fraction * (high - low))
            up = (value.item() - low) / (high - low)
            codes = codes_of(value.repeat(draws), "unsigned_dynamic", quantize, seed=code)
            assert set(codes.tolist()) == {code, code + 1}
            standard_error = (up * (1 - up) / draws) ** 0.5
            assert abs((codes - code).double().mean().item() - up) < 4 * standard_error


def test_stochastic_rounding_keeps_map_values(implementation):
    quantize, _ = implementation
    values = dynamic_map(signed=False).repeat(2000)
    codes = codes_of(values, "unsigned_dynamic", quantize, seed=3)
    assert torch.equal(codes, torch.arange(256, dtype=torch.int32).repeat(2000))


def test_stochastic_rounding_is_reproducible(implementation):
    quantize, _ = implementation
    x = torch.rand(10_001, generator=torch.Generator().manual_seed(0)).square()
    key = {"seed": 2**63 - 5, "step": 12, "stream": 3}

    def codes(x=x, **changes):
        return quantize(x, "unsigned_dynamic", **(key | changes))[0]

    assert torch.equal(codes(), codes())
    assert torch.equal(codes(step=torch.tensor(12.0)), codes())
    # An element's bits go by its number alone, not by how many there are.
    assert torch.equal(codes(x[: 20 * BLOCK_SIZE]), codes()[: 20 * BLOCK_SIZE])
    for changes in ({"seed": 1}, {"seed": 2**63 - 5 - 2**32}, {"step": 13}, {"stream": 4}):
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
            for options in ({}, {"seed": 5, "step": 6, "stream": 7}):
                if options and format != "unsigned_dynamic":
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
    first, key = PHILOX_ANSWERS[0][2], {"seed": 0, "step": 0, "stream": 0}
    halves = [half for word in first for half in (word & 0xFFFF, word >> 16)]
    assert blockwise.random_bits(8, **key).tolist() == halves
    words = blockwise.philox([torch.tensor([word]) for word in (1, 0, 9, 4)], (7, 2))
    third = blockwise.random_bits(11, seed=7 + 2 * 2**32, step=9, stream=4)[10]
    assert third == words[1].item() & 0xFFFF


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(torch.ones(3), "nf4"), ValueError, "format must be one of .*'nf4'"),
        (
            lambda: quantize(torch.ones(3), "signed_dynamic", seed=1),
            ValueError,
            "only unsigned_dynamic is rounded stochastically, not signed_dynamic",
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

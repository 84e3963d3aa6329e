"""bitsandbytes' 8-bit formats."""

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.quantized import MOMENTS
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.checkpoint import dynamic_map, from_bitsandbytes, to_bitsandbytes
from torch_ademamix.checkpoint.dynamic_map import dequantize, quantize
from torch_ademamix.numerics.blockwise import BLOCK_SIZE

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "ademamix_float64.npz")
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@SIGNED
def test_maps_are_the_golden_ones(signed):
    golden = GOLDEN[f"dynamic_map/{'signed' if signed else 'unsigned'}"]
    assert np.array_equal(dynamic_map.dynamic_map(signed).numpy(), golden.astype(np.float32))


@SIGNED
def test_every_code_keeps_its_value(signed):
    values = dynamic_map.dynamic_map(signed)
    codes = torch.arange(256).to(torch.uint8)
    assert torch.equal(dequantize(codes, torch.tensor([0.37]), signed), values * 0.37)
    assert torch.equal(quantize(values, signed)[0], codes)


@SIGNED
def test_nearest(signed):
    x = torch.rand(100_000).pow(4)
    x = x * x.new_tensor([1, -1]).repeat(50_000) if signed else x
    codes, absmax = quantize(x, signed)
    assert absmax.shape == (-(-x.numel() // BLOCK_SIZE),)
    scales = absmax.double().repeat_interleave(BLOCK_SIZE)[: x.numel()]
    values = dynamic_map.dynamic_map(signed).double()
    allowed = values if signed else values[1:]  # a positive value never becomes 0
    distance = (values[codes.int()] * scales - x).abs()
    best = (allowed * scales[:, None] - x[:, None]).abs().min(1).values
    assert torch.equal(distance, best)


@SIGNED
def test_zeros(signed):
    codes, absmax = quantize(torch.zeros(300), signed)
    assert (dequantize(codes, absmax, signed) == 0).all()
    assert (absmax == 0).all()


def test_a_round_trip_through_bitsandbytes_costs_what_the_manual_says():
    """Root mean squares of the errors, relative to those of the values: docs/migration.md."""
    p = torch.nn.Parameter(torch.zeros(64, 1024))
    optimizer = AdEMAMix8bit([p], weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    mean = 0.1 * torch.randn(p.shape, generator=generator)
    for _ in range(200):
        p.grad = mean + torch.randn(p.shape, generator=generator)
        optimizer.step()

    def values(state_dict):
        exact = AdEMAMix([torch.zeros_like(p)])
        exact.load_state_dict(state_dict)
        return exact.state_dict()["state"][0]

    def errors(actual, expected):
        return [((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in MOMENTS]

    there = from_bitsandbytes(to_bitsandbytes(optimizer.state_dict()))
    back = AdEMAMix8bit([p])
    back.load_state_dict(there)
    ours, theirs, ours_again = (values(state_dict) for state_dict in (optimizer.state_dict(), there, back.state_dict()))
    assert errors(theirs, ours) == pytest.approx([0.011, 0.011, 0.003], abs=5e-4)
    assert errors(ours_again, theirs) == pytest.approx([0.007, 0, 0.003], abs=5e-4)
    assert errors(ours_again, ours) == pytest.approx([0.013, 0.011, 0], abs=5e-4)


def test_docstring_examples():
    assert doctest.testmod(dynamic_map).failed == 0

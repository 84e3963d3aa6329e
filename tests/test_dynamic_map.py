"""bitsandbytes' 8-bit formats, and state that version 0.1.0 has saved in them."""

import copy
import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from config import assert_identical
from quantized import MOMENTS, make_optimizer, train

from torch_ademamix import AdEMAMix, AdEMAMix8bit, blockwise, dynamic_map
from torch_ademamix.blockwise import BLOCK_SIZE, FORMATS
from torch_ademamix.checkpoint import from_bitsandbytes, to_bitsandbytes
from torch_ademamix.dynamic_map import dequantize, quantize

GOLDEN = np.load(Path(__file__).parent / "data" / "ademamix_float64.npz")
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


def saved_by_0_1(optimizer):
    """The state dict with quantized state as 0.1.0 had it."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["state_format"]
    for state in saved["state"].values():
        for name in MOMENTS:
            if "exp_avg_absmax" in state and state[name].dtype != torch.int16:
                values = blockwise.dequantize(state[name], state[f"{name}_absmax"], FORMATS[state[name].dtype])
                state[name], state[f"{name}_absmax"] = quantize(values, signed=name != "exp_avg_sq")
    return saved


@pytest.mark.parametrize("storage", [{"optim_bits": 32}, {}, {"slow_ema_bits": 8}, {"slow_ema_bits": 16}], ids=str)
def test_state_of_0_1_is_converted(storage):
    """Its values, to the nearest; also into 32 bits, and by way of the other slow average's format."""
    params, optimizer = make_optimizer()
    train(params, optimizer, 3)
    saved = saved_by_0_1(optimizer)
    assert saved["state"][0]["exp_avg"].dtype == torch.uint8
    before = copy.deepcopy(saved)
    cls = AdEMAMix if "optim_bits" in storage else AdEMAMix8bit
    new_params, new_optimizer = make_optimizer(cls=cls, **storage)
    new_optimizer.load_state_dict(saved)
    assert_identical(saved, before)

    for i, p in enumerate(p for group in new_optimizer.param_groups for p in group["params"]):
        state, new = saved["state"][i], new_optimizer.state[p]
        assert_identical(new["step"], state["step"])
        for name in MOMENTS:
            if "exp_avg_absmax" not in state:
                assert_identical(new[name], state[name])
                continue
            codes, absmax = state[name], state[f"{name}_absmax"]
            if codes.dtype == torch.int16:
                values = blockwise.dequantize(codes, absmax, "linear_int16")
            else:
                values = dequantize(codes, absmax, signed=name != "exp_avg_sq")
            if "exp_avg_absmax" not in new:
                assert_identical(new[name], values)
            elif codes.dtype == new[name].dtype == torch.int16:
                assert_identical((new[name], new[f"{name}_absmax"]), (codes, absmax))
            else:
                expected = blockwise.quantize(values, FORMATS[new[name].dtype])
                assert_identical((new[name], new[f"{name}_absmax"]), expected)
    train(new_params, new_optimizer, 1)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("exp_avg_sq", torch.int8, r"\['exp_avg_sq'\] has dtype torch.int8, but must be torch.uint8"),
        (
            "exp_avg_slow",
            torch.int8,
            r"\['exp_avg_slow'\] has dtype torch.int8, but must be torch.int16 or torch.uint8",
        ),
    ],
)
def test_mixtures_of_both_are_refused(name, dtype, message):
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    saved = saved_by_0_1(optimizer)
    saved["state"][0][name] = saved["state"][0][name].to(dtype)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_a_round_trip_through_bitsandbytes_costs_what_the_manual_says():
    """Root mean squares of the errors, relative to those of the values: docs/checkpoints.md."""
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

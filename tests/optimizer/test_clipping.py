"""Gradient clipping inside the step, against torch's own before it."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.helpers.config import DTYPES, assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit

SHAPES = ((300, 20), (), (0, 3), (17,))


def make(optimizer_class=AdEMAMix, dtypes=(torch.float32,), max_grad_norm=None, seed=0, **options):
    """An optimizer of two groups, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(d)) for d in dtypes for s in SHAPES]
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=1e-2, max_grad_norm=max_grad_norm, **options)
    set_grads(params, generator)
    return params, optimizer


def set_grads(params, generator, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def assert_close(actual, expected, eps=None):
    """To one rounding of the factor and one of the product at each of some steps, of which an update has 1e-2."""
    for a, b in zip(actual, expected, strict=True):
        eps_of_a = eps or torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * eps_of_a, atol=eps_of_a * 1e-2)


@pytest.mark.parametrize("optimizer_class", [AdEMAMix, AdEMAMix8bit])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64,), (torch.float32, torch.float64)], ids=str)
def test_equals_clipping_before_the_step(dtypes, max_norm, optimizer_class):
    params, optimizer = make(optimizer_class, dtypes, max_norm)
    expected, plain = make(optimizer_class, dtypes)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    # One code that is rounded to the other side shows in the steps that follow.
    for _ in range(5 if optimizer_class is AdEMAMix else 1):
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
        plain.step()
        assert_identical([p.grad for p in params], grads)
        torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=1e-6, atol=0)
        # Beside float32 ones, torch's norm of float64 gradients has float32's digits.
        assert_close(params, expected, torch.finfo(dtypes[0]).eps)
        for tensors, generator in zip((params, expected), generators, strict=True):
            set_grads(tensors, generator)


def test_norms_of_16_bit_gradients_are_not_rounded_to_16_bits():
    params, optimizer = make(dtypes=(torch.bfloat16, torch.float16), max_grad_norm=1.0)
    for p in params:
        p.grad = p.grad.abs() + 200  # the norm is beyond float16
    optimizer.step()
    exact = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in params]))
    torch.testing.assert_close(optimizer.grad_norm, exact.float(), rtol=1e-5, atol=0)


def test_infinite_bound_only_measures():
    params, optimizer = make(max_grad_norm=torch.inf)
    expected, plain = make()
    optimizer.step()
    plain.step()
    assert_identical(params, expected)
    assert optimizer.grad_norm > 70


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite(value):
    """As after clip_grad_norm_: an infinite norm makes the finite gradients 0, and NaN makes all NaN."""
    params, optimizer = make(max_grad_norm=1.0)
    expected, plain = make()
    for tensors in (params, expected):
        tensors[3].grad[5] = value
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(expected, 1.0)
    plain.step()
    assert not optimizer.grad_norm.isfinite()
    assert_close([p.nan_to_num(7.0) for p in params], [p.nan_to_num(7.0) for p in expected])


def test_without_gradients():
    params, optimizer = make(max_grad_norm=1.0)
    before = copy.deepcopy(params)
    for p in params:
        p.grad = None
    optimizer.step()
    assert_identical(params, before)


@pytest.mark.parametrize("optimizer_class", [AdEMAMix, AdEMAMix8bit])
def test_with_grad_scaler(optimizer_class):
    """The norm is that of the unscaled gradients; a step that is skipped changes nothing."""
    params, optimizer = make(optimizer_class, max_grad_norm=0.5)
    expected, plain = make(optimizer_class)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale
    for p in params:
        p.grad *= 1024
    scaler.step(optimizer)
    scaler.update()
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    plain.step()
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    assert_close(params, expected)

    before = copy.deepcopy((params, optimizer.state_dict()))
    params[0].grad[3, 4] = torch.inf
    scaler.step(optimizer)
    assert_identical((params, optimizer.state_dict()), before)


def test_grad_norm_is_one_tensor():
    _, optimizer = make(max_grad_norm=1.0)
    first = optimizer.grad_norm
    assert first.shape == ()
    optimizer.step()
    assert optimizer.grad_norm is first
    assert make()[1].grad_norm is None


def test_copies_keep_the_bound():
    params, optimizer = make(max_grad_norm=0.25)
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for copied in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert copied.max_grad_norm == 0.25
        for group in copied.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        copied.step()
        assert copied.grad_norm > 1
    assert "max_grad_norm" not in optimizer.state_dict()["param_groups"][0]
    del params


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan])
def test_refuses_other_bounds(value):
    with pytest.raises(ValueError, match=f"max_grad_norm is {value}, but must be positive or None"):
        make(max_grad_norm=value)
    params, optimizer = make()
    before = copy.deepcopy(params)
    optimizer.max_grad_norm = value
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()
    assert_identical(params, before)


def test_every_dtype_of_gradients():
    params = [nn.Parameter(torch.zeros(10, dtype=dtype)) for dtype in DTYPES]
    optimizer = AdEMAMix(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(160**0.5)


def test_an_empty_first_group_with_clipping():
    p = nn.Parameter(torch.ones(4))
    optimizer = AdEMAMix([{"params": []}, {"params": [p]}], max_grad_norm=1.0)
    p.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert optimizer.grad_norm == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_norm_is_float32_whatever_the_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = AdEMAMix([nn.Parameter(torch.ones(4))], max_grad_norm=1.0)
    finally:
        torch.set_default_dtype(before)
    assert optimizer.grad_norm.dtype == torch.float32


def test_the_norm_is_on_the_parameters_device():
    """That of the construction, or of the first step, where the model was moved in between; torch's default is none."""
    with torch.device("meta"):
        optimizer = AdEMAMix([nn.Parameter(torch.ones(4, device="cpu"))], max_grad_norm=1.0)
    assert optimizer.grad_norm.device.type == "cpu"
    optimizer.param_groups[0]["params"][0] = moved = nn.Parameter(torch.ones(4, device="meta"))
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert optimizer.grad_norm.device.type == "meta"

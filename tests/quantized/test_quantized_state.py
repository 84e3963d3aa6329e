"""Quantized state of an optimizer: names, shapes, memory, copies, and the bits that it draws."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.helpers.config import DTYPES, assert_identical
from tests.helpers.quantized import ABSMAXS, MOMENTS, everything, make_optimizer, stored, train
from torch_ademamix import AdEMAMix8bit, PagedAdEMAMix8bit
from torch_ademamix.numerics.blockwise import CODE_DTYPES
from torch_ademamix.numerics.reference_step import compute_dtype

SLOW_BITS = pytest.mark.parametrize("slow_ema_bits", [8, 16])


@pytest.mark.parametrize(("slow_ema_bits", "bytes_per_param"), [(16, 4.05), (8, 3.05)])
def test_memory(slow_ema_bits, bytes_per_param):
    p = nn.Parameter(torch.zeros(2048, 1024))
    optimizer = AdEMAMix8bit([p], slow_ema_bits=slow_ema_bits)
    p.grad = torch.ones_like(p)
    optimizer.step()
    storages = {t.untyped_storage() for t in optimizer.state[p].values()}
    assert sum(s.nbytes() for s in storages) <= bytes_per_param * p.numel()


@SLOW_BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_shapes_and_dtypes(dtype, slow_ema_bits):
    params, optimizer = make_optimizer(dtype, slow_ema_bits=slow_ema_bits)
    optimizer.init_state()
    initial = copy.deepcopy(optimizer.state_dict())
    for name in ABSMAXS:
        assert (optimizer.state[params[0]][name] == 0).all()
    train(params, optimizer, 1)
    for p in params:
        state = optimizer.state[p]
        if p.numel() < 4096:
            assert state.keys() == {"step", *MOMENTS}
            assert {state[name].dtype for name in MOMENTS} == {compute_dtype(dtype)}
            continue
        assert state.keys() == {"step", *MOMENTS, *ABSMAXS}
        for name, absmax, format in zip(MOMENTS, ABSMAXS, stored(slow_ema_bits), strict=True):
            assert state[name].shape == p.shape
            assert state[name].dtype == CODE_DTYPES[format]
            assert state[absmax].shape == (-(-p.numel() // 256),)
            assert state[absmax].dtype == torch.float32
    # State made beforehand is what the first step would make.
    again, other = make_optimizer(dtype, slow_ema_bits=slow_ema_bits)
    other.load_state_dict(initial)
    train(again, other, 1)
    assert_identical(everything(again, other), everything(params, optimizer))


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((20, 256), (20, 1)),
        ((3, 2, 384), (3, 3)),
        ((0, 512), (0, 2)),
        ((20, 255), (20,)),  # blocks cross rows
        ((512,), (2,)),
        ((), (1,)),
    ],
)
def test_shape_of_scales(shape, scales):
    """One row of scales per row of the parameter, where no block crosses a row; they load from a plain list too."""
    p = nn.Parameter(torch.randn(shape))
    optimizer = AdEMAMix8bit([p], min_8bit_size=0)
    p.grad = torch.randn(shape)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert {tuple(state["state"][0][name].shape) for name in ABSMAXS} == {scales}
    flat = copy.deepcopy(state)
    for name in ABSMAXS:
        flat["state"][0][name] = flat["state"][0][name].flatten()
    optimizer.step()
    optimizer.load_state_dict(flat)
    assert_identical(optimizer.state_dict(), state)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_blocks_count_in_row_major_order(memory_format):
    """However the parameter lies in memory."""
    values, grad = torch.randn(6, 30, 5, 7), torch.randn(6, 30, 5, 7)
    results = []
    for format in (torch.contiguous_format, memory_format):
        p = nn.Parameter(values.clone(memory_format=format))
        p.grad = grad.clone(memory_format=format)
        optimizer = AdEMAMix8bit([p])
        for _ in range(3):
            optimizer.step()
        results.append((p.detach().contiguous(), optimizer.state_dict()["state"]))
    assert_identical(results[1], results[0])


def test_parameters_draw_different_bits():
    """Equal parameters with equal gradients, in one group or in two; the seed is the group's."""
    params = [nn.Parameter(torch.zeros(4096)) for _ in range(3)]
    optimizer = AdEMAMix8bit([{"params": params[:2]}, {"params": params[2:]}])
    grad = torch.randn(4096)
    for p in params:
        p.grad = grad
    optimizer.step()
    first, *others = (optimizer.state[p] for p in params)
    for other in others:
        assert_identical(other["exp_avg"], first["exp_avg"])
        assert 0.1 < (other["exp_avg_sq"] != first["exp_avg_sq"]).double().mean() < 0.9
    assert not torch.equal(others[0]["exp_avg_sq"], others[1]["exp_avg_sq"])
    assert_identical(params[1], params[0])


def test_a_frozen_parameter_keeps_its_stream():
    """What others draw doesn't depend on which parameters have a gradient."""
    results = []
    for frozen in (False, True):
        params = [nn.Parameter(torch.zeros(4096)) for _ in range(2)]
        params[1].grad = torch.linspace(-1, 1, 4096)
        params[0].grad = None if frozen else torch.ones(4096)
        optimizer = AdEMAMix8bit(params)
        optimizer.step()
        results.append((params[1], optimizer.state[params[1]]))
    assert_identical(results[1], results[0])


@SLOW_BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_few_elements(dtype, slow_ema_bits):
    """Down to none, where min_8bit_size allows it."""
    shapes = [(), (0,), (1,), (3, 0), (3, 257)]
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = AdEMAMix8bit(params, slow_ema_bits=slow_ema_bits, min_8bit_size=0)
    train(params, optimizer, 3)
    for p in params:
        assert optimizer.state[p]["exp_avg"].dtype == torch.int8
        assert p.isfinite().all()
    before = copy.deepcopy(everything(params, optimizer))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_identical(everything(params, optimizer), before)


@pytest.mark.parametrize("cls", [AdEMAMix8bit, PagedAdEMAMix8bit])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copy_of, cls):
    """A copy of parameters and optimizer together trains on by itself, with the same bits."""
    params, optimizer = make_optimizer(cls=cls)
    train(params, optimizer, 2)
    before = copy.deepcopy(everything(params, optimizer))
    new_params, new_optimizer = copy_of((params, optimizer))
    assert type(new_optimizer) is cls
    train(new_params, new_optimizer, 2)
    assert_identical(everything(params, optimizer), before)
    train(params, optimizer, 2)
    assert_identical(everything(new_params, new_optimizer), everything(params, optimizer))


def test_slow_bits_changed_in_mid_run():
    # What has state keeps its format; what is trained only later has the new one.
    old, new = (torch.nn.Parameter(torch.randn(512)) for _ in range(2))
    new.requires_grad_(False)
    optimizer = AdEMAMix8bit([old, new], min_8bit_size=0)
    old.grad = torch.randn(512)
    optimizer.step()
    optimizer.param_groups[0]["slow_ema_bits"] = 8
    new.grad = torch.randn(512)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg_slow"].dtype for p in (old, new)] == [torch.int16, torch.int8]
    assert [optimizer.state[p]["step"].item() for p in (old, new)] == [2, 1]

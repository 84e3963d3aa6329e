"""Checkpoints to and from the real bitsandbytes, on its CPU kernels."""

import copy

import pytest
import torch

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix
from torch_ademamix.checkpoint import from_bitsandbytes, to_bitsandbytes

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'torch-ademamix[bitsandbytes]'")

SHAPES = [(48, 256), (8192,), (9, 1000), (300,), ()]
QUANTIZED = [0, 1, 2]  # the numbers of those of 4096 elements or more
EXPORTED_IN_8_BITS = [0, 1]  # of these, those of whole blocks
OPTIONS = dict(lr=3e-3, betas=(0.9, 0.99, 0.999), alpha=3.0)

# Of parameters after 20 steps, relative to a tensor's largest element. With 8 bits a moment between two codes may be
# rounded apart, a positive exp_avg_sq is never rounded to 0 here, and the ragged tensor goes on in 32 bits there.
TOLERANCES = {32: 1e-5, 8: 1e-3}
# Of a moment that is rounded to a map, relative to its largest element: half a step of the signed one.
SIGNED_MAP_TOLERANCE = 0.008
# bitsandbytes computes its maps in float32: up to 2 ulp from ours.
MAP_TOLERANCE = 3e-7


def make_params():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups_of(params):
    return [{"params": params[:1], "lr": 1e-3}, {"params": params[1:]}]


def train(optimizer, steps):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) + 0.3
        optimizer.step()
    return optimizer


def copied(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def nested(state):
    return state["__bnb_optimizer_quant_state__"]


def assert_near(actual, expected, tolerance):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a - e).abs().max() / e.abs().max()
        assert error <= tolerance, f"tensor {i} is {error:.3g} off"


def moments(optimizer):
    """m1, m2 and nu of every parameter of a bitsandbytes optimizer, dequantized by bitsandbytes."""
    for state in optimizer.state.values():
        tensors = [state["state1"][0], state["state1"][1], state["state2"]]
        if tensors[0].dtype == torch.uint8:
            absmaxs, maps = [*state["absmax1"], state["absmax2"]], [*[state["qmap1"]] * 2, state["qmap2"]]
            yield [
                bnb.functional.dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=256)
                for codes, absmax, qmap in zip(tensors, absmaxs, maps, strict=True)
            ]
        else:
            yield tensors


def moments_as_loaded(state_dict, params):
    """The same of a state dict of ours, dequantized by loading it into a 32-bit optimizer."""
    optimizer = AdEMAMix(groups_of(copied(params)))
    optimizer.load_state_dict(state_dict)
    for state in optimizer.state.values():
        yield [state["exp_avg"], state["exp_avg_slow"], state["exp_avg_sq"]]


@pytest.mark.parametrize("options", [{}, {"t_alpha": 25, "t_beta3": 20}], ids=["constant", "schedules"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optim_bits", [32, 8])
@pytest.mark.parametrize("direction", ["from", "to"])
def test_goes_on_as_before(direction, optim_bits, weight_decay, options):
    """The one goes on from the other's checkpoint as the other does itself."""
    options = {**OPTIONS, **options, "weight_decay": weight_decay, "optim_bits": optim_bits}
    # 8 bits as bitsandbytes has them.
    storage = {} if optim_bits == 32 else {"slow_ema_bits": 8, "stochastic_rounding": False}
    params = make_params()
    if direction == "from":
        before = train(bnb.optim.AdEMAMix(groups_of(params), **options), range(10))
        after_params = copied(params)
        after = AdEMAMix(groups_of(after_params), optim_bits=optim_bits, **storage)
        after.load_state_dict(from_bitsandbytes(before.state_dict()))
    else:
        before = train(AdEMAMix(groups_of(params), **options, **storage), range(10))
        after_params = copied(params)
        after = bnb.optim.AdEMAMix(groups_of(after_params), optim_bits=optim_bits)
        after.load_state_dict(to_bitsandbytes(before.state_dict()))
    train(before, range(10, 30))
    train(after, range(10, 30))
    assert_near(after_params, params, TOLERANCES[optim_bits])


@pytest.mark.parametrize("cls", ["AdEMAMix8bit", "PagedAdEMAMix8bit", "AdEMAMix", "PagedAdEMAMix"])
def test_reads_its_values(cls):
    params = make_params()
    theirs = train(getattr(bnb.optim, cls)(groups_of(params)), range(10))
    ours = from_bitsandbytes(theirs.state_dict())
    assert all("exp_avg_absmax" not in state for state in ours["state"].values())
    for actual, expected in zip(moments_as_loaded(ours, params), moments(theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=MAP_TOLERANCE, atol=0)


@pytest.mark.parametrize("slow_ema_bits", [8, 16])
@pytest.mark.parametrize("cls", ["AdEMAMix8bit", "PagedAdEMAMix8bit", "AdEMAMix", "PagedAdEMAMix"])
def test_is_read_as_the_same_values(cls, slow_ema_bits):
    params = make_params()
    ours = train(AdEMAMix(groups_of(params), optim_bits=8, slow_ema_bits=slow_ema_bits), range(10))
    exported = to_bitsandbytes(ours.state_dict())
    theirs = getattr(bnb.optim, cls)(groups_of(copied(params)))
    theirs.load_state_dict(copy.deepcopy(exported))
    for i, state in enumerate(theirs.state.values()):
        assert state["step"] == 10
        assert state["state1"].dtype == (torch.uint8 if i in EXPORTED_IN_8_BITS else torch.float32)
    actual, expected = moments(theirs), moments_as_loaded(ours.state_dict(), params)
    for i, (values, exact) in enumerate(zip(actual, expected, strict=True)):
        if i in EXPORTED_IN_8_BITS:
            assert_near(values, exact, SIGNED_MAP_TOLERANCE)
        else:
            assert_identical(values, exact)
    train(theirs, range(10, 12))


def test_there_and_back():
    """What bitsandbytes writes after reading our state is that state."""
    params = make_params()
    ours = train(AdEMAMix(groups_of(params), optim_bits=8, slow_ema_bits=8), range(10))
    theirs = bnb.optim.AdEMAMix8bit(groups_of(copied(params)))
    exported = to_bitsandbytes(ours.state_dict())
    theirs.load_state_dict(exported)
    assert_identical(from_bitsandbytes(theirs.state_dict())["state"], from_bitsandbytes(exported)["state"])
    assert theirs.state_dict()["param_groups"] == exported["param_groups"]
    assert theirs.state_dict()["param_groups"][0].keys() == bnb.optim.AdEMAMix8bit(params).param_groups[0].keys()

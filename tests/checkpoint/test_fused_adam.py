"""The interface of Transformer Engine's FusedAdam that Megatron gets; test_megatron.py has Megatron itself."""

import pytest
import torch

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.checkpoint import to_apertus
from torch_ademamix.megatron.fused_adam import make_class

SHAPES = [(20, 30), (513,), (7,)]
OPTIONS = {"alpha": 8.0, "t_alpha": 9}


def make(bits=32, requires_grad=False, betas=(0.9, 0.99), **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in SHAPES]
    storage = {"min_8bit_size": 0} if bits == 8 else {}
    cls = make_class(AdEMAMix8bit if bits == 8 else AdEMAMix, 0.999, {**OPTIONS, **storage, **options})
    groups = [{"params": params[:2], "wd_mult": 1.0}, {"params": params[2:], "wd_mult": 0.0}]
    return cls(groups, lr=0.01, weight_decay=0.1, betas=betas, eps=1e-8, adam_w_mode=True)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_portable_state_dicts(bits, beta1):
    """Float32 moments of the parameters' shapes, and one step per group."""
    optimizer = train(make(bits, betas=(beta1, 0.99)), range(5))
    state_dict = optimizer.state_dict()
    names = {"exp_avg_slow", "exp_avg_sq"} | ({"exp_avg"} if beta1 else set())
    for state, shape in zip(state_dict["state"].values(), SHAPES, strict=True):
        assert state.keys() == names
        assert {(value.dtype, tuple(value.shape)) for value in state.values()} == {(torch.float32, shape)}
    assert [(group["step"], group["wd_mult"]) for group in state_dict["param_groups"]] == [(5, 1.0), (5, 0.0)]
    resumed = make(bits, betas=(beta1, 0.99))
    for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
        p.copy_(q)
    resumed.load_state_dict(state_dict)
    optimizer.portable = resumed.portable = False
    assert_identical(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert_identical(params_of(train(resumed, range(5, 9))), params_of(train(optimizer, range(5, 9))))


def test_state_dict_of_fused_adam():
    moments = [{name: torch.rand(shape) for name in ("exp_avg", "exp_avg_sq")} for shape in SHAPES]
    group = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0, "bias_correction": True, "step": 7}
    groups = [{**group, "params": [0, 1], "wd_mult": 1.0}, {**group, "params": [2], "wd_mult": 0.0}]
    optimizer = make()
    optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})
    for p, expected in zip(params_of(optimizer), moments, strict=True):
        state = optimizer.state[p]
        assert_identical({name: state[name] for name in expected}, expected)
        assert state["step"] == 7
        assert not state["exp_avg_slow"].any()
    loaded = optimizer.param_groups[0]
    assert (loaded["lr"], loaded["betas"], loaded["schedule_start"]) == (0.5, (0.8, 0.9, 0.999), 7)
    assert (loaded["alpha"], loaded["t_alpha"]) == (8.0, 9)
    assert "bias_correction" not in loaded


def test_state_dict_of_the_apertus_fork():
    optimizer = train(make(), range(3))
    optimizer.portable = False
    native = optimizer.state_dict()
    for group in native["param_groups"]:
        del group["step"]
    other = make()
    other.load_state_dict(to_apertus(native))
    other.portable = False
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])
    assert other.param_groups[0]["t_alpha"] == 9


@pytest.mark.parametrize("bits", [32, 8])
def test_fused_adams_methods(bits):
    optimizer = make(bits)
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    assert len(optimizer.state) == len(SHAPES)
    p = train(optimizer, range(2)).param_groups[0]["params"][0]
    value = torch.rand_like(p)
    before = optimizer.get_unscaled_state(p, "exp_avg").clone()
    optimizer.set_scaled_state(p, "exp_avg_slow", value)
    torch.testing.assert_close(optimizer.get_unscaled_state(p, "exp_avg_slow"), value, rtol=0, atol=1e-4)
    assert_identical(optimizer.get_unscaled_state(p, "exp_avg"), before)
    for call in (
        lambda: optimizer.get_unscaled_state(p, "master_param"),
        lambda: optimizer.set_scaled_state(p, "master_param", value),
        lambda: optimizer.initialize_state(p, store_param_remainders=True),
    ):
        with pytest.raises(NotImplementedError, match="leave use_precision_aware_optimizer off"):
            call()


def test_errors():
    optimizer = train(make(), range(1))
    params_of(optimizer)[0].grad = None
    optimizer.step()
    with pytest.raises(ValueError, match="parameters have done 1, 2 steps, but Megatron's checkpoints have one step"):
        optimizer.state_dict()
    cls = make_class(AdEMAMix, 0.999, {})
    with pytest.raises(ValueError, match="decoupled_weight_decay is False"):
        cls([torch.ones(2)], adam_w_mode=False)
    with pytest.raises(NotImplementedError, match="leave optimizer_cuda_graph off"):
        cls([torch.ones(2)], capturable=True)
    with pytest.raises(NotImplementedError, match="Megatron asks for exp_avg_dtype, master_weights"):
        cls([torch.ones(2)], exp_avg_dtype=torch.bfloat16, master_weights=True)


def test_state_of_frozen_parameters():
    frozen, integers = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    optimizer = AdEMAMix([frozen])
    optimizer.init_state()
    assert len(optimizer.state) == 0
    optimizer.init_state(include_frozen=True)
    assert optimizer.state[frozen]["step"] == 0
    frozen.grad = torch.ones(3)
    before = optimizer.state[frozen]["exp_avg"]
    optimizer.step()
    assert optimizer.state[frozen]["exp_avg"] is before
    assert before.any()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] has dtype torch.int32"):
        AdEMAMix([integers]).init_state(include_frozen=True)

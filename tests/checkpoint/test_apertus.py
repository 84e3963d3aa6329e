"""Against the AdEMAMix class of the Megatron-LM fork that trained Apertus, and its state dicts."""

import copy
import math

import pytest
import torch

from tests.helpers.config import assert_identical, ulp
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.checkpoint import from_apertus, from_apple, to_apertus

SHAPES = [(17, 300), (300,), (40, 256)]
ULPS = 2  # of a weight, or of its change if that is larger, after one step in another order of operations


class Apertus(torch.optim.Optimizer):
    """The paper's update as the fork keeps its state: names of its own, the step in the group, no exp_avg at β1 = 0."""

    def __init__(self, params, **options):
        super().__init__(params, {**options, "step": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            t = group["step"] = group["step"] + 1
            beta1, beta2, beta3 = group["betas"]
            alpha, warmup = group["alpha"], group["alpha_warmup"]
            if warmup is not None and t < warmup:
                alpha = t / warmup * alpha
            warmup = group["beta3_warmup"]
            if warmup is not None and t < warmup:
                first, last = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))
                beta3 = 0.5 ** (1 / (first + t / warmup * (last - first) + 1))
            for p in group["params"]:
                g, state = p.grad, self.state[p]
                if not state:
                    names = (
                        ("exp_avg_slow", "exp_avg_sq") if beta1 == 0 else ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
                    )
                    state.update({name: torch.zeros_like(p) for name in names})
                state["exp_avg_slow"].mul_(beta3).add_(g, alpha=1 - beta3)
                state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                if beta1 != 0:
                    state["exp_avg_fast"].mul_(beta1).add_(g, alpha=1 - beta1)
                m1 = state.get("exp_avg_fast", g) / (1 - beta1**t)
                denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**t) + group["eps"]
                p.sub_(group["lr"] * ((m1 + alpha * state["exp_avg_slow"]) / denominator + group["weight_decay"] * p))


def make_params():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups_of(params):
    return [{"params": params[:1], "wd_mult": 1.0}, {"params": params[1:], "weight_decay": 0.0, "wd_mult": 0.0}]


def make_apertus(params, beta1=0.9, warmup=-1):
    options = dict(lr=1e-3, alpha=8.0, weight_decay=0.1, eps=1e-8, alpha_warmup=warmup, beta3_warmup=warmup)
    return Apertus(groups_of(params), betas=(beta1, 0.999, 0.9999), **options)


def make_ours(params, beta1=0.9, cls=AdEMAMix, **options):
    options = {"lr": 1e-3, "alpha": 8.0, "weight_decay": 0.1, **options}
    return cls(groups_of(params), betas=(beta1, 0.999, 0.9999), **options)


def train(optimizer, steps):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("warmup", [None, -1])
def test_weights_stay_together_over_50_steps(beta1, warmup):
    theirs, ours = make_params(), make_params()
    train(make_apertus(theirs, beta1, warmup), range(50))
    train(make_ours(ours, beta1), range(50))
    for p, q in zip(theirs, ours, strict=True):
        assert (p - q).abs().max() <= 1e-6


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("warmup", [-1, 0, None, 1000])
def test_a_converted_state_dict_goes_on(beta1, warmup):
    theirs = make_params()
    apertus = train(make_apertus(theirs, beta1, warmup), range(10))
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = make_ours(ours, beta1)
    optimizer.load_state_dict(from_apertus(apertus.state_dict()))
    assert optimizer.param_groups[1]["wd_mult"] == 0.0
    assert [group["t_alpha"] for group in optimizer.param_groups] == [1000 if warmup == 1000 else None] * 2
    before = copy.deepcopy(ours)
    train(apertus, [10])
    train(optimizer, [10])
    for p, q, old in zip(theirs, ours, before, strict=True):
        size = torch.maximum(p.abs(), (p - old).abs()).detach().double()
        if warmup == 1000:  # the fork's β3 is larger, since it adds 1e-8 inside its logarithms
            size = size.max()
        assert ((p - q).double().abs() <= ULPS * ulp(size, torch.float32)).all()


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("warmup", [-1, 1000])
def test_there_and_back(beta1, warmup):
    state_dict = train(make_apertus(make_params(), beta1, warmup), range(3)).state_dict()
    optimizer = make_ours(make_params(), beta1)
    optimizer.load_state_dict(from_apertus(state_dict))
    assert_identical(to_apertus(optimizer.state_dict()), state_dict)


def test_8_bit_state_there_and_back():
    optimizer = train(make_ours(make_params(), cls=AdEMAMix8bit, min_8bit_size=0, weight_decay=0.0), range(3))
    exported = to_apertus(optimizer.state_dict())
    assert {value.dtype for state in exported["state"].values() for value in state.values()} == {torch.float32}
    other = make_ours(make_params(), cls=AdEMAMix8bit, min_8bit_size=0)
    other.load_state_dict(from_apertus(exported))
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_errors():
    apertus = train(make_apertus(make_params()), range(2)).state_dict()
    optimizer = make_ours(make_params())
    with pytest.raises(ValueError, match="from_apertus"):
        optimizer.load_state_dict(apertus)
    with pytest.raises(ValueError, match=r"has no 'step', .* load a state dict of the Apertus fork .*\.from_apertus"):
        from_apple(apertus)
    apple = copy.deepcopy(apertus)
    for group in apple["param_groups"]:
        del group["step"]
    for state in apple["state"].values():
        state["step"] = 2
    with pytest.raises(ValueError, match=r"group without 'step'.*\.from_apple"):
        from_apertus(apple)
    no_m1 = copy.deepcopy(apertus)
    del no_m1["state"][0]["exp_avg_fast"]
    with pytest.raises(ValueError, match=r"\['exp_avg_fast'\] is a NoneType, but must be a tensor"):
        from_apertus(no_m1)

    params = make_params()
    optimizer = make_ours(params)
    train(optimizer, range(1))
    params[1].grad = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"\['param_groups'\]\[1\] have done 1, 2 steps, but"):
        to_apertus(optimizer.state_dict())
    maximizing = train(make_ours(make_params(), maximize=True), range(1)).state_dict()
    with pytest.raises(ValueError, match="the Apertus fork only minimizes"):
        to_apertus(maximizing)
    late = train(make_ours(make_params(), schedule_start=1, t_alpha=5), range(1)).state_dict()
    with pytest.raises(ValueError, match="the Apertus fork counts its schedules from the first step"):
        to_apertus(late)

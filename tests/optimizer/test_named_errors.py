"""Errors of a step and of a state dict name the group and the parameter, and nothing has changed then."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix

FORMATS = {"32-bit": {}, "8-bit": dict(optim_bits=8, min_8bit_size=0)}
GROUP_1 = r"param_groups\[1\]\['params'\]\[0\]"


def named_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    groups = [{"params": list(layer.named_parameters(prefix=f"{i}"))} for i, layer in enumerate(model)]
    return model, groups


def train(model, optimizer, steps=1):
    x = torch.linspace(-1, 1, 64).view(4, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def test_frozen_parameters_that_get_a_gradient():
    p = nn.Parameter(torch.ones(8))
    frozen = nn.Parameter(torch.ones(1).expand(8), requires_grad=False)
    optimizer = AdEMAMix([{"params": [("fine", p)]}, {"params": [("tied", frozen)]}])
    frozen.requires_grad_()
    p.grad, frozen.grad = torch.ones(8), torch.ones(8)
    with pytest.raises(ValueError, match=rf"{GROUP_1} \(tied\) has elements that share memory"):
        optimizer.step()
    assert_identical(p.data, torch.ones(8))


def spoil_shape(p, state):
    p.data = torch.ones(3)


def spoil_grad(p, state):
    p.grad = torch.ones(4).to_sparse()


def spoil_state(p, state):
    state["exp_avg"] = state["exp_avg"].double()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_shape, r"grad has shape \[4\], but param has shape \[3\]"),
        (spoil_grad, "has layout torch.sparse_coo"),
        (spoil_state, "exp_avg has dtype torch.float64"),
    ],
)
def test_a_refused_step(spoil, match, options):
    """It says which parameter, and has changed none, so that the loop may go on with the next one."""
    model, groups = named_model()
    optimizer = AdEMAMix(groups, **options)
    train(model, optimizer)
    p = model[1].bias
    state = optimizer.state[p]
    good = p.data, p.grad, state["exp_avg"]
    spoil(p, state)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=rf"param_groups\[1\]\['params'\]\[1\] \(1.bias\).* {match}"):
        optimizer.step()
    assert_identical(snapshot(model, optimizer), before)
    p.data, p.grad, state["exp_avg"] = good
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_refused_options_and_state_say_whose_they_are():
    model, groups = named_model()
    with pytest.raises(ValueError, match=r"param_groups\[1\]: alpha is -1"):
        AdEMAMix([groups[0], {**groups[1], "alpha": -1}])
    optimizer = AdEMAMix(groups)
    train(model, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][2]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"{GROUP_1} \(1.weight\): state_dict\['state'\]\[2\]\['exp_avg'\] has shape"):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[1]["alpha"] = -1
    with pytest.raises(ValueError, match=r"param_groups\[1\]: alpha is -1"):
        optimizer.step()


def test_a_step_that_is_no_tensor():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([("weight", p)])
    optimizer.init_state()
    optimizer.state[p]["step"] = 5
    p.grad = torch.ones(3)
    match = r"the step of param_groups\[0\]\['params'\]\[0\] \(weight\) is a int, but must be a tensor"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_state_that_is_incomplete():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p])
    optimizer.init_state()
    del optimizer.state[p]["exp_avg_sq"]
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"the state of param_groups\[0\]\['params'\]\[0\] has no exp_avg_sq"):
        optimizer.step()


@pytest.mark.parametrize("lost", ["exp_avg_sq", "step", ""], ids=lambda name: name or "all")
def test_flat_state_dicts_with_missing_state(lost):
    model, groups = named_model()
    optimizer = AdEMAMix(groups)
    train(model, optimizer)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    saved = {name: value for name, value in saved.items() if not name.startswith(f"state.1.bias.{lost}")}
    with pytest.raises(ValueError, match=rf"\(1.bias\): state_dict\['state'\]\['1.bias'\] has no .*{lost}"):
        set_optimizer_state_dict(model, optimizer, saved, options=flat)


@pytest.mark.parametrize(
    ("state_dict", "error"),
    [("checkpoint.pt", TypeError), (None, TypeError), ({"state": {}}, ValueError), ({"model": {}}, ValueError)],
    ids=repr,
)
def test_what_is_no_state_dict(state_dict, error):
    optimizer = AdEMAMix([nn.Parameter(torch.ones(3))])
    with pytest.raises(error, match=r"state_dict .*must be what an optimizer's state_dict"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("step", [None, [3], {"a": 3}], ids=repr)
def test_saved_steps_that_are_no_numbers(step):
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p])
    optimizer.init_state()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["step"] = step
    with pytest.raises(ValueError, match=rf"\['step'\] is a {type(step).__name__}, but must be a number or a tensor"):
        optimizer.load_state_dict(state_dict)

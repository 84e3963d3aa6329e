"""Making, copying and loading optimizers: numbers of other libraries, lazy modules, meta, fake tensors, Dynamo."""

import copy
from collections.abc import Sequence

import numpy
import pytest
import torch
from config import assert_identical
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torch_ademamix import AdEMAMix, AdEMAMix8bit, compile_train_step

EVERY_CLASS = pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])


class ConfigurationList(Sequence):
    """As OmegaConf's ListConfig: no list, and not to be loaded by torch.load's default."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


FOREIGN = {
    "lr": numpy.float64(1e-2),
    "betas": ConfigurationList(0.9, numpy.float32(0.5), numpy.float64(0.75)),
    "alpha": numpy.float32(4),
    "t_alpha": numpy.int64(30),
    "t_beta3": numpy.array(20),
    "weight_decay": numpy.float64(0.25),
    "maximize": numpy.bool_(True),
    "seed": numpy.int32(3),
}
PLAIN = {
    "lr": 1e-2,
    "betas": (0.9, 0.5, 0.75),
    "alpha": 4.0,
    "t_alpha": 30,
    "t_beta3": 20,
    "weight_decay": 0.25,
    "maximize": True,
    "seed": 3,
}


def assert_plain(group):
    for name, value in PLAIN.items():
        assert (group[name], type(group[name])) == (value, type(value))
    assert {type(beta) for beta in group["betas"]} == {float}


def at_construction(p):
    return AdEMAMix([p], **FOREIGN)


def in_a_group(p):
    return AdEMAMix([{"params": [p], **FOREIGN}])


def added(p):
    optimizer = AdEMAMix([nn.Parameter(torch.ones(1))])
    optimizer.add_param_group({"params": [p], **FOREIGN})
    return optimizer


def loaded(p):
    optimizer = AdEMAMix([p])
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0].update(FOREIGN)
    optimizer.load_state_dict(state_dict)
    return optimizer


def set_before_a_step(p):
    """As training loops set the learning rates of a schedule that numpy computes."""
    optimizer = AdEMAMix([p])
    optimizer.param_groups[0].update(FOREIGN)
    return optimizer


@pytest.mark.parametrize("make", [at_construction, in_a_group, added, loaded, set_before_a_step])
def test_foreign_numbers_become_plain(make, tmp_path):
    p = nn.Parameter(torch.ones(3))
    optimizer = make(p)
    if make is not set_before_a_step:
        assert_plain(optimizer.param_groups[-1])
    assert_plain(optimizer.state_dict()["param_groups"][-1])
    p.grad = torch.ones(3)
    optimizer.step()
    assert_plain(optimizer.param_groups[-1])
    torch.save(optimizer.state_dict(), tmp_path / "file")
    optimizer.load_state_dict(torch.load(tmp_path / "file", weights_only=True))


@pytest.mark.parametrize("make", [at_construction, set_before_a_step])
def test_a_compiled_step_takes_foreign_numbers(make):
    expected, p = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, plain = make(p), AdEMAMix([expected], **PLAIN)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for q, update in ((p, step), (expected, plain.step)):
        q.grad = torch.ones(3)
        update()
    assert_identical(p.detach(), expected.detach())


class TestPositionalOrder:
    """bitsandbytes' order works; AdamW's raises."""

    p = nn.Parameter(torch.ones(3))

    def test_of_bitsandbytes(self):
        optimizer = AdEMAMix([self.p], 1e-3, (0.9, 0.99, 0.999), 5.0, 100, 200, 1e-7, 0.1, 8)
        values = {"alpha": 5.0, "t_alpha": 100, "t_beta3": 200, "eps": 1e-7, "weight_decay": 0.1, "optim_bits": 8}
        assert {name: optimizer.param_groups[0][name] for name in values} == values

    @pytest.mark.parametrize("rest", [(1e-8,), (1e-3, 0), (1e-8, 0.1), (1e-6, 0.01, False)])
    def test_of_adamw(self, rest):
        with pytest.raises(ValueError, match=r"alpha is .*must be 0 or above 0.001: .*lr, betas, alpha, .*by name"):
            AdEMAMix([self.p], 1e-3, (0.9, 0.99, 0.999), *rest)

    @pytest.mark.parametrize("name", ["t_alpha", "t_beta3"])
    def test_steps_below_one(self, name):
        with pytest.raises(ValueError, match=rf"{name} is 0.1, but must be None, 0 or at least 1 step: .*by name"):
            AdEMAMix([self.p], **{name: 0.1})

    def test_in_a_group(self):
        optimizer = AdEMAMix([self.p])
        with pytest.raises(ValueError, match=r"param_groups\[1\]: alpha is 1e-08, but must be 0 or above 0.001"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "alpha": 1e-8})
        assert len(optimizer.param_groups) == 1

    def test_plain_adamw_is_allowed(self):
        AdEMAMix([self.p], alpha=0, t_alpha=0, t_beta3=0)

    def test_small_alphas(self):
        """With kappa, which no position is for, and in the groups of an optimizer that a schedule writes to."""
        p = nn.Parameter(torch.ones(3))
        optimizer = AdEMAMix([p], alpha=1e-3, kappa=0.85)
        optimizer.param_groups[0].update(alpha=1e-8, kappa=None)
        p.grad = torch.ones_like(p)
        optimizer.step()


@EVERY_CLASS
@pytest.mark.parametrize("steps_before", [0, 1])
def test_lazy_parameters(cls, steps_before):
    """They are given to the optimizer before the first batch makes them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(600))
    optimizer = cls(model.parameters(), lr=1e-2)
    optimizer.init_state(include_frozen=True)
    for _ in range(steps_before):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    x = torch.ones(2, 4)
    model(x)
    plain = copy.deepcopy(model)
    expected = cls(plain.parameters(), lr=1e-2)
    for one, o in ((model, optimizer), (plain, expected)):
        for _ in range(3):
            o.zero_grad()
            one(x).square().sum().backward()
            o.step()
    assert_identical(model.state_dict(), plain.state_dict())
    fresh = cls(nn.Sequential(nn.Linear(4, 8), nn.LazyLinear(600)).parameters())
    with pytest.raises(ValueError, match=r"\['params'\]\[2\]: is not initialized yet: call its lazy module once"):
        fresh.load_state_dict(optimizer.state_dict())


def test_a_group_that_fails_is_not_added(monkeypatch):
    """Whatever the error is."""
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p])
    bad = [nn.Parameter(torch.ones(3).to_sparse()), torch.ones(3, requires_grad=True) * 2, p, "text"]
    for params in bad:
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group({"params": [params]})
        assert len(optimizer.param_groups) == 1

    def fails(*_):
        raise RuntimeError("of another kind")

    monkeypatch.setattr("torch_ademamix.optimizer.check_params", fails)
    with pytest.raises(RuntimeError, match="of another kind"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    monkeypatch.undo()
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def made(cls, **options):
    torch.manual_seed(0)
    model = nn.Linear(64, 128)
    return model, cls(model.parameters(), lr=1e-2, **options)


def train(model, optimizer, steps=1):
    x = torch.ones(1, 64, device="cpu")
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@EVERY_CLASS
@pytest.mark.parametrize("options", [{}, {"capturable": True, "max_grad_norm": 0.1}], ids=["", "capturable"])
def test_under_a_meta_default_device(cls, options):
    """torchtitan and others make everything under it; the optimizer's numbers go where its parameters are."""
    expected_model, expected = made(cls, **options)
    train(expected_model, expected, 3)
    model, optimizer = made(cls)
    with torch.device("meta"):
        optimizer = cls(model.parameters(), lr=1e-2, **options)
        train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 1.0
    for entry in saved["state"][1]:
        saved["state"][1][entry] = saved["state"][1][entry].to(memory_format=torch.contiguous_format, copy=True)
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
        train(model, optimizer)
        new = cls(model.parameters(), lr=1e-2, **options)
        new.load_state_dict(optimizer.state_dict())
    train(model, new)
    assert_identical(model.state_dict(), expected_model.state_dict())
    assert_identical(new.state_dict(), expected.state_dict())


@EVERY_CLASS
def test_a_whole_step_under_a_meta_default_device(cls):
    expected_model, expected = made(cls)
    train(expected_model, expected, 2)
    model, optimizer = made(cls)
    x = torch.ones(1, 64)
    with torch.device("meta"):
        step = compile_train_step(model, optimizer, lambda model, x: model(x).square().mean(), backend="aot_eager")
        for _ in range(2):
            step(x)
    assert_identical(model.state_dict(), expected_model.state_dict())


def cloned(state_dict):
    """deepcopy fails under a FakeTensorMode."""
    return {
        **state_dict,
        "state": {i: {name: t.clone() for name, t in state.items()} for i, state in state_dict["state"].items()},
    }


@EVERY_CLASS
def test_loading_under_fake_tensor_mode(cls):
    """As estimators of memory do; what is real stays so."""
    real_model, real = made(cls)
    train(real_model, real)
    saved = copy.deepcopy(real.state_dict())
    with FakeTensorMode():
        model, optimizer = made(cls)
        optimizer.load_state_dict(saved)
        train(model, optimizer)
        optimizer.load_state_dict(cloned(optimizer.state_dict()))
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        assert all(isinstance(t, FakeTensor) for t in tensors)
    train(real_model, real)
    with FakeTensorMode():
        real.load_state_dict(saved)
    assert_identical(real.state_dict(), saved)


def test_a_state_dict_hook_that_returns_another_structure():
    _, optimizer = made(AdEMAMix)
    optimizer.init_state()
    types = []

    def wrap(_, state_dict):
        types.append({type(state) for state in state_dict["state"].values()})
        return {"optimizer": state_dict, "version": 1}

    optimizer.register_state_dict_post_hook(wrap)
    wrapped = optimizer.state_dict()
    assert wrapped.keys() == {"optimizer", "version"}
    assert types == [{dict}]
    other = made(AdEMAMix)[1]
    other.load_state_dict(wrapped["optimizer"])
    assert len(other.state) == 2


@EVERY_CLASS
def test_optimizers_are_made_and_copied_in_a_compiled_function(cls):
    model, _ = made(cls)

    @torch.compile(backend="aot_eager")
    def make(x):
        optimizer = cls(model.parameters(), lr=1e-2)
        return optimizer, x + 1

    @torch.compile(backend="aot_eager")
    def copy_of(optimizer, x):
        return copy.deepcopy(optimizer), x + 1

    optimizer, _ = make(torch.ones(1))
    train(model, optimizer)
    assert optimizer.state[model.weight]["step"] == 1
    copied, _ = copy_of(optimizer, torch.ones(1))
    assert_identical(copied.state_dict(), optimizer.state_dict())
    copied.step()

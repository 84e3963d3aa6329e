"""Making, copying and loading optimizers: numbers of other libraries, lazy modules, meta, fake tensors, Dynamo."""

import copy
import inspect
from collections.abc import Sequence

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.helpers.config import assert_identical
from torch_ademamix import (
    ADANA,
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
    compile_train_step,
)

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


RELATIVES = {
    # class: the arguments that it fixes
    AdEMAMix32bit: {"optim_bits": 32},
    AdEMAMix8bit: {"optim_bits": 8},
    PagedAdEMAMix: {"is_paged": True},
    PagedAdEMAMix32bit: {"optim_bits": 32, "is_paged": True},
    PagedAdEMAMix8bit: {"optim_bits": 8, "is_paged": True},
    ADANA: {"betas": (0.0, 0.999, 0.9999), "t_alpha": None, "t_beta3": None, "log_time_beta2": True},
}
EVERY_RELATIVE = pytest.mark.parametrize(("cls", "fixed"), RELATIVES.items(), ids=lambda x: getattr(x, "__name__", ""))
OTHER_DEFAULTS = {ADANA: {"alpha": 1.0, "delta": 8.0, "kappa": 0.85}}


@EVERY_RELATIVE
def test_signatures(cls, fixed):
    """Those of relatives are AdEMAMix's without what they fix: positions, types and defaults."""
    defaults = OTHER_DEFAULTS.get(cls, {})
    expected = [
        argument.replace(default=defaults.get(argument.name, argument.default))
        for argument in inspect.signature(AdEMAMix).parameters.values()
        if argument.name not in fixed
    ]
    assert [*inspect.signature(cls).parameters.values()] == expected
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        cls([nn.Parameter(torch.ones(3))], **fixed)


@EVERY_RELATIVE
def test_each_argument_arrives(cls, fixed):
    values = {
        **dict(lr=0.5, betas=(0.5, 0.6, 0.7), alpha=2.0, t_alpha=3, t_beta3=4, eps=0.25, weight_decay=0.125),
        **dict(min_8bit_size=5, schedule_start=6, t_weight_decay=7.0, slow_ema_bits=12, stochastic_rounding=False),
        **dict(seed=8, master_weights="remainder8", maximize=True),
    }
    others = {"delta": 9.0, "kappa": 0.75, "t_alpha": None, "t_beta3": None, "param_rounding": "stochastic"}
    others |= {"log_time_beta2": True, "master_weights": None, "optim_bits": 8, "is_paged": True, "capturable": True}
    for options in (values, others):
        given = {name: value for name, value in options.items() if name not in fixed}
        group = cls([nn.Parameter(torch.ones(3))], **given, max_grad_norm=0.5).param_groups[0]
        assert {name: group[name] for name in (*given, *fixed)} == {**given, **fixed}
    assert cls([nn.Parameter(torch.ones(3))], max_grad_norm=0.5).max_grad_norm == 0.5


WRONG_CALLS = {
    "AdEMAMix8bit(params, optim_bits=32)": 'Unexpected keyword argument "optim_bits"',
    "PagedAdEMAMix32bit(params, is_paged=True)": 'Unexpected keyword argument "is_paged"',
    "ADANA(params, betas=(0.9, 0.999, 0.999))": 'Unexpected keyword argument "betas"',
    "AdEMAMix32bit(params, 'high')": 'Argument 2 to "AdEMAMix32bit" has incompatible type "str"',
    "AdEMAMix(params, betas=(0.9, 0.999))": 'Argument "betas" to "AdEMAMix" has incompatible type',
}
RIGHT_CALLS = [
    "AdEMAMix(params, fused=True, **recommended(100))",
    "PagedAdEMAMix8bit(params, 1e-3, (0.9, 0.99, 0.999), 5.0, 100, 200, 1e-7, 0.1, 4096, seed=1)",
]


def test_type_checkers_know_the_arguments(tmp_path):
    api = pytest.importorskip("mypy.api", reason="comes with the extra `dev`")
    calls = [*WRONG_CALLS, *RIGHT_CALLS]
    text = ["import torch", "from torch_ademamix import *", "params = [torch.ones(2)]", *calls]
    (tmp_path / "calls.py").write_text("\n".join(text))
    out, _, _ = api.run(["--strict", "--no-error-summary", "--hide-error-context", str(tmp_path / "calls.py")])
    errors = [line for line in out.splitlines() if "error:" in line]
    assert len(errors) == len(WRONG_CALLS), out
    for error, expected in zip(errors, WRONG_CALLS.values(), strict=True):
        assert expected in error


class TestAdamWArguments:
    """`foreach`, `fused` and what configurations set to False are accepted; what AdEMAMix doesn't have raises."""

    @pytest.mark.parametrize("cls", [AdEMAMix, *RELATIVES])
    @pytest.mark.parametrize("value", [True, False, None])
    def test_foreach_and_fused(self, cls, value):
        p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer, expected = cls([p], foreach=value, fused=value, amsgrad=False, differentiable=False), cls([p])
        more = {"fused": value, "foreach": value, "amsgrad": False, "differentiable": False}
        optimizer.add_param_group({"params": [q], **more})
        expected.add_param_group({"params": [q]})
        assert optimizer.state_dict() == expected.state_dict()
        assert optimizer.defaults == expected.defaults

    @pytest.mark.parametrize("cls", [AdEMAMix, *RELATIVES])
    @pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
    def test_what_ademamix_has_not(self, cls, name):
        message = rf"{name} is True, but must be False: .*leave {name} out"
        with pytest.raises(ValueError, match=message):
            cls([nn.Parameter(torch.ones(3))], **{name: True})
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: {message}"):
            cls([{"params": [nn.Parameter(torch.ones(3))], name: True}])

    @pytest.mark.parametrize("betas", [(0.9, 0.95), [0.9, 0.95]])
    def test_two_betas(self, betas):
        message = r"betas is .* append β3, as in betas=\(0.9, 0.95, 0.999\), or pass \*\*torch_ademamix.recommended"
        for make in (
            lambda p: AdEMAMix([p], betas=betas),
            lambda p: AdEMAMix([{"params": [p], "betas": betas}]),
            lambda p: AdEMAMix([p], 1e-3, betas, 1e-8, 0.1),
        ):
            with pytest.raises(ValueError, match=message):
                make(nn.Parameter(torch.ones(3)))

    def test_adamws_state_dict(self):
        p = nn.Parameter(torch.ones(3))
        optimizer = AdEMAMix([p])
        before = optimizer.state_dict()
        with pytest.raises(ValueError, match=r"\['param_groups'\]\[0\]: betas is .*checkpoint.from_adamw"):
            optimizer.load_state_dict(torch.optim.AdamW([p]).state_dict())
        assert optimizer.state_dict() == before


class TestMaxGradNormInAGroup:
    """It was ignored: it is the optimizer's, whose groups are clipped together."""

    message = "max_grad_norm is 0.1, but can't be an option of a group: pass it to the constructor"

    def test_at_construction(self):
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: {self.message}"):
            AdEMAMix([{"params": [nn.Parameter(torch.ones(3))], "max_grad_norm": 0.1}])

    def test_before_a_step(self):
        p = nn.Parameter(torch.ones(3))
        optimizer = AdEMAMix([p])
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["max_grad_norm"] = 0.1
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: {self.message}"):
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

"""Full training steps and gradient release call whatever `step()` is, or raise."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.loops import batch, loss_fn, plain
from torch_ademamix import AdEMAMix, AdEMAMix8bit, capture_train_step, compile_train_step, release_gradients


def make(cls=AdEMAMix, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, cls(model.parameters(), **{"lr": 1e-2, **options})


def compiled(model, optimizer, loss_fn, **more):
    return compile_train_step(model, optimizer, loss_fn, backend="aot_eager", **more)


def captured(model, optimizer, loss_fn, **more):
    return capture_train_step(model, optimizer, loss_fn, batch(99), **more)


@pytest.fixture(params=[compiled, captured])
def make_step(request, monkeypatch):
    stand_in(monkeypatch)
    return request.param


class Centralized(AdEMAMix):
    """Gradient centralization, a cautious decay by the learning rate, and a count that no graph could keep."""

    def step(self, closure=None):
        self.calls = [*getattr(self, "calls", []), self.param_groups[0]["lr"]]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim > 1:
                    p.grad.sub_(p.grad.mean(1, keepdim=True))
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1 - 0.1 * float(self.param_groups[0]["lr"]))
        return super().step(closure)


def doubled(step):
    def twice(self, closure=None):
        step(self, closure)
        return step(self, closure)

    return twice


class Twice(AdEMAMix8bit):
    step = doubled(AdEMAMix.step)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("cls", [Centralized, Twice])
def test_overridden_step_is_called(make_step, cls, scaled):
    """With a float learning rate that changes at each step, more often than Dynamo would compile."""
    results = []
    for of in (plain, make_step):
        model, optimizer = make(cls)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        step = of(model, optimizer, loss_fn, scaler=scaler)
        scheduler = LambdaLR(optimizer, lambda t: 1 / (1 + t))
        losses = []
        for i in range(10):
            losses.append(step(*batch(i)))
            if scaler is not None:
                scaler.update()
            scheduler.step()
        assert all(p.grad is None for p in model.parameters())
        results.append(
            copy.deepcopy((losses, model.state_dict(), optimizer.state_dict(), vars(optimizer).get("calls")))
        )
    assert_identical(results[1], results[0])


def foreign(optimizer):
    optimizer.step = lambda closure=None: None


def foreign_method(optimizer):
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)


def foreign_below_a_scheduler(optimizer):
    foreign_method(optimizer)
    LambdaLR(optimizer, lambda t: 1.0)


FOREIGN = [foreign, foreign_method, foreign_below_a_scheduler]


@pytest.mark.parametrize("replace", FOREIGN)
def test_replaced_step_raises(make_step, replace):
    """Before the training step is made, and after."""
    model, optimizer = make()
    step = make_step(model, optimizer, loss_fn)
    step(*batch(0))
    replace(optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for call in (lambda: step(*batch(1)), lambda: make_step(model, optimizer, loss_fn)):
        with pytest.raises(ValueError, match=r"optimizer\.step was replaced on the instance .* override step\(\)"):
            call()
    assert_identical((model.state_dict(), optimizer.state_dict()), before)
    del optimizer.step
    step(*batch(1))


@pytest.mark.parametrize("replace", FOREIGN)
def test_replaced_step_and_released_gradients(replace):
    model, optimizer = make()
    LambdaLR(optimizer, lambda t: 1.0)
    release_gradients(model, optimizer)
    del optimizer.step
    replace(optimizer)
    with pytest.raises(ValueError, match=r"optimizer\.step was replaced on the instance"):
        loss_fn(model, *batch(0)).backward()
    with pytest.raises(ValueError, match=r"optimizer\.step was replaced on the instance"):
        release_gradients(model, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("cls", [Centralized, Twice])
def test_overridden_step_and_released_gradients(cls):
    with pytest.raises(ValueError, match=r"overrides step\(\), .* keep the standard training loop"):
        release_gradients(*make(cls))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(make_step, context):
    """The plain loop's backward() raises too."""
    model, optimizer = make()
    step = make_step(model, optimizer, loss_fn)
    before = copy.deepcopy(model.state_dict())
    with context(), pytest.raises(RuntimeError, match=r"called under torch\.no_grad or torch\.inference_mode"):
        step(*batch(0))
    assert_identical(model.state_dict(), before)
    step(*batch(0))


def halve(p):
    p.grad.mul_(0.5)


@pytest.mark.parametrize("disable", [lambda: torch._dynamo.config.patch(disable=True), None])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_disabled_compilation_runs_the_plain_loop(disable, accumulate):
    """What TORCH_COMPILE_DISABLE=1 sets, and the stance; hooks are called once."""
    results = []
    for of in (plain, compiled):
        model, optimizer = make(max_grad_norm=0.05)
        model[0].weight.register_hook(lambda grad: 2 * grad)
        optimizer.register_step_pre_hook(lambda optimizer, *_: halve(optimizer.param_groups[0]["params"][1]))
        step = of(model, optimizer, loss_fn, accumulate=accumulate)
        with torch.compiler.set_stance("force_eager") if disable is None else disable():
            losses = [step(*batch(i)) for i in range(3)]
        results.append(copy.deepcopy((losses, model.state_dict(), optimizer.state_dict())))
    assert_identical(results[1], results[0])

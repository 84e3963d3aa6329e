"""Several optimizers in one full training step: as the plain loop steps them, in their order."""

import copy
import warnings

import muon
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.loops import batch, loss_fn
from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step


def plain(model, optimizers, loss_fn, accumulate=1, scaler=None):
    def step(*args):
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = 0
        for part in zip(*(arg.tensor_split(accumulate) for arg in args), strict=True):
            loss = loss_fn(model, *part) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            total = total + loss.detach()
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        for optimizer in optimizers:
            optimizer.zero_grad()
        return total

    return step


def compiled(model, optimizers, loss_fn, **more):
    return compile_train_step(model, optimizers, loss_fn, backend="aot_eager", **more)


def captured(model, optimizers, loss_fn, **more):
    return capture_train_step(model, optimizers, loss_fn, batch(99), **more)


@pytest.fixture(params=[compiled, captured])
def make_step(request, monkeypatch):
    stand_in(monkeypatch)
    return request.param


def make(*makers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, [maker(model) for maker in makers]


def matrices(model):
    return Muon([model[0].weight, model[2].weight], lr=0.02)


def biases(model):
    return SGD([model[0].bias, model[2].bias], lr=0.1, momentum=0.9)


def head(model):
    return AdamW(model[4].parameters(), lr=1e-2)


def vectors_and_head(model):
    params = [model[0].bias, model[2].bias, *model[4].parameters()]
    return AdEMAMix(params, lr=1e-2, t_alpha=15, t_beta3=15, max_grad_norm=0.05)


def head_in_8_bits(model):
    return AdEMAMix(model[4].parameters(), lr=1e-2, optim_bits=8, min_8bit_size=1)


def everything(model, optimizers):
    return copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))


def assert_same_training(
    make_step, makers, prepare=lambda model, optimizers: lambda i: None, steps=6, scale=None, **more
):
    results = []
    for of in (plain, make_step):
        model, optimizers = make(*makers)
        after = prepare(model, optimizers)
        if scale is not None:
            more["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        step = of(model, optimizers, loss_fn, **more)
        losses = []
        for i in range(steps):
            losses.append(step(*batch(i)))
            if scale is not None:
                more["scaler"].update()
            after(i)
        assert all(p.grad is None for p in model.parameters())
        results.append((losses, everything(model, optimizers), more["scaler"].state_dict() if scale else None))
    assert_identical(results[1], results[0])


SETS = {
    "Muon first": (matrices, vectors_and_head),
    "AdEMAMix first": (vectors_and_head, matrices),
    "three": (matrices, biases, head_in_8_bits),
}


@pytest.mark.parametrize("makers", SETS.values(), ids=SETS)
def test_schedulers(make_step, makers):
    """Each with one of its own, of float learning rates."""

    def prepare(model, optimizers):
        schedulers = [OneCycleLR(optimizers[0], 0.03, total_steps=20)]
        schedulers += [CosineAnnealingLR(optimizer, 20) for optimizer in optimizers[1:]]
        return lambda i: [scheduler.step() for scheduler in schedulers]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # also of schedulers that saw no step
        assert_same_training(make_step, makers, prepare, steps=10)


@pytest.mark.parametrize("makers", SETS.values(), ids=SETS)
def test_scaler_and_micro_batches(make_step, makers):
    """Some steps are skipped: each optimizer's by its own gradients."""
    assert_same_training(make_step, makers, steps=8, scale=2.0**127, accumulate=3)


def clip_all(model, optimizers):
    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    optimizers[0].register_step_pre_hook(clip)
    return lambda i: None


def frozen_and_loaded(model, optimizers):
    def after(i):
        model[0].requires_grad_(i % 2 == 0)
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():
            loss_fn(model, *batch(i))

    return after


def group_added_to_the_first(model, optimizers):
    def after(i):
        if i == 2:
            model.append(nn.Linear(1, 1, bias=False))
            optimizers[0].add_param_group({"params": model[-1].parameters(), "lr": 1e-3})

    return after


@pytest.mark.parametrize("prepare", [clip_all, frozen_and_loaded, group_added_to_the_first])
@pytest.mark.parametrize("makers", [SETS["Muon first"], SETS["AdEMAMix first"]], ids=["Muon first", "AdEMAMix first"])
def test_around_the_step(make_step, makers, prepare):
    assert_same_training(make_step, makers, prepare)


def test_shared_parameters(make_step):
    """Stepped twice, in the given order."""

    def all_params(model):
        return AdEMAMix(model.parameters(), lr=1e-2)

    assert_same_training(make_step, (matrices, all_params, head))
    assert_same_training(make_step, (all_params, matrices, head))


def test_parameters_of_no_optimizer_are_told(make_step):
    model, (muon, ademamix) = make(matrices, vectors_and_head)

    def train():
        step = make_step(model, ademamix, loss_fn)
        step(*batch(0))
        ademamix.add_param_group({"params": [model[0].weight]})
        step(*batch(0))

    with pytest.warns(
        UserWarning, match=r"2 parameters of the model \(such as 0.weight\) .* Pass all optimizers"
    ) as told:
        train()
    assert sum(warning.category is UserWarning for warning in told) == 1  # torch warns of Python 3.13.0's guards
    muon.param_groups[0]["params"].pop(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_step(model, [muon, ademamix], loss_fn)
        model[2].weight.requires_grad_(False)
        make_step(model, ademamix, loss_fn)


@pytest.mark.parametrize(
    ("makers", "error", "message"),
    [
        ((matrices, biases), TypeError, "there is no AdEMAMix among the optimizers"),
        ((vectors_and_head, head_in_8_bits), ValueError, "there are 2 AdEMAMix .* make parameter groups of one"),
        ((vectors_and_head, lambda model: 3), TypeError, r"optimizers\[1\] is a int, but must be a torch.optim"),
        (
            (vectors_and_head, lambda model: torch.optim.LBFGS([model[0].weight])),
            ValueError,
            r"optimizers\[1\] is a LBFGS, whose step\(\) needs a closure .* keep the standard training loop",
        ),
        ((), TypeError, "there is no AdEMAMix among the optimizers"),
    ],
)
def test_what_raises(make_step, makers, error, message):
    model, optimizers = make(*makers)
    with pytest.raises(error, match=message):
        make_step(model, optimizers, loss_fn)
    assert not any(optimizer.state for optimizer in optimizers if not isinstance(optimizer, int))


def test_a_scheduler_of_lambdas_sees_every_step(make_step):
    model, optimizers = make(matrices, vectors_and_head)
    step = make_step(model, optimizers, loss_fn)
    schedulers = [LambdaLR(optimizer, lambda t: 0.0 if t >= 2 else 1.0) for optimizer in optimizers]
    for i in range(4):
        if i == 2:
            before = copy.deepcopy(model.state_dict())
        step(*batch(i))
        for scheduler in schedulers:
            scheduler.step()
    assert_identical(model.state_dict(), before)


@pytest.mark.nightly
def test_example(monkeypatch):
    """Eager, compiled and captured, bit for bit."""
    expected, model = muon.train("eager", 12, "cpu")
    assert expected[-1] < 0.8 * expected[0]
    stand_in(monkeypatch)
    for mode, options in (("compiled", {"backend": "aot_eager"}), ("captured", {})):
        losses, trained = muon.train(mode, 12, "cpu", **options)
        assert losses == expected
        assert_identical(trained.state_dict(), model.state_dict())

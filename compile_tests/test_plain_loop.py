"""compile_train_step does what the plain loop does, bit for bit, or refuses."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from tests.helpers.config import assert_identical
from tests.helpers.loops import OPTIONS, ROWS, batch, loss_fn, plain
from torch_ademamix import AdEMAMix, compile_train_step, release_gradients


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, AdEMAMix(model.parameters(), **{"lr": 1e-2, "t_alpha": 15, "t_beta3": 15, **options})


def train(step, steps=12, after=lambda i: None, first=0):
    losses = []
    for i in range(first, first + steps):
        losses.append(step(*batch(i)))
        after(i)
    return losses


def everything(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_same_training(counter, options, prepare=lambda model, optimizer: lambda i: None, graphs=1, **more):
    """With `prepare`, which returns what is done after each step."""
    results = []
    for compiled in (False, True):
        model, optimizer = make(**options)
        after = prepare(model, optimizer)
        if compiled:
            step = compile_train_step(model, optimizer, loss_fn, backend=counter, **more)
        else:
            step = plain(model, optimizer, loss_fn, **more)
        results.append((train(step, after=after), everything(model, optimizer)))
    assert_identical(results[1], results[0])
    assert counter.frame_count == graphs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_scheduler(counter, options):
    """OneCycleLR writes lr and betas; the loop itself the rest."""

    def prepare(model, optimizer):
        scheduler = OneCycleLR(optimizer, 3e-2, total_steps=20, cycle_momentum=True)

        def after(i):
            scheduler.step()
            optimizer.param_groups[0]["weight_decay"] = 0.01 * i
            optimizer.param_groups[0]["alpha"] = 5.0 + i
            optimizer.param_groups[0]["eps"] = 1e-8 * (1 + i)

        return after

    assert_same_training(counter, options, prepare)


@pytest.mark.each_value
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("average", [True, False])
def test_micro_batches(counter, options, average):
    assert_same_training(counter, options, accumulate=3, average=average)


def halve_gradient(p):
    p.grad.mul_(0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parameter_hooks(counter, accumulate):
    """A mask of the gradient, and what comes after its accumulation."""

    def prepare(model, optimizer):
        mask = (torch.arange(8) % 2).float()
        model[0].weight.register_hook(lambda grad: grad * mask)
        model[0].bias.register_hook(lambda grad: None)
        model[2].weight.register_post_accumulate_grad_hook(halve_gradient)
        return lambda i: None

    assert_same_training(counter, {}, prepare, accumulate=accumulate)


def test_hooks_of_accumulation_nodes_are_not_seen(counter):
    """A known limit: Python can't ask a node for its hooks."""
    model, optimizer = make()
    calls = []
    weight = model[0].weight
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append("called"))
    train(compile_train_step(model, optimizer, loss_fn, backend=counter), steps=1)
    assert not calls
    train(plain(model, optimizer, loss_fn), steps=1)
    assert calls == ["called"]


def test_hooks_that_come_later(counter):
    def prepare(model, optimizer):
        def after(i):
            if i == 3:
                model[0].weight.register_hook(torch.zeros_like)

        return after

    assert_same_training(counter, {}, prepare, graphs=2)


def test_another_model_after_one_with_hooks(counter):
    """Nothing of the first is left in what Dynamo traces later."""
    model, optimizer = make()
    model[0].weight.register_hook(torch.zeros_like)
    train(compile_train_step(model, optimizer, loss_fn, backend=counter), steps=2)
    other = nn.Bilinear(8, 8, 1)
    optimizer = AdEMAMix(other.parameters())
    step = compile_train_step(
        other, optimizer, lambda model, x, y: loss_fn(lambda x: model(x, x), x, y), backend=counter
    )
    train(step, steps=2)
    assert optimizer.state[other.weight]["step"] == 2


def test_step_hooks(counter):
    def prepare(model, optimizer):
        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        optimizer.register_step_pre_hook(clip)
        return lambda i: None

    assert_same_training(counter, {}, prepare)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_left_by_others(counter, set_to_none):
    """Evaluation with gradients between steps, zero_grad of either kind."""

    def prepare(model, optimizer):
        def after(i):
            model.eval()
            loss_fn(model, *batch(99)).backward()
            if i % 2:
                optimizer.zero_grad(set_to_none=set_to_none)
            model.train()

        return after

    assert_same_training(counter, {}, prepare)


def test_frozen_in_between(counter):
    def prepare(model, optimizer):
        return lambda i: model[0].requires_grad_(i % 4 < 2)

    assert_same_training(counter, {}, prepare, graphs=2)


def test_loads_in_between(counter):
    def prepare(model, optimizer):
        def after(i):
            for _ in range(2):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                model.load_state_dict(copy.deepcopy(model.state_dict()))

        return after

    assert_same_training(counter, {}, prepare)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_grad_scaler(counter, options):
    """With steps that are skipped, after which the scale is halved."""

    def loss_fn(model, x, y):
        return 30 * (model(x) - y).square().mean()

    results = []
    for compiled in (False, True):
        model, optimizer = make(**options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)
        if compiled:
            step = compile_train_step(model, optimizer, loss_fn, backend=counter, scaler=scaler)
        else:
            step = plain(model, optimizer, loss_fn, scaler=scaler)
        losses = train(step, after=lambda i, scaler=scaler: scaler.update())
        results.append((losses, everything(model, optimizer), scaler.state_dict()))
        assert 0 < optimizer.state[model[0].weight]["step"] < 12
    assert_identical(results[1], results[0])
    assert counter.frame_count == 1
    step(*batch(0))
    with pytest.raises(RuntimeError, match=r"scaler\.update\(\) must be called after each step"):
        step(*batch(0))


def test_two_steps_over_one_model(counter):
    """A generator's and a discriminator's: each other's gradients are gone."""

    def generator_loss(models, noise):
        return models[1](models[0](noise)).mean()

    def discriminator_loss(models, noise):
        return models[1](noise).mean() - models[1](models[0](noise).detach()).mean()

    def build():
        torch.manual_seed(0)
        models = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
        return models, [AdEMAMix(models[i].parameters(), lr=1e-2) for i in (0, 1)]

    expected, optimizers = build()
    noise = torch.randn(5, 4)
    for _ in range(4):
        for optimizer, loss in zip(optimizers, (generator_loss, discriminator_loss), strict=True):
            expected.zero_grad()
            loss(expected, noise).backward()
            optimizer.step()
    models, optimizers = build()
    losses = (generator_loss, discriminator_loss)
    steps = [
        compile_train_step(models, optimizer, loss, backend=counter)
        for optimizer, loss in zip(optimizers, losses, strict=True)
    ]
    for _ in range(4):
        for step in steps:
            step(noise)
            assert all(p.grad is None for p in models.parameters())
    assert_identical(models.state_dict(), expected.state_dict())
    assert counter.frame_count == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_loss_fn_returns_besides(counter, accumulate):
    def with_more(model, x, *, target):
        predicted = model(x)
        return (predicted - target).square().mean(), {"predicted": predicted, "rows": x.shape[0]}, predicted.sum()

    model, optimizer = make()
    step = compile_train_step(model, optimizer, with_more, backend=counter, accumulate=accumulate)
    x, y = batch(0)
    expected = model(x).detach()
    loss, more, total = step(x, target=y)
    assert_identical(loss, (expected - y).square().view(accumulate, -1).mean(1).div(accumulate).sum())
    if accumulate > 1:
        assert [part["rows"] for part in more] == [ROWS // accumulate] * accumulate
        assert len(total) == accumulate
        more = {"predicted": torch.cat([part["predicted"] for part in more])}
        total = sum(total)
    torch.testing.assert_close(more["predicted"], expected)
    assert not any(t.requires_grad for t in (loss, more["predicted"], total))


@pytest.mark.nightly
def test_sweep(counter):
    """Each step has its own budget of recompilations."""
    for _ in range(20):
        train(compile_train_step(*make(), loss_fn, backend=counter), steps=2)
    assert counter.frame_count == 20


def replaced_module(model):
    model[0] = nn.Linear(8, 16)


def assigned_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@pytest.mark.parametrize("replace", [replaced_module, assigned_state])
def test_replaced_parameters_are_refused(counter, replace):
    model, optimizer = make()
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    train(step, steps=2)
    replace(model)
    before = everything(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the optimizer's parameters are no longer the model's"):
            step(*batch(2))
    assert_identical(everything(model, optimizer), before)


def test_added_parameters(counter):
    def prepare(model, optimizer):
        def after(i):
            if i == 4:
                model.append(nn.Linear(1, 1))
                optimizer.add_param_group({"params": model[-1].parameters(), "lr": 1e-3})

        return after

    assert_same_training(counter, {}, prepare, graphs=2)


def test_refusals(counter):
    model, optimizer = make()
    other, _ = make()
    with pytest.raises(ValueError, match="no parameter of the model that requires a gradient"):
        compile_train_step(other, optimizer, loss_fn)
    with pytest.raises(ValueError, match="fullgraph is False, but a full training step is one graph"):
        compile_train_step(model, optimizer, loss_fn, fullgraph=False)
    with pytest.raises(ValueError, match="accumulate is 0, but must be an int of at least 1"):
        compile_train_step(model, optimizer, loss_fn, accumulate=0)
    step = compile_train_step(model, optimizer, loss_fn, backend=counter, accumulate=5)
    with pytest.raises(ValueError, match=r"leaf 0 of the batch has shape \[12, 8\], whose first dimension isn't"):
        step(*batch(0))
    handle = release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="release_gradients is in effect"):
        compile_train_step(model, optimizer, loss_fn)
    handle.remove()


@pytest.mark.parametrize(
    "wrong",
    [lambda model, x, y: {"loss": model(x).mean()}, lambda model, x, y: model(x), lambda model, x, y: y.mean()],
    ids=["dict", "many elements", "no gradient"],
)
def test_what_is_no_loss(counter, wrong):
    model, optimizer = make()
    step = compile_train_step(model, optimizer, wrong, backend=counter)
    before = everything(model, optimizer)
    with pytest.raises(TypeError, match="loss_fn must return the loss, a tensor of one element"):
        step(*batch(0))
    assert_identical(everything(model, optimizer), before)


def test_a_scheduler_sees_the_steps(counter, recwarn):
    model, optimizer = make()
    scheduler = CosineAnnealingLR(optimizer, 10)
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    train(step, steps=2, after=lambda i: scheduler.step())
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]

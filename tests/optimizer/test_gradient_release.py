"""Parameters that are updated during the backward pass end up as after ordinary steps."""

import copy
import gc
from weakref import ref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, release_gradients

OPTIONS = {
    "32-bit": {},
    "8-bit": {"optim_bits": 8, "min_8bit_size": 16},  # with stochastic rounding: bits by the parameter's number
    "maximize": {"maximize": True, "t_alpha": 3, "t_beta3": 3},
    "remainders": {"dtype": torch.bfloat16, "master_weights": "remainder"},
    "remainders of 8 bits": {"dtype": torch.bfloat16, "master_weights": "remainder8"},
    "stochastic parameters": {"dtype": torch.bfloat16, "param_rounding": "stochastic", "optim_bits": 8},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.frozen(torch.tanh(self.hidden(self.embedding(x)))))


def make(lr=1e-2, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model().to(dtype)
    groups = [
        {"params": [*model.hidden.parameters(), *model.frozen.parameters()], "weight_decay": 0.1},
        {"params": [model.embedding.weight, model.head.bias, model.unused], "lr": copy.deepcopy(lr)},
    ]
    return model, AdEMAMix(groups, lr=lr, **options)


def train(model, optimizer, batches, scheduler=None):
    for batch in batches:
        x = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(batch))
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_ordinary_steps(options, lr):
    """With several groups, tied, frozen and unused parameters, and an LR scheduler."""
    runs = []
    for released in (False, True):
        model, optimizer = make(copy.deepcopy(lr), **options)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if released:
            release_gradients(model, optimizer)
        train(model, optimizer, range(5), scheduler)
        runs.append(everything(model, optimizer))
    assert_identical(*runs)


def test_gradients_are_freed_one_by_one():
    model, optimizer = make()
    params = [p for p in model.parameters() if p.requires_grad and p is not model.unused]
    alive = []
    for p in params:  # these hooks run before the ones that release
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in params)))
    release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    assert alive == [1] * 2 * len(params)
    assert all(p.grad is None for p in model.parameters())


def test_step_updates_the_rest():
    """Parameters that aren't the model's, or were frozen before, are left to step()."""
    model, optimizer = make()
    other = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [other]})
    release_gradients(model, optimizer)
    other.grad = torch.ones(3)
    train(model, optimizer, [0])
    assert {int(state["step"]) for p, state in optimizer.state.items() if p is not model.unused} == {1}
    assert other in optimizer.state
    model.frozen.requires_grad_(True)
    train(model, optimizer, [1])
    assert int(optimizer.state[model.frozen.weight]["step"]) == 1
    assert int(optimizer.state[model.hidden.weight]["step"]) == 2


def test_closure():
    model, optimizer = make()
    release_gradients(model, optimizer)
    other_model, other_optimizer = make()
    x = torch.arange(32)

    def closure_of(model):
        def closure():
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return closure

    for _ in range(3):
        loss = optimizer.step(closure_of(model))
        other_optimizer.zero_grad()
        assert loss == other_optimizer.step(closure_of(other_model))
    assert_identical(everything(model, optimizer), everything(other_model, other_optimizer))


def test_resume_and_remove():
    """Loading a state dict replaces the groups; without the handle, gradients wait for step() again."""
    model, optimizer = make()
    train(model, optimizer, range(2))
    saved = copy.deepcopy(everything(model, optimizer))
    train(model, optimizer, range(2, 6))
    new_model, new_optimizer = make(lr=1.0)
    handle = release_gradients(new_model, new_optimizer)
    new_model.load_state_dict(saved[0])
    new_optimizer.load_state_dict(saved[1])
    train(new_model, new_optimizer, range(2, 4))
    handle.remove()
    new_model(torch.arange(4)).sum().backward()
    assert new_model.hidden.weight.grad is not None
    assert int(new_optimizer.state[new_model.hidden.weight]["step"]) == 4
    new_optimizer.zero_grad()
    train(new_model, new_optimizer, range(4, 6))
    assert_identical(everything(new_model, new_optimizer), everything(model, optimizer))


def test_accumulation_is_refused():
    model, optimizer = make()
    release_gradients(model, optimizer)
    model(torch.arange(4)).sum().backward()
    before = copy.deepcopy(everything(model, optimizer))
    with pytest.raises(RuntimeError, match=r"second backward pass before optimizer\.step\(\)"):
        model(torch.arange(4)).sum().backward()
    assert_identical(everything(model, optimizer), before)


def test_grad_scaler_is_refused():
    model, optimizer = make()
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.arange(4)).sum()).backward()
    with pytest.raises(RuntimeError, match="can't be unscaled by GradScaler"):
        scaler.step(optimizer)


def test_clipping_is_refused():
    model, optimizer = make(max_grad_norm=1.0)
    with pytest.raises(ValueError, match="can't be clipped"):
        release_gradients(model, optimizer)
    optimizer.max_grad_norm = None
    release_gradients(model, optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="can't be clipped"):
        model(torch.arange(4)).sum().backward()
    assert not optimizer.state


def test_foreign_parameters_are_refused():
    _, optimizer = make()
    with pytest.raises(ValueError, match="no parameter of the model"):
        release_gradients(nn.Linear(2, 2), optimizer)


def test_bad_options_are_refused():
    model, optimizer = make()
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["eps"] = -1.0
    before = copy.deepcopy(model.hidden.state_dict())
    with pytest.raises(ValueError, match="eps"):
        model(torch.arange(4)).sum().backward()
    assert_identical(model.hidden.state_dict(), before)


def test_keeps_nothing_alive():
    """Without the garbage collector, and without remove()."""
    gc.disable()
    try:
        model, optimizer = make()
        release_gradients(model, optimizer)
        train(model, optimizer, range(2))
        refs = [ref(model), ref(optimizer), ref(model.hidden.weight)]
        del model, optimizer
        assert [r() for r in refs] == [None] * 3
    finally:
        gc.enable()


def test_gradients_stay_when_the_optimizer_is_gone():
    model, optimizer = make()
    release_gradients(model, optimizer)
    del optimizer
    gc.collect()
    model(torch.arange(4)).sum().backward()
    assert model.hidden.weight.grad is not None

"""Schedules in logarithmic time in compiled and captured steps: computed in the op, from each parameter's step."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.loops import batch, loss_fn, plain
from torch_ademamix import ADANA, AdEMAMix, capture_train_step, compile_train_step

STEPS = 20
OPTIMIZERS = {
    "ADANA": (ADANA, {"t_weight_decay": 7.0}),
    "ADANA, 12 bits": (ADANA, {"optim_bits": 8, "min_8bit_size": 1, "slow_ema_bits": 12}),
    "AdEMAMix": (AdEMAMix, {"delta": 8.0, "kappa": 0.75, "alpha": 2.0}),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    cls, options = OPTIMIZERS[name]
    return model, cls(model.parameters(), lr=torch.tensor(1e-2), **options)


def train(model, optimizer, step, change=False):
    losses = []
    for i in range(STEPS):
        losses.append(step(*batch(i)))
        if change:  # read at each step, like all options
            optimizer.param_groups[0]["delta"] = 8.0 + 0.1 * i
            optimizer.param_groups[0]["kappa"] = 0.85 + 0.001 * i
            optimizer.param_groups[0]["t_weight_decay"] = 5.0 + i
    return copy.deepcopy((losses, model.state_dict(), optimizer.state_dict()["state"]))


@optimizers
def test_compiled_optimizer(name):
    """One graph, compiled once; eager's bits."""
    counter = CompileCounterWithBackend("aot_eager")
    model, optimizer = make(name)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)

    def step(x, y):
        optimizer.zero_grad()
        loss = loss_fn(model, x, y)
        loss.backward()
        compiled()
        return loss.detach()

    actual = train(model, optimizer, step)
    model, optimizer = make(name)
    assert_identical(actual, train(model, optimizer, plain(model, optimizer, loss_fn)))
    assert counter.frame_count == 1


@optimizers
def test_full_training_step(name):
    counter = CompileCounterWithBackend("aot_eager")
    model, optimizer = make(name)
    actual = train(model, optimizer, compile_train_step(model, optimizer, loss_fn, backend=counter), change=True)
    model, optimizer = make(name)
    assert_identical(actual, train(model, optimizer, plain(model, optimizer, loss_fn), change=True))
    assert counter.frame_count == 1


@optimizers
def test_captured(name, monkeypatch):
    graphs = stand_in(monkeypatch)
    model, optimizer = make(name)
    actual = train(model, optimizer, capture_train_step(model, optimizer, loss_fn, batch(99)), change=True)
    model, optimizer = make(name)
    assert_identical(actual, train(model, optimizer, plain(model, optimizer, loss_fn), change=True))
    assert graphs.captures == 1

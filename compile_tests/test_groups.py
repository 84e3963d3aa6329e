"""Groups that differ in numbers only, in compiled and captured steps: one op call that reads each group's row."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.graphs import op_calls
from torch_ademamix import AdEMAMix, AdEMAMix8bit, capture_train_step, compile_train_step

CLASSES = pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])

LAYERS = 4


def make(cls=AdEMAMix, **options):
    """A group for each layer, as with layer-wise learning rates."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(LAYERS)))
    groups = [
        {
            "params": layer.parameters(),
            "lr": torch.tensor(1e-2 * 0.7**i),
            "betas": (0.9 - 0.1 * i, 0.99, 0.999),
            "weight_decay": 0.1 * i,
            "t_alpha": 5 * i,
        }
        for i, layer in enumerate(model)
    ]
    return model, cls(groups, t_beta3=10, min_8bit_size=1, **options)


def loss_fn(model, x, y):
    return (model(x) - y).square().mean()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 5, 12, generator=generator)) for _ in range(count)]


def train(model, optimizer, step, count=20, change=False):
    scheduler = CosineAnnealingLR(optimizer, count)
    losses = []
    for i, batch in enumerate(batches(count)):
        losses.append(step(model, optimizer, *batch))
        optimizer._opt_called = True
        scheduler.step()
        if change:
            optimizer.param_groups[i % LAYERS]["weight_decay"] = 0.01 * i
            optimizer.param_groups[i % LAYERS]["betas"] = (0.5, 0.9 + 0.001 * i, 0.99)
    return copy.deepcopy((losses, model.state_dict(), optimizer.state_dict()["state"]))


def plain(model, optimizer, *batch):
    optimizer.zero_grad()
    loss = loss_fn(model, *batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


@CLASSES
def test_compiled_optimizer(cls, counter):
    """Compiled once, with a scheduler; eager's bits."""
    model, optimizer = make(cls)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)

    def step(model, optimizer, *batch):
        optimizer.zero_grad()
        loss = loss_fn(model, *batch)
        loss.backward()
        compiled()
        return loss.detach()

    assert_identical(train(model, optimizer, step), train(*make(cls), plain))
    assert counter.frame_count == 1


def test_generated_code():
    model, optimizer = make()
    optimizer.init_state()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert len(op_calls(code)) == 1
    model, optimizer = make()
    _, codes = run_and_get_code(compile_train_step(model, optimizer, loss_fn), *batches(1)[0])
    assert [len(op_calls(code)) for code in codes if op_calls(code)] == [1]


def test_numbers_as_lr(counter):
    """Of several groups too, a number that changes compiles again, and is followed."""
    model, optimizer = make()
    expected_model, eager = make()
    for o in (optimizer, eager):
        for group in o.param_groups:
            group["lr"] = 1e-2
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for i in range(4):
        for m, o, step in ((model, optimizer, compiled), (expected_model, eager, eager.step)):
            for p in m.parameters():
                p.grad = torch.full_like(p, 0.1 * (i + 1))
            o.param_groups[1]["lr"] = 1e-2 / (i + 1)
            o.param_groups[2]["schedule_start"] = i
            step()
    assert_identical(list(model.parameters()), list(expected_model.parameters()))


@CLASSES
def test_full_training_step(cls):
    """Every number may change, in every group."""
    counter = CompileCounterWithBackend("aot_eager")
    model, optimizer = make(cls)
    compiled = compile_train_step(model, optimizer, loss_fn, backend=counter)
    actual = train(model, optimizer, lambda model, optimizer, *batch: compiled(*batch), change=True)
    assert_identical(actual, train(*make(cls), plain, change=True))
    assert counter.frame_count == 1


@CLASSES
def test_captured(cls, monkeypatch):
    graphs = stand_in(monkeypatch)
    model, optimizer = make(cls)
    replayed = capture_train_step(model, optimizer, loss_fn, batches(1)[0])
    actual = train(model, optimizer, lambda model, optimizer, *batch: replayed(*batch), change=True)
    assert_identical(actual, train(*make(cls), plain, change=True))
    assert graphs.captures == 1


def test_another_table_is_captured_again(monkeypatch):
    """An added group makes the table of rows another tensor, also where nothing of it is trained."""
    graphs = stand_in(monkeypatch)
    model, optimizer = make()
    replayed = capture_train_step(model, optimizer, loss_fn, batches(1)[0])
    replayed(*batches(1)[0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]})
    replayed(*batches(1)[0])
    assert graphs.captures == 2

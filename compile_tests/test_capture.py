"""capture_train_step on a stand-in for CUDA's graphs; tests/cuda/test_cuda.py has real ones."""

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import CUDAGraph, Graphs, stand_in
from tests.helpers.loops import OPTIONS, batch, loss_fn, plain
from torch_ademamix import AdEMAMix, capture_train_step


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return stand_in(monkeypatch)


def make(**options: Any) -> tuple[nn.Module, AdEMAMix]:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
    model = nn.Sequential(*layers)
    return model, AdEMAMix(
        model.parameters(), **{"lr": 1e-2, "t_alpha": 15, "t_beta3": 15, "capturable": True, **options}
    )


def captured(model: nn.Module, optimizer: AdEMAMix, **more: Any) -> Any:
    return capture_train_step(model, optimizer, loss_fn, batch(99), **more)


def test_needs_one_cuda_device() -> None:
    model, optimizer = make()
    with pytest.raises(ValueError, match="needs all parameters on one CUDA device"):
        captured(model, optimizer)
    assert not optimizer.state


def test_order_of_calls(graphs: Graphs) -> None:
    """The warm-up and the capture are on one stream of their own, which waits and is waited for."""
    step = captured(*make())
    step(*batch(0))
    step(*batch(1))
    assert graphs.log == [
        "a stream waits for the default stream",
        *["warm-up"] * 3,
        "the default stream waits for a stream",
        "capture",
        *["replay"] * 2,
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_plain_loop(graphs: Graphs, options: dict[str, Any]) -> None:
    """Bit for bit, with buffers, dropout, and a scheduler that writes lr and betas; captured once."""
    results = []
    for make_step in (partial(plain, loss_fn=loss_fn), captured):
        model, optimizer = make(**options)
        step = make_step(model, optimizer)
        torch.manual_seed(1)
        scheduler = OneCycleLR(optimizer, 3e-2, total_steps=20, cycle_momentum=True)
        losses = []
        for i in range(12):
            losses.append(step(*batch(i)))
            scheduler.step()
            optimizer.param_groups[0]["weight_decay"] = 0.01 * i
            optimizer.param_groups[0]["alpha"] = 5.0 + i
        norm = None if optimizer.grad_norm is None else optimizer.grad_norm.clone()
        results.append(copy.deepcopy((losses, norm, model.state_dict(), optimizer.state_dict()["state"])))
    assert_identical(results[1], results[0])
    assert graphs.captures == 1


def freeze(model: nn.Module, optimizer: AdEMAMix) -> None:
    model[0].bias.requires_grad_(False)


def evaluation_mode(model: nn.Module, optimizer: AdEMAMix) -> None:
    model[2].eval()


def another_option(model: nn.Module, optimizer: AdEMAMix) -> None:
    optimizer.param_groups[0]["maximize"] = True


def another_norm(model: nn.Module, optimizer: AdEMAMix) -> None:
    optimizer.max_grad_norm = 0.1


def hook(model: nn.Module, optimizer: AdEMAMix) -> None:
    model[0].weight.register_hook(lambda grad: grad * 0.5)


def moved_weight(model: nn.Module, optimizer: AdEMAMix) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def moved_buffer(model: nn.Module, optimizer: AdEMAMix) -> None:
    model[1].running_mean = model[1].running_mean.clone()


def replaced_state(model: nn.Module, optimizer: AdEMAMix) -> None:
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].clone()


def reset_state(model: nn.Module, optimizer: AdEMAMix) -> None:
    optimizer.state.clear()


@pytest.mark.parametrize(
    "change",
    [
        *(freeze, evaluation_mode, another_option, another_norm, hook),
        *(moved_weight, moved_buffer, replaced_state, reset_state),
    ],
)
def test_what_a_graph_has_for_good_is_captured_anew(graphs: Graphs, change: Any) -> None:
    """And once: the step then is the plain loop's."""
    results = []
    for make_step in (partial(plain, loss_fn=loss_fn), captured):
        model, optimizer = make()
        step = make_step(model, optimizer)
        torch.manual_seed(1)
        losses = [step(*batch(i)) for i in range(2)]
        change(model, optimizer)
        losses += [step(*batch(i)) for i in range(2, 5)]
        results.append(copy.deepcopy((losses, model.state_dict(), optimizer.state_dict()["state"])))
    assert_identical(results[1], results[0])
    assert graphs.captures == 2


def test_autocast_around_a_step(graphs: Graphs) -> None:
    step = captured(*make())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            step(*batch(0))
    assert graphs.captures == 2
    step(*batch(0))
    assert graphs.captures == 3


def test_loading_is_into_the_graphs_memory(graphs: Graphs) -> None:
    model, optimizer = make()
    step = captured(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    runs = []
    for _ in range(20):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        torch.manual_seed(1)
        runs.append([step(*batch(i)) for i in range(2)])
    assert_identical(runs[1:], runs[:1] * 19)
    assert graphs.captures == 1


def test_an_added_group_takes_part(graphs: Graphs) -> None:
    model, _ = make()
    optimizer = AdEMAMix(model[0].parameters(), lr=1e-2)
    step = captured(model, optimizer)
    step(*batch(0))
    before = model[3].weight.detach().clone()
    optimizer.add_param_group({"params": model[3].parameters()})
    step(*batch(1))
    assert graphs.captures == 2
    assert not torch.equal(model[3].weight, before)


def test_results_are_the_callers(graphs: Graphs) -> None:
    """Copies, which the next replay leaves alone."""
    step = captured(*make())
    first = step(*batch(0))
    kept = first.clone()
    step(*batch(1))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((torch.ones(11, 8), torch.ones(12, 1)), r"leaf 0 of the batch is a torch.float32 tensor of shape \[11, 8\]"),
        ((torch.ones(12, 8).double(), torch.ones(12, 1)), "leaf 0 of the batch is a torch.float64"),
        ((torch.ones(12, 8), 3), "leaf 1 of the batch is 3"),
        ((torch.ones(12, 8),), "(?s)the batch is .* but the sample was"),
    ],
)
def test_other_batches_are_refused(graphs: Graphs, wrong: Any, message: str) -> None:
    model, optimizer = make()
    step = captured(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        step(*wrong)
    assert_identical(model.state_dict(), before)


def test_leaves_that_hold_tensors_are_refused(graphs: Graphs) -> None:
    class Batch:
        x = torch.ones(12, 8)

    model, optimizer = make()
    with pytest.raises(TypeError, match="leaf 0 of the batch is a Batch, but must be a tensor"):
        capture_train_step(model, optimizer, lambda model, b: model(b.x).sum(), (Batch(),))
    assert graphs.captures == 0


def test_micro_batches_and_what_loss_fn_returns_besides(graphs: Graphs) -> None:
    def both(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = model(x)
        return (prediction - y).square().mean(), prediction

    model, optimizer = make()
    step = capture_train_step(model, optimizer, both, batch(99), accumulate=3)
    loss, predictions = step(*batch(0))
    assert loss.ndim == 0
    assert [tuple(p.shape) for p in predictions] == [(4, 1)] * 3
    assert all(p.grad is None for p in model.parameters())


def test_replaced_parameters_are_refused(graphs: Graphs) -> None:
    model, optimizer = make()
    step = captured(model, optimizer)
    model[3] = nn.Linear(16, 1)
    with pytest.raises(RuntimeError, match="no longer the model's"):
        step(*batch(0))


def test_the_warm_up_leaves_the_gradients_norm(graphs: Graphs) -> None:
    model, optimizer = make(max_grad_norm=0.05)
    plain(model, optimizer, loss_fn)(*batch(0))
    before = optimizer.grad_norm.clone()
    step = captured(model, optimizer)
    assert torch.equal(optimizer.grad_norm, before)
    step(*batch(1))
    assert not torch.equal(optimizer.grad_norm, before)


def test_the_graph_is_free_with_the_step(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and optimizer live on."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(graph := CUDAGraph(graphs)) or graph)
    model, optimizer = make()
    step = captured(model, optimizer)
    step(*batch(0))
    graph = weakref.ref(made.pop())
    del step
    gc.collect()
    assert graph() is None
    plain(model, optimizer, loss_fn)(*batch(1))

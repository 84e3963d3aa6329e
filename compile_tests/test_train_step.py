"""compile_train_step: forward, backward, update and the clearing of gradients as one graph."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._dynamo.utils import ReinplaceCounters
from torch._inductor.utils import run_and_get_code
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from tests.helpers.config import TOLERANCES, assert_identical
from tests.helpers.graphs import OP_CALL
from tests.helpers.loops import plain
from torch_ademamix import AdEMAMix, AdEMAMix8bit, compile_train_step

VOCABULARY, WIDTH, CONTEXT = 17, 16, 8


class Transformer(nn.Module):
    """One block, with an optional second way through it and a frozen table of positions."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH), requires_grad=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, adapted=False):
        x = self.tokens(tokens) + self.positions
        qkv = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 2, WIDTH // 2)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attention.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        if adapted:
            x = x + self.adapter(x)
        return self.head(self.norms[2](x))


def loss_fn(model, tokens, adapted=False):
    logits = model(tokens[:, :-1], adapted)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make(cls=AdEMAMix, **options):
    torch.manual_seed(0)
    model = Transformer()
    weights = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
    options = {"lr": 1e-2, "t_alpha": 15, "t_beta3": 15, "weight_decay": 0.1, **options}
    return model, cls(groups, **options)


def batch(i):
    """Rows that count upwards."""
    return (torch.arange(4)[:, None] * (i + 3) + torch.arange(CONTEXT + 1)) % VOCABULARY


def eager_train_step(model, optimizer, loss_fn):
    optimizer.init_state()

    def step(*args):
        optimizer.zero_grad()
        loss = loss_fn(model, *args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(step, schedulers=(), steps=20, first=0):
    losses = []
    for i in range(first, first + steps):
        losses.append(step(batch(i)))
        for scheduler in schedulers:
            scheduler.step()
    return losses


def state_of(model, optimizer):
    """All but the learning rate, a tensor in the compiled step."""
    return model.state_dict(), optimizer.state_dict()["state"]


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= TOLERANCES["inductor"] * b.abs().max().clamp(min=1)


@pytest.fixture
def counter():
    """A backend that counts the graphs, and computes as eager does."""
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.each_value
@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
def test_equals_eager(counter, cls, scheduler_first):
    """Two groups, a frozen parameter, one without gradient, and a scheduler made before or after."""
    expected_model, eager = make(cls)
    step = eager_train_step(expected_model, eager, loss_fn)
    expected_losses = train(step, [CosineAnnealingLR(eager, 20)])

    model, optimizer = make(cls)
    frozen = model.positions.clone()
    before = [CosineAnnealingLR(optimizer, 20)] if scheduler_first else []
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    losses = train(step, before or [CosineAnnealingLR(optimizer, 20)])
    assert counter.frame_count == 1
    assert_identical((losses, state_of(model, optimizer)), (expected_losses, state_of(expected_model, eager)))
    assert losses[-1] < losses[0]
    assert not any(loss.requires_grad for loss in losses)
    assert all(p.grad is None for p in model.parameters())
    assert_identical(model.positions, frozen)


def lists_of_op_calls(code):
    """The names in the positional lists of each op call in generated code."""
    for line in code.splitlines():
        if OP_CALL.match(line.strip()):
            yield [names.split(", ") if names else [] for names in re.findall(r"(?<!=)\[(.*?)\]", line)]


@pytest.mark.nightly
def test_inductor():
    """As eager but for the last bits, and the ops write to the parameters and state themselves."""
    expected_model, eager = make()
    step = eager_train_step(expected_model, eager, loss_fn)
    expected_losses = train(step, [CosineAnnealingLR(eager, 20)])

    model, optimizer = make()
    counter = CompileCounterWithBackend("inductor")
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    scheduler = CosineAnnealingLR(optimizer, 20)
    losses, (code,) = run_and_get_code(train, step, [scheduler])
    assert counter.frame_count == 1
    assert_all_close(losses, expected_losses)
    assert_all_close(model.parameters(), expected_model.parameters())

    calls = list(lists_of_op_calls(code))
    assert [len(lists) for lists in calls] == [7]  # of both groups
    for params, _grads, *state in calls:
        for name in sum(state, params):
            assert re.match(r"(primals|arg)\w+$", name)
    assert "copy_(" not in code
    assert ReinplaceCounters.get_total_missed() == 0


def test_every_scheduler_step_is_seen(counter):
    """The learning rate that a step uses is the scheduler's latest."""
    model, optimizer = make(weight_decay=0.0)
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    scheduler = LambdaLR(optimizer, lambda t: 0.0 if t >= 2 else 1.0)
    train(step, [scheduler], steps=2)
    before = copy.deepcopy(model.state_dict())
    train(step, [scheduler], steps=2)
    assert_identical(model.state_dict(), before)
    assert counter.frame_count == 1


def test_parameters_without_gradient_in_some_steps(counter):
    """Another set of gradients costs one more compilation, once."""
    model, optimizer = make()
    expected_model, eager = make()
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    expected_step = eager_train_step(expected_model, eager, loss_fn)
    for i in range(9):
        adapted = i % 3 == 2
        assert_identical(step(batch(i), adapted), expected_step(batch(i), adapted))
    assert counter.frame_count == 2
    assert optimizer.state[model.adapter.weight]["step"] == 3
    assert_identical(model.state_dict(), expected_model.state_dict())


def test_load_state_dict_in_between(counter):
    """Training goes on from the loaded state, with its learning rate."""
    model, optimizer = make()
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    scheduler = CosineAnnealingLR(optimizer, 20)
    train(step, [scheduler], steps=5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    expected = train(step, [scheduler], steps=5, first=5), copy.deepcopy(state_of(model, optimizer))

    model.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    scheduler.load_state_dict(saved[2])
    assert_identical((train(step, [scheduler], steps=5, first=5), state_of(model, optimizer)), expected)
    assert counter.frame_count <= 2

    model, optimizer = make(lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, 20)
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    assert_identical((train(step, [scheduler], steps=5, first=5), state_of(model, optimizer)), expected)


def test_options_reach_the_compiler():
    model, optimizer = make()
    counter = CompileCounterWithBackend("eager")
    step = compile_train_step(model, optimizer, loss_fn, backend=counter, dynamic=False)
    train(step, steps=2)
    assert counter.frame_count == 1


@pytest.mark.each_value
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_leaves(backend, accumulate):
    """Leaves that are neither the model's nor the optimizer's get their gradients as in the plain loop."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 3), nn.Linear(3, 1)
    results = []
    for compiled in (False, True):
        ours, others = copy.deepcopy(encoder), copy.deepcopy(decoder)
        optimizer, second = AdEMAMix(ours.parameters(), lr=1e-2), torch.optim.AdamW(others.parameters())

        def through_others(model, x, others=others):
            return others(model(x)).square().mean()

        make = compile_train_step if compiled else plain
        options = {"backend": backend} if compiled else {}
        step = make(ours, optimizer, through_others, accumulate=accumulate, **options)
        for i in range(3):
            x = torch.full((4, 4), 1.0 + i, requires_grad=accumulate == 1)  # else its parts are no leaves
            step(x)
            results.append([x.grad, *(p.grad.clone() for p in others.parameters())])
            second.step()
            second.zero_grad()
        results.append([*ours.parameters(), *others.parameters()])
    for expected, actual in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(actual, expected)


def test_steps_of_other_shapes():
    """A step of another model doesn't take its batch's sizes for variable ones, since this has others."""
    graphs = []
    for size in (3, 5):
        model = nn.Linear(size, 2)
        backend = EagerAndRecordGraphs()
        step = compile_train_step(model, AdEMAMix(model.parameters()), lambda m, x: m(x).sum(), backend=backend)
        step(torch.ones(size + 4, size))
        graphs += backend.graphs
    for graph in graphs:
        inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        assert inputs
        assert not any(isinstance(size, torch.SymInt) for t in inputs for size in (t, *getattr(t, "shape", ())))

"""Data parallelism in compile_train_step: one graph with its collectives, by DTensors or by parametrizations."""

import re
from collections import Counter

import data_parallel
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.utils import ReinplaceCounters
from torch._inductor.utils import run_and_get_code
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from tests.helpers.config import TOLERANCES, assert_identical
from tests.helpers.graphs import op_calls
from tests.helpers.sharded import BITS, OPTIONS, full, full_state, make_model
from torch_ademamix import AdEMAMix, compile_train_step
from torch_ademamix.distributed import LoadPlanner

pytestmark = pytest.mark.distributed

PARAMS = 6  # of the model
GATHER, SCATTER, REDUCE = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"

# Ways to train on parts of a batch: the collectives in the graph of a step.
WAYS = {
    "dtensors": {REDUCE: PARAMS},  # replicated, with sharded batches
    "replicate": {REDUCE: PARAMS},  # the others are parametrizations, named as SimpleFSDP names its modes
    "fully_shard": {GATHER: PARAMS, SCATTER: PARAMS},
    "hybrid_shard": {GATHER: PARAMS, SCATTER: PARAMS, REDUCE: PARAMS},
}
EVERY_WAY = pytest.mark.parametrize(
    ("world_size", "way"),
    [(2, "dtensors"), (2, "replicate"), (2, "fully_shard"), (4, "dtensors"), (4, "fully_shard"), (4, "hybrid_shard")],
)


class Gathered(nn.Module):
    """A parameter's whole values, whose gradient is averaged over the processes and sharded again."""

    def forward(self, p):
        dims = p.device_mesh.ndim
        return p.redistribute(placements=[Replicate()] * dims).to_local(grad_placements=[Partial("avg")] * dims)


def make(way, dtype=torch.float32, **options):
    """A model, plain where there is no way to train it on several processes, and its optimizer."""
    model = make_model(hidden=64, dtype=dtype)
    size = dist.get_world_size()
    if way == "dtensors":
        distribute_module(model, init_device_mesh("cpu", (size,)))
    elif way is not None:
        placements = [Replicate() if way == "replicate" else Shard(0)]
        mesh = init_device_mesh("cpu", (size,))
        if way == "hybrid_shard":
            mesh, placements = init_device_mesh("cpu", (size // 2, 2)), [Replicate(), Shard(0)]
        for module in list(model.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
                register_parametrization(module, name, Gathered())
    return model, AdEMAMix(model.parameters(), **{**OPTIONS, "lr": 1e-3, **options})


def batch(number, way, dtype=torch.float32, rows=16):
    """This process's part of it, if there are several."""
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(number)).to(dtype)
    if way is None:
        return x
    if way == "dtensors":
        return distribute_tensor(x, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss_fn(model, x):
    return model(x).square().mean()


def plain_step(model, optimizer, loss_fn=loss_fn):
    def step(x):
        loss = loss_fn(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(step, optimizer, way, dtype=torch.float32, steps=5):
    """The losses of whole batches."""
    scheduler = CosineAnnealingLR(optimizer, 2 * steps)
    losses = []
    for number in range(steps):
        loss = full(step(batch(number, way, dtype)))
        if way not in (None, "dtensors"):
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss)
        scheduler.step()
    return losses


def collectives(backend):
    """Of the one graph that was compiled, which has the backward pass and the update in it too."""
    (graph,) = backend.fw_graphs
    assert not backend.bw_graphs
    assert "torch_ademamix._ademamix" in graph.code
    names = (node.target._opname for node in graph.graph.nodes if "c10d" in str(node.target))
    return {name: n for name, n in Counter(names).items() if name != "wait_tensor"}


def difference(actual, expected):
    """The largest, relative to a tensor's largest element."""
    pairs = zip(actual, expected, strict=True)
    return max(float((full(a.detach()) - e).abs().max() / e.detach().abs().max()) for a, e in pairs)


def whole_steps(way, dtype, options, bound):
    """As the plain loop on as many processes bit for bit, and as one process within a bound."""
    models, optimizers = zip(*(make(w, dtype, **options) for w in (way, way, None)), strict=True)
    backend = AotEagerAndRecordGraphs()
    steps = [
        compile_train_step(models[0], optimizers[0], loss_fn, backend=backend),
        *map(plain_step, models[1:], optimizers[1:]),
    ]
    losses, plain, single = [
        train(step, optimizer, w, dtype) for step, optimizer, w in zip(steps, optimizers, (way, way, None), strict=True)
    ]
    expected = Counter(WAYS[way])
    if "max_grad_norm" in options:
        assert_identical(optimizers[0].grad_norm, optimizers[1].grad_norm)
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[2].grad_norm, rtol=1e-6, atol=0)
        assert optimizers[0].grad_norm > options["max_grad_norm"]
        expected[REDUCE] += "shard" in way  # of the norm
    assert collectives(backend) == dict(expected)

    assert_identical(losses, plain)
    params, plain_params = ([full(p.detach()) for p in model.parameters()] for model in models[:2])
    assert_identical(params, plain_params)
    ours, theirs = (full_state(o, m.parameters()) for o, m in zip(optimizers[:2], models[:2], strict=True))
    assert_identical(ours, theirs)
    assert all(p.grad is None for p in models[0].parameters())
    if bound is not None:
        assert difference(losses, single) < bound
        assert difference(params, models[2].parameters()) < bound
    else:
        assert any("exp_avg_absmax" in state for state in ours)


# Of eps, see test_sharding.test_training.
CASES = {
    "float64": (torch.float64, {}, 1e-10),
    "clipped": (torch.float32, {"eps": 1e-3, "max_grad_norm": 1e-2}, 1e-6),
    "8-bit": (torch.float32, BITS[8], None),  # a code turns over at the last bit of a gradient
}


@pytest.mark.each_value
@pytest.mark.parametrize("case", CASES)
@EVERY_WAY
def test_whole_steps(workers, world_size, way, case):
    workers.run(world_size, whole_steps, way, *CASES[case])


def accumulated(way):
    """Each process splits its own rows; replicated DTensors are reduced once an update."""
    (model, optimizer), (single, single_optimizer) = (make(w, eps=1e-3) for w in (way, None))
    backend = AotEagerAndRecordGraphs()
    step = compile_train_step(model, optimizer, loss_fn, accumulate=2, backend=backend)
    losses = train(step, optimizer, way)
    assert difference(losses, train(plain_step(single, single_optimizer), single_optimizer, None)) < 1e-6
    assert difference(model.parameters(), single.parameters()) < 1e-6
    times = 1 if way == "dtensors" else 2
    assert collectives(backend) == {name: times * n for name, n in WAYS[way].items()}


@pytest.mark.parametrize("way", ["dtensors", "fully_shard"])
def test_accumulation(workers, way):
    workers.run(2, accumulated, way)


def what_cannot_be_split():
    """Rows of one process that aren't as many, or aren't the same, as another's: before anything is computed."""
    model, optimizer = make("dtensors")
    step = compile_train_step(model, optimizer, lambda model, x, y: (model(x) - y).square().mean(), accumulate=2)
    x, y = batch(0, "dtensors"), torch.zeros(16, 3)
    for other in (y, distribute_tensor(y, x.device_mesh, [Replicate()])):
        with pytest.raises(ValueError, match="leaves 0 and 1 of the batch are sharded differently along their first"):
            step(x, other)
    with pytest.raises(ValueError, match=r"shape \[6, 256\], .* isn't a multiple of accumulate=2 times its 2 shards"):
        step(batch(0, "dtensors", rows=6), y)


def reduced_once():
    """The norm and the update of a plain step read the same gradients, which are reduced for both."""
    model, optimizer = make("dtensors", max_grad_norm=1e-2)
    loss_fn(model, batch(0, "dtensors")).backward()
    assert {p.grad.placements for p in model.parameters()} == {(Partial(),)}
    with CommDebugMode() as communication:
        optimizer.step()
    assert communication.get_total_counts() == PARAMS


def gathered_again():
    """Of a layer with activation checkpointing, by the backward pass, as in a plain loop; its output is kept."""

    def loss_fn(model, x):
        x = torch.tanh(model.up(x))
        x = checkpoint(lambda x: torch.tanh(model.down(x)), x, use_reentrant=False)
        return model.head(x).square().mean()

    (model, optimizer), (plain, plain_optimizer) = (make("fully_shard") for _ in range(2))
    backend = AotEagerAndRecordGraphs()
    step = compile_train_step(model, optimizer, loss_fn, backend=backend)
    losses = train(step, optimizer, "fully_shard")
    assert_identical(losses, train(plain_step(plain, plain_optimizer, loss_fn), plain_optimizer, "fully_shard"))
    assert collectives(backend) == {GATHER: PARAMS + 2, SCATTER: PARAMS}  # weight and bias


def inductor():
    """As one process, but for the last bits; one op call updates the shards themselves."""
    (model, optimizer), (single, single_optimizer) = (make(w, eps=1e-3) for w in ("fully_shard", None))
    step = compile_train_step(model, optimizer, loss_fn)
    losses, (code,) = run_and_get_code(train, step, optimizer, "fully_shard")
    call = code[code.index("def call(") :]
    for name in (GATHER, SCATTER):
        assert len(re.findall(rf"= torch\.ops\._c10d_functional\.{name}\.", call)) == PARAMS, call
    assert len(op_calls(call)) == 1
    assert "copy_(" not in call, call
    assert not ReinplaceCounters.get_total_missed()
    expected = train(plain_step(single, single_optimizer), single_optimizer, None)
    assert difference(losses, expected) < TOLERANCES["inductor"]
    assert difference(model.parameters(), single.parameters()) < TOLERANCES["inductor"]


ON_TWO = [what_cannot_be_split, reduced_once, gathered_again, pytest.param(inductor, marks=pytest.mark.nightly)]


@pytest.mark.parametrize("case", ON_TWO, ids=lambda case: case.__name__)
def test_on_two(workers, case):
    workers.run(2, case)


def resumed(folder):
    """A distributed checkpoint of parametrized parameters; the steps after it are the same."""

    def make_all():
        model, optimizer = make("fully_shard", **BITS[8])
        optimizer.init_state()
        return model, optimizer, compile_train_step(model, optimizer, loss_fn, backend="aot_eager")

    def state_of(model, optimizer):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def steps(step, numbers):
        return [step(batch(number, "fully_shard")) for number in numbers]

    model, optimizer, step = make_all()
    steps(step, range(2))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    expected = steps(step, range(2, 4))

    model, optimizer, step = make_all()
    state = state_of(model, optimizer)
    assert "up.parametrizations.weight.original" in state["model"]
    dcp.load(state, checkpoint_id=folder, planner=LoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_identical(steps(step, range(2, 4)), expected)


def test_checkpoint(workers, tmp_path):
    workers.run(2, resumed, tmp_path)


def run_example():
    return data_parallel.main(["--size", "nano", "--steps", "12", "--compiler", "aot_eager"])


@pytest.mark.nightly
def test_example(workers):
    """The loss of the whole batch, and the same on any number of processes."""
    (single,) = workers.run(1, run_example)
    losses, same = workers.run(2, run_example)
    assert losses == same == pytest.approx(single, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


def one_infinite_gradient(way):
    """Where one process finds one, all skip the step, as a plain loop does; one of four has nothing of the head."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    (model, optimizer), (plain, plain_optimizer) = (make(way) for _ in range(2))
    backend = AotEagerAndRecordGraphs()
    step = compile_train_step(model, optimizer, loss_fn, scaler=scalers[0], backend=backend)
    for number in range(3):
        x = batch(number, way)
        if number == 1 and dist.get_rank() == 0:
            (x.to_local() if isinstance(x, DTensor) else x)[0] = float("inf")
        step(x)
        scalers[1].scale(loss_fn(plain, x)).backward()
        scalers[1].step(plain_optimizer)
        plain_optimizer.zero_grad()
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (8.0 if number == 0 else 4.0)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert_identical(*[[full(p.detach()) for p in m.parameters()] for m in (model, plain)])
    assert collectives(backend)[REDUCE] == WAYS[way].get(REDUCE, 0) + 1  # whether there was one


@pytest.mark.parametrize("way", [pytest.param("dtensors", marks=pytest.mark.nightly), "fully_shard"])
def test_scaler(workers, way):
    workers.run(4, one_infinite_gradient, way)

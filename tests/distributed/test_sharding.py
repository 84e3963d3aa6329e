"""DTensor parameters are stepped by their shards, and give what one process gives."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.config import assert_identical
from tests.helpers.graphs import op_calls
from tests.helpers.sharded import (
    BITS,
    LAYOUTS,
    OPTIONS,
    backward,
    full,
    full_state,
    make_model,
    quantizable,
    rounding_of_part,
)
from torch_ademamix import AdEMAMix, compile_train_step, release_gradients
from torch_ademamix.state.sharding import first_group
from torch_ademamix.variants import ADANA_OPTIONS

pytestmark = pytest.mark.distributed

MORE_OPTIONS = {
    "ADANA": {**ADANA_OPTIONS, "t_weight_decay": 5.0},
    "12": {**BITS[8], "slow_ema_bits": 12},
    "8 without exp_avg": {**BITS[8], "betas": (0.0, 0.99, 0.999)},
    "12 without exp_avg": {**BITS[8], "slow_ema_bits": 12, "betas": (0.0, 0.99, 0.999)},
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
EVERY_BITS = pytest.mark.parametrize("bits", BITS)


def steps_equal_plain_steps(layout, bits, hidden=512, backend=None):
    """Each step gives, bit for bit, what a plain parameter's step gives with the same gradient."""
    model, plain = make_model(layout, hidden), make_model(None, hidden)
    options = {**OPTIONS, **{**BITS, **MORE_OPTIONS}[bits], "lr": torch.tensor([1e-2], dtype=torch.float64)}
    # One group, as parameters usually come, where all are rounded alike.
    groups = [{"params": [p], **rounding_of_part(p)} for p in model.parameters()]
    alike = all(group["stochastic_rounding"] for group in groups)
    optimizer = AdEMAMix(model.parameters() if alike else groups, **options)
    # What can't be quantized in shards isn't quantized here either.
    groups = [
        {"params": [q], **rounding_of_part(p), **({} if quantizable(p) else {"optim_bits": 32})}
        for p, q in pairs(model, plain)
    ]
    plain_optimizer = AdEMAMix(groups, **{**options, "lr": options["lr"].clone()})
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter) if backend else optimizer.step
    optimizer.init_state()
    for batch in range(3):
        backward(model, layout, batch)
        for p, q in pairs(model, plain):
            q.grad = full(p.grad)
        for group in (*optimizer.param_groups, *plain_optimizer.param_groups):
            group["lr"].mul_(0.9)
        if backend == "inductor" and batch == 0:
            _, (code,) = run_and_get_code(step)
            call = code[code.index("def call(") : code.index("runner = ")]
            assert len(op_calls(call)) == (2 if bits == 8 else 1)  # one per kind of state
            assert not re.search("empty_strided|copy_|clone|cpp_fused", call), call
        else:
            step()
        plain_optimizer.step()
        optimizer.zero_grad()
        for p, q in pairs(model, plain):
            assert_identical(full(p.detach()), q.detach())
    assert counter.frame_count == (1 if backend else 0)
    ours, theirs = (full_state(o, m.parameters()) for o, m in ((optimizer, model), (plain_optimizer, plain)))
    assert_identical(ours, theirs)
    quantized = [name for name, p in model.named_parameters() if "exp_avg_absmax" in optimizer.state[p]]
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            if isinstance(p, DTensor) and name != "step":
                assert value.placements == p.placements
                assert value.device_mesh == p.device_mesh
            else:
                assert not isinstance(value, DTensor)
    return quantized


def pairs(model, plain):
    return list(zip(model.parameters(), plain.parameters(), strict=True))


def expected_quantized(layout, world_size):
    """Weights of whole blocks to a row, unless columns of a block go to two processes; biases that aren't sharded."""
    if layout != "tp":
        return ["up.weight", "down.weight", "head.weight"]
    return ["up.weight", *(["down.weight"] if world_size == 2 else []), "down.bias", "head.weight"]


@pytest.mark.each_value
@EVERY_BITS
@EVERY_LAYOUT
@pytest.mark.parametrize("world_size", [2, 4])
def test_step(workers, world_size, layout, bits):
    expected = expected_quantized(layout, world_size) if bits == 8 else []
    assert workers.run(world_size, steps_equal_plain_steps, layout, bits) == [expected] * world_size


@pytest.mark.parametrize("more", MORE_OPTIONS)
def test_step_with_more_options(workers, more):
    workers.run(2, steps_equal_plain_steps, "fsdp", more)


@pytest.mark.parametrize(("layout", "hidden"), [("fsdp", 5), ("fsdp_tp", 6)])
def test_step_of_uneven_shards(workers, layout, hidden):
    workers.run(4, steps_equal_plain_steps, layout, 8, hidden)


PLACED = [
    ((5, 256), [Shard(0), Shard(0)]),
    ((1, 512), [Shard(0), Shard(0)]),  # three of four shards are empty
    ((4, 1024), [Shard(1), Shard(1)]),
    ((4, 512), [Shard(1), Replicate()]),
    ((4, 512), [Shard(0), Shard(1)]),
    ((3, 7), [Shard(1), Shard(0)]),
    ((4, 768), [Shard(1), Replicate()]),  # a block goes to two processes
    ((2, 4, 256), [Shard(1), Replicate()]),
    ((2, 4, 64), [Shard(0), Replicate()]),
    ((512,), [Replicate(), Replicate()]),
    ((512,), [Shard(0), Replicate()]),
    ((), [Replicate(), Replicate()]),
]
QUANTIZED = [True, True, True, True, True, False, False, False, True, True, False, True]


def steps_of_any_placement(dtype, master_weights):
    mesh = init_device_mesh("cpu", (2, 2))
    options = {**OPTIONS, **BITS[8], "min_8bit_size": 0, "master_weights": master_weights}
    quantized = []
    for shape, placements in PLACED:
        values, grads = torch.randn(shape).to(dtype), torch.randn(3, *shape).to(dtype)
        p, q = nn.Parameter(distribute_tensor(values, mesh, placements)), nn.Parameter(values.clone())
        quantized.append(quantizable(p))
        options |= rounding_of_part(p)
        optimizer = AdEMAMix([p], **options)
        plain_optimizer = AdEMAMix([q], **{**options, "optim_bits": 8 if quantized[-1] else 32})
        for grad in grads:
            p.grad, q.grad = distribute_tensor(grad, mesh, placements), grad
            optimizer.step()
            plain_optimizer.step()
        assert_identical(full(p.detach()), q.detach())
        assert_identical(full(optimizer.master_weight(p)), plain_optimizer.master_weight(q))
        assert_identical(full_state(optimizer, [p]), full_state(plain_optimizer, [q]))
    assert quantized == QUANTIZED


@pytest.mark.parametrize(
    ("dtype", "master_weights"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "remainder")]
)
def test_any_placement(workers, dtype, master_weights):
    workers.run(4, steps_of_any_placement, dtype, master_weights)


@pytest.mark.first_case
@pytest.mark.parametrize(("world_size", "layout", "backend"), [(2, "fsdp", "inductor"), (4, "fsdp_tp", "aot_eager")])
def test_compiled_step(workers, world_size, layout, backend):
    """One graph, without a break or a recompilation; inductor makes nothing of it but the op calls."""
    workers.run(world_size, steps_equal_plain_steps, layout, 8, 6, backend)


def compiled_training_equals_eager(bits):
    """Forward, backward and update as one graph, with the communication in it."""
    options = {**OPTIONS, **BITS[bits]}
    models = [make_model("tp") for _ in range(2)]
    eager, optimizer = [AdEMAMix(model.parameters(), **options) for model in models]
    counter = CompileCounterWithBackend("aot_eager")
    step = compile_train_step(models[1], optimizer, lambda model, x: model(x).square().mean(), backend=counter)
    for batch in range(4):
        loss = backward(models[0], "tp", batch)
        eager.step()
        eager.zero_grad()
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(batch))
        assert_identical(step(x), loss)
    assert counter.frame_count == 1
    for p, q in pairs(*models):
        assert_identical(full(p.detach()), full(q.detach()))
    assert_identical(*[full_state(o, m.parameters()) for o, m in zip((eager, optimizer), models, strict=True)])


@pytest.mark.first_case
@EVERY_BITS
def test_compiled_training(workers, bits):
    workers.run(2, compiled_training_equals_eager, bits)


def compiled_training_is_refused():
    """The hooks that reduce gradients would not be in the graph."""
    model = make_model("fsdp")
    with pytest.raises(ValueError, match="the model is a FSDPModule"):
        compile_train_step(model, AdEMAMix(model.parameters()), lambda model, x: model(x).sum())


def test_compiled_training_is_refused(workers):
    workers.run(1, compiled_training_is_refused)


def training_equals_plain_training(layout, dtype, eps):
    """The largest relative difference of a parameter after ten steps."""
    differences = []
    models = {name: make_model(name, dtype=dtype) for name in (layout, None)}
    for name, model in models.items():
        optimizer = AdEMAMix(model.parameters(), **{**OPTIONS, "lr": 1e-3, "eps": eps})
        for batch in range(10):
            backward(model, name, batch)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in pairs(*models.values()):
        differences.append(float((full(p) - q).abs().max() / q.abs().max()))
    return max(differences)


# An element's update is a ratio, in which the rounding of a gradient near 0 is as large as any gradient. With a
# larger eps, or in float64, only the sharding's own differences are left.
@pytest.mark.each_value
@pytest.mark.parametrize(("dtype", "eps", "bound"), [(torch.float32, 1e-3, 1e-6), (torch.float64, 1e-8, 1e-10)])
@EVERY_LAYOUT
def test_training(workers, layout, dtype, eps, bound):
    world_size = 4 if LAYOUTS[layout] == 2 else 2
    assert max(workers.run(world_size, training_equals_plain_training, layout, dtype, eps)) < bound


def gradient_placed_otherwise():
    """As sequence parallelism leaves the gradients of its norms: summands on each process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    plain = nn.Parameter(torch.ones(4, 3))
    p.grad = DTensor.from_local(torch.full((4, 3), 0.5 + dist.get_rank()), mesh, [Partial()])
    plain.grad = torch.full((4, 3), 2.0)
    optimizers = [AdEMAMix([q], **OPTIONS) for q in (p, plain)]
    for optimizer in optimizers:
        optimizer.step()
    assert_identical(full(p.detach()), plain.detach())
    assert_identical(full_state(optimizers[0], [p]), full_state(optimizers[1], [plain]))


def plain_gradient():
    """Refused before anything changes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p, other = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])), nn.Parameter(torch.ones(3))
    p.grad, other.grad = torch.ones(4, 3), torch.ones(3)
    optimizer = AdEMAMix([other, p])
    with pytest.raises(RuntimeError, match="is a plain tensor, but its parameter is a DTensor"):
        optimizer.step()
    assert_identical(other.detach(), torch.ones(3))
    assert not optimizer.state


def version_counters():
    """A backward after the step says that its weights have changed, as with torch's optimizers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    loss = (p * p).sum()
    p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    AdEMAMix([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def scaler_skips_on_every_rank():
    """Where one process has a gradient that isn't finite, none steps."""
    model = make_model("fsdp")
    optimizer = AdEMAMix(model.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps = []
    for batch in range(3):
        x = torch.randn(2, 256)
        if batch == 1 and dist.get_rank() == 0:
            x[0] = float("inf")
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps.append({int(state["step"]) for state in optimizer.state.values()})
    assert steps == [{1}, {1}, {2}]
    assert all(full(p).isfinite().all() for p in model.parameters())


def replicas_stay_equal(rounding):
    """Stochastic rounding draws the same bits for the same element on every process that has it."""
    model = make_model("hsdp", dtype=torch.bfloat16)
    options = {**OPTIONS, **BITS[8], "stochastic_rounding": True, **rounding}
    optimizer = AdEMAMix(model.parameters(), **options)
    for batch in range(3):
        backward(model, "hsdp", batch)
        optimizer.step()
        optimizer.zero_grad()
    mesh = model.up.weight.device_mesh
    for p in model.parameters():
        for tensor in (optimizer.master_weight(p).detach(), optimizer.state[p]["exp_avg_sq"]):
            ours = tensor.to_local().double()
            theirs = [torch.empty_like(ours) for _ in range(mesh.size(0))]
            dist.all_gather(theirs, ours, mesh.get_group(0))
            assert_identical(theirs, [ours] * mesh.size(0))


def clipped_steps(layout):
    """The norm is that of all processes' gradients."""
    model, plain = make_model(layout), make_model()
    options = {**OPTIONS, "eps": 1e-3, "max_grad_norm": 1e-3}  # of eps, see test_training
    optimizers = [AdEMAMix(m.parameters(), **options) for m in (model, plain)]
    for batch in range(3):
        backward(model, layout, batch)
        for p, q in pairs(model, plain):
            q.grad = full(p.grad)
        for optimizer in optimizers:
            optimizer.step()
            assert not isinstance(optimizer.grad_norm, DTensor)
            assert optimizer.grad_norm > 1e-3
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-6, atol=0)
    for p, q in pairs(model, plain):
        assert (full(p) - q).abs().max() <= 1e-6 * q.abs().max()


@EVERY_LAYOUT
def test_clipping(workers, layout):
    workers.run(4, clipped_steps, layout)


def released_gradients(layout):
    """Shards that are updated during the backward pass end up as after ordinary steps."""
    runs = []
    for released in (False, True):
        model = make_model(layout)
        optimizer = AdEMAMix(model.parameters(), **{**OPTIONS, **BITS[8]})
        if released:
            release_gradients(model, optimizer)
        for batch in range(3):
            backward(model, layout, batch)
            assert all((p.grad is None) == released for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(([full(p.detach()) for p in model.parameters()], full_state(optimizer, model.parameters())))
    assert_identical(*runs)


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_released_gradients(workers, layout):
    workers.run(2, released_gradients, layout)


def parts_of_many_processes():
    """The last of 512 processes, which torch's "fake" backend imitates, has a place for its random bits too."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=511, world_size=512)
    mesh = init_device_mesh("cpu", (64, 8))
    for placements, local_shape, shape in (
        ([_StridedShard(0, split_factor=8), Shard(0)], (2, 256), (1024, 256)),
        ([Shard(0), Shard(1)], (1, 256), (64, 2048)),
    ):
        stride = (shape[1], 1)
        place = {"device_mesh": mesh, "placements": placements, "shape": torch.Size(shape), "stride": stride}
        p = nn.Parameter(DTensor.from_local(torch.ones(local_shape), **place))
        p.grad = DTensor.from_local(torch.ones(local_shape), **place)
        optimizer = AdEMAMix([p], **{**OPTIONS, **BITS[8]})
        optimizer.step()
        assert "exp_avg_absmax" in optimizer.state[p]
        _, (first_row, _) = compute_local_shape_and_global_offset(shape, mesh, placements)
        if Shard(1) not in placements:
            assert first_group(p) == first_row * 256 // 8


def test_parts_of_many_processes(workers):
    workers.run(1, parts_of_many_processes)


CASES = [gradient_placed_otherwise, plain_gradient, version_counters, scaler_skips_on_every_rank]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_on_two(workers, case):
    workers.run(2, case)


@pytest.mark.parametrize("rounding", [{"param_rounding": "stochastic"}, {"master_weights": "remainder8"}], ids=repr)
def test_replicas(workers, rounding):
    workers.run(4, replicas_stay_equal, rounding)

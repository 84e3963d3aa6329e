"""torch.compile of the optimizer's step: the graph, the generated code, and what compiles it again."""

import copy
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._inductor.utils import run_and_get_code
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.helpers.config import assert_identical
from tests.helpers.graphs import assert_only_op_calls, describe
from torch_ademamix import AdEMAMix, AdEMAMix8bit

SCHEDULES = dict(t_alpha=20, t_beta3=20)


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4,), (), (70, 60)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    params[0].data = params[0].mT.contiguous().mT
    return params


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(cls=AdEMAMix, dtype=torch.float32, **options):
    params = make_params(dtype)
    optimizer = cls(params, **{"lr": torch.tensor(1e-2), **SCHEDULES, **options})
    optimizer.init_state()
    set_grads(params, 0)
    return params, optimizer


def traced(optimizer):
    backend = EagerAndRecordGraphs()
    torch.compile(optimizer.step, fullgraph=True, backend=backend)()
    (module,) = backend.graphs
    return describe(module.graph)


def test_graph():
    _, optimizer = make()
    assert_expected_inline(
        traced(optimizer),
        """\
_set_grad_enabled(
    False)
_ademamix_step_.default(
    [f32[5, 3], f32[4], f32[], f32[70, 60]]
    [f32[5, 3], f32[4], f32[], f32[70, 60]]
    [f32[5120]]
    [f32[5120]]
    [f32[5120]]
    [f32[4]]
    []
    [0.0, 0.9, 0.999, 0.9999, 5.0, 20.0, 20.0, 0.0, 1e-08, 0.01, 0.0, 0.0, 0.0, 0.0]
    [f32[]]
    rows=[]
    maximize=False
    stochastic_param_rounding=False
    seed=0
    subsequences=[]
    offsets=[0, 0, 0, 0, 256, 1, 0, 512, 2, 0, 768, 3]
    grad_scale=None
    found_inf=None)
increment_version(
    [f32[5, 3], f32[4], f32[], f32[70, 60], f32[5120], f32[5120], f32[5120], f32[4]])
_set_grad_enabled(
    True)""",
    )


def test_graph_of_two_dtypes():
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(4))]
    set_grads(params, 0)
    optimizer = AdEMAMix(params, maximize=True)
    optimizer.init_state()
    assert_expected_inline(
        traced(optimizer),
        """\
_set_grad_enabled(
    False)
_ademamix_step_.default(
    [f32[2], f32[4]]
    [f32[2], f32[4]]
    [f32[768]]
    [f32[768]]
    [f32[768]]
    [f32[3]]
    []
    [0.001, 0.9, 0.999, 0.9999, 5.0, 0.0, 0.0, 0.0, 1e-08, 0.01, 0.0, 0.0, 0.0, 0.0]
    []
    rows=[]
    maximize=True
    stochastic_param_rounding=False
    seed=0
    subsequences=[]
    offsets=[0, 0, 0, 0, 512, 2]
    grad_scale=None
    found_inf=None)
increment_version(
    [f32[2], f32[4], f32[768], f32[768], f32[768], f32[3]])
_ademamix_step_.default(
    [bf16[3]]
    [bf16[3]]
    [f32[768]]
    [f32[768]]
    [f32[768]]
    [f32[3]]
    []
    [0.001, 0.9, 0.999, 0.9999, 5.0, 0.0, 0.0, 0.0, 1e-08, 0.01, 0.0, 0.0, 0.0, 0.0]
    []
    rows=[]
    maximize=True
    stochastic_param_rounding=False
    seed=0
    subsequences=[]
    offsets=[0, 256, 1]
    grad_scale=None
    found_inf=None)
increment_version(
    [bf16[3], f32[768], f32[768], f32[768], f32[3]])
_set_grad_enabled(
    True)""",
    )


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"lr": 1e-3}, {"maximize": True, "capturable": True}], ids=repr)
def test_generated_code(options, dtype):
    _, optimizer = make(dtype=dtype, **options)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert_only_op_calls(code, 1)


def test_generated_code_of_groups_and_dtypes():
    first, second, third = make_params(), make_params(torch.bfloat16), make_params()
    optimizer = AdEMAMix([{"params": first + second}, {"params": third, "weight_decay": 0.0}], lr=torch.tensor(1e-2))
    optimizer.init_state()
    set_grads(first + second + third, 0)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert_only_op_calls(code, 2)


KEEPING_UPDATES = ({"master_weights": "remainder"}, {"master_weights": "remainder8"}, {"param_rounding": "stochastic"})


@pytest.mark.each_value
@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
@pytest.mark.parametrize("options", KEEPING_UPDATES, ids=repr)
def test_generated_code_of_bfloat16(options, cls):
    """The remainders are updated in place too."""
    _, optimizer = make(cls, torch.bfloat16, **options)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert_only_op_calls(code, 1 + (cls is AdEMAMix8bit))


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        *((torch.bfloat16, options) for options in KEEPING_UPDATES),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
def test_compiles_once(counter, cls, dtype, options):
    """Over 50 steps with a scheduler, past the warm-ups; with the same bits as eager."""
    params, optimizer = make(cls, dtype, **options)
    expected, eager = make(cls, dtype, **options)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    schedulers = [CosineAnnealingLR(o, 50) for o in (optimizer, eager)]
    for i in range(50):
        set_grads(params, i)
        set_grads(expected, i)
        optimizer._opt_called = True  # the compiled step isn't the one that the scheduler watches
        compiled()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_identical((params, optimizer.state_dict()), (expected, eager.state_dict()))


def test_clipping_compiles_once(counter):
    """Inductor adds the squares in another order than eager."""
    params, optimizer = make(max_grad_norm=0.5)
    expected, eager = make(max_grad_norm=0.5)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for i in range(5):
        set_grads(params, i)
        set_grads(expected, i)
        compiled()
        eager.step()
        torch.testing.assert_close(optimizer.grad_norm, eager.grad_norm, rtol=1e-6, atol=0)
    assert counter.frame_count == 1
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-7)


def test_scheduler_made_first(counter):
    """It wraps optimizer.step in what can't be traced; the class's step is as it was."""
    params, optimizer = make()
    scheduler = CosineAnnealingLR(optimizer, 10)
    compiled = torch.compile(lambda: type(optimizer).step(optimizer), fullgraph=True, backend=counter)
    for i in range(10):
        set_grads(params, i)
        optimizer._opt_called = True
        compiled()
        scheduler.step()
    assert counter.frame_count == 1
    assert optimizer.state[params[0]]["step"] == 10


def test_one_graph_per_set_of_gradients(counter):
    params, optimizer = make()
    expected, eager = make()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for i in range(12):
        set_grads(params, i)
        set_grads(expected, i)
        if i % 3 == 2:
            params[1].grad = expected[1].grad = None
        compiled()
        eager.step()
    assert counter.frame_count == 2
    assert optimizer.state[params[1]]["step"] == 8
    assert_identical(params, expected)


def test_without_init_state(counter):
    """State is made before the first step is traced."""
    params = make_params()
    expected, eager = make()
    optimizer = AdEMAMix(params, lr=torch.tensor(1e-2), **SCHEDULES)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    for i in range(5):
        set_grads(params, i)
        set_grads(expected, i)
        compiled()
        eager.step()
    assert counter.frame_count == 1
    assert_identical(params, expected)


def test_load_state_dict_between_steps(counter):
    params, optimizer = make()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)

    def run():
        for i in range(4):
            set_grads(params, i)
            compiled()
        return copy.deepcopy((params, optimizer.state_dict()))

    run()
    saved = copy.deepcopy((params, optimizer.state_dict()))
    expected = run()
    for _ in range(20):
        with torch.no_grad():
            for p, value in zip(params, saved[0], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(saved[1])
        assert_identical(run(), expected)
    assert counter.frame_count == 1


def test_replaced_state_between_steps(counter):
    """A compiled step hears of it too, whoever keeps the tensors that were there."""
    params, optimizer = make()
    expected, eager = make()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    kept = []
    for i in range(4):
        set_grads(params, i)
        set_grads(expected, i)
        compiled()
        eager.step()
        if i == 1:
            kept += optimizer.state[params[3]].values()
            for name, value in optimizer.state[params[3]].items():
                optimizer.state[params[3]][name] = value.clone()
            kept[0].zero_()
    assert counter.frame_count == 2
    assert_identical((params, optimizer.state_dict()), (expected, eager.state_dict()))


def test_skipped_step(counter):
    """found_inf is read at each call."""
    params, optimizer = make()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    compiled()
    before = copy.deepcopy((params, optimizer.state_dict()))
    optimizer.found_inf.fill_(1)
    compiled()
    assert_identical((params, optimizer.state_dict()), before)
    assert counter.frame_count == 1


def test_backward_after_a_compiled_step_raises(counter):
    params, optimizer = make()
    loss = sum(p.square().sum() for p in params)
    torch.compile(optimizer.step, fullgraph=True, backend=counter)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


COMPILE_1000 = """
import time, torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch_ademamix import AdEMAMix
params = [nn.Parameter(torch.ones(8)) for _ in range(1000)]
for p in params:
    p.grad = torch.ones(8)
optimizer = AdEMAMix(params, lr=torch.tensor(1e-3))
optimizer.init_state()
counter = CompileCounterWithBackend("inductor")
step = torch.compile(optimizer.step, fullgraph=True, backend=counter)

def call(depth):
    step() if depth == 0 else call(depth - 1)

start = time.perf_counter(), time.process_time()
call(8)
seconds = time.perf_counter() - start[0], time.process_time() - start[1]
print("1,000 parameters compiled in %.1f s, %.1f s of them on the CPU" % seconds)
step()
assert counter.frame_count == 1
assert optimizer.state[params[-1]]["step"] == 2
"""


@pytest.mark.nightly
@pytest.mark.slow
def test_compile_1000_parameters():
    """The time is printed (-s shows it); without other load it should stay below 60 s on two cores.

    The call is a few frames deep because CPython 3.11 maps and unmaps memory at each call across the end of a chunk
    of its frame stack: where such an end falls into torch's innermost loops, as it does for a call from a script's
    top level, compiling takes several times longer. That is no matter of the step's.
    """
    caches = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    subprocess.run([sys.executable, "-c", COMPILE_1000], env={**os.environ, **caches}, check=True)


@pytest.mark.nightly
@pytest.mark.parametrize("isolated", [False, True])
def test_ninth_optimizer(isolated):
    """All optimizers' steps count towards one limit, unless they are isolated."""
    if isolated and "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("came with torch 2.13")
    options = {"isolate_recompiles": True} if isolated else {}

    def step():
        params, optimizer = make()
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager", **options)()
        assert optimizer.state[params[0]]["step"] == 1

    for _ in range(8):
        step()
    if isolated:
        return step()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        step()
    with torch._dynamo.config.patch(recompile_limit=9):
        step()


@pytest.mark.each_value
@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_version_counters(backend, cls):
    """A compiled step counts as eager ones do: backward through what it has changed is refused."""
    p = nn.Parameter(torch.randn(70, 60))
    optimizer = cls([p])
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=backend)
    compiled()
    changed = [p, *optimizer.state[p].values()]
    before = [t._version for t in changed]
    compiled()
    assert all(t._version > version for t, version in zip(changed, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CHANGES = {
    "strides": lambda p: p.data.mT.contiguous().mT,
    "dtype": lambda p: p.data.bfloat16(),
    "values": lambda p: p.data.clone(),
}


@pytest.mark.each_value
@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_parameters_of_another_form(backend, change, cls):
    """A compiled step notices, though it guards parameters by identity: their gradients have their form."""
    torch.manual_seed(0)
    start = torch.randn(70, 60)
    results = []
    for compiled in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = cls([p], lr=torch.tensor(1e-2))
        step = torch.compile(optimizer.step, fullgraph=True, backend=backend) if compiled else optimizer.step
        for i in range(4):
            if i == 2:
                p.data = CHANGES[change](p)
            p.grad = torch.empty_like(p).copy_(start * (i - 1))
            step()
        results.append([p, *optimizer.state[p].values()])
    assert_identical(*results)


def test_marks_of_parameters():
    """What a step is traced with doesn't stay: the model is compiled as it would have been."""
    params, optimizer = make()
    torch._dynamo.mark_static_address(params[1], guard=False)
    before = [dict(p.__dict__) for p in params]
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    set_grads(params, 0)
    torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert [dict(p.__dict__) for p in params] == before


def test_numbers_are_not_guarded_one_by_one():
    """A compiled call looks at parameters and gradients, but not at each number of their offsets and subsequences."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(5)]
    optimizer = AdEMAMix8bit(params, min_8bit_size=1)
    optimizer.init_state()
    for p in params:
        p.grad = torch.ones_like(p)
    names = set()
    options = {"guard_filter_fn": lambda guards: [names.add(guard.name) or True for guard in guards]}
    torch.compile(optimizer.step, fullgraph=True, options=options)()
    assert any(name.endswith("params'][4].grad") for name in names)
    assert not [name for name in names if re.search(r"(offsets|subsequences)\[", name)]


def test_gradients_are_guarded_once():
    """Each is read in C++ and compared once; that it is there at all would not be enough."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    optimizer = AdEMAMix(params)
    optimizer.init_state()
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    kinds = {}

    def keep_all(guards):
        for guard in guards:
            kinds.setdefault(guard.name, set()).add(guard.guard_type)
        return [True] * len(guards)

    torch.compile(optimizer.step, fullgraph=True, options={"guard_filter_fn": keep_all})()
    of_grads = [kinds[name] for name in sorted(kinds) if re.search(r"params'\]\[\d\]\.grad$", name)]
    assert of_grads[:2] == [{"_match_grad", "NOT_NONE_MATCH"}] * 2
    assert len(of_grads) == 3
    assert not any("HASATTR" in of_param for name, of_param in kinds.items() if "params'][" in name)


def test_gradients_without_internals_of_dynamo(monkeypatch):
    """Where another torch has no such source, the traced code reads `p.grad` itself."""
    params, optimizer = make()
    expected, reference = make()
    monkeypatch.delattr(torch._dynamo.source, "GradSource")
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        set_grads(params, i)
        set_grads(expected, i)
        step()
        reference.step()
    assert_identical(params, expected)

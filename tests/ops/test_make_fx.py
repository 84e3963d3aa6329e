"""make_fx traces a step: the graph has the op calls and no more, and running it is a step."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers.config import assert_identical
from tests.helpers.tracers import CAN_SWAP, step_nodes, trace
from torch_ademamix import AdEMAMix, ademamix

needs_swap = pytest.mark.skipif(not CAN_SWAP, reason="this torch has no swap_in_optimizer_params_and_state")
OPTIONS = {
    "32 bits": {},
    "8 bits": {"optim_bits": 8, "min_8bit_size": 0},
    "12 bits": {"optim_bits": 8, "min_8bit_size": 0, "slow_ema_bits": 12},
    "remainders": {"master_weights": "remainder"},
    "clipping": {"max_grad_norm": 1.0},
}
EVERY_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(options):
    """Parameters of two dtypes, which take an op call each; their state is there."""
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16)
    params = [torch.nn.Parameter(torch.randn(3, 256, dtype=dtype)) for dtype in dtypes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.5}]
    optimizer = AdEMAMix(groups, **{"lr": 1e-2, "t_alpha": 6, "t_beta3": 6, "weight_decay": 0.1, **options})
    optimizer.init_state()
    set_grads(params, 0)
    return params, optimizer


def set_grads(params, seed):
    """Gradients in the same tensors, as a graph reads them."""
    for p in params:
        p.grad = torch.empty_like(p) if p.grad is None else p.grad
        p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def in_arenas(params, optimizer):
    parts = [(p, optimizer.state[p].slice) for p in params]
    return all(part is not None and part.is_of(p, optimizer.state[p]) for p, part in parts)


def steps_equal_eager_steps(step, params, optimizer, options, traced_steps):
    """Two steps by the graph and two eager ones, beside an optimizer that was never traced."""
    plain, plain_optimizer = make(options)
    for _ in range(traced_steps):
        plain_optimizer.step()
    for seed in range(1, 5):
        for ps in (params, plain):
            set_grads(ps, seed)
        step() if seed < 3 else optimizer.step()
        plain_optimizer.step()
        assert_identical(params, plain)
        assert_identical([dict(optimizer.state[p]) for p in params], [dict(plain_optimizer.state[p]) for p in plain])
    assert in_arenas(params, optimizer)


@EVERY_OPTIONS
def test_live_step(options):
    """Traced with real tensors, which is a step, and are the graph's from then on."""
    params, optimizer = make(options)
    graph = make_fx(lambda: optimizer.step(), tracing_mode="real")()
    assert len(step_nodes(graph)) == 2
    steps_equal_eager_steps(graph, params, optimizer, options, traced_steps=1)


@needs_swap
@EVERY_OPTIONS
def test_swapped_in_step(options):
    """Traced with fake parameters and state in place of the live ones."""
    params, optimizer = make(options)
    graph, tensors = trace(optimizer)
    assert len(step_nodes(graph)) == 2
    assert in_arenas(params, optimizer)
    steps_equal_eager_steps(lambda: graph(*tensors), params, optimizer, options, traced_steps=0)


@needs_swap
@pytest.mark.parametrize(("lr", "follows"), [(1e-2, False), (torch.tensor(1e-2), True)], ids=["number", "tensor"])
def test_learning_rate(lr, follows):
    """A graph keeps a number, and follows a tensor."""
    params, optimizer = make({"lr": lr})
    graph, tensors = trace(optimizer)
    for group in optimizer.param_groups:
        if follows:
            group["lr"].zero_()
        else:
            group["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    graph(*tensors)
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [follows] * 3


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_functional(mode, pre_dispatch):
    """The same for the step on lists."""
    lists = [[torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)] for _ in range(2)]
    lists += [[torch.ones(3), torch.ones(3)] for _ in range(3)]
    lists.append([torch.zeros(()), torch.zeros(())])

    def step(*lists):
        ademamix(*lists, lr=1e-2, beta1=0.9, beta2=0.999, beta3=0.9999, alpha=5.0, eps=1e-8, weight_decay=0.0)
        return ()

    graph = make_fx(step, tracing_mode=mode, pre_dispatch=pre_dispatch)(*lists)
    assert len(step_nodes(graph)) == 2


@pytest.mark.parametrize("traced", [False, True])
def test_second_op_call_is_checked_before_the_first_writes(traced):
    params, optimizer = make({})
    optimizer.state[params[1]]["exp_avg_sq"] = torch.ones(3)
    before = params[0].detach().clone()
    step = make_fx(lambda: optimizer.step(), tracing_mode="real") if traced else optimizer.step
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\].*exp_avg_sq has shape \[3\]"):
        step()
    assert_identical(params[0].detach(), before)

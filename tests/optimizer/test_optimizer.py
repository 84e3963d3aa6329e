"""AdEMAMix as a torch.optim optimizer."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import torch_ademamix
from tests.helpers.config import CONTIGUOUS, DTYPES, HYPERPARAMETERS, TOLERANCES, assert_identical, make_lists
from torch_ademamix import AdEMAMix, ReferenceAdEMAMix, ademamix

CLASSES = {
    # name: the arguments that bitsandbytes' class takes after the common ones, and the fixed options
    "AdEMAMix": (["optim_bits", "min_8bit_size", "is_paged"], {}),
    "AdEMAMix8bit": (["min_8bit_size", "is_paged"], {"optim_bits": 8}),
    "AdEMAMix32bit": (["min_8bit_size", "is_paged"], {"optim_bits": 32}),
    "PagedAdEMAMix": (["optim_bits", "min_8bit_size"], {"is_paged": True}),
    "PagedAdEMAMix8bit": (["min_8bit_size"], {"optim_bits": 8, "is_paged": True}),
    "PagedAdEMAMix32bit": (["min_8bit_size"], {"optim_bits": 32, "is_paged": True}),
}
COMMON_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999, 0.9999),
    "alpha": 5.0,
    "t_alpha": None,
    "t_beta3": None,
    "eps": 1e-8,
    "weight_decay": 1e-2,
}
DEFAULTS = {**COMMON_DEFAULTS, "optim_bits": 32, "min_8bit_size": 4096, "is_paged": False}


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name):
    """Of bitsandbytes, positionally and with its defaults."""
    more, fixed = CLASSES[name]
    cls = getattr(torch_ademamix, name)
    positional = [
        argument for argument in inspect.signature(cls).parameters.values() if argument.kind != argument.KEYWORD_ONLY
    ]
    assert [argument.name for argument in positional] == ["params", *COMMON_DEFAULTS, *more]
    assert {a.name: a.default for a in positional[1:]} == {x: DEFAULTS[x] for x in (*COMMON_DEFAULTS, *more)}

    values = [1e-2, (0.5, 0.6, 0.7), 2.0, 10, 20, 1e-6, 0.3]
    optimizer = cls([torch.ones(2)], *values, *[DEFAULTS[x] for x in more])
    assert isinstance(optimizer, AdEMAMix)
    group = optimizer.param_groups[0]
    assert [group[x] for x in COMMON_DEFAULTS] == values
    assert {x: group[x] for x in ("optim_bits", "is_paged")} == {
        x: fixed.get(x, DEFAULTS[x]) for x in ("optim_bits", "is_paged")
    }


def make_params(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes or [(7, 5), (5,), ()]]


def set_grads(params, step):
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps, first=0):
    for i in range(first, first + steps):
        set_grads(params, i)
        optimizer.step()
    return params


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"t_alpha": 10, "t_beta3": 10, "weight_decay": 0.1},
        {"betas": (0.0, 0.99, 0.999), "t_beta3": 5, "weight_decay": 0.0},
        {"maximize": True, "alpha": 0.0},
        {"schedule_start": 4, "t_alpha": 10, "t_beta3": 10},
        {"lr": torch.tensor(1e-2)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_reference(dtype, options):
    params, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, reference = (cls(p, **options) for cls, p in ((AdEMAMix, params), (ReferenceAdEMAMix, expected)))
    run(optimizer, params, 20)
    run(reference, expected, 20)
    for p, q in zip(params, expected, strict=True):
        assert (p - q).abs().max() <= TOLERANCES["vectors", dtype, "param"] * q.abs().max()
        assert optimizer.state[p].keys() == reference.state[q].keys()
        assert optimizer.state[p]["step"] == reference.state[q]["step"] == 20
        for name in reference.state[q].keys() - {"step"}:
            m, n = optimizer.state[p][name], reference.state[q][name]
            assert (m - n).abs().max() <= TOLERANCES["vectors", dtype, "moment"] * n.abs().max()


@pytest.mark.parametrize("cls", [AdEMAMix, ReferenceAdEMAMix])
def test_closure(cls):
    (p,) = params = make_params((3,))
    optimizer = cls(params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step() is None
    assert optimizer.state[p]["step"] == 4
    assert p.is_leaf
    assert p.requires_grad


def test_step_hooks():
    params = make_params()
    optimizer, order = AdEMAMix(params), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: order.append(("pre", len(o.state))))
    optimizer.register_step_post_hook(lambda o, args, kwargs: order.append(("post", len(o.state))))
    run(optimizer, params, 1)
    assert order == [("pre", 0), ("post", 3)]


SCHEDULERS = {
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: 0.9**t),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda t: 0.95),
    "step": partial(lr_scheduler.StepLR, step_size=3),
    "multi_step": partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
    "constant": partial(lr_scheduler.ConstantLR, total_iters=4),
    "linear": partial(lr_scheduler.LinearLR, total_iters=4),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=6, power=2),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "one_cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=11, cycle_momentum=False),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 7)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
}


@pytest.mark.parametrize("kind", ["float", "tensor", "capturable"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, kind):
    """Any scheduler sets the learning rates that torch.optim.AdamW gets, and the step takes them."""

    def train(optimizer, params):
        scheduler = SCHEDULERS[name](optimizer)
        for i in range(10):
            run(optimizer, params, 1, first=i)
            yield float(optimizer.param_groups[0]["lr"])
            scheduler.step(*[1.0] * (name == "plateau"))

    params = make_params()
    lr = torch.tensor(1e-2, dtype=torch.float64) if kind == "tensor" else 1e-2
    optimizer = AdEMAMix(params, lr=lr, capturable=kind == "capturable")
    lrs = list(train(optimizer, params))
    others = make_params()
    assert lrs == pytest.approx(list(train(torch.optim.AdamW(others, lr=1e-2), others)), rel=1e-12)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == (kind != "float")

    expected = make_params()
    by_hand = AdEMAMix(expected)
    for i, lr in enumerate(lrs):
        by_hand.param_groups[0]["lr"] = lr
        run(by_hand, expected, 1, first=i)
    assert_identical(params, expected)


def test_options_per_group():
    """Each group is updated as by an optimizer of its own; a group may come later."""
    options = [
        {},
        dict(lr=0.1, betas=(0.8, 0.9, 0.99), alpha=2.0, t_alpha=5, t_beta3=5, eps=1e-4, weight_decay=0.0),
        dict(lr=torch.tensor(0.1), maximize=True),
    ]
    together, alone = ([make_params(seed=i) for i in range(3)] for _ in range(2))
    groups = [{"params": params, **o} for params, o in zip(together, options, strict=True)]
    optimizer = AdEMAMix(groups[:2], lr=0.01)
    alone_optimizers = [AdEMAMix(params, **{"lr": 0.01, **o}) for params, o in zip(alone, options, strict=True)]
    for i in range(6):
        if i == 2:
            optimizer.add_param_group(groups[2])
        for j, (params, own, own_optimizer) in enumerate(zip(together, alone, alone_optimizers, strict=True)):
            set_grads(params, i)
            if j < 2 or i >= 2:
                run(own_optimizer, own, 1, first=i)
        optimizer.step()
    assert_identical(together, alone)


def test_every_parameter_has_its_own_step():
    """Parameters without gradient, or frozen for a while, are left alone and count their own steps."""
    params, expected = make_params(), make_params()
    optimizer = AdEMAMix(params, t_alpha=10, t_beta3=10)
    own = [AdEMAMix([q], t_alpha=10, t_beta3=10) for q in expected]
    for i in range(8):
        set_grads(params, i)
        set_grads(expected, i)
        for j, (p, q, o) in enumerate(zip(params, expected, own, strict=True)):
            if i == 5 or (i + j) % 3 == 0:
                p.grad = None
            else:
                o.step()
                assert o.state[q]["step"] == optimizer.state[p].get("step", 0) + 1
        optimizer.step()
    assert_identical(params, expected)


def test_mixed_dtypes_and_layouts_in_a_group():
    shapes = [(4, 3, 2, 2), (5,), ()]
    params = [p for dtype in DTYPES for p in make_params(*shapes, dtype=dtype)]
    with torch.no_grad():
        params[0].data = params[0].to(memory_format=torch.channels_last)
    expected = copy.deepcopy(params)
    run(AdEMAMix(params), params, 5)
    for q in expected:
        optimizer = AdEMAMix([q])
        for i in range(5):
            set_grads(expected, i)
            optimizer.step()
    assert_identical(params, expected)


def test_gradient_of_another_dtype():
    params, expected = make_params(), make_params()
    optimizer, other = AdEMAMix(params), AdEMAMix(expected)
    set_grads(params, 0)
    for p, q in zip(params, expected, strict=True):
        q.grad_dtype = None
        q.grad = p.grad.bfloat16()
        p.grad = q.grad.float()
    optimizer.step()
    other.step()
    assert_identical(params, expected)


def test_float_and_tensor_lr():
    """The same numbers, also where one follows the other; a tensor keeps its place."""
    params, expected = make_params(), make_params()
    optimizer, reference = AdEMAMix(params, lr=0.1), AdEMAMix(expected, lr=0.1)
    run(optimizer, params, 2)
    optimizer.param_groups[0]["lr"] = lr = torch.tensor([0.1], dtype=torch.float64)
    run(optimizer, params, 2, first=2)
    run(reference, expected, 4)
    assert optimizer.param_groups[0]["lr"] is lr
    lr.fill_(0.5)
    reference.param_groups[0]["lr"] = 0.5
    run(optimizer, params, 2, first=4)
    run(reference, expected, 2, first=4)
    assert_identical(params, expected)


def test_capturable():
    """lr is a tensor on the parameters' device, also after loading a float."""
    params = make_params()
    optimizer = AdEMAMix(params, lr=0.1, capturable=True)
    assert_identical(optimizer.param_groups[0]["lr"], torch.tensor([0.1], dtype=torch.float64))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = 0.2
    optimizer.load_state_dict(state_dict)
    assert_identical(optimizer.param_groups[0]["lr"], torch.tensor([0.2], dtype=torch.float64))
    optimizer.add_param_group({"params": make_params(), "lr": 0.3})
    assert_identical(optimizer.param_groups[1]["lr"], torch.tensor([0.3], dtype=torch.float64))
    AdEMAMix([{"params": []}, {"params": params}], capturable=True)


def test_several_devices():
    """One op call each; the learning rate and a scaler's tensors may be on either."""
    params, expected = make_params(), make_params()
    meta = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = AdEMAMix([meta, *params], lr=torch.tensor(0.1))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    for i in range(3):
        set_grads(params, i)
        meta.grad = torch.ones_like(meta)
        optimizer.step()
    run(AdEMAMix(expected, lr=torch.tensor(0.1)), expected, 3)
    assert_identical(params, expected)
    assert optimizer.state[meta]["step"].is_meta


def test_functional_on_several_devices():
    lists = make_lists(CONTIGUOUS[1:4])
    expected = lists.clone()
    ademamix(*expected, lr=torch.tensor(0.1), **HYPERPARAMETERS)
    for tensors in lists:
        tensors.append(torch.zeros(()).to("meta"))
    ademamix(*lists, lr=torch.tensor(0.1), grad_scale=torch.ones(()), **HYPERPARAMETERS)
    assert_identical([tensors[:-1] for tensors in lists], list(expected))


def test_named_parameters():
    model = nn.Linear(3, 2)
    optimizer = AdEMAMix(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    state_dict = copy.deepcopy(optimizer.state_dict())
    run(optimizer, list(model.parameters()), 1)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_scaler(dtype, unscale):
    """As without scaler, but for the steps with a non-finite gradient, which change nothing."""
    params, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer, reference = AdEMAMix(params), AdEMAMix(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    for i in range(8):
        set_grads(params, i)
        for p in params:
            p.grad *= scaler.scale(torch.ones(()))
        if i == 4:
            params[0].grad[2, 3] = float("inf")
        else:
            run(reference, expected, 1, first=i)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert len(calls) == 8  # the op skips the step, without a look from the host
    assert not hasattr(optimizer, "found_inf")
    assert_identical(params, expected)
    assert all(state["step"] == 7 for state in optimizer.state.values())


def test_repr():
    text = repr(AdEMAMix(make_params(), lr=0.25, t_alpha=7))
    assert text.startswith("AdEMAMix (\nParameter Group 0\n")
    for line in ("alpha: 5.0", "betas: (0.9, 0.999, 0.9999)", "lr: 0.25", "t_alpha: 7", "maximize: False"):
        assert f"    {line}\n" in text


def test_warm_ups_of_0_steps_are_none():
    """As bitsandbytes means them; also from a checkpoint, and set by hand."""
    params = [nn.Parameter(torch.ones(5)) for _ in range(3)]
    zero, none, set_later = (
        AdEMAMix([p], t_alpha=steps, t_beta3=steps) for p, steps in zip(params, (0, None, 9), strict=True)
    )
    set_later.param_groups[0].update(t_alpha=0, t_beta3=0)
    for _ in range(3):
        for p, optimizer in zip(params, (zero, none, set_later), strict=True):
            p.grad = torch.linspace(0, 1, 5)
            optimizer.step()
    assert_identical(params[0].data, params[1].data)
    assert_identical(params[2].data, params[1].data)
    zero.load_state_dict(copy.deepcopy(zero.state_dict()))
    zero.step()


def test_seeds_of_numpy():
    results = []
    for seed in (np.int64(4), 4):
        p = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        optimizer = AdEMAMix([p], seed=seed, param_rounding="stochastic")
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.data)
    assert_identical(*results)

"""A β1 of 0: the gradient takes exp_avg's place, so there is none in state, files and op calls."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.config import (
    DTYPES,
    MIXED,
    StepLists,
    assert_identical,
    hyperparameter_tensor,
    make_lists,
    step,
    step_call,
)
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import SMALL, blockwise_call, blockwise_step, make_blockwise, train, without_exp_avg
from torch_ademamix import AdEMAMix, ademamix
from torch_ademamix.checkpoint import from_adamw, from_bitsandbytes, to_bitsandbytes
from torch_ademamix.optimizer import MIN_8BIT_SIZE
from torch_ademamix.state import allocation
from torch_ademamix.training.release import release_gradients

BETAS = (0.0, 0.99, 0.999)
STORAGES: dict[str, dict[str, Any]] = {
    "32": {},
    "8": {"optim_bits": 8, "slow_ema_bits": 16},
    "8-8": {"optim_bits": 8, "slow_ema_bits": 8},
    "bfloat16": {"master_weights": "remainder"},
    "stochastic": {"param_rounding": "stochastic"},
}
all_storages = pytest.mark.parametrize("storage", STORAGES)
KINDS = pytest.mark.parametrize("kind", ["32", "16", "8"])


def make_op_lists(kind: str, entries: Any, *dtypes: torch.dtype) -> Any:
    if kind == "32":
        return make_lists(entries, *dtypes)
    return make_blockwise(entries, *dtypes, slow_ema_bits=int(kind))


def make(storage: str, sizes: Any = (5000, 300, 4096), **options: Any) -> tuple[list[nn.Parameter], AdEMAMix]:
    dtype = torch.bfloat16 if storage in ("bfloat16", "stochastic") else torch.float32
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    options = {"lr": 1e-2, "betas": BETAS, "t_alpha": 30, "t_beta3": 30, **STORAGES[storage], **options}
    return params, AdEMAMix(params, **options)


def has_exp_avg(optimizer: AdEMAMix) -> bool:
    return any(name in ("exp_avg", "exp_avg_absmax") for entries in optimizer.state.values() for name in entries)


# ---------------------------------------------------------------------------------------------------------- the ops


@KINDS
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_that_with_zeros_for_exp_avg(
    kernel: str, kind: str, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    lists = make_op_lists(kind, MIXED if kind == "32" else SMALL, dtype, grad_dtype)
    call = step if kind == "32" else blockwise_step
    with_zeros, without = lists.clone(), without_exp_avg(lists)
    for _ in range(2):
        for m1 in with_zeros.exp_avgs:
            m1.zero_()
        for options in ({}, {"t_beta3": 40, "t_alpha": 9, "grad_scale": torch.tensor(8.0), "maximize": True}):
            call(kernel, with_zeros, beta1=0.0, **options)
            call(kernel, without, beta1=0.0, **options)
    assert_identical(list(without), list(without_exp_avg(with_zeros)))


@KINDS
def test_elements_that_are_not_finite(kernel: str, kind: str) -> None:
    lists = make_op_lists(kind, MIXED[3:7])
    lists.grads[-1][[0, 5, 700]] = torch.tensor([torch.nan, torch.inf, 3e38])
    with_zeros, without = lists.clone(), without_exp_avg(lists)
    call = step if kind == "32" else blockwise_step
    call(kernel, with_zeros, beta1=0.0)
    call(kernel, without, beta1=0.0)
    assert_identical(list(without), list(without_exp_avg(with_zeros)))


@KINDS
@pytest.mark.parametrize("numbers", ["numbers", "tensor"])
@pytest.mark.parametrize("where", ["lists", "arenas"])
def test_opcheck(kind: str, numbers: str, where: str) -> None:
    lists = without_exp_avg(make_op_lists(kind, MIXED[2:5]))
    given = in_arenas(lists) if where == "arenas" else lists
    options: dict[str, Any] = {"beta1": 0.0, **(given.options if where == "arenas" else {})}
    if numbers == "tensor":
        options["hyperparameters"] = hyperparameter_tensor(beta1=0.0)
    if kind == "32":
        torch.library.opcheck(*step_call(torch.ops.torch_ademamix.ademamix_step_, given, **options))
    else:
        torch.library.opcheck(*blockwise_call(given, **options))


def test_the_function_takes_empty_lists() -> None:
    numbers = dict(lr=0.1, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8, weight_decay=0.1)
    mixed = [*MIXED[2:5], *MIXED[2:5]]
    lists = make_lists(mixed)
    lists.grads[1] = lists.grads[1].bfloat16()  # so that there are two op calls
    with_zeros, without = lists.clone(), without_exp_avg(lists)
    for m1 in with_zeros.exp_avgs:
        m1.zero_()
    ademamix(*with_zeros, beta1=0.0, **numbers)
    ademamix(*without, beta1=0.0, **numbers)
    assert_identical(list(without), list(without_exp_avg(with_zeros)))
    with pytest.raises(RuntimeError, match=r"beta1 is 0\.9, but must be 0 without exp_avgs"):
        ademamix(*without, beta1=0.9, **numbers)


# --------------------------------------------------------------------------------------------------------- optimizers


@all_storages
def test_training_is_that_with_exp_avg(storage: str) -> None:
    params, optimizer = make(storage)
    others, other = make(storage, betas=(0.9, *BETAS[1:]))
    other.init_state()
    other.param_groups[0]["betas"] = BETAS  # state that was made before keeps its exp_avg
    train(params, optimizer, 3)
    train(others, other, 3)
    assert has_exp_avg(other)
    assert not has_exp_avg(optimizer)
    assert_identical([p.detach() for p in params], [p.detach() for p in others])
    for p, q in zip(params, others, strict=True):
        assert_identical(dict(optimizer.state[p]), {name: other.state[q][name] for name in optimizer.state[p]})


@pytest.mark.parametrize(("storage", "bytes_per_param"), [("32", 8.0), ("8", 3.04), ("8-8", 2.04)])
def test_bytes(storage: str, bytes_per_param: float) -> None:
    (p,), optimizer = make(storage, sizes=(1 << 20,))
    optimizer.init_state()
    del optimizer.state[p]["step"]
    assert sum(tensor.nbytes for tensor in optimizer.state[p].values()) / p.numel() <= bytes_per_param


@all_storages
def test_saving_and_loading(storage: str) -> None:
    params, optimizer = make(storage)
    train(params, optimizer, 2)
    saved = copy.deepcopy((params, optimizer.state_dict()))
    assert not any("exp_avg" in entries for entries in saved[1]["state"].values())
    train(params, optimizer, 2)
    others, other = make(storage)
    for p, q in zip(others, saved[0], strict=True):
        p.data.copy_(q.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved[1])
    train(others, other, 2)
    assert_identical([p.detach() for p in others], [p.detach() for p in params])
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])
    assert_identical(copy.deepcopy(optimizer).state_dict(), optimizer.state_dict())


def raise_beta1(optimizer: AdEMAMix) -> None:
    optimizer.param_groups[0]["betas"] = (0.9, *BETAS[1:])


def cycle_momentum(optimizer: AdEMAMix) -> None:
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=True)


@all_storages
@pytest.mark.parametrize("change", [raise_beta1, cycle_momentum])
def test_a_beta1_above_0_is_refused_later(storage: str, change: Any) -> None:
    params, optimizer = make(storage)
    train(params, optimizer, 1)
    change(optimizer)
    before = copy.deepcopy([[p.detach() for p in params], dict(optimizer.state_dict()["state"])])
    message = r"betas\[0\] is .*, but the state of param_groups\[0\]\['params'\]\[0\] has no exp_avg, since"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer._plan_cache.clear()
    assert_identical([[p.detach() for p in params], dict(optimizer.state_dict()["state"])], before)
    optimizer.param_groups[0]["betas"] = BETAS
    train(params, optimizer, 1)
    raise_beta1(optimizer)
    with pytest.warns(UserWarning, match="starts at zero"):  # what the message says
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(not optimizer.state[p]["exp_avg"].any() for p in params)
    train(params, optimizer, 1)
    assert all(optimizer.state[p]["exp_avg"].any() for p in params)


@all_storages
def test_loading_state_with_exp_avg_drops_it(storage: str) -> None:
    params, optimizer = make(storage, betas=(0.9, *BETAS[1:]))
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    others, other = make(storage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)  # its β1 is loaded too
    assert has_exp_avg(other)
    saved["param_groups"][0]["betas"] = BETAS
    others, other = make(storage)
    with pytest.warns(UserWarning, match="has exp_avg, which isn.t kept"):
        other.load_state_dict(saved)
    assert not has_exp_avg(other)
    train(others, other, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)  # whose own state has exp_avg
    assert has_exp_avg(optimizer)


def test_parameters_that_come_after_a_change() -> None:
    """Each parameter's state is as it was made."""
    params, optimizer = make("8")
    train(params[:2], optimizer, 1)
    optimizer.param_groups[0]["betas"] = (0.9, *BETAS[1:])
    params[2].grad = torch.ones_like(params[2])
    with pytest.raises(ValueError, match=r"\['params'\]\[0\] has no exp_avg"):
        optimizer.step()
    assert params[2] not in optimizer.state or not allocation.has_exp_avg(optimizer.state[params[2]])


def test_gradient_release() -> None:
    models, results = [nn.Linear(80, 60) for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    for model, release in zip(models, (False, True), strict=True):
        optimizer = AdEMAMix(model.parameters(), betas=BETAS, optim_bits=8)
        if release:
            release_gradients(model, optimizer)
        for i in range(3):
            model(torch.ones(2, 80) * i).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([list(model.parameters()), optimizer.state_dict()["state"]])
    assert_identical(*results)


def test_conversions() -> None:
    params, optimizer = make("8", sizes=(MIN_8BIT_SIZE, 300))
    train(params, optimizer, 2)
    converted = to_bitsandbytes(optimizer.state_dict())
    for entry in converted["state"].values():
        nested = entry["__bnb_optimizer_quant_state__"]
        m1 = nested["state1"][0]
        assert bool((m1 == (127 if m1.dtype == torch.uint8 else 0)).all())
    assert all("exp_avg" not in entry for entry in from_bitsandbytes(converted)["state"].values())
    p = nn.Parameter(torch.ones(5))
    adamw = torch.optim.AdamW([p], betas=(0.0, 0.99))
    p.grad = torch.ones(5)
    adamw.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = AdEMAMix([p], betas=BETAS)
        other.load_state_dict(from_adamw(adamw.state_dict()))
    assert sorted(other.state[p]) == ["exp_avg_slow", "exp_avg_sq", "step"]


def test_compiled() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params, optimizer = make("8")
        call = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for t in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * t - 0.05)
            call()
        results.append([[p.detach() for p in params], optimizer.state_dict()["state"]])
    assert_identical(*results)


def test_has_state_ignores_others_entries() -> None:
    (p, *_), optimizer = make("32")
    optimizer.state[p]["slow_buffer"] = torch.zeros(3)
    assert not allocation.has_state(optimizer.state[p])
    optimizer.init_state()
    assert allocation.has_state(optimizer.state[p])
    assert not allocation.has_exp_avg(optimizer.state[p])


def test_the_lists_without_exp_avg_are_the_optimizers() -> None:
    """Of a step of the optimizer's own call: an empty list, no zeros."""
    params, optimizer = make("32")
    train(params, optimizer, 1)
    plan = optimizer._plan_cache.plan
    ((_, _, lists, _),) = plan.calls(plan.work(), None, {})
    assert StepLists(*lists[:-1]).exp_avgs == []  # the last are the remainders

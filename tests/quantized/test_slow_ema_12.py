"""`slow_ema_bits=12`: two EMAs in one int16 word, and the values of EMAs in every format."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.config import assert_identical, hyperparameter_tensor
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import SMALL, blockwise_call, blockwise_step, make_blockwise, train
from torch_ademamix import AdEMAMix
from torch_ademamix.checkpoint import from_bitsandbytes, to_bitsandbytes
from torch_ademamix.numerics import blockwise
from torch_ademamix.numerics.moments import QUANTIZED, WITHOUT_EXP_AVG, op_entries, op_formats
from torch_ademamix.training.release import release_gradients

BETAS = (0.9, 0.99, 0.999)
AT_0 = (0.0, 0.99, 0.999)
# Options by which state is stored.
STORAGES: dict[str, dict[str, Any]] = {
    "32": {"optim_bits": 32},
    "16": {"slow_ema_bits": 16},
    "8": {"slow_ema_bits": 8},
    "12": {"slow_ema_bits": 12},
}
storages = pytest.mark.parametrize("storage", STORAGES)
betas_of_both = pytest.mark.parametrize("betas", [BETAS, AT_0], ids=["beta1", "no beta1"])
WORDS = {0.9: "exp_avg_slow_and_exp_avg", 0.0: "exp_avg_slow_and_exp_avg_sq"}


def make(storage: str = "12", betas: Any = BETAS, sizes: Any = (5000, 300, 4096), **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    options = {"lr": 1e-2, "t_alpha": 30, "t_beta3": 30, "optim_bits": 8, **STORAGES[storage], **options}
    return params, AdEMAMix(params, betas=betas, **options)


def emas(optimizer: AdEMAMix, p: Any) -> dict[str, torch.Tensor]:
    has_exp_avg = optimizer.param_groups[0]["betas"][0] > 0
    names = QUANTIZED[16] if has_exp_avg else WITHOUT_EXP_AVG[16]
    return {name: optimizer.ema(p, name) for name in names}


@betas_of_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_state(betas: Any, dtype: torch.dtype) -> None:
    params, optimizer = make(betas=betas, dtype=dtype)
    train(params, optimizer, 2)
    state = optimizer.state[params[0]]
    others = ["exp_avg_slow_absmax", "exp_avg_sq_absmax"]
    others += ["exp_avg_absmax", "exp_avg_sq"] if betas[0] else []
    assert state.keys() == {"step", WORDS[betas[0]], *others}
    words = state[WORDS[betas[0]]]
    assert (words.dtype, words.shape) == (torch.int16, params[0].shape)
    assert "exp_avg_sq" in optimizer.state[params[1]]  # below min_8bit_size
    assert sum(t.nbytes for n, t in state.items() if n != "step") / 5000 <= (3.07 if betas[0] else 2.06)
    slow, fast = optimizer.ema(params[0], "exp_avg_slow"), optimizer.ema(params[0], "exp_avg_sq")
    assert slow.unique().numel() > 1000
    assert fast.unique().numel() > (100 if betas[0] else 5)


@betas_of_both
def test_the_update_is_that_of_8_bits_but_for_rounding(betas: Any) -> None:
    results = []
    for storage in ("32", "12"):
        params, optimizer = make(storage, betas=betas)
        before = [p.detach().clone() for p in params]
        train(params, optimizer, 30)
        results.append(torch.cat([p.detach() - q for p, q in zip(params, before, strict=True)]))
    off = ((results[1] - results[0]).norm() / results[0].norm()).item()
    assert off < (0.25 if betas[0] else 0.15), off  # noise, which averages out over more steps


@betas_of_both
@storages
def test_resume(storage: str, betas: Any) -> None:
    params, optimizer = make(storage, betas)
    train(params, optimizer, 3)
    saved = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
    train(params, optimizer, 3)
    others, other = make(storage, betas)
    for p, q in zip(others, saved[0], strict=True):
        p.data.copy_(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved[1])
    train(others, other, 3)
    assert_identical([p.detach() for p in others], [p.detach() for p in params])
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])


@betas_of_both
@pytest.mark.parametrize("target", STORAGES)
@storages
def test_loading_between_formats(storage: str, target: str, betas: Any) -> None:
    """To the nearest codes; equal formats keep theirs."""
    params, optimizer = make(storage, betas)
    train(params, optimizer, 3)
    others, other = make(target, betas)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    by_bits = QUANTIZED if betas[0] else WITHOUT_EXP_AVG
    for p, q in zip(params, others, strict=True):
        for name, values in emas(optimizer, p).items():
            format = None if target == "32" or p.numel() < 4096 else by_bits[int(target)][name]
            if format is not None:
                values = blockwise.dequantize(*blockwise.quantize(values, format), format)
            assert_identical(other.ema(q, name), values)
    if storage == target:
        assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])
    train(others, other, 1)


def test_loading_at_another_beta1_changes_the_words() -> None:
    params, optimizer = make()
    train(params, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["betas"] = AT_0
    others, other = make(betas=AT_0)
    with pytest.warns(UserWarning, match="has exp_avg, which isn.t kept"):
        other.load_state_dict(saved)
    assert WORDS[0.0] in other.state[others[0]]
    slow = [o.ema(p[0], "exp_avg_slow") for o, p in ((optimizer, params), (other, others))]
    assert_identical(slow[1], slow[0])
    back = copy.deepcopy(other.state_dict())
    back["param_groups"][0]["betas"] = BETAS
    with pytest.warns(UserWarning, match="exp_avg starts at zero"):
        optimizer.load_state_dict(back)
    assert_identical(optimizer.ema(params[0], "exp_avg_slow"), slow[0])
    assert not optimizer.ema(params[0], "exp_avg").any()


@betas_of_both
@storages
def test_emas_are_read_and_written(storage: str, betas: Any) -> None:
    params, optimizer = make(storage, betas)
    train(params, optimizer, 2)
    addresses = {name: t.data_ptr() for name, t in optimizer.state[params[0]].items()}
    for name, values in emas(optimizer, params[0]).items():
        assert (values.dtype, values.shape) == (torch.float32, params[0].shape)
        before = emas(optimizer, params[0])
        optimizer.set_ema(params[0], name, values)
        assert_identical(emas(optimizer, params[0]), before)  # values of codes keep these
        optimizer.set_ema(params[0], name, torch.zeros_like(values))
        assert not optimizer.ema(params[0], name).any()
        before[name] = torch.zeros_like(values)
        assert_identical(emas(optimizer, params[0]), before)  # and the others' codes stay
    assert {name: t.data_ptr() for name, t in optimizer.state[params[0]].items()} == addresses
    train(params, optimizer, 1)


def test_emas_that_there_are_not() -> None:
    params, optimizer = make(betas=AT_0)
    with pytest.raises(ValueError, match="p has no state yet; call init_state"):
        optimizer.ema(params[0], "exp_avg_slow")
    optimizer.init_state()
    for name in ("exp_avg", "step", "m1"):
        with pytest.raises(ValueError, match=f"name is '{name}', but must be one of exp_avg_slow, exp_avg_sq"):
            optimizer.ema(params[0], name)
    with pytest.raises(ValueError, match=r"values is a Tensor of shape \[3\], but must be a plain tensor of \[5000\]"):
        optimizer.set_ema(params[0], "exp_avg_slow", torch.zeros(3))


@betas_of_both
def test_conversion_to_bitsandbytes_and_back(betas: Any) -> None:
    params, optimizer = make(betas=betas)
    train(params, optimizer, 3)
    others, other = make(betas=betas)
    other.load_state_dict(from_bitsandbytes(to_bitsandbytes(optimizer.state_dict())))
    for p, q in zip(params, others, strict=True):
        a, b = optimizer.ema(p, "exp_avg_slow"), other.ema(q, "exp_avg_slow")
        assert ((a - b).norm() / a.norm()) < 0.03


@betas_of_both
def test_gradient_release(betas: Any) -> None:
    models, results = [nn.Linear(80, 60) for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    for model, release in zip(models, (False, True), strict=True):
        optimizer = AdEMAMix(model.parameters(), betas=betas, optim_bits=8, slow_ema_bits=12)
        if release:
            release_gradients(model, optimizer)
        for i in range(3):
            model(torch.ones(2, 80) * i).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([list(model.parameters()), optimizer.state_dict()["state"]])
    assert_identical(*results)


@betas_of_both
def test_compiled(betas: Any) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params, optimizer = make(betas=betas)
        call = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        for t in range(3):
            for p in params:
                p.grad = torch.linspace(-1, 1 + t, p.numel())
            call()
        results.append([[p.detach() for p in params], optimizer.state_dict()["state"]])
    assert_identical(*results)


@pytest.mark.parametrize("has_exp_avg", [True, False])
@pytest.mark.parametrize("numbers", ["numbers", "tensor"])
@pytest.mark.parametrize("where", ["lists", "arenas"])
def test_opcheck(where: str, numbers: str, has_exp_avg: bool) -> None:
    lists = make_blockwise(SMALL[2:5], slow_ema_bits=12, has_exp_avg=has_exp_avg)
    given = in_arenas(lists) if where == "arenas" else lists
    options: dict[str, Any] = {"beta1": 0.9 * has_exp_avg, **(given.options if where == "arenas" else {})}
    if numbers == "tensor":
        options["hyperparameters"] = hyperparameter_tensor(beta1=0.9 * has_exp_avg)
    torch.library.opcheck(*blockwise_call(given, **options))


def test_wrong_words_are_refused(kernel: str) -> None:
    lists = make_blockwise(SMALL[:3], slow_ema_bits=12)
    lists.exp_avg_slows = [words.to(torch.int8) for words in lists.exp_avg_slows]
    with pytest.raises(RuntimeError, match=r"exp_avg_slows\[0\] has dtype torch\.int8, but must be torch\.int16"):
        blockwise_step(kernel, lists)
    lists = make_blockwise(SMALL[:3], slow_ema_bits=12)
    lists.exp_avg_sqs.clear()
    with pytest.raises(RuntimeError, match="exp_avg_sqs has length 0, but params has length 3"):
        blockwise_step(kernel, lists)
    lists = make_blockwise(SMALL[:3], slow_ema_bits=12, has_exp_avg=False)
    with pytest.raises(RuntimeError, match=r"beta1 is 0\.9, but must be 0 without exp_avgs"):
        blockwise_step(kernel, lists)


@pytest.mark.parametrize("by_bits", [QUANTIZED, WITHOUT_EXP_AVG])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_ops_lists_tell_the_formats(by_bits: Any, bits: int) -> None:
    lists = make_blockwise(SMALL[:2], slow_ema_bits=bits, has_exp_avg=by_bits is QUANTIZED)
    given = [lists.exp_avgs, lists.exp_avg_absmaxs, lists.exp_avg_slows, lists.exp_avg_sqs]
    assert op_formats(*given) == by_bits[bits]
    names = op_entries(by_bits[bits])
    assert [name is not None for name in names[:-1]] == [len(tensors) > 0 for tensors in list(lists)[2:-1]]

"""Checkpoints of quantized state: resumed, converted from other formats, and refused."""

import copy
import subprocess
import sys

import pytest
import torch

from tests.helpers.config import DTYPES, assert_identical
from tests.helpers.quantized import ABSMAXS, MOMENTS, everything, make_optimizer, stored, train
from torch_ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix8bit
from torch_ademamix.checkpoint import to_bitsandbytes
from torch_ademamix.numerics.blockwise import dequantize, quantize
from torch_ademamix.numerics.reference_step import compute_dtype


def through_state_dict(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def through_file(optimizer):
    torch.save(optimizer.state_dict(), "state.pt")
    return torch.load("state.pt", weights_only=True)


@pytest.mark.parametrize("cls", [AdEMAMix8bit, PagedAdEMAMix8bit])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", [through_state_dict, through_file])
def test_load_state_dict(save, dtype, cls, tmp_path, monkeypatch):
    """Codes and scales keep their dtypes, and training goes on as if it had not stopped."""
    monkeypatch.chdir(tmp_path)
    params, optimizer = make_optimizer(dtype, cls)
    train(params, optimizer, 3)
    new_params, new_optimizer = make_optimizer(dtype, cls, lr=1.0, seed=1, slow_ema_bits=16)
    new_optimizer.param_groups[1]["slow_ema_bits"] = 8
    for p, q in zip(params, new_params, strict=True):
        q.data.copy_(p)
    new_optimizer.load_state_dict(save(optimizer))
    assert_identical(everything(new_params, new_optimizer), everything(params, optimizer))
    train(params, optimizer, 3)
    train(new_params, new_optimizer, 3)
    assert_identical(everything(new_params, new_optimizer), everything(params, optimizer))


def test_strided_codes_load():
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, tensor in state.items():
            state[name] = torch.stack((tensor, tensor), dim=-1)[..., 0]
    before = copy.deepcopy(everything(params, optimizer))
    optimizer.load_state_dict(saved)
    assert_identical(everything(params, optimizer), before)
    train(params, optimizer, 1)


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.helpers.quantized import make_optimizer, train
checkpoint = torch.load("checkpoint.pt", weights_only=True)
params, optimizer = make_optimizer(getattr(torch, sys.argv[2]))
for p, saved in zip(params, checkpoint["params"]):
    p.data.copy_(saved)
optimizer.load_state_dict(checkpoint["optimizer"])
train(params, optimizer, 20)
torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, "resumed.pt")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_in_a_new_process(dtype, tmp_path, request):
    params, optimizer = make_optimizer(getattr(torch, dtype))
    train(params, optimizer, 20)
    checkpoint = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    train(params, optimizer, 20)
    arguments = [sys.executable, "-c", RESUME, request.config.rootpath, dtype]
    subprocess.run(arguments, cwd=tmp_path, check=True)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert_identical((resumed["params"], resumed["optimizer"]), everything(params, optimizer))


STORAGES = {
    "32-bit": {"optim_bits": 32},
    "8-bit": {"optim_bits": 8, "slow_ema_bits": 16},
    "8-bit, slow too": {"optim_bits": 8, "slow_ema_bits": 8},
    "8-bit from 300 on": {"optim_bits": 8, "slow_ema_bits": 16, "min_8bit_size": 300},
    "8-bit from 5000 on": {"optim_bits": 8, "slow_ema_bits": 8, "min_8bit_size": 5000},
}


def formats_of(storage, p):
    if storage["optim_bits"] == 32 or p.numel() < storage.get("min_8bit_size", 4096):
        return None, None, None
    return stored(storage["slow_ema_bits"])


def values_of(state, name, format):
    if format is None:
        return state[name]
    return dequantize(state[name], state[f"{name}_absmax"], format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", STORAGES)
@pytest.mark.parametrize("source", STORAGES)
def test_state_stored_otherwise_is_converted(source, target, dtype):
    """To the nearest values; what is stored alike is taken over as it is."""
    params, optimizer = make_optimizer(dtype, AdEMAMix, **STORAGES[source])
    train(params, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    new_params, new_optimizer = make_optimizer(dtype, AdEMAMix, **STORAGES[target])
    new_optimizer.load_state_dict(optimizer.state_dict())
    assert_identical(optimizer.state_dict(), before)
    for group in new_optimizer.param_groups:
        assert STORAGES[target].items() <= group.items()
        assert group["seed"] == 9
    for p, q in zip(params, new_params, strict=True):
        old, new = optimizer.state[p], new_optimizer.state[q]
        assert_identical(new["step"], old["step"])
        for name, was, format in zip(
            MOMENTS, formats_of(STORAGES[source], p), formats_of(STORAGES[target], p), strict=True
        ):
            if was == format:
                names = [name] if format is None else [name, f"{name}_absmax"]
                assert_identical([new[n] for n in names], [old[n] for n in names])
                continue
            values = values_of(old, name, was)
            if format is None:
                assert_identical(new[name], values.to(compute_dtype(dtype)))
            else:
                expected = quantize(values.float(), format)
                assert_identical((new[name], new[f"{name}_absmax"]), expected)
    train(new_params, new_optimizer, 1)


@pytest.mark.parametrize("other", [1, 3, "2", None])
def test_other_formats_are_refused(other):
    """Those of a later version, whose dtypes may be the same."""
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    before = copy.deepcopy(everything(params, optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["state_format"] for group in saved["param_groups"]] == [2, 2]
    saved["param_groups"][1]["state_format"] = other
    message = rf"param_groups'\]\[1\]: state_format is {other!r}, but must be 2: another version of torch_ademamix"
    for read in (optimizer.load_state_dict, to_bitsandbytes):
        with pytest.raises(ValueError, match=message):
            read(saved)
    assert_identical(everything(params, optimizer), before)


def test_codes_of_another_format_are_refused():
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].byte()
    with pytest.raises(ValueError, match=r"\['exp_avg'\] has dtype torch.uint8, but must be torch.int8"):
        optimizer.load_state_dict(saved)


def test_state_dicts_and_pickles_without_a_format():
    """The dtypes tell what they are, and from then on the groups do."""
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    before = copy.deepcopy(everything(params, optimizer))
    for group in optimizer.param_groups:
        del group["state_format"]
    older = copy.deepcopy(optimizer)
    train(older.param_groups[0]["params"], older, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_identical(everything(params, optimizer), before)


def without(name):
    return lambda state: state.pop(name)


def change(name, change):
    def bend(state):
        state[name] = change(state[name])

    return bend


def first_is(value):
    return lambda tensor: torch.cat((torch.full((1,), value), tensor[1:]))


ENTRIES = str(sorted([*MOMENTS, *ABSMAXS, "step"]))


@pytest.mark.parametrize(
    ("bend", "text"),
    [
        *[(without(name), ENTRIES) for name in ("exp_avg", "exp_avg_sq", *ABSMAXS[1:], "step")],
        (without("exp_avg_absmax"), "['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']"),
        *[
            (
                change(name, lambda codes: codes.float()),
                f"[{name!r}] has dtype torch.float32, but must be {dtypes}",
            )
            for name, dtypes in zip(
                MOMENTS,
                ("torch.int8", "torch.int16 or torch.int8", "torch.uint8"),
                strict=True,
            )
        ],
        (
            change("exp_avg", lambda codes: codes.short()),
            "['exp_avg'] has dtype torch.int16, but must be torch.int8",
        ),
        *[
            (
                change(name, lambda codes: codes[:-1]),
                f"[{name!r}] has shape [4095], but must have [4096]",
            )
            for name in MOMENTS
        ],
        *[
            (
                change(name, lambda absmax: absmax[:-1]),
                f"[{name!r}] has shape [15], but must have [16]",
            )
            for name in ABSMAXS
        ],
        *[
            (
                change(name, lambda absmax: absmax.bfloat16()),
                f"[{name!r}] has dtype torch.bfloat16, but must be torch.float32",
            )
            for name in ABSMAXS
        ],
        (
            change("exp_avg_absmax", lambda absmax: absmax.tolist()),
            "['exp_avg_absmax'] is a list, but must be a tensor",
        ),
        (
            change("step", lambda step: step.repeat(2)),
            "['step'] has shape [2], but must hold one element",
        ),
        *[
            (change(name, first_is(value)), f"[{name!r}] has scales that aren't finite or are below 0")
            for name, value in zip(ABSMAXS, (float("nan"), float("inf"), -1e-30), strict=True)
        ],
    ],
)
def test_damaged_state_is_refused_and_nothing_changes(bend, text):
    params, optimizer = make_optimizer()
    train(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    bend(saved["state"][2])  # of the second group's first parameter
    train(params, optimizer, 1)
    before = copy.deepcopy(everything(params, optimizer))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        optimizer.load_state_dict(saved)
    assert str(raised.value).startswith("param_groups[1]['params'][0]: state_dict['state'][2]")
    assert text in str(raised.value)
    assert_identical(everything(params, optimizer), before)
    train(params, optimizer, 1)

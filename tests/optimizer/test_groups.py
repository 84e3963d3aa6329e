"""Groups that differ in numbers only: one op call, and the bits that each group has by itself."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit, ops

FROZEN = {
    "uint8": lambda: torch.arange(8, dtype=torch.uint8),
    "int8": lambda: torch.arange(8, dtype=torch.int8),
    "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(8, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(8),
    "sparse": lambda: torch.ones(8).to_sparse(),
}

CLASSES = pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])

# What groups may differ in and share an op call.
NUMBERS = [
    {},
    {"lr": 1e-3},
    {"betas": (0.5, 0.99, 0.999)},
    {"alpha": 2.0, "t_alpha": 3},
    {"t_beta3": 4, "schedule_start": 1},
    {"eps": 1e-3, "weight_decay": 0.3},
]


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(300 + 7 * i, generator=generator).to(dtype)) for i in range(2 * len(NUMBERS))]


def groups_of(params, options):
    return [{"params": params[2 * i : 2 * i + 2], **numbers} for i, numbers in enumerate(options)]


def set_grads(params, step, left_out=()):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in left_out else grad


def count_calls(optimizer, name="ademamix_step_"):
    """The op calls of a step."""
    with patch.object(ops, name, wraps=getattr(ops, name)) as op:
        optimizer.step()
    return len([call for call in op.call_args_list if not call.kwargs.get("dry_run")])


def make(cls, options, dtype=torch.float32, **defaults):
    params = make_params(dtype)
    defaults = {"lr": 1e-2, "stochastic_rounding": False, "min_8bit_size": 1, **defaults}
    return params, cls(groups_of(params, options), **defaults)


@CLASSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_of_separate_optimizers(cls, dtype):
    params, optimizer = make(cls, NUMBERS, dtype)
    expected = make_params(dtype)
    alone = [
        cls([group], lr=1e-2, stochastic_rounding=False, min_8bit_size=1) for group in groups_of(expected, NUMBERS)
    ]
    for step in range(6):
        left_out = (3, 4, 5) if step == 2 else (1,) if step == 4 else ()
        set_grads(params, step, left_out)
        set_grads(expected, step, left_out)
        assert count_calls(optimizer, "ademamix_step_" if cls is AdEMAMix else "ademamix_blockwise_step_") == 1
        for other in alone:
            other.step()
        for group, other in zip(optimizer.param_groups, alone, strict=True):
            group["lr"] *= 0.9
            other.param_groups[0]["lr"] *= 0.9
    assert_identical(params, expected)
    for p, q in zip(params, expected, strict=True):
        (other,) = (other for other in alone if q in other.state)
        assert_identical(dict(optimizer.state[p]), dict(other.state[q]))


def test_tensor_lrs_are_read_at_each_step():
    """Each group's own, written to in place; also among groups whose lr is a number."""
    for kinds in ((True,) * 6, (True, False, True, False, False, True)):
        lrs = [torch.tensor(1e-2) if is_tensor else 1e-2 for is_tensor in kinds]
        params, optimizer = make(AdEMAMix, [{**numbers, "lr": lr} for numbers, lr in zip(NUMBERS, lrs, strict=True)])
        expected, numbers = make(AdEMAMix, [{**numbers, "lr": 1e-2} for numbers in NUMBERS])
        for step in range(4):
            set_grads(params, step)
            set_grads(expected, step)
            assert count_calls(optimizer) == len(set(kinds))
            numbers.step()
            for i, (group, other) in enumerate(zip(optimizer.param_groups, numbers.param_groups, strict=True)):
                value = torch.tensor(1e-2 / (step + i + 1)).item()
                other["lr"] = value
                if kinds[i]:
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value
            expected_lr = [float(group["lr"]) for group in numbers.param_groups]
            assert [float(group["lr"]) for group in optimizer.param_groups] == expected_lr
        torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-7)  # 1e-2 in float32 at the first step


@pytest.mark.parametrize("option", [{"maximize": True}, {"seed": 3}, {"param_rounding": "stochastic"}], ids=repr)
def test_other_options_take_a_call_of_their_own(option):
    """Also when they are set later, and no longer when they are set back."""
    params, optimizer = make(AdEMAMix, [{}] * 6)
    ((name, value),) = option.items()
    before = optimizer.param_groups[2][name]
    for step, (wanted, calls) in enumerate([(before, 1), (value, 2), (value, 2), (before, 1)]):
        optimizer.param_groups[2][name] = wanted
        set_grads(params, step)
        assert count_calls(optimizer) == calls


def test_300_groups():
    params = [nn.Parameter(torch.randn(8)) for _ in range(300)]
    expected = copy.deepcopy(params)
    optimizer = AdEMAMix([{"params": [p], "lr": 1e-5 * (i + 1)} for i, p in enumerate(params)])
    alone = [AdEMAMix([p], lr=1e-5 * (i + 1)) for i, p in enumerate(expected)]
    for step in range(2):
        set_grads(params, step)
        set_grads(expected, step)
        assert count_calls(optimizer) == 1
        for other in alone:
            other.step()
    assert_identical(params, expected)
    assert len({t.untyped_storage().data_ptr() for state in optimizer.state.values() for t in state.values()}) == 4


def test_an_added_group_and_errors_that_name_it():
    params, optimizer = make(AdEMAMix, NUMBERS)
    set_grads(params, 0)
    optimizer.step()
    later = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [later], "lr": 0.5, "weight_decay": 0.0})
    set_grads([*params, later], 1)
    assert count_calls(optimizer) == 1
    optimizer.param_groups[6]["betas"] = (0.9, 1.0, 0.9)
    before = copy.deepcopy([params, later])
    with pytest.raises(ValueError, match=r"param_groups\[6\]: betas is \(0.9, 1.0, 0.9\), but must be three"):
        optimizer.step()
    optimizer.param_groups[6]["betas"] = (0.9, 0.99, 0.9)
    later.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,))
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[6\]\['params'\]\[0\] has layout"):
        optimizer.step()
    assert_identical([params, later], before)
    later.grad = torch.ones(3)
    optimizer.state[later]["exp_avg"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"param_groups\[6\]\['params'\]\[0\]: .*exp_avg has shape \[4\]"):
        optimizer.step()


def test_options_that_change_in_place():
    """A list of betas is looked at at each step."""
    params, optimizer = make(AdEMAMix, NUMBERS[:1] * 6)
    betas = [0.9, 0.99, 0.999]
    optimizer.param_groups[4]["betas"] = betas
    expected, other = make(AdEMAMix, NUMBERS[:1] * 6)
    for step in range(4):
        set_grads(params, step)
        set_grads(expected, step)
        betas[1] = 0.9 + 0.01 * step
        other.param_groups[4]["betas"] = tuple(betas)
        optimizer.step()
        other.step()
    assert_identical(params, expected)
    betas[1] = 1.5
    with pytest.raises(ValueError, match=r"param_groups\[4\]: betas"):
        optimizer.step()


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters(kind):
    """Of any kind, as QLoRA has them: they are neither refused nor touched, and saved and loaded around."""
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    p = nn.Parameter(torch.ones(8))
    optimizer = AdEMAMix([frozen, p])
    optimizer.add_param_group({"params": [nn.Parameter(FROZEN[kind](), requires_grad=False)]})
    optimizer.init_state()
    p.grad = torch.ones(8)
    optimizer.step()
    assert p.max() < 1
    assert list(optimizer.state) == [p]
    assert_identical(frozen.to_dense().detach(), FROZEN[kind]().to_dense())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def groups_of_two():
    return [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(2)]


def loaded(optimizer):
    """Another optimizer, with a state dict in which the groups have one tensor."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["lr"] = state_dict["param_groups"][0]["lr"]
    new = AdEMAMix(groups_of_two())
    new.load_state_dict(state_dict)
    return new


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("way", ["construction", "add_param_group", "copy", "load_state_dict"])
def test_one_lr_tensor_for_all_groups(way, capturable):
    """Each group has its own rate all the same: schedulers write to the tensors in place."""
    lr = torch.tensor(0.5)
    if way == "add_param_group":
        first, second = groups_of_two()
        optimizer = AdEMAMix([first], lr=lr, capturable=capturable)
        optimizer.add_param_group({**second, "lr": lr})
    else:
        optimizer = AdEMAMix(groups_of_two(), lr=lr, capturable=capturable)
    assert optimizer.param_groups[0]["lr"] is lr  # a tensor of the user's stays the group's
    if way == "copy":
        optimizer = copy.deepcopy(optimizer)
    if way == "load_state_dict":
        optimizer = loaded(optimizer)
    LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.1])
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])

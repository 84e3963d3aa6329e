"""bfloat16 parameters that don't lose their updates: with remainders, and rounded stochastically."""

import copy
import itertools
import re
from contextlib import nullcontext

import pytest
import torch

from tests.helpers.config import (
    KERNELS,
    MIXED,
    OPTIONS,
    assert_identical,
    bits,
    make_lists,
    native_built,
    step,
    step_call,
)
from tests.helpers.quantized import blockwise_call, blockwise_step, make_blockwise
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.checkpoint import to_bitsandbytes
from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import FIRST_PARAM_GROUP, random_bits

SEED = -(2**62) - 12345
STEPS, LR = 5000, 1e-5

KINDS = pytest.mark.parametrize("kind", ["32", "blockwise"])
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS if native_built() else ["reference"])


def make(kind, dtype=torch.bfloat16, grad_dtype=torch.bfloat16, entries=MIXED):
    make = make_lists if kind == "32" else make_blockwise
    return make(entries, dtype, grad_dtype)


def take_step(kernel, lists, **options):
    (step if type(lists).__name__ == "StepLists" else blockwise_step)(kernel, lists, **options)


def split_lists(lists):
    """The lists with bfloat16 parameters, and remainders in their order in memory."""
    halves = [bfloat16.split(p) for p in lists.params]
    result = lists.clone()
    result.params = [
        torch.empty_like(p, dtype=torch.bfloat16).copy_(half) for p, (half, _) in zip(lists.params, halves, strict=True)
    ]
    remainders = [
        torch.empty_like(p, dtype=torch.int16).copy_(rest) for p, (_, rest) in zip(lists.params, halves, strict=True)
    ]
    return result, remainders


def every_float():
    """Of each sign, exponent and upper mantissa some lower ones, the ties among them."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] + lower).flatten().view(torch.float32)


@EVERY_KERNEL
@pytest.mark.parametrize("way", ["remainders", "stochastic_param_rounding"])
def test_float64_scale_of_a_parameter_without_dimensions(kernel, way):
    before = make_lists([((), "contiguous", "contiguous", "contiguous")], torch.bfloat16)
    before.grads[0].fill_(1)
    stepped = []
    for dtype in (torch.float32, torch.float64):
        options = {"remainders": [torch.zeros((), dtype=torch.int16)]} if way == "remainders" else {way: True}
        stepped.append((before.clone(), options))
        step(kernel, stepped[-1][0], lr=1.0, grad_scale=torch.tensor(2.0, dtype=dtype), subsequences=[0], **options)
    assert stepped[0][0].params[0] != before.params[0]
    assert_identical(*[(list(lists), options) for lists, options in stepped])


def test_weights_are_split_without_loss():
    weights = every_float()
    weights = weights[~weights.isnan()]
    param, remainder = bfloat16.split(weights)
    assert_identical(bfloat16.join(param, remainder), weights)
    tie = remainder == -(1 << 15)
    assert_identical(param[~tie], weights[~tie].to(torch.bfloat16))
    assert bool((param[tie].float().abs() > weights[tie].abs()).all())


def test_nan_stays_nan():
    nan = torch.tensor(
        [torch.nan, -torch.nan, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()]
    )
    param, remainder = bfloat16.split(nan)
    assert bool(param.isnan().all())
    assert bool(bfloat16.join(param, remainder).isnan().all())
    assert bool(bfloat16.round_stochastically(nan, torch.full((3,), 65535)).isnan().all())


@KINDS
@EVERY_KERNEL
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", ["plain", "schedules", "grad_scale", "tensor_lr"])
def test_remainders_make_it_a_step_of_float32_weights(kernel, kind, grad_dtype, options):
    exact = make(kind, torch.float32, grad_dtype)
    lists, remainders = split_lists(exact)
    for _ in range(2):
        take_step(kernel, exact, **OPTIONS[options])
        take_step(kernel, lists, remainders=remainders, **OPTIONS[options])
    expected, expected_remainders = split_lists(exact)
    assert_identical(list(lists), list(expected))
    assert_identical(remainders, expected_remainders)


@KINDS
@EVERY_KERNEL
def test_weights_of_every_size(kernel, kind):
    """A step that adds nothing: every finite weight goes through; infinity times the decay is NaN, and shows."""
    weights = every_float()
    exact = make(kind, torch.float32, entries=[((len(weights),), *["contiguous"] * 3)])
    exact.params = [weights.clone()]
    exact.grads = [torch.zeros(len(weights), dtype=torch.bfloat16)]
    lists, remainders = split_lists(exact)
    take_step(kernel, lists, lr=0.0, weight_decay=0.0, remainders=remainders)
    finite = weights.isfinite()
    assert torch.equal(bfloat16.join(lists.params[0], remainders[0])[finite], weights[finite])
    assert bool(lists.params[0][~finite].isnan().all())


@KINDS
@EVERY_KERNEL
def test_remainder_of_a_parameter_that_was_set_to_zero(kernel, kind):
    lists = make(kind, entries=[((300,), *["contiguous"] * 3)])
    lists.params[0].copy_(torch.tensor(0.0).copysign(torch.randn(300)))
    remainders = [torch.full((300,), -7, dtype=torch.int16)]
    take_step(kernel, lists, remainders=remainders)
    assert bool(lists.params[0].isfinite().all())


@KINDS
@EVERY_KERNEL
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stochastic_rounding_is_that_of_the_formula(kernel, kind, grad_dtype):
    """In whatever order the elements lie in memory, the same random bits belong to them."""
    lists = make(kind, torch.bfloat16, grad_dtype)
    exact = lists.clone()
    exact.params = [p.float() for p in lists.params]
    subsequences = [5 * i + 2 + i * 2**32 for i in range(len(lists.params))]  # as of slices of larger tensors
    take_step(kernel, exact, seed=SEED, subsequences=subsequences)
    take_step(kernel, lists, seed=SEED, subsequences=subsequences, stochastic_param_rounding=True)
    for i, weight in enumerate(exact.params):
        key = {"seed": SEED, "step": lists.steps[i], "subsequence": subsequences[i], "first_group": FIRST_PARAM_GROUP}
        random = random_bits(weight.numel(), **key).view(weight.shape)
        assert torch.equal(bits(lists.params[i]), bits(bfloat16.round_stochastically(weight.contiguous(), random)))
    exact.params = lists.params
    assert_identical(list(lists), list(exact))


@KINDS
@EVERY_KERNEL
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_remainders_of_8_bits_are_those_of_the_formula(kernel, kind, grad_dtype):
    """The float32 step of the 24-bit weights, rounded by the parameters' random bits."""
    lists, remainders = split_lists(make(kind, torch.float32, grad_dtype))
    remainders = [torch.empty_like(r, dtype=torch.int8).copy_(bfloat16.converted(r, torch.int8)) for r in remainders]
    exact = lists.clone()
    exact.params = [bfloat16.join(p, r) for p, r in zip(lists.params, remainders, strict=True)]
    subsequences = [5 * i + 2 + i * 2**32 for i in range(len(lists.params))]
    take_step(kernel, exact, seed=SEED, subsequences=subsequences)
    take_step(kernel, lists, seed=SEED, subsequences=subsequences, remainders=remainders)
    for i, weight in enumerate(exact.params):
        key = {"seed": SEED, "step": lists.steps[i], "subsequence": subsequences[i], "first_group": FIRST_PARAM_GROUP}
        random = random_bits(weight.numel(), **key).view(weight.shape)
        param, remainder = bfloat16.split(bfloat16.round_to_24_bits(weight.contiguous(), random), torch.int8)
        assert torch.equal(bits(lists.params[i]), bits(param))
        assert torch.equal(remainders[i], remainder)
    exact.params = lists.params
    assert_identical(list(lists), list(exact))


@pytest.mark.nightly
def test_24_bits_are_right_on_average_and_come_back():
    weights = every_float()
    weights = weights[weights.isfinite()]
    random = torch.arange(256)[:, None]
    rounded = bfloat16.round_to_24_bits(weights.expand(256, -1), random)
    assert_identical(bfloat16.join(*bfloat16.split(rounded, torch.int8)), rounded)
    average = rounded.view(torch.int32).long().sum(0)
    assert torch.equal(average, 256 * weights.view(torch.int32).long())
    nan = torch.full((1,), torch.nan)
    assert bool(bfloat16.join(*bfloat16.split(bfloat16.round_to_24_bits(nan, random[:1, 0]), torch.int8)).isnan().all())


def test_remainders_change_their_width():
    remainders = torch.arange(-(1 << 15), 1 << 15).short()
    narrow = bfloat16.converted(remainders, torch.int8)
    off = (bfloat16.converted(narrow, torch.int16).int() - remainders).abs()
    assert off[remainders < 127 * 256 + 128].max() == 128
    assert off.max() == 255  # rather than to the next parameter
    assert_identical(bfloat16.converted(bfloat16.converted(narrow, torch.int16), torch.int8), narrow)


@KINDS
@EVERY_KERNEL
def test_a_skipped_step_changes_nothing(kernel, kind):
    lists, remainders = split_lists(make(kind, torch.float32))
    before, before_remainders = lists.clone(), [r.clone() for r in remainders]
    take_step(kernel, lists, remainders=remainders, found_inf=torch.ones(()))
    take_step(kernel, lists, stochastic_param_rounding=True, subsequences=[0] * len(MIXED), found_inf=torch.ones(()))
    narrow = [torch.full_like(r, 7, dtype=torch.int8) for r in remainders]
    take_step(kernel, lists, remainders=narrow, subsequences=[0] * len(MIXED), found_inf=torch.ones(()))
    assert all(bool((r == 7).all()) for r in narrow)
    assert_identical(list(lists), list(before))
    assert_identical(remainders, before_remainders)


def op_call(kind, lists, **options):
    """The op, and its positional and keyword arguments."""
    if kind == "32":
        return step_call(torch.ops.torch_ademamix.ademamix_step_, lists, **options)
    return blockwise_call(lists, **options)


@KINDS
def test_opcheck(kind):
    lists, remainders = split_lists(make(kind, torch.float32, entries=[MIXED[2], *MIXED[8:11]]))
    torch.library.opcheck(*op_call(kind, lists, remainders=remainders))
    torch.library.opcheck(*op_call(kind, lists, stochastic_param_rounding=True, subsequences=[4, 3, 2, 1]))
    remainders = [bfloat16.converted(r, torch.int8) for r in remainders]
    torch.library.opcheck(*op_call(kind, lists, remainders=remainders, subsequences=[4, 3, 2, 1]))


@KINDS
def test_version_counters(kind):
    lists, remainders = split_lists(make(kind, torch.float32))
    versions = [r._version for r in remainders]
    op, args, kwargs = op_call(kind, lists, remainders=remainders)
    op(*args, **kwargs)
    assert [r._version for r in remainders] == [version + 1 for version in versions]


def train(dtype, optimizer_class, **options):
    """Steps of a tiny learning rate with the same gradients, whatever the parameter's dtype."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(512, generator=generator).bfloat16()
    p = torch.nn.Parameter(start.to(dtype))
    optimizer = optimizer_class([p], lr=LR, min_8bit_size=0, **options)
    for _ in range(STEPS):
        p.grad = (torch.randn(512, generator=generator) + 0.3).bfloat16().to(dtype)
        optimizer.step()
    return p.detach(), optimizer.master_weight(p), start


OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [AdEMAMix, AdEMAMix8bit])


@OPTIMIZERS
def test_remainders_track_float32_weights_exactly(optimizer_class):
    exact, *_ = train(torch.float32, optimizer_class)
    param, weight, _ = train(torch.bfloat16, optimizer_class, master_weights="remainder")
    assert_identical(weight, exact)
    assert_identical(param, bfloat16.split(exact)[0])


def most_variance(start, moved, significant_bits):
    """Of the sum of the errors of stochastic rounding: a step's is between -ulp and ulp, of mean 0 and a variance of at
    most ulp * |update|, and updates go back half the way at most.
    """
    ulp = torch.ldexp(torch.ones(len(start)), torch.frexp(start.float()).exponent - significant_bits)
    return 2 * ulp * moved.abs()


@OPTIMIZERS
def test_remainders_of_8_bits_track_float32_weights(optimizer_class):
    """To the random walk of stochastic rounding to their 16 significant bits, and without bias."""
    exact, _, start = train(torch.float32, optimizer_class)
    _, weight, _ = train(torch.bfloat16, optimizer_class, master_weights="remainder8")
    moved, error = exact - start.float(), weight - exact
    variance = most_variance(start, moved, 16)
    assert error.square().mean() < variance.mean() < (0.04 * moved).square().mean()
    assert error.mean().abs() < 4 * variance.sum().sqrt() / len(moved) < moved.mean().abs() / 100


@OPTIMIZERS
def test_stochastic_rounding_has_no_bias_and_nearest_loses_updates(optimizer_class):
    """Over 5,000 steps of 1e-5, where half an ulp of most weights is 1e-3 and more."""
    exact, _, start = train(torch.float32, optimizer_class)
    moved = exact - start.float()

    def error(**options):
        return train(torch.bfloat16, optimizer_class, **options)[0].float() - exact

    stochastic, nearest = error(param_rounding="stochastic"), error()
    deviation = most_variance(start, moved, 8).sum().sqrt() / len(moved)
    assert stochastic.mean().abs() < 4 * deviation < moved.mean().abs() / 10
    assert nearest.mean().abs() > moved.mean().abs() / 2


def make_optimizer(dtype=torch.bfloat16, optimizer_class=AdEMAMix, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((70, 80), (30,))]
    return params, optimizer_class(params, lr=1e-4, **options)


def take_steps(params, optimizer, count, first=0):
    for i in range(first, first + count):
        generator = torch.Generator().manual_seed(i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def everything(params, optimizer):
    return [p.detach() for p in params], optimizer.state_dict()


@OPTIMIZERS
@pytest.mark.parametrize(
    "options",
    [{"master_weights": "remainder"}, {"master_weights": "remainder8"}, {"param_rounding": "stochastic"}],
    ids=repr,
)
def test_resume(tmp_path, optimizer_class, options):
    params, optimizer = make_optimizer(optimizer_class=optimizer_class, **options)
    take_steps(params, optimizer, 3)
    torch.save((params, optimizer.state_dict()), tmp_path / "saved.pt")
    take_steps(params, optimizer, 3, first=3)
    again, other = make_optimizer(optimizer_class=optimizer_class, **options)
    saved_params, saved = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(again, saved_params, strict=True):
            p.copy_(value)
    take_steps(again, other, 3, first=3)
    assert_identical(everything(again, other), everything(params, optimizer))


def test_remainders_are_state_of_bfloat16_parameters_alone():
    params, optimizer = make_optimizer(master_weights="remainder")
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    optimizer.init_state()
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    assert [state.get("master_remainder", torch.ones(())).dtype for state in states] == [torch.int16] * 2 + [
        torch.float32
    ]
    assert states[0]["master_remainder"].shape == params[0].shape
    p = optimizer.param_groups[1]["params"][0]
    assert optimizer.master_weight(p).data_ptr() == p.data_ptr()


@pytest.mark.parametrize(("saved", "wanted"), [("remainder", "remainder8"), ("remainder8", "remainder")])
def test_remainders_of_another_width_are_converted(saved, wanted):
    params, optimizer = make_optimizer(master_weights=saved)
    take_steps(params, optimizer, 2)
    _, other = make_optimizer(master_weights=wanted)
    lossy = pytest.warns(UserWarning, match="remainders of 16 bits, .* 8 bits are kept")
    with lossy if wanted == "remainder8" else nullcontext():
        other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        remainder = optimizer.state[p]["master_remainder"]
        dtype = bfloat16.REMAINDERS[wanted]
        assert_identical(other.state[q]["master_remainder"], bfloat16.converted(remainder, dtype))
        assert other.state[q]["master_remainder"].dtype == dtype


def test_remainders_of_another_width_than_their_group_says():
    """As DCP leaves them, which copies what it reads into tensors of another dtype."""
    params, optimizer = make_optimizer(master_weights="remainder8")
    take_steps(params, optimizer, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["master_weights"] = "remainder"
    with pytest.raises(ValueError, match=r"'master_remainder'\] has dtype torch.int8, .* master_weights='remainder'"):
        optimizer.load_state_dict(saved)


def test_float32_weights_split_to_the_nearest_of_24_bits():
    weights = every_float()
    weights = weights[weights.isfinite()]
    param, remainder = bfloat16.split(weights, torch.int8)
    halfway = torch.tensor(128)
    assert_identical(bfloat16.join(param, remainder), bfloat16.round_to_24_bits(weights, halfway))


def test_one_call_has_remainders_of_one_width():
    lists, remainders = split_lists(make("32", torch.float32))
    remainders[1] = bfloat16.converted(remainders[1], torch.int8)
    for kernel in KERNELS if native_built() else ["reference"]:
        with pytest.raises(RuntimeError, match=r"remainders\[1\] has dtype torch.int8, but must be torch.int16"):
            take_step(kernel, lists, remainders=remainders, subsequences=[0] * len(MIXED))


@OPTIMIZERS
def test_state_without_remainders_loads(optimizer_class):
    """The parameters are their own weights then."""
    params, plain = make_optimizer(optimizer_class=optimizer_class)
    take_steps(params, plain, 1)
    _, optimizer = make_optimizer(optimizer_class=optimizer_class, master_weights="remainder")
    optimizer.load_state_dict(plain.state_dict())
    for p in optimizer.param_groups[0]["params"]:
        assert optimizer.state[p]["master_remainder"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_remainders_are_not_lost_silently(dtype):
    params, optimizer = make_optimizer(master_weights="remainder")
    take_steps(params, optimizer, 1)
    others, plain = make_optimizer(dtype, master_weights="remainder" if dtype == torch.float32 else None)
    take_steps(others, plain, 1)
    before = copy.deepcopy(everything(others, plain))
    with pytest.raises(ValueError, match=r"state_dict\['state'\]\[0\] has 'master_remainder', .* would be lost"):
        plain.load_state_dict(optimizer.state_dict())
    assert_identical(everything(others, plain), before)


def test_remainders_are_not_lost_to_bitsandbytes():
    params, optimizer = make_optimizer(master_weights="remainder")
    take_steps(params, optimizer, 1)
    with pytest.raises(ValueError, match="'master_remainder', a part of the float32 weights, which would be lost"):
        to_bitsandbytes(optimizer.state_dict())


@pytest.mark.parametrize(
    ("bend", "text"),
    [
        (lambda r: r[:-1], r"has shape \[69, 80\], but must have \[70, 80\]"),
        (lambda r: r.int(), "has dtype torch.int32, but must be torch.int16 or torch.int8"),
        (lambda r: 3, "is a int, but must be a tensor"),
    ],
)
def test_refuses_damaged_remainders(bend, text):
    params, optimizer = make_optimizer(master_weights="remainder")
    take_steps(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["master_remainder"] = bend(saved["state"][0]["master_remainder"])
    before = copy.deepcopy(everything(params, optimizer))
    with pytest.raises(ValueError, match=rf"\['master_remainder'\] {text}"):
        optimizer.load_state_dict(saved)
    assert_identical(everything(params, optimizer), before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"master_weights": "kahan"}, "master_weights is 'kahan', but must be 'remainder', 'remainder8' or None"),
        ({"param_rounding": "down"}, "param_rounding is 'down', but must be 'nearest' or 'stochastic'"),
        (
            {"master_weights": "remainder", "param_rounding": "stochastic"},
            "param_rounding is 'stochastic', but must be 'nearest'",
        ),
    ],
)
def test_refuses_options(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make_optimizer(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"master_weights": "remainder"}, "master_weights is 'remainder'"),
        ({"param_rounding": "stochastic"}, "param_rounding is 'stochastic'"),
    ],
)
def test_refuses_float16(options, text):
    with pytest.raises(ValueError, match=f"{text}, which is for bfloat16 parameters, but param_groups.* has dtype"):
        make_optimizer(torch.float16, **options)


def test_parameters_draw_bits_of_their_own():
    """Of equal parameters with equal gradients, in one group or two, and of each step."""
    params = [torch.nn.Parameter(torch.full((4096,), 0.1, dtype=torch.bfloat16)) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = AdEMAMix(groups, lr=1e-5, param_rounding="stochastic")
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = [p.detach() != old for p, old in zip(params, before, strict=True)]
        for i in range(3):
            assert 0 < moved[i].count_nonzero() < 4096
            assert not torch.equal(moved[i], moved[i - 1])


def test_steps_beyond_those_that_float32_counts() -> None:
    """Each draws other bits than the one before."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdEMAMix([p], lr=1e-3, param_rounding="stochastic")
    optimizer.init_state()
    state = optimizer.state[p]
    state["step"].fill_(2**24 - 2)
    steps, drawn = [], []
    for _ in range(5):
        with torch.no_grad():
            for tensor in (state["exp_avg"], state["exp_avg_slow"], state["exp_avg_sq"]):
                tensor.zero_()
            p.fill_(1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        steps.append(state["step"].item() - 2**24)
        drawn.append(p.detach().clone())
    assert steps == [-1, 0, 2, 4, 6]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(drawn))

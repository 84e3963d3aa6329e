"""Switching over from other optimizers' checkpoints; test_bitsandbytes.py has bitsandbytes itself."""

import copy

import pytest
import torch

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit, ReferenceAdEMAMix, recommended
from torch_ademamix.checkpoint import (
    dynamic_map,
    from_adamw,
    from_apple,
    from_bitsandbytes,
    to_apertus,
    to_bitsandbytes,
)
from torch_ademamix.numerics.blockwise import dequantize, quantize
from torch_ademamix.numerics.schedules import alpha_schedule, beta3_schedule

SHAPES = [(17, 300), (300,), (), (0, 3)]
TOLERANCE = 1e-6  # relative to the largest element, after 20 steps of float32 arithmetic in another order


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups_of(params):
    return [{"params": params[:1], "lr": 3e-3, "weight_decay": 0.1}, {"params": params[1:]}]


def train(optimizer, steps, skip=()):
    """Steps on reproducible random gradients, which parameters whose numbers are in `skip` don't have."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator) + 0.3
            p.grad = None if i in skip else grad.to(p.dtype)
        optimizer.step()
    return optimizer


def copied(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_near(actual, expected, tolerance=TOLERANCE):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            error = (a.detach().double() - e.detach().double()).abs().max() / e.detach().double().abs().max()
            assert error <= tolerance, f"tensor {i} is {error:.3g} off"


# Each makes a state dict of the other implementation's, after some training, and its converter.


def adamw_state_dict():
    return train(torch.optim.AdamW(groups_of(make_params())), range(5)).state_dict()


def apple_state_dict(optimizer=None):
    """What Apple's implementation would hold in the place of an optimizer with our names."""
    optimizer = optimizer or train(ReferenceAdEMAMix(groups_of(make_params()), t_alpha=40, t_beta3=40), range(5))
    state_dict = optimizer.state_dict()
    no_m1 = optimizer.param_groups[0]["betas"][0] == 0
    states = {
        i: {
            "step": int(s["step"]),
            "exp_avg_fast": None if no_m1 else s["exp_avg"],
            "exp_avg_slow": s["exp_avg_slow"],
            "exp_avg_sq": s["exp_avg_sq"],
        }
        for i, s in state_dict["state"].items()
    }
    names = {"t_alpha": "alpha_warmup", "t_beta3": "beta3_warmup"}
    unknown = {"schedule_start", "maximize"}
    groups = [
        {names.get(name, name): value for name, value in group.items() if name not in unknown}
        for group in state_dict["param_groups"]
    ]
    return {"state": states, "param_groups": groups}


def ademamix_state_dict(optim_bits=8):
    return train(AdEMAMix(groups_of(make_params()), optim_bits=optim_bits), range(5)).state_dict()


def bitsandbytes_state_dict(optim_bits=8):
    return to_bitsandbytes(ademamix_state_dict(optim_bits))


CONVERSIONS = [
    (from_adamw, adamw_state_dict),
    (from_apple, apple_state_dict),
    (from_bitsandbytes, bitsandbytes_state_dict),
    (to_bitsandbytes, ademamix_state_dict),
    (to_apertus, ademamix_state_dict),
]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
def test_argument_stays_and_nothing_is_shared(convert, make):
    state_dict = make()
    for group in state_dict["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), "initial_lr": 1.0}
    before = copy.deepcopy(state_dict)
    converted = convert(state_dict)
    memory = {t.untyped_storage().data_ptr() for t in tensors_in(converted) if t.numel()}
    assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in tensors_in(state_dict) if t.numel())
    assert [group["initial_lr"] for group in converted["param_groups"]] == [1.0, 1.0]
    for tensor in tensors_in(converted):
        tensor.zero_()
    assert_identical(list(tensors_in(state_dict)), list(tensors_in(before)))
    assert state_dict["state"].keys() == before["state"].keys()
    assert state_dict["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
def test_survives_torch_save(convert, make, tmp_path):
    torch.save(convert(make()), tmp_path / "checkpoint.pt")
    torch.load(tmp_path / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
@pytest.mark.parametrize("broken", [{}, [], {"state": {}}])
def test_refuses_what_is_no_state_dict(convert, make, broken):
    with pytest.raises(ValueError, match="with 'state' and 'param_groups'"):
        convert(broken)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
def test_refuses_options_that_are_missing(convert, make):
    state_dict = make()
    del state_dict["param_groups"][1]["eps"]
    with pytest.raises(ValueError, match=r"state_dict\['param_groups'\]\[1\] has no 'eps', but must have"):
        convert(state_dict)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
def test_refuses_state_without_a_parameter(convert, make):
    state_dict = make()
    state_dict["state"][9] = state_dict["state"][0]
    with pytest.raises(ValueError, match=r"state_dict\['state'\]\[9\] belongs to no parameter"):
        convert(state_dict)
    state_dict["state"] = {1: None}
    with pytest.raises(ValueError, match=r"state_dict\['state'\]\[1\] is a NoneType, but must be a dict"):
        convert(state_dict)


def entries_of(state):
    return state.get("__bnb_optimizer_quant_state__", state)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(name), r"has entries \[.*\], but must have|but must be a tensor"),
        (lambda state, name: state.update(extra=1), r"has entries \[.*'extra'.*\], but must have"),
        (lambda state, name: state.update({name: 1.0}), r"\['{name}'\] is a float, but must be a tensor"),
        (lambda state, name: state.update({name: state[name].int()}), r"\['{name}'\] has dtype torch.int32, but must"),
        (lambda state, name: state.update({name: state[name][..., :-1]}), r"has shape \[.*\], but must have \["),
    ],
)
def test_refuses_state_that_is_broken(convert, make, change, message):
    state_dict = make()
    for name in entries_of(state_dict["state"][0]):
        if name in ("step", "exp_avg_fast"):
            continue
        broken = copy.deepcopy(state_dict)
        change(entries_of(broken["state"][0]), name)
        with pytest.raises(ValueError, match=r"state_dict\['state'\]\[0\].*(" + message.replace("{name}", name) + ")"):
            convert(broken)


@pytest.mark.parametrize(("convert", "make"), CONVERSIONS)
def test_refuses_steps_of_several_elements(convert, make):
    state_dict = make()
    state_dict["state"][0]["step"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"\['step'\] has shape \[2\], but must hold one element"):
        convert(state_dict)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"foreach": True}, {"fused": True}])
def test_adamw_goes_on_as_before_without_the_slow_average(optimizer_class, options):
    params = make_params()
    decay = 0.1 if optimizer_class is torch.optim.AdamW else 0.0
    groups = [{"params": params[:1], "lr": 3e-3, "weight_decay": decay}, {"params": params[1:]}]
    adamw = optimizer_class(groups, **options, betas=(0.8, 0.99), weight_decay=0.0)
    train(adamw, range(20), skip=[1])
    train(adamw, range(20, 30))
    ours = copied(params)
    optimizer = AdEMAMix(groups_of(ours))
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), alpha=0.0))
    steps = range(30, 50)
    train(adamw, steps)
    train(optimizer, steps)
    assert_near(ours, params)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_near([optimizer.state[p][name] for p in ours], [adamw.state[p][name] for p in params])
    assert [optimizer.state[p]["step"].item() for p in ours] == [50, 30, 50, 50]


def test_schedules_are_counted_from_the_switch():
    options = dict(beta3=0.99, alpha=3.0, t_alpha=15, t_beta3=12)
    params = make_params()
    adamw = train(torch.optim.AdamW(groups_of(params)), range(30))
    state_dict = from_adamw(adamw.state_dict(), **options)
    assert [group["schedule_start"] for group in state_dict["param_groups"]] == [30, 30]
    ours = copied(params)
    optimizer = AdEMAMix(groups_of(ours))
    optimizer.load_state_dict(state_dict)

    # In float64: AdamW's own moments, and the slow average and its schedules from the switch on.
    expected = [p.detach().double() for p in params]
    m2s = [torch.zeros_like(p) for p in expected]
    for t in range(30, 50):
        train(optimizer, [t])
        train(adamw, [t])
        beta3 = beta3_schedule(t - 29, 0.9, options["beta3"], options["t_beta3"])
        alpha = alpha_schedule(t - 29, options["alpha"], options["t_alpha"])
        for i, p in enumerate(params):
            group = adamw.param_groups[min(i, 1)]
            m2s[i] = beta3 * m2s[i] + (1 - beta3) * p.grad.double()
            m1 = adamw.state[p]["exp_avg"].double() / (1 - 0.9 ** (t + 1))
            nu = adamw.state[p]["exp_avg_sq"].double() / (1 - 0.999 ** (t + 1))
            update = (m1 + alpha * m2s[i]) / (nu.sqrt() + group["eps"]) + group["weight_decay"] * expected[i]
            expected[i] = expected[i] - group["lr"] * update
    assert_near(ours, expected)
    assert_near([optimizer.state[p]["exp_avg_slow"] for p in ours], m2s)


def test_schedules_wait_for_parameters_with_fewer_steps():
    """A parameter's schedules begin after as many steps of its own as its group's foremost had done at the switch."""
    params = make_params()[:2]
    adamw = torch.optim.AdamW(params)
    train(adamw, range(10), skip=[1])
    train(adamw, range(10, 15))
    ours = copied(params)
    optimizer = AdEMAMix(ours)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), t_alpha=100, t_beta3=100))
    train(adamw, range(15, 25))
    train(optimizer, range(15, 25))
    assert_near(ours[1:], params[1:])
    with pytest.raises(AssertionError):
        assert_near(ours[:1], params[:1])
    train(adamw, [25])
    train(optimizer, [25])
    with pytest.raises(AssertionError):
        assert_near(ours[1:], params[1:])


class TestOptionsOfTheSwitch:
    """What AdamW doesn't have stays the optimizer's own, of each group, unless it is given."""

    OWN = ("alpha", "t_alpha", "t_beta3", "delta", "seed", "maximize", "stochastic_rounding")

    @pytest.fixture
    def switched(self):
        def switch(**given):
            adamw = torch.optim.AdamW(groups_of(make_params()), lr=5e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
            state_dict = train(adamw, range(5)).state_dict()
            groups = groups_of(make_params())
            groups[1].update(betas=(0.9, 0.999, 0.99), alpha=2.0, t_alpha=7, kappa=None, seed=9)
            optimizer = AdEMAMix(groups, lr=1.0, **recommended(1000), stochastic_rounding=False)
            own = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(from_adamw(state_dict, **given))
            return own, optimizer.param_groups

        return switch

    def test_default(self, switched):
        own, groups = switched()
        assert [group["betas"] for group in groups] == [(0.8, 0.95, 0.999), (0.8, 0.95, 0.99)]
        assert [[group[name] for name in self.OWN] for group in groups] == [[g[name] for name in self.OWN] for g in own]
        assert [(g["lr"], g["eps"], g["weight_decay"]) for g in groups] == [(3e-3, 1e-6, 0.1), (5e-3, 1e-6, 0.3)]
        assert [group["schedule_start"] for group in groups] == [5, 5]

    def test_given(self, switched):
        _, groups = switched(beta3=0.9999, alpha=0.5, t_alpha=0, t_beta3=30)
        for group in groups:
            assert group["betas"] == (0.8, 0.95, 0.9999)
            assert (group["alpha"], group["t_alpha"], group["t_beta3"]) == (0.5, 0, 30)

    @pytest.mark.parametrize("given", [{"beta3": 1.0}, {"alpha": -1.0}])
    def test_out_of_range(self, switched, given):
        name = {"beta3": "betas"}.get(*given, *given)
        with pytest.raises(ValueError, match=rf"state_dict\['param_groups'\]\[0\]: {name} is .*, but must be"):
            switched(**given)

    def test_none_as_beta3_is_for_loading_only(self):
        with pytest.raises(TypeError, match=r"betas is \(0.9, 0.999, None\), but must be three numbers"):
            AdEMAMix(make_params(), betas=(0.9, 0.999, None))


@pytest.mark.parametrize("lost", ["alpha", "seed", "lr", "betas"])
def test_options_that_a_group_lacks_stay_the_optimizers_own(lost):
    own = {"alpha": 3.0, "seed": 4, "lr": 0.5, "betas": (0.5, 0.6, 0.7)}
    state_dict = ademamix_state_dict(optim_bits=32)
    for group in state_dict["param_groups"]:
        del group[lost]
    optimizer = AdEMAMix(groups_of(make_params()))
    optimizer.param_groups[1].update(own)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[1][lost] == own[lost]


def test_adamw_state_loads_into_8_bits():
    params = make_params()
    adamw = train(torch.optim.AdamW(groups_of(params)), range(5))
    optimizer = AdEMAMix8bit(groups_of(copied(params)))
    optimizer.load_state_dict(from_adamw(adamw.state_dict()))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    expected = quantize(adamw.state[params[0]]["exp_avg"], "signed_sqrt_int8")
    assert_identical([state["exp_avg"], state["exp_avg_absmax"]], list(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("source", ["adamw", "apple"])
def test_state_gets_the_dtype_of_the_arithmetic(source, dtype):
    params = make_params(dtype)
    adamw = train(torch.optim.AdamW(params), range(5))
    state_dict = adamw.state_dict()
    if source == "apple":
        for state in state_dict["state"].values():
            state |= {"exp_avg_fast": state.pop("exp_avg"), "exp_avg_slow": state["exp_avg_sq"].clone()}
        state_dict["param_groups"] = [
            dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), eps=1e-8, alpha=2.0, beta3_warmup=None, alpha_warmup=None,
                 weight_decay=0.0, params=[0, 1, 2, 3])
        ]  # fmt: skip
    optimizer = AdEMAMix(params)
    optimizer.load_state_dict({"adamw": from_adamw, "apple": from_apple}[source](state_dict))
    for p in params:
        for theirs, ours in {"exp_avg_fast": "exp_avg", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
            if theirs in adamw.state[p]:
                assert_identical(optimizer.state[p][ours], adamw.state[p][theirs].to(optimizer.state[p][ours].dtype))
    train(optimizer, range(5, 7))


def test_refuses_amsgrad():
    state_dict = train(torch.optim.AdamW(make_params(), amsgrad=True), range(2)).state_dict()
    with pytest.raises(ValueError, match=r"\[0\]\['amsgrad'\] is True, but must be False"):
        from_adamw(state_dict)
    state_dict["param_groups"][0]["amsgrad"] = False
    with pytest.raises(ValueError, match=r"\[0\] has entries \[.*'max_exp_avg_sq'.*\], but must have"):
        from_adamw(state_dict)


def test_refuses_an_l2_penalty():
    adam = train(torch.optim.Adam(make_params(), weight_decay=0.01), range(2))
    with pytest.raises(ValueError, match=r"\['weight_decay'\] is 0.01, but must be 0 where decoupled_weight_decay is"):
        from_adamw(adam.state_dict())


def test_refuses_another_number_of_betas():
    with pytest.raises(ValueError, match=r"\['betas'\] is \(0.9, 0.999, 0.9999\), but must be 2 numbers"):
        from_adamw(ademamix_state_dict(optim_bits=32))
    state_dict = apple_state_dict()
    state_dict["param_groups"][0]["betas"] = (0.9, 0.999)
    with pytest.raises(ValueError, match=r"\['betas'\] is \(0.9, 0.999\), but must be 3 numbers"):
        from_apple(state_dict)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("warmup", [None, 25])
def test_apple_goes_on_as_before(beta1, warmup):
    """Against the formula of the paper, which Apple's is but for 1e-8 in the schedule of β3."""
    params = make_params()
    options = dict(betas=(beta1, 0.99, 0.999), alpha=3.0, t_alpha=warmup, t_beta3=warmup)
    plain = train(ReferenceAdEMAMix(groups_of(params), **options), range(10))
    ours = copied(params)
    optimizer = AdEMAMix(groups_of(ours))
    optimizer.load_state_dict(from_apple(apple_state_dict(plain)))
    train(plain, range(10, 30))
    train(optimizer, range(10, 30))
    assert_near(ours, params)


@pytest.mark.parametrize("entry", [{}, {"exp_avg_fast": None}])
def test_apple_state_without_fast_average(entry):
    state_dict = apple_state_dict(train(ReferenceAdEMAMix(make_params(), betas=(0.0, 0.9, 0.99)), range(2)))
    for state in state_dict["state"].values():
        del state["exp_avg_fast"]
        state.update(entry)
    converted = from_apple(state_dict)
    assert "exp_avg" not in converted["state"][0]
    state_dict["param_groups"][0]["betas"] = (0.9, 0.9, 0.99)
    with pytest.raises(ValueError, match=r"\['exp_avg_fast'\] is a NoneType, but must be a tensor"):
        from_apple(state_dict)


def test_hints_for_foreign_state():
    optimizer = AdEMAMix(groups_of(make_params()))
    with pytest.raises(ValueError, match=r"load Apple's state with torch_ademamix.checkpoint.from_apple"):
        optimizer.load_state_dict(apple_state_dict())
    with pytest.raises(ValueError, match=r"bitsandbytes' state with torch_ademamix.checkpoint.from_bitsandbytes"):
        optimizer.load_state_dict(bitsandbytes_state_dict())


def test_slow_ema_bits_changed_after_the_state_was_made():
    """The state keeps its format, so its group says otherwise; the refusal tells how to load it."""
    params = [torch.nn.Parameter(torch.ones(20, 256))]
    optimizer = train(AdEMAMix8bit(params), range(3))
    optimizer.param_groups[0]["slow_ema_bits"] = 8
    state_dict = optimizer.state_dict()
    other = AdEMAMix8bit(copied(params))
    with pytest.raises(ValueError, match=r"slow_ema_bits=8: .* set it back in the state dict"):
        other.load_state_dict(state_dict)
    state_dict["param_groups"][0]["slow_ema_bits"] = 16
    other.load_state_dict(state_dict)
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_there_and_back(optim_bits, flat):
    """Through bitsandbytes' format, nested as it is now and flat as it was; float32 state comes back as it was."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(20, 256), (3, 5)]]
    options = dict(optim_bits=optim_bits, slow_ema_bits=8, min_8bit_size=1000)
    optimizer = train(AdEMAMix(params, **options, lr=torch.tensor(1e-3), t_alpha=7), range(5))
    state_dict = to_bitsandbytes(optimizer.state_dict())
    if flat:
        for state in state_dict["state"].values():
            state |= state.pop("__bnb_optimizer_quant_state__")
    other = AdEMAMix(copied(params), **options)
    other.load_state_dict(from_bitsandbytes(state_dict))
    ours, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    if optim_bits == 32:
        assert_identical(theirs, ours)
    for state, again in zip(ours.values(), theirs.values(), strict=True):
        assert {name: t.dtype for name, t in again.items()} == {name: t.dtype for name, t in state.items()}
        for name in state:
            codes = 0 if state[name].is_floating_point() else 2
            torch.testing.assert_close(again[name].double(), state[name].double(), rtol=0.01, atol=codes)
    for name in ("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay"):
        assert other.param_groups[0][name] == pytest.approx(optimizer.param_groups[0][name])


FORMATS_OF = {"exp_avg": "signed_sqrt_int8", "exp_avg_slow": "linear_int16", "exp_avg_sq": "fourth_root_uint8"}


def test_layout_of_bitsandbytes():
    state_dict = train(AdEMAMix8bit([torch.nn.Parameter(torch.ones(20, 256))]), range(5)).state_dict()
    ours, theirs = state_dict["state"][0], to_bitsandbytes(state_dict)["state"][0]
    assert theirs.keys() == {"step", "__bnb_optimizer_quant_state__"}
    assert type(theirs["step"]) is int
    assert theirs["step"] == 5
    theirs = theirs["__bnb_optimizer_quant_state__"]
    moments = [(theirs["state1"][i], theirs["absmax1"][i]) for i in (0, 1)] + [(theirs["state2"], theirs["absmax2"])]
    for moment, (name, format) in zip(moments, FORMATS_OF.items(), strict=True):
        values = dequantize(ours[name], ours[f"{name}_absmax"].flatten(), format)
        assert_identical(moment, dynamic_map.quantize(values, signed=name != "exp_avg_sq"))
    maps = [dynamic_map.dynamic_map(signed) for signed in (True, False)]
    assert_identical([theirs["qmap1"], theirs["qmap2"]], maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ragged_and_unquantized_state_becomes_float32(dtype):
    params = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5000, 100)]
    state_dict = train(AdEMAMix8bit(params), range(5)).state_dict()
    for i, state in to_bitsandbytes(state_dict)["state"].items():
        theirs = state["__bnb_optimizer_quant_state__"]
        assert theirs.keys() == {"state1", "state2"}
        assert theirs["state1"].dtype == theirs["state2"].dtype == torch.float32
        ours = state_dict["state"][i]
        expected = ours["exp_avg_slow"]
        if i == 0:
            expected = dequantize(ours["exp_avg_slow"], ours["exp_avg_slow_absmax"].flatten(), "linear_int16")
        assert_identical(theirs["state1"][1], expected.float())


def test_slow_averages_scales_written_by_the_cuda_kernel():
    """That kernel has them one entry early if the size isn't a multiple of 256; the values must come out the same."""
    n, blocks = 5000, 20
    moments = [dynamic_map.quantize(torch.randn(n).cumsum(0), signed=True) for _ in range(2)]
    (m1, m1_absmax), (m2, m2_absmax) = moments
    nu, nu_absmax = dynamic_map.quantize(torch.randn(n).square(), signed=False)

    def read(absmax1, m2=m2, nu_absmax=nu_absmax):
        maps = {"qmap1": dynamic_map.dynamic_map(True), "qmap2": dynamic_map.dynamic_map(False)}
        nested = {"state1": torch.stack((m1, m2)), "state2": nu, "absmax1": absmax1, "absmax2": nu_absmax, **maps}
        groups = bitsandbytes_state_dict()["param_groups"][:1]
        state_dict = {"state": {0: {"step": 3, "__bnb_optimizer_quant_state__": nested}}, "param_groups": groups}
        return from_bitsandbytes(state_dict)["state"][0]

    by_rows = torch.stack((m1_absmax, m2_absmax))
    by_cuda = torch.zeros(2 * blocks)
    by_cuda[:blocks] = m1_absmax
    by_cuda[blocks - 1 : -1] = m2_absmax
    by_cuda = by_cuda.view(2, blocks)
    for absmax1 in (by_rows, by_cuda):
        state = read(absmax1)
        assert_identical(state["exp_avg_slow"], dynamic_map.dequantize(m2, m2_absmax, signed=True))
        assert_identical(state["exp_avg"], dynamic_map.dequantize(m1, absmax1[0], signed=True))
    # Where the last block is zero, its scale is too.
    no_last = m2_absmax.clone()
    no_last[-1] = 0
    by_rows = torch.stack((m1_absmax, no_last))
    zero_codes = torch.where(torch.arange(n) < 19 * 256, m2, 127).to(torch.uint8)
    expected = dynamic_map.dequantize(zero_codes, no_last, signed=True)
    assert_identical(read(by_rows, m2=zero_codes)["exp_avg_slow"], expected)
    no_nu = nu_absmax.clone()
    no_nu[-1] = 0
    expected = dynamic_map.dequantize(m2, no_last, signed=True)
    assert_identical(read(by_rows, nu_absmax=no_nu)["exp_avg_slow"], expected)


def test_from_bitsandbytes_refuses_other_optimizers_state():
    state_dict = bitsandbytes_state_dict()
    nested = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
    nested["state1"] = nested["state1"][0]
    with pytest.raises(ValueError, match=r"\['state1'\] has shape \[17, 300\], but must have \[2, 17, 300\]"):
        from_bitsandbytes(state_dict)


def test_from_bitsandbytes_refuses_other_maps():
    params = [torch.nn.Parameter(torch.ones(4096))]
    state_dict = to_bitsandbytes(train(AdEMAMix8bit(params), range(2)).state_dict())
    nested = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
    nested["qmap2"] = nested["qmap1"]
    with pytest.raises(ValueError, match=r"\['qmap2'\] must be the unsigned dynamic map, but has other values"):
        from_bitsandbytes(state_dict)


def test_to_bitsandbytes_refuses_what_it_has_no_option_for():
    params = make_params()
    with pytest.raises(ValueError, match=r"\[0\]\['maximize'\] is True, but must be False"):
        to_bitsandbytes(AdEMAMix(params, maximize=True).state_dict())
    with pytest.raises(ValueError, match=r"\[0\]\['schedule_start'\] is 9, but must be 0, or t_alpha and t_beta3 None"):
        to_bitsandbytes(AdEMAMix(params, schedule_start=9, t_beta3=100).state_dict())
    to_bitsandbytes(AdEMAMix(params, schedule_start=9).state_dict())

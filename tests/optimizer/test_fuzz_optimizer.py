"""The optimizer in long, drawn sequences of what people do with one, each step against the formula in float64."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from tests.helpers import float64
from tests.helpers.config import DTYPES, assert_identical
from tests.helpers.fuzzing import GRAD_SCALES, OPTIONS, effort, fuzz, laid_out, learning_rates, shapes, values
from tests.helpers.quantized import ABSMAXS, MOMENTS, stored
from tests.optimizer.test_optimizer_errors import REFUSED_OPTIONS
from torch_ademamix import AdEMAMix
from torch_ademamix.checkpoint import from_bitsandbytes, to_bitsandbytes
from torch_ademamix.checkpoint.dynamic_map import dynamic_map
from torch_ademamix.numerics.reference_step import compute_dtype
from torch_ademamix.state.options import LARGEST_EPS

pytestmark = fuzz

# What a group may be given, beside the options of the op.
BETAS = st.tuples(*(OPTIONS[name] for name in ("beta1", "beta2", "beta3")))
STEP_OPTIONS = {
    "lr": learning_rates,
    "betas": BETAS,
    **{name: strategy for name, strategy in OPTIONS.items() if not name.startswith("beta")},
    # As small as AdamW's eps and weight_decay they are refused.
    "alpha": OPTIONS["alpha"].filter(lambda alpha: alpha == 0 or alpha > LARGEST_EPS),
    **{name: OPTIONS[name].filter(lambda steps: steps is None or steps >= 1) for name in ("t_alpha", "t_beta3")},
    "stochastic_rounding": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
}
STORAGE = {
    "optim_bits": st.sampled_from([8, 8, 32]),
    "slow_ema_bits": st.sampled_from([8, 16]),
    "min_8bit_size": st.sampled_from([0, 1, 256, 4096]),
    "is_paged": st.booleans(),
}
ROUNDING = st.sampled_from(
    [{"master_weights": "remainder"}, {"master_weights": "remainder8"}, {"param_rounding": "stochastic"}, {}]
)
PARAM_DTYPES = st.sampled_from([*DTYPES, torch.bfloat16])  # which has the most ways


@st.composite
def groups(draw, most):
    """A new group: parameters, and options that go with them."""
    params = draw(st.lists(parameters(), min_size=1, max_size=most))
    options = draw(st.fixed_dictionaries(STORAGE, optional=STEP_OPTIONS | {"capturable": st.booleans()}))
    rounding = draw(ROUNDING) if all(p.dtype != torch.float16 for p in params) else {}
    return {"params": params, **options, **rounding}


@st.composite
def parameters(draw):
    p = draw(laid_out(draw(values(draw(shapes))).to(draw(PARAM_DTYPES))))
    return nn.Parameter(p)


ABSENT = "absent"  # in the place of exp_avg's format, at a beta1 of 0


def formats_of(state):
    formats = (None, None, None)
    if "exp_avg_sq_absmax" in state:
        formats = stored(16 if state["exp_avg_slow"].dtype == torch.int16 else 8)
    return formats if "exp_avg" in state else (ABSENT, *formats[1:])


def weight_of(p, state):
    return float64.master_weight(p, state[REMAINDER]) if REMAINDER in state else float64.float64(p)


def wanted_formats(p, group):
    quantized = group["optim_bits"] == 8 and p.numel() >= group["min_8bit_size"]
    formats = stored(group["slow_ema_bits"]) if quantized else (None, None, None)
    return formats if group["betas"][0] > 0 else (ABSENT, *formats[1:])


def moments_of(state):
    """The moments' values, and how exactly they are known."""
    return [
        float64.exactly(np.zeros(state["exp_avg_slow"].shape))
        if format == ABSENT
        else float64.exactly(float64.float64(state[name]))
        if format is None
        else float64.decoded(state[name], state[f"{name}_absmax"], format)
        for name, format in zip(MOMENTS, formats_of(state), strict=True)
    ]


def in_bitsandbytes_codes(moment, signed):
    """Of whole blocks, rounded to the nearest codes of bitsandbytes: by half the widest gap at most."""
    widest = dynamic_map(signed, torch.device("cpu")).double().diff().max().item()
    absmax = moment.most.reshape(-1, float64.BLOCK_SIZE).max(axis=1)
    rounding = np.repeat(absmax * widest / 2, float64.BLOCK_SIZE).reshape(moment.value.shape)
    return float64.Interval(moment.value, moment.error + rounding)


def load(optimizer, state_dict):
    """At a beta1 of 0 without exp_avg, even if the saved state has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the state dict has exp_avg")
        optimizer.load_state_dict(state_dict)


def drop_exp_avg(state_dict):
    """What is left of a state dict that such an optimizer has loaded."""
    for group in state_dict["param_groups"]:
        for i in group["params"]:
            if group["betas"][0] == 0 and i in state_dict["state"]:
                for name in ("exp_avg", "exp_avg_absmax"):
                    state_dict["state"][i].pop(name, None)


def through_state_dict(params, optimizer, new):
    load(new, copy.deepcopy(optimizer.state_dict()))
    return params, new


def through_file(params, optimizer, new):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    load(new, torch.load(file, weights_only=True))
    return params, new


def through_pickle(params, optimizer, new):
    return pickle.loads(pickle.dumps((params, optimizer)))


def through_deepcopy(params, optimizer, new):
    return copy.deepcopy((params, optimizer))


REMAINDER = "master_remainder"
WAYS = [through_state_dict, through_file, through_pickle, through_deepcopy]


class Training(RuleBasedStateMachine):
    @initialize(group=groups(2), max_grad_norm=st.sampled_from([None, None, 1e-3, 10.0]), data=st.data())
    def make(self, group, max_grad_norm, data):
        self.optimizer = AdEMAMix([group], max_grad_norm=max_grad_norm)
        if data.draw(st.booleans()):
            self.step(data, None, finite=True)

    @property
    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def everything(self):
        """All that a refusal or a way to disk may not change."""
        return copy.deepcopy(([p.detach() for p in self.params], self.optimizer.state_dict(), self.optimizer.defaults))

    def assert_refuses(self, call, error, match=None):
        before = self.everything()
        with pytest.raises(error, match=match):
            call()
        assert_identical(self.everything(), before)

    def draw_gradients(self, data, finite=True):
        for i, p in enumerate(self.params):
            p.grad = None
            if p.requires_grad and data.draw(st.sampled_from([True, True, False]), label=f"gradient of {i}"):
                p.grad_dtype = None  # any
                g = data.draw(values(p.shape, finite=finite)).to(data.draw(st.sampled_from(DTYPES)))
                p.grad = data.draw(laid_out(g, expanded=True))

    @rule(data=st.data(), steps=st.integers(1, 4), grad_scale=GRAD_SCALES, finite=st.sampled_from([True, True, False]))
    def train(self, data, steps, grad_scale, finite):
        for _ in range(steps):
            self.step(data, grad_scale, finite)

    def step(self, data, grad_scale, finite):
        self.draw_gradients(data, finite or self.optimizer.max_grad_norm is not None)
        if grad_scale is not None:
            self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(grad_scale), torch.tensor(0.0)
        before = {p: copy.deepcopy((p.detach(), dict(self.optimizer.state.get(p, {})))) for p in self.params}
        self.optimizer.step()
        for name in ("grad_scale", "found_inf"):
            vars(self.optimizer).pop(name, None)
        scale, scale_error = self.clipped(grad_scale or 1.0)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                old, old_state = before[p]
                if p.grad is None:
                    state = dict(self.optimizer.state.get(p, {}))
                    if not old_state:  # it may have been made, for those that have a gradient
                        old_state = {name: torch.zeros_like(value) for name, value in state.items()}
                    assert_identical((p.detach(), state), (old, old_state))
                else:
                    self.assert_stepped(p, old, old_state, group, grad_scale=scale, grad_scale_error=scale_error)

    def clipped(self, scale):
        """What the gradients were divided by, and its relative error."""
        largest = self.optimizer.max_grad_norm
        grads = [float64.float64(p.grad).ravel() for p in self.params if p.grad is not None]
        if largest is None or not grads:
            return scale, 0.0
        norm = np.linalg.norm(np.concatenate(grads)) / scale
        if norm * scale > 1e18:  # the squares may overflow
            return scale, np.inf
        error = 2e-5  # sums of a few thousand squares in float32
        np.testing.assert_allclose(self.optimizer.grad_norm.item(), norm, rtol=error, atol=1e-18)
        return scale * max(1.0, (norm + 1e-6) / largest), error

    def assert_stepped(self, p, old, old_state, group, **grad_scale):
        state = self.optimizer.state[p]
        formats = formats_of(state)
        assert formats == (formats_of(old_state) if old_state else wanted_formats(p, group))
        t = float(old_state["step"]) + 1 if old_state else 1.0
        assert state["step"] == t
        moments = moments_of(old_state) if old_state else [float64.exactly(np.zeros(p.shape))] * 3
        options = {name: group[name] for name in OPTIONS if not name.startswith("beta")}
        options |= zip(("beta1", "beta2", "beta3"), group["betas"], strict=True)
        weight, *new = float64.step(
            weight_of(old, old_state), p.dtype, p.grad, *moments, t, float(group["lr"]), **grad_scale, **options
        )
        if REMAINDER in state and state[REMAINDER].dtype == torch.int8:
            weight = float64.stored_as(weight, p.dtype, 2.0**-8)  # to one of two values around
        stochastic = group["param_rounding"] == "stochastic" and p.dtype == torch.bfloat16
        float64.assert_within(p, float64.stored_as(weight, p.dtype, 1.0 if stochastic else 0.5), "param")
        if REMAINDER in state:
            float64.assert_within(self.optimizer.master_weight(p), weight, "weight")
        # Of an element of which one moment isn't finite all are lost, and of one that may overflow perhaps.
        lost = ~np.logical_and.reduce([np.isfinite(m.value) for m in new])
        may_be_lost = ~np.logical_and.reduce([m.most < 1e37 for m in new])
        for name, format, expected in zip(MOMENTS, formats, new, strict=True):
            if format == ABSENT:
                continue
            if format is None:
                float64.assert_within(state[name], expected, name)
                continue
            expected.error[may_be_lost] = np.inf
            nearest = format != "fourth_root_uint8" or not group["stochastic_rounding"]
            codes, absmax = state[name], state[f"{name}_absmax"]
            float64.assert_quantized(codes, absmax, expected, format, nearest=nearest, lost=lost, where=name)

    @rule(data=st.data())
    def skipped_step(self, data):
        self.draw_gradients(data, finite=False)
        self.optimizer.init_state()
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(3.0), torch.tensor(1.0)
        before = self.everything()
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        assert_identical(self.everything(), before)

    @precondition(lambda self: len(self.params) < 6)
    @rule(group=groups(2))
    def add_group(self, group):
        self.optimizer.add_param_group(group)

    @rule(data=st.data(), trained=st.booleans())
    def freeze_or_not(self, data, trained):
        data.draw(st.sampled_from(self.params)).requires_grad_(trained)

    @rule()
    def init_state(self):
        before = self.everything()
        self.optimizer.init_state()
        params, after, defaults = self.everything()
        after["state"] = {i: state for i, state in after["state"].items() if i in before[1]["state"]}
        assert_identical((params, after, defaults), before)

    @rule(data=st.data(), name=st.sampled_from(sorted(STEP_OPTIONS)))
    def change_option(self, data, name):
        group, value = data.draw(st.sampled_from(self.optimizer.param_groups)), data.draw(STEP_OPTIONS[name])
        old, group[name] = group.get(name), value
        states = [self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state]
        if name == "betas" and value[0] > 0 and any("exp_avg" not in state for state in states if state):
            self.assert_refuses(self.optimizer.step, ValueError, "has no exp_avg")
            group[name] = old

    @rule(data=st.data(), way=st.sampled_from(WAYS))
    def reload(self, data, way):
        before = self.everything()
        groups = [dict(group) for group in self.optimizer.param_groups]
        new = AdEMAMix(groups, max_grad_norm=self.optimizer.max_grad_norm)
        _, self.optimizer = way(self.params, self.optimizer, new)
        self.optimizer.defaults = before[2]
        if self.optimizer is new:
            drop_exp_avg(before[1])
        assert_identical(self.everything(), before)

    @rule(data=st.data(), bits=st.fixed_dictionaries(STORAGE))
    def reload_in_other_bits(self, data, bits):
        old = self.optimizer
        new = AdEMAMix([{**group, **bits} for group in old.param_groups], max_grad_norm=old.max_grad_norm)
        before = copy.deepcopy(old.state_dict())
        load(new, old.state_dict())
        assert_identical(old.state_dict(), before)
        self.optimizer = new
        for group in new.param_groups:
            assert bits.items() <= group.items()
            for p in group["params"]:
                assert (p in new.state) == (p in old.state)
                if p in new.state:
                    self.assert_converted(p, old.state[p], new.state[p], wanted_formats(p, group))

    def assert_converted(self, p, old, new, wanted):
        for name in ("step", REMAINDER):
            assert_identical(new.get(name), old.get(name))
        assert formats_of(new) == wanted
        for name, was, now, exact in zip(MOMENTS, formats_of(old), wanted, moments_of(old), strict=True):
            if now == ABSENT:
                continue
            if was == now:
                entries = [name] if now is None else [name, f"{name}_absmax"]
                assert_identical([new[entry] for entry in entries], [old[entry] for entry in entries])
            else:
                self.assert_rounded(new, name, exact, now)

    def assert_rounded(self, state, name, exact, format):
        """That a moment has these values, to the rounding of its format."""
        roundings = exact.error + np.abs(exact.value) * 2**-22 + 2**-149
        bound = float64.Interval(exact.value, np.where(exact.most < 1e37, roundings, np.inf))
        if format is None:
            float64.assert_within(state[name], bound, name)
        else:
            lost = ~np.isfinite(exact.value)
            codes, absmax = state[name], state[f"{name}_absmax"]
            float64.assert_quantized(codes, absmax, bound, format, nearest=True, lost=lost, where=name)

    @rule()
    def through_bitsandbytes(self):
        before = copy.deepcopy(self.optimizer.state_dict())
        if any(
            group["maximize"] or (group["schedule_start"] > 0 and (group["t_alpha"] or group["t_beta3"]))
            for group in self.optimizer.param_groups
        ) or any(REMAINDER in state for state in before["state"].values()):
            return self.assert_refuses(lambda: to_bitsandbytes(self.optimizer.state_dict()), ValueError)
        converted = from_bitsandbytes(to_bitsandbytes(self.optimizer.state_dict()))
        assert_identical(self.optimizer.state_dict(), before)
        for i, old in before["state"].items():
            new = converted["state"][i]
            assert_identical(new["step"], old["step"])
            for name, was, now, exact in zip(MOMENTS, formats_of(old), formats_of(new), moments_of(old), strict=True):
                if now == ABSENT:
                    continue
                assert now is None or old[name].numel() % float64.BLOCK_SIZE == 0
                if was == now is not None:
                    assert_identical(new[name], old[name])
                    assert_identical(new[f"{name}_absmax"].flatten(), old[f"{name}_absmax"].flatten())
                else:
                    if was is not None and old[name].numel() % float64.BLOCK_SIZE == 0:
                        exact = in_bitsandbytes_codes(exact, signed=name != "exp_avg_sq")
                    self.assert_rounded(new, name, exact, now)

    @rule(data=st.data(), p=parameters(), refused=st.sampled_from(REFUSED_OPTIONS))
    def refused_option(self, data, p, refused):
        error, options, match = refused
        self.assert_refuses(lambda: self.optimizer.add_param_group({"params": [p], **options}), error, match)
        i = data.draw(st.integers(0, len(self.optimizer.param_groups) - 1))
        if not options.keys() & STORAGE.keys():  # these aren't loaded
            bent = copy.deepcopy(self.optimizer.state_dict())
            bent["param_groups"][i].update(options)
            self.assert_refuses(lambda: self.optimizer.load_state_dict(bent), error, match)
        group = self.optimizer.param_groups[i]
        self.draw_gradients(data)
        kept = {name: group[name] for name in options}
        group.update(options)
        self.assert_refuses(self.optimizer.step, error, match)
        group.update(kept)

    @rule(data=st.data(), dtype=st.sampled_from([torch.int32, torch.complex64, "sparse"]))
    def refused_gradient(self, data, dtype):
        self.draw_gradients(data)
        p = data.draw(st.sampled_from(self.params))
        p.requires_grad_(True)
        p.grad_dtype = None
        p.grad = torch.ones(p.shape).to_sparse() if dtype == "sparse" else torch.ones(p.shape, dtype=dtype)
        self.assert_refuses(self.optimizer.step, RuntimeError)
        p.grad = None

    @precondition(lambda self: self.optimizer.state)
    @rule(data=st.data(), change=st.sampled_from(["pop", "float16", "longer", "list"]))
    def refused_state(self, data, change):
        bent = copy.deepcopy(self.optimizer.state_dict())
        state = data.draw(st.sampled_from(list(bent["state"].values())))
        optional = set()
        if change == "pop":  # without exp_avg it is state of a beta1 of 0
            optional = {REMAINDER} if "exp_avg_absmax" in state else {REMAINDER, "exp_avg"}
        name = data.draw(st.sampled_from(sorted(state.keys() - {"step"} - optional)))
        if change == "pop":
            del state[name]
        elif change == "float16":
            state[name] = state[name].half()
        elif change == "longer":
            state[name] = torch.cat((state[name].flatten(), state[name].new_ones(1)))
        else:
            state[name] = state[name].tolist()
        self.assert_refuses(lambda: self.optimizer.load_state_dict(bent), ValueError, "state_dict")

    @invariant()
    def state_is_sound(self):
        if not hasattr(self, "optimizer"):
            return
        groups_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for p, state in self.optimizer.state.items():
            quantized = "exp_avg_sq_absmax" in state
            with_remainder = groups_of[p]["master_weights"] and p.dtype == torch.bfloat16
            without = 0 if "exp_avg" in state else 1
            assert state.keys() == {
                *("step", *MOMENTS[without:]),
                *(ABSMAXS[without:] if quantized else ()),
                *([REMAINDER] if with_remainder else []),
            }
            for name, format in zip(MOMENTS[without:], formats_of(state)[without:], strict=True):
                dtype = compute_dtype(p.dtype) if format is None else float64.CODE_DTYPES[format]
                assert (state[name].shape, state[name].dtype) == (p.shape, dtype)


@pytest.mark.parametrize("examples", [80, pytest.param(250, marks=pytest.mark.nightly)])
def test_training(examples):
    run_state_machine_as_test(Training, settings=effort(examples, stateful_step_count=20))

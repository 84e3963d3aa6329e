"""Schedules in logarithmic time and ADANA, against float64 arithmetic written from the paper (arXiv 2602.05298)."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.memory import Recipe, gpt2_state
from tests.helpers.config import assert_identical
from torch_ademamix import ADANA, AdEMAMix, ReferenceAdEMAMix
from torch_ademamix.checkpoint import from_adana, to_adana

STEPS = 50


def make_params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in (300, 7)]


def grads_of(step):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (300, 7)]


def train(params, optimizer, steps=STEPS, first=0):
    for step in range(first, first + steps):
        for p, grad in zip(params, grads_of(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()


def paper(params, lr, delta=8.0, kappa=0.85, eps=1e-8, weight_decay=0.0, t_weight_decay=math.inf):
    """ADANA's algorithm in plain float64; weight_decay is multiplied with lr."""
    results = [p.detach().double().clone() for p in params]
    ms, nus = ([torch.zeros_like(p) for p in results] for _ in range(2))
    for step in range(STEPS):
        t = step + 1
        beta = 1 - delta / (delta + t)
        for i, (p, g) in enumerate(zip(results, grads_of(step), strict=True)):
            ms[i] = beta * ms[i] + (1 - beta) * g
            nus[i] = beta * nus[i] + (1 - beta) * g * g
            update = (g + (1 + (1 + t) ** (1 - kappa)) * ms[i]) / (nus[i].sqrt() + eps)
            decay = weight_decay / (1 + t / t_weight_decay)
            results[i] = p - lr * update - lr * decay * p
    return results


OPTIONS = [{}, {"delta": 3.0, "kappa": 0.6}, {"weight_decay": 0.3}, {"weight_decay": 4.0, "t_weight_decay": 7.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adana_is_the_papers(dtype, options):
    params = make_params(dtype)
    expected = paper(params, 1e-2, **options)
    train(params, ADANA(params, lr=1e-2, **{"weight_decay": 0.0, **options}))
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for p, q in zip(params, expected, strict=True):
        assert (p.double() - q).abs().max() <= bound * q.abs().max()


class TheirADana(torch.optim.Optimizer):
    """The update of mlexpos/adana's class (src/optim/adana.py, Apache 2.0), in its order; without SNR clipping.

    Weight decay acts on the new parameter, by the learning rate's schedule without its peak.
    """

    def __init__(self, params, lr, delta=8.0, kappa=0.85, epsilon=1e-8, weight_decay=0.0, wd_ts=math.inf):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.lr, self.delta, self.kappa, self.epsilon, self.wd_ts = lr, delta, kappa, epsilon, wd_ts

    def decay(self, group, step):
        return group["weight_decay"] / (1 + step / self.wd_ts) * group["lr"] / self.lr

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                alpha = self.delta / (self.delta + t)
                m.lerp_(p.grad, alpha)
                v.mul_(1 - alpha).addcmul_(p.grad, p.grad, value=alpha)
                norm = 1.0 / (v.sqrt() + self.epsilon)
                growing = m.sign() * (1.0 + t) ** (1 - self.kappa) * m.abs() * norm
                p.add_(-group["lr"] * p.grad * norm - group["lr"] * (growing + m * norm))
                p.mul_(1 - self.decay(group, t))


THEIRS = [{}, {"weight_decay": 1e-2}, {"weight_decay": 0.5, "wd_ts": 3.0}, {"delta": 4.0, "kappa": 1.0}]


@pytest.mark.parametrize("options", THEIRS, ids=repr)
def test_adana_is_the_reference_implementations(options):
    """Over 50 float32 steps with a learning rate schedule.

    (p - lr·u)(1 - w) is p - lr·(1 - w)·u - w·p: their step has our form, with these lr and weight decay.
    """
    params, expected = make_params(torch.float32), make_params(torch.float32)
    theirs = TheirADana(expected, lr=1e-2, **options)
    ours = ADANA(params, lr=1e-2, **{name: options[name] for name in ("delta", "kappa") if name in options})
    (group,), (their_group,) = ours.param_groups, theirs.param_groups
    for step in range(STEPS):
        their_group["lr"] = 1e-2 * (1 - step / STEPS)
        decay = theirs.decay(their_group, step + 1)
        group["lr"] = their_group["lr"] * (1 - decay)
        group["weight_decay"] = decay / group["lr"]
        train(params, ours, 1, first=step)
        train(expected, theirs, 1, first=step)
    for p, q in zip(params, expected, strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_two_emas_in_log_time():
    """AdEMAMix with a slow EMA in logarithmic time, which starts later too."""
    for start in (0, 10):
        params = make_params()
        results = [p.detach().clone() for p in params]
        ms, ss, nus = ([torch.zeros_like(p) for p in results] for _ in range(3))
        for step in range(STEPS):
            t = step + 1
            s = max(t - start, 0)
            rate = 8.0 / (8.0 + s)
            for i, (p, g) in enumerate(zip(results, grads_of(step), strict=True)):
                ms[i] = 0.9 * ms[i] + 0.1 * g
                ss[i] = (1 - rate) * ss[i] + rate * g
                nus[i] = 0.999 * nus[i] + 0.001 * g * g
                numerator = ms[i] / (1 - 0.9**t) + (2.0 + (1 + s) ** 0.25) * ss[i]
                update = numerator / ((nus[i] / (1 - 0.999**t)).sqrt() + 1e-8)
                results[i] = p - 1e-2 * update
        options = {"alpha": 2.0, "delta": 8.0, "kappa": 0.75, "schedule_start": start, "weight_decay": 0.0}
        train(params, AdEMAMix(params, lr=1e-2, **options))
        for p, q in zip(params, results, strict=True):
            assert (p - q).abs().max() <= 1e-12 * q.abs().max()


STORED = [{}, *({"optim_bits": 8, "min_8bit_size": 1, "slow_ema_bits": bits} for bits in (16, 12))]


@pytest.mark.parametrize("options", STORED, ids=repr)
def test_resuming_is_bit_for_bit(options):
    params = make_params(torch.float32)
    optimizer = ADANA(params, lr=1e-2, t_weight_decay=10.0, **options)
    train(params, optimizer, 5)
    saved = copy.deepcopy((params, optimizer.state_dict()))
    train(params, optimizer, 5, first=5)
    other = ADANA(saved[0], lr=1e-2, **options)
    other.load_state_dict(saved[1])
    train(saved[0], other, 5, first=5)
    assert_identical([p.detach() for p in saved[0]], [p.detach() for p in params])
    assert_identical(other.state_dict(), optimizer.state_dict())


def test_reference_has_the_options():
    params, expected = make_params(), make_params()
    options = {"alpha": 1.0, "delta": 8.0, "log_time_beta2": True, "kappa": 0.85, "t_weight_decay": 20.0}
    train(params, AdEMAMix(params, betas=(0.0, 0.999, 0.9999), **options))
    train(expected, ReferenceAdEMAMix(expected, betas=(0.0, 0.999, 0.9999), **options))
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-14)


def test_options_are_read_at_each_step_and_in_each_group():
    params = make_params()
    optimizer = AdEMAMix([{"params": [params[0]], "delta": 4.0}, {"params": [params[1]]}])
    before = copy.deepcopy(params)
    train(params, optimizer, 1)
    optimizer.param_groups[1]["delta"] = 4.0
    optimizer.param_groups[1]["kappa"] = 0.9
    train(params, optimizer, 3, first=1)
    other = AdEMAMix(before, delta=4.0)
    train(before, other, 1)
    train(before, other, 3, first=1)
    assert_identical(params[0].detach(), before[0].detach())
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta is 0.0, but must be positive, or None"),
        ({"kappa": 0.0}, r"kappa is 0.0, but must be in \(0, 1\], or None"),
        ({"kappa": 1.5}, "kappa is 1.5, but must be in"),
        ({"t_weight_decay": -1}, "t_weight_decay is -1, but must be positive, or None"),
        ({"log_time_beta2": True}, "log_time_beta2 is True, but delta is None"),
        ({"delta": "8"}, "delta is '8', but must be positive, or None"),
        ({"delta": 8.0, "t_beta3": 100}, "delta is 8.0 and t_beta3 is 100, but both are schedules of β3"),
        ({"kappa": 0.85, "t_alpha": 100}, "kappa is 0.85 and t_alpha is 100, but both are schedules of α"),
    ],
)
def test_errors(options, message):
    params = make_params()
    with pytest.raises((TypeError, ValueError), match=message):
        AdEMAMix(params, **options)
    optimizer = AdEMAMix(params)
    optimizer.param_groups[0].update(options)
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]: " + message):
        train(params, optimizer, 1)


def test_state_dicts_of_the_reference_implementation():
    """There and back, and the run goes on as ours would."""
    params = make_params(torch.float32)
    optimizer = ADANA(params, lr=1e-2, weight_decay=0.1)
    train(params, optimizer, 4)
    exported = to_adana(optimizer.state_dict(), peak_lr=0.1)
    (group,) = exported["param_groups"]
    assert (group["epsilon"], group["delta"], group["params"]) == (1e-8, 8.0, [0, 1])
    assert math.isclose(group["weight_decay"], 0.01)
    assert exported["state"][0].keys() == {"step", "m", "v"}
    assert exported["state"][0]["step"] == 4
    exported["state"][0]["grad_norm"] = torch.tensor(1.0)  # it logs such
    other_params = copy.deepcopy(params)
    other = ADANA(other_params, lr=1.0, kappa=0.5)
    other.load_state_dict(from_adana(exported, peak_lr=0.1))
    other.param_groups[0]["weight_decay"] = 0.1  # to the last bit
    train(params, optimizer, 3, first=4)
    train(other_params, other, 3, first=4)
    assert_identical(other_params, params)
    del exported["state"][1]["v"]
    with pytest.raises(ValueError, match=r"\['state'\]\[1\] has no v, but must have step, m, v"):
        from_adana(exported, peak_lr=0.1)
    with pytest.raises(ValueError, match=r"\['log_time_beta2'\] is False"):
        to_adana(AdEMAMix(params).state_dict(), peak_lr=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 8.0), ({"optim_bits": 8}, 3.04), ({"optim_bits": 8, "slow_ema_bits": 12}, 2.04)],
    ids=repr,
)
def test_bytes_of_state(options, expected):
    """Per parameter of GPT-2, of which biases have float32 state, with gaps between tensors and the steps."""
    recipe = Recipe("ADANA", torch.float32, partial(ADANA, **options))
    assert gpt2_state(recipe) == pytest.approx(expected, abs=0.005)

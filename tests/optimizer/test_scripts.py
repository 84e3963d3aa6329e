"""What scripts do that were written for AdamW or bitsandbytes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit

FROZEN = {
    "uint8": lambda: torch.arange(8, dtype=torch.uint8),
    "int8": lambda: torch.arange(8, dtype=torch.int8),
    "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(8, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(8),
    "sparse": lambda: torch.ones(8).to_sparse(),
}
FORMATS = {"32-bit": {}, "8-bit": dict(optim_bits=8, min_8bit_size=0)}
GROUP_1 = r"param_groups\[1\]\['params'\]\[0\]"


def named_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    groups = [{"params": list(layer.named_parameters(prefix=f"{i}"))} for i, layer in enumerate(model)]
    return model, groups


def train(model, optimizer, steps=1):
    x = torch.linspace(-1, 1, 64).view(4, 16)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


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


def test_frozen_parameters_that_get_a_gradient():
    p = nn.Parameter(torch.ones(8))
    frozen = nn.Parameter(torch.ones(1).expand(8), requires_grad=False)
    optimizer = AdEMAMix([{"params": [("fine", p)]}, {"params": [("tied", frozen)]}])
    frozen.requires_grad_()
    p.grad, frozen.grad = torch.ones(8), torch.ones(8)
    with pytest.raises(ValueError, match=rf"{GROUP_1} \(tied\) has elements that share memory"):
        optimizer.step()
    assert_identical(p.data, torch.ones(8))


def spoil_shape(p, state):
    p.data = torch.ones(3)


def spoil_grad(p, state):
    p.grad = torch.ones(4).to_sparse()


def spoil_state(p, state):
    state["exp_avg"] = state["exp_avg"].double()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_shape, r"grad has shape \[4\], but param has shape \[3\]"),
        (spoil_grad, "has layout torch.sparse_coo"),
        (spoil_state, "exp_avg has dtype torch.float64"),
    ],
)
def test_a_refused_step(spoil, match, options):
    """It says which parameter, and has changed none, so that the loop may go on with the next one."""
    model, groups = named_model()
    optimizer = AdEMAMix(groups, **options)
    train(model, optimizer)
    p = model[1].bias
    state = optimizer.state[p]
    good = p.data, p.grad, state["exp_avg"]
    spoil(p, state)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=rf"param_groups\[1\]\['params'\]\[1\] \(1.bias\).* {match}"):
        optimizer.step()
    assert_identical(snapshot(model, optimizer), before)
    p.data, p.grad, state["exp_avg"] = good
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_refused_options_and_state_say_whose_they_are():
    model, groups = named_model()
    with pytest.raises(ValueError, match=r"param_groups\[1\]: alpha is -1"):
        AdEMAMix([groups[0], {**groups[1], "alpha": -1}])
    optimizer = AdEMAMix(groups)
    train(model, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][2]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"{GROUP_1} \(1.weight\): state_dict\['state'\]\[2\]\['exp_avg'\] has shape"):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[1]["alpha"] = -1
    with pytest.raises(ValueError, match=r"param_groups\[1\]: alpha is -1"):
        optimizer.step()


class Lookahead:
    """As timm has it: a wrapper that keeps a copy of the weights in the optimizer's own state."""

    def __init__(self, optimizer, k=2):
        self.optimizer, self.k, self.steps = optimizer, k, 0

    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.k:
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.state[p]
                slow = state.setdefault("lookahead_slow_buff", p.detach().clone())
                p.data.copy_(slow.lerp_(p.data, 0.5))


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_state_of_others(options, tmp_path):
    """It is saved and loaded as torch does, and a resumed run repeats the unbroken one."""
    (model, groups), (other, other_groups) = named_model(), named_model()
    optimizer, resumed = AdEMAMix(groups, **options), AdEMAMix(other_groups, **options)
    wrapper = Lookahead(optimizer)
    for _ in range(3):
        model(torch.ones(2, 16)).square().mean().backward()
        wrapper.step()
    torch.save(snapshot(model, optimizer), tmp_path / "checkpoint.pt")
    weights, state_dict = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state_dict)
    assert all("lookahead_slow_buff" in state for state in resumed.state.values())
    again = Lookahead(resumed)
    again.steps = wrapper.steps
    for model_, wrapper_ in ((model, wrapper), (other, again)):
        model_.zero_grad()
        model_(torch.ones(2, 16)).square().mean().backward()
        wrapper_.step()
    assert_identical(snapshot(other, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("slow_ema_bits", [8, 16])
def test_state_set_to_zero(slow_ema_bits):
    """In place, as ReLoRA and pruning do it: code 0 is 0 in every format."""
    p = nn.Parameter(torch.ones(512))
    optimizer = AdEMAMix8bit([p], lr=1e-3, weight_decay=0, min_8bit_size=0, slow_ema_bits=slow_ema_bits)
    p.grad = torch.linspace(1, 2, 512)
    for _ in range(3):
        optimizer.step()
    for name in ("exp_avg", "exp_avg_slow"):
        optimizer.state[p][name].zero_()
    p.grad = torch.zeros(512)
    before = p.detach().clone()
    optimizer.step()
    assert_identical(p.data, before)


def test_an_empty_first_group_with_clipping():
    p = nn.Parameter(torch.ones(4))
    optimizer = AdEMAMix([{"params": []}, {"params": [p]}], max_grad_norm=1.0)
    p.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert optimizer.grad_norm == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_norm_is_float32_whatever_the_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = AdEMAMix([nn.Parameter(torch.ones(4))], max_grad_norm=1.0)
    finally:
        torch.set_default_dtype(before)
    assert optimizer.grad_norm.dtype == torch.float32


def test_the_norm_is_on_the_parameters_device():
    """That of the construction, or of the first step, where the model was moved in between; torch's default is none."""
    with torch.device("meta"):
        optimizer = AdEMAMix([nn.Parameter(torch.ones(4, device="cpu"))], max_grad_norm=1.0)
    assert optimizer.grad_norm.device.type == "cpu"
    optimizer.param_groups[0]["params"][0] = moved = nn.Parameter(torch.ones(4, device="meta"))
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert optimizer.grad_norm.device.type == "meta"


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


def test_a_step_that_is_no_tensor():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([("weight", p)])
    optimizer.init_state()
    optimizer.state[p]["step"] = 5
    p.grad = torch.ones(3)
    match = r"the step of param_groups\[0\]\['params'\]\[0\] \(weight\) is a int, but must be a tensor"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_state_that_is_incomplete():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p])
    optimizer.init_state()
    del optimizer.state[p]["exp_avg_sq"]
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"the state of param_groups\[0\]\['params'\]\[0\] has no exp_avg_sq"):
        optimizer.step()


@pytest.mark.parametrize("lost", ["exp_avg_sq", "step", ""], ids=lambda name: name or "all")
def test_flat_state_dicts_with_missing_state(lost):
    model, groups = named_model()
    optimizer = AdEMAMix(groups)
    train(model, optimizer)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    saved = {name: value for name, value in saved.items() if not name.startswith(f"state.1.bias.{lost}")}
    with pytest.raises(ValueError, match=rf"\(1.bias\): state_dict\['state'\]\['1.bias'\] has no .*{lost}"):
        set_optimizer_state_dict(model, optimizer, saved, options=flat)


@pytest.mark.parametrize(
    ("state_dict", "error"),
    [("checkpoint.pt", TypeError), (None, TypeError), ({"state": {}}, ValueError), ({"model": {}}, ValueError)],
    ids=repr,
)
def test_what_is_no_state_dict(state_dict, error):
    optimizer = AdEMAMix([nn.Parameter(torch.ones(3))])
    with pytest.raises(error, match=r"state_dict .*must be what an optimizer's state_dict"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("step", [None, [3], {"a": 3}], ids=repr)
def test_saved_steps_that_are_no_numbers(step):
    p = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p])
    optimizer.init_state()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["step"] = step
    with pytest.raises(ValueError, match=rf"\['step'\] is a {type(step).__name__}, but must be a number or a tensor"):
        optimizer.load_state_dict(state_dict)


class OptimizersContainer(torch.optim.Optimizer):
    """As torchtitan makes one: an optimizer for each part of the model, behind one, and one flat state dict."""

    def __init__(self, parts, cls, options):
        self.parts = parts
        self.optimizers = [cls([p for p in part.parameters() if p.requires_grad], **options) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], options)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self):
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        parts = zip(self.parts, self.optimizers, strict=True)
        return {k: v for pair in parts for k, v in get_optimizer_state_dict(*pair, options=flat).items()}

    def load_state_dict(self, state_dict):
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=flat)


class Part(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.add_module(f"layer{index}", nn.Linear(16, 16))  # names are of the whole model

    def forward(self, x):
        return next(self.children())(x)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_torchtitan(options):
    """Its container, a scheduler for each optimizer, and a resumed run that repeats the unbroken one."""

    def make():
        torch.manual_seed(0)
        parts = [Part(i) for i in range(2)]
        container = OptimizersContainer(parts, AdEMAMix, dict(lr=1e-2, t_alpha=6, t_beta3=6, **options))
        return nn.Sequential(*parts), container, [LambdaLR(o, lambda t: 1 / (1 + t)) for o in container.optimizers]

    def run(model, container, schedulers):
        for _ in range(3):
            container.zero_grad()
            model(torch.linspace(-1, 1, 64).view(4, 16)).square().mean().backward()
            container.step()
            for scheduler in schedulers:
                scheduler.step()

    model, container, schedulers = unbroken = make()
    run(*unbroken)
    new_model, new_container, new_schedulers = resumed = make()
    new_model.load_state_dict(model.state_dict())
    new_container.load_state_dict(copy.deepcopy(container.state_dict()))
    for new, old in zip(new_schedulers, schedulers, strict=True):
        new.load_state_dict(old.state_dict())
    run(*unbroken)
    run(*resumed)
    assert_identical(new_model.state_dict(), model.state_dict())
    assert_identical(new_container.state_dict(), container.state_dict())
    assert all(state["step"] == 6 for o in new_container.optimizers for state in o.state.values())


class MainParams:
    """As Megatron has them: the optimizer's are float32 copies of bfloat16 weights, in groups with keys of its own."""

    def __init__(self, model, **options):
        self.weights = list(model.parameters())
        self.main = [nn.Parameter(p.detach().float()) for p in self.weights]
        kinds = (
            dict(wd_mult=1.0, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False),
            dict(wd_mult=0.0, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False),
            dict(wd_mult=1.0, lr_mult=1.0, is_expert_parallel=True, is_decoupled_lr=False),  # none on this rank
        )
        members = ([p for p in self.main if p.dim() > 1], [p for p in self.main if p.dim() == 1], [])
        groups = [{"params": params, **kind} for params, kind in zip(members, kinds, strict=True)]
        self.optimizer = AdEMAMix(groups, **options)

    def schedule(self, lr, weight_decay):
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_mult"], weight_decay * group["wd_mult"]

    def step(self):
        for weight, main in zip(self.weights, self.main, strict=True):
            main.grad = weight.grad.float()
        self.optimizer.step()
        for weight, main in zip(self.weights, self.main, strict=True):
            weight.data.copy_(main)
            weight.grad = main.grad = None


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_megatron(options):
    """Groups keep Megatron's keys, through a state dict too, and a rank's empty group is none of the step's affair."""

    def make():
        model, _ = named_model()
        model.to(torch.bfloat16)
        return model, MainParams(model, **options)

    def run(model, main_params, first, steps):
        for t in range(first, first + steps):
            main_params.schedule(lr=1e-2 / (1 + t), weight_decay=0.1 * t)
            model(torch.linspace(-1, 1, 64).view(4, 16).bfloat16()).float().square().mean().backward()
            main_params.step()

    (model, main_params), (new_model, resumed) = make(), make()
    resumed.optimizer.init_state()
    run(model, main_params, 0, 3)
    new_model.load_state_dict(model.state_dict())
    for new, old in zip(resumed.main, main_params.main, strict=True):
        new.data.copy_(old)
    resumed.optimizer.load_state_dict(copy.deepcopy(main_params.optimizer.state_dict()))
    assert [group["is_expert_parallel"] for group in resumed.optimizer.param_groups] == [False, False, True]
    run(model, main_params, 3, 3)
    run(new_model, resumed, 3, 3)
    assert_identical(resumed.main, main_params.main)
    assert_identical(resumed.optimizer.state_dict(), main_params.optimizer.state_dict())

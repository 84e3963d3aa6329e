"""Optimizers as torchtitan and Megatron make them, without these packages: containers, main parameters, own keys."""

import copy

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
from torch_ademamix import AdEMAMix

FORMATS = {"32-bit": {}, "8-bit": dict(optim_bits=8, min_8bit_size=0)}


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
def test_torchtitans_container(options):
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
def test_megatrons_main_parameters(options):
    """Groups keep Megatron's keys, through a state dict too, and a rank's empty group is none of the step's affair."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to(torch.bfloat16)
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

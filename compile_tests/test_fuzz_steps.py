"""Full training steps against the plain loop, over drawn models, optimizers and what people do between steps.

Everything is equal bit for bit: losses, weights, buffers, state, the scaler, random numbers.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.fuzzing import SEED, effort, fuzz
from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step

pytestmark = fuzz

WIDTH, STEPS = 8, 8


class Gated(nn.Module):
    """Leaves an auxiliary loss and a count."""

    def __init__(self):
        super().__init__()
        self.gate, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.aux_loss = None

    def forward(self, x):
        gate = torch.sigmoid(self.gate(x))
        self.aux_loss = gate.square().mean()
        return gate * self.linear(x)


class Shared(nn.Module):
    """One weight in two layers, and one parameter that is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Sometimes(nn.Module):
    """A second way, for batches that begin with a positive number: another set of parameters has a gradient."""

    def __init__(self):
        super().__init__()
        self.linear, self.adapter, self.adapted = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), False

    def forward(self, x):
        return self.linear(x) + self.adapter(x) if self.adapted else self.linear(x)


def pruned():
    linear = nn.Linear(WIDTH, WIDTH)
    prune.random_unstructured(linear, "weight", 0.5)
    return linear


LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)),
    "gated": Gated,
    "shared": Shared,
    "sometimes": Sometimes,
    "pruned": pruned,
}


def halved(grad):
    return grad * 0.5


def doubled_in_place(p):
    p.grad.mul_(2)


def shifted(module, inputs, output):
    return output + 0.1


def decayed(optimizer, *_):
    for p in optimizer.param_groups[0]["params"]:
        if p.grad is not None:
            p.grad.add_(p.detach(), alpha=0.1)


HOOKS = {
    "gradient": lambda training: training.some_param().register_hook(halved),
    "accumulated": lambda training: training.some_param().register_post_accumulate_grad_hook(doubled_in_place),
    "forward": lambda training: training.model[0].register_forward_hook(shifted),
    "step": lambda training: training.ademamix.register_step_pre_hook(decayed),
    "first step": lambda training: training.optimizers[0].register_step_pre_hook(decayed),
}


class Centralized(AdEMAMix):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sub_(p.grad.mean())
        return super().step(closure)


@dataclass
class Training:
    """One run of a scenario."""

    scenario: dict[str, Any]
    model: nn.Sequential = field(init=False)
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self):
        torch.manual_seed(self.scenario["seed"])
        layers = [LAYERS[name]() for name in self.scenario["layers"]]
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, 1))
        for i in self.scenario["frozen"]:
            self.model[i % len(self.model)].requires_grad_(False)
        self.model[-1].requires_grad_(True)
        self.optimizers = self.make_optimizers()
        self.ademamix = next(o for o in self.optimizers if isinstance(o, AdEMAMix))
        for name in self.scenario["hooks"]:
            HOOKS[name](self)
        scale = self.scenario["scale"]
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        self.schedulers = [self.make_scheduler(o) for o in self.optimizers] if self.scenario["scheduler"] else []
        self.saved: Any = None

    def make_optimizers(self):
        params = list(self.model.parameters())
        made, ours = [], params
        for name in self.scenario["others"]:
            if name == "muon" and (matrices := [p for p in ours if p.ndim == 2][:-1]):
                made.append(Muon(matrices, lr=0.02))
                ours = [p for p in ours if all(p is not q for q in matrices)]
            elif name != "muon" and len(ours) > 2:
                cls = {"adamw": AdamW, "sgd": SGD}[name]
                made.append(cls(ours[:1], lr=0.01, **({"momentum": 0.9} if name == "sgd" else {})))
                ours = ours[1:]
        if self.scenario["overlap"] and made:
            ours = [*ours, made[0].param_groups[0]["params"][0]]
        cls = Centralized if self.scenario["overridden"] else AdEMAMix
        middle = len(ours) // 2 if self.scenario["groups"] == 2 else 0
        groups = [{"params": part} for part in (ours[:middle], ours[middle:]) if part]
        groups[0].update(self.scenario["of_first_group"])
        made.insert(self.scenario["place"] % (len(made) + 1), cls(groups, **self.scenario["options"]))
        return made

    def make_scheduler(self, optimizer):
        if self.scenario["scheduler"] == "cosine":
            return CosineAnnealingLR(optimizer, 20)
        return OneCycleLR(optimizer, 0.03, total_steps=20)

    def some_param(self):
        return self.model[-1].weight

    def loss_fn(self, model, x, y):
        loss = (model(x) - y).square().mean()
        for module in model.modules():
            if isinstance(module, Gated):
                loss = loss + 0.1 * module.aux_loss
        return loss

    def batch(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(12, WIDTH, generator=generator), torch.randn(12, 1, generator=generator)

    def plain(self):
        n, average = self.scenario["accumulate"], self.scenario["average"]

        def step(*batch):
            self.model.zero_grad()
            total = 0
            for part in zip(*(arg.tensor_split(n) for arg in batch), strict=True):
                loss = self.loss_fn(self.model, *part)
                loss = loss / n if average and n > 1 else loss
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                total = total + loss.detach()
            for optimizer in self.optimizers:
                optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.model.zero_grad()
            return total

        return step

    def compiled(self):
        return compile_train_step(self.model, self.given(), self.loss_fn, backend="aot_eager", **self.arguments())

    def captured(self):
        return capture_train_step(self.model, self.given(), self.loss_fn, self.batch(99), **self.arguments())

    def given(self):
        return self.optimizers if len(self.optimizers) > 1 else self.ademamix

    def arguments(self):
        return {"scaler": self.scaler, **{name: self.scenario[name] for name in ("accumulate", "average")}}

    def run(self, way):
        step = getattr(self, way)()
        torch.manual_seed(1)
        losses = []
        for i in range(STEPS):
            losses.append(step(*self.batch(i)))
            if self.scaler is not None:
                self.scaler.update()
            for scheduler in self.schedulers:
                scheduler.step()
            assert all(p.grad is None for p in self.model.parameters())
            for name in self.scenario["between"].get(i, ()):
                BETWEEN[name](self, i)
        return copy.deepcopy(
            (
                losses,
                self.model.state_dict(),
                [optimizer.state_dict() for optimizer in self.optimizers],
                self.ademamix.grad_norm,
                None if self.scaler is None else self.scaler.state_dict(),
                torch.get_rng_state(),
            )
        )


def evaluate(training, i):
    training.model.eval()
    with torch.no_grad():
        training.loss_fn(training.model, *training.batch(50 + i))
    training.model.train()


def eager_backward(training, i):
    training.loss_fn(training.model, *training.batch(50 + i)).backward()


def save(training, i):
    state = [optimizer.state_dict() for optimizer in training.optimizers]
    training.saved = copy.deepcopy((training.model.state_dict(), state))


def load(training, i):
    if training.saved is None:
        save(training, i)
    training.model.load_state_dict(training.saved[0])
    for optimizer, state in zip(training.optimizers, training.saved[1], strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))


def freeze(training, i):
    training.model[0].requires_grad_(not training.model[0].weight.requires_grad)


def adapt(training, i):
    for module in training.model.modules():
        if isinstance(module, Sometimes):
            module.adapted = not module.adapted


def other_options(training, i):
    training.ademamix.param_groups[0].update(weight_decay=0.01 * i, alpha=5.0 + i, betas=(0.8, 0.99, 0.999))


def other_norm(training, i):
    training.ademamix.max_grad_norm = 0.1 + i


def other_seed(training, i):
    training.ademamix.param_groups[-1]["seed"] = i


def replaced_state(training, i):
    for state in training.ademamix.state.values():
        state["exp_avg"] = state["exp_avg"].clone()


def moved_data(training, i):
    p = training.some_param()
    p.data = p.data.clone()


def another_hook(training, i):
    training.some_param().register_hook(halved)


def frozen_dropout(training, i):
    for module in training.model.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
            module.eval()


BETWEEN = {
    function.__name__: function
    for function in (
        *(evaluate, eager_backward, save, load, freeze, adapt, other_options, other_norm, other_seed),
        *(replaced_state, moved_data, another_hook, frozen_dropout),
    )
}
OPTIONS = {
    "32-bit": {},
    "8-bit": {"optim_bits": 8, "min_8bit_size": 16},
    "8-bit, slow EMA too": {"optim_bits": 8, "min_8bit_size": 1, "slow_ema_bits": 8},
}

scenarios = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 9),
        "layers": st.lists(st.sampled_from(sorted(LAYERS)), max_size=3),
        "frozen": st.lists(st.integers(0, 4), max_size=1),
        "hooks": st.lists(st.sampled_from(sorted(HOOKS)), max_size=2, unique=True),
        "others": st.sampled_from([(), (), ("muon",), ("sgd",), ("muon", "adamw"), ("adamw", "sgd")]),
        "place": st.integers(0, 2),
        "overlap": st.sampled_from([False, False, False, True]),
        "overridden": st.sampled_from([False, False, False, True]),
        "groups": st.sampled_from([1, 2]),
        "of_first_group": st.sampled_from([{}, {"weight_decay": 0.0, "lr": 3e-3}, {"maximize": True}]),
        "options": st.tuples(
            st.sampled_from(list(OPTIONS.values())),
            st.sampled_from([None, None, 0.05, 10.0]),
            st.sampled_from([None, 5]),
        ).map(
            lambda drawn: {"lr": 1e-2, **drawn[0], "max_grad_norm": drawn[1], "t_alpha": drawn[2], "t_beta3": drawn[2]}
        ),
        "accumulate": st.sampled_from([1, 1, 2, 3]),
        "average": st.booleans(),
        "scale": st.sampled_from([None, None, 1024.0, 2.0**127]),
        "scheduler": st.sampled_from([None, "cosine", "one cycle"]),
        "between": st.dictionaries(
            st.integers(0, STEPS - 2), st.lists(st.sampled_from(sorted(BETWEEN)), min_size=1, max_size=2), max_size=3
        ),
    }
)


def expected_of(scenario):
    try:
        return Training(scenario).run("plain")
    except AssertionError as error:
        if "No inf checks were recorded" not in str(error):  # GradScaler's, of an optimizer without gradients
            raise
        reject()


SCENARIO = {
    "seed": 0,
    "layers": ["gated", "shared"],
    "frozen": [],
    "hooks": ["gradient"],
    "others": ("muon",),
    "place": 1,
    "overlap": False,
    "overridden": False,
    "groups": 2,
    "of_first_group": {"weight_decay": 0.0, "lr": 3e-3},
    "options": {"lr": 1e-2, "max_grad_norm": 0.05, "t_alpha": 5, "t_beta3": 5},
    "accumulate": 2,
    "average": True,
    "scale": 1024.0,
    "scheduler": "one cycle",
    "between": {1: ["save", "evaluate"], 3: ["load"], 4: ["other_options", "eager_backward"]},
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@given(scenario=scenarios)
@example(scenario=SCENARIO)
@(effort(8) if SEED else settings(phases=[Phase.explicit], deadline=None))  # each compiles for seconds
def test_compiled(scenario):
    torch._dynamo.reset()
    expected = expected_of(scenario)
    assert_identical(Training(scenario).run("compiled"), expected)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@given(scenario=scenarios)
@effort(15)
def test_captured(scenario):
    expected = expected_of(scenario)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        assert_identical(Training(scenario).run("captured"), expected)

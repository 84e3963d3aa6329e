"""State: what there is, and its way through state_dict, torch.save, pickle and deepcopy."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.helpers.config import DTYPES, assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix32bit
from torch_ademamix.numerics.reference_step import compute_dtype

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99, 0.999), t_alpha=30, t_beta3=30)


def train(model, optimizer, steps):
    """Full-batch training on fixed data; the gradients depend on the parameters alone."""
    x = torch.linspace(-1, 1, 64).view(16, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def make(dtype=torch.float32, cls=AdEMAMix, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    return model, cls(groups, **{**OPTIONS, **options})


def everything(model, optimizer):
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allocate_state", [lambda model, o: train(model, o, 1), lambda model, o: o.init_state()])
def test_names_shapes_and_dtypes(allocate_state, dtype):
    model, optimizer = make(dtype)
    allocate_state(model, optimizer)
    for p in model.parameters():
        state = optimizer.state[p]
        assert state.keys() == {"step", *MOMENTS}
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        for name in MOMENTS:
            assert state[name].shape == p.shape
            assert state[name].stride() == p.stride()
            assert state[name].dtype == compute_dtype(dtype)


def test_init_state():
    """Makes what the first step would make: zeros; and leaves frozen parameters and older state alone."""
    model, optimizer = make()
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(3), requires_grad=False)})
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.init_state()
    assert_identical(optimizer.state_dict(), before)

    fresh_model, fresh = make()
    fresh.init_state()
    assert all((value == 0).all() for state in fresh.state.values() for value in state.values())
    train(fresh_model, fresh, 1)
    assert_identical(fresh_model.state_dict(), model.state_dict())


def through_state_dict(model, optimizer):
    return copy.deepcopy(optimizer.state_dict())


def through_file(model, optimizer):
    path = "state.pt"
    torch.save(optimizer.state_dict(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", [through_state_dict, through_file])
def test_load_state_dict(save, dtype, tmp_path, monkeypatch):
    """Float32 state of 16-bit parameters stays float32, and training goes on as if it had not stopped."""
    monkeypatch.chdir(tmp_path)
    model, optimizer = make(dtype)
    train(model, optimizer, 3)
    new_model, new_optimizer = make(dtype, lr=1.0, weight_decay=0.5)
    new_model.load_state_dict(model.state_dict())
    new_optimizer.load_state_dict(save(model, optimizer))
    assert_identical(everything(new_model, new_optimizer), everything(model, optimizer))
    train(model, optimizer, 3)
    train(new_model, new_optimizer, 3)
    assert_identical(everything(new_model, new_optimizer), everything(model, optimizer))


@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix32bit])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copy_of, cls):
    """A copy of model and optimizer together trains on by itself."""
    model, optimizer = make(cls=cls)
    train(model, optimizer, 3)
    before = copy.deepcopy(everything(model, optimizer))
    new_model, new_optimizer = copy_of((model, optimizer))
    assert type(new_optimizer) is cls
    train(new_model, new_optimizer, 3)
    assert_identical(everything(model, optimizer), before)
    train(model, optimizer, 3)
    assert_identical(everything(new_model, new_optimizer), everything(model, optimizer))


def test_state_of_parameters_without_gradient_is_not_made():
    model, optimizer = make()
    model[0].weight.requires_grad_(False)
    train(model, optimizer, 2)
    assert model[0].weight not in optimizer.state
    assert model[0].bias in optimizer.state


def test_older_pickles_get_new_options():
    model, optimizer = make()
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["maximize"], group["capturable"]
    optimizer.__setstate__(state)
    assert all(group["maximize"] is False for group in optimizer.param_groups)
    train(model, optimizer, 1)


def test_float_and_shaped_steps_load():
    """Checkpoints of other optimizers keep the step as a number, or as a tensor of one element."""
    model, optimizer = make()
    train(model, optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["step"] = 2
    state_dict["state"][1]["step"] = 2.0
    state_dict["state"][2]["step"] = torch.tensor([2])
    optimizer.load_state_dict(state_dict)
    for state in optimizer.state.values():
        assert_identical(state["step"], torch.tensor(2.0))


def test_one_saved_step_of_all_parameters_loads():
    """As a converter may write it; each parameter then counts by itself."""
    model, optimizer = make()
    train(model, optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    step = torch.tensor(2.0)
    for state in state_dict["state"].values():
        state["step"] = step
    optimizer.load_state_dict(state_dict)
    train(model, optimizer, 1)
    assert all(state["step"] == 3 for state in optimizer.state.values())
    assert step == 2


def test_expanded_state_loads():
    """As a converter may write zeros."""
    model, optimizer = make()
    train(model, optimizer, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["exp_avg_slow"] = torch.zeros(1).expand_as(state["exp_avg_slow"])
    optimizer.load_state_dict(state_dict)
    assert all((state["exp_avg_slow"] == 0).all() for state in optimizer.state.values())
    train(model, optimizer, 1)


def test_hooks_of_load_state_dict():
    """A user's hook sees an ordinary state dict, and what it returns is loaded."""
    model, optimizer = make()
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())

    def reset_steps(optimizer, state_dict):
        state = {i: {**s, "step": torch.zeros(())} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    after = []
    optimizer.register_load_state_dict_pre_hook(reset_steps)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: after.append(len(optimizer.state)))
    optimizer.load_state_dict(saved)
    assert after == [4]
    assert all(state["step"] == 0 for state in optimizer.state.values())
    assert all(state["exp_avg"].abs().max() > 0 for state in optimizer.state.values())


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.state.test_state import make, train
torch.set_num_threads(1)
model, optimizer = make(getattr(torch, sys.argv[2]))
checkpoint = torch.load("checkpoint.pt", weights_only=True)
model.load_state_dict(checkpoint["model"])
optimizer.load_state_dict(checkpoint["optimizer"])
train(model, optimizer, 20)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "resumed.pt")
"""


@pytest.mark.first_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_in_a_new_process(dtype, tmp_path, request):
    model, optimizer = make(getattr(torch, dtype))
    train(model, optimizer, 20)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, optimizer, 20)
    arguments = [sys.executable, "-c", RESUME, request.config.rootpath, dtype]
    subprocess.run(arguments, cwd=tmp_path, check=True)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert_identical((resumed["model"], resumed["optimizer"]), everything(model, optimizer))


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


@pytest.mark.parametrize("options", [{}, dict(optim_bits=8, min_8bit_size=0)], ids=["32-bit", "8-bit"])
def test_state_of_others(options, tmp_path):
    """It is saved and loaded as torch does, and a resumed run repeats the unbroken one."""
    (model, optimizer), (other, resumed) = make(**options), make(**options)
    wrapper = Lookahead(optimizer)
    x = torch.ones(2, 4)
    for _ in range(3):
        model(x).square().mean().backward()
        wrapper.step()
    torch.save(everything(model, optimizer), tmp_path / "checkpoint.pt")
    weights, state_dict = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state_dict)
    assert all("lookahead_slow_buff" in state for state in resumed.state.values())
    again = Lookahead(resumed)
    again.steps = wrapper.steps
    for model_, wrapper_ in ((model, wrapper), (other, again)):
        model_.zero_grad()
        model_(x).square().mean().backward()
        wrapper_.step()
    assert_identical(everything(other, resumed), everything(model, optimizer))


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

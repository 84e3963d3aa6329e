"""What a forward pass leaves on modules: tensors with a history, counters. docs/compile.md has the rest."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune, spectral_norm, weight_norm

from tests.helpers.config import assert_identical
from tests.helpers.loops import batch, plain
from torch_ademamix import AdEMAMix, compile_train_step


class Experts(nn.Module):
    """A mixture that leaves its auxiliary losses: one by itself, more in a list and a dict."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        self.aux_loss, self.losses, self.more, self.calls = None, [], {}, 0

    def forward(self, x):
        gates = F.softmax(self.gate(x), -1)
        self.calls += 1
        self.aux_loss = gates.mean(0).square().sum()
        self.losses = [self.aux_loss * 2]
        self.losses.append(self.gate(x).logsumexp(-1).square().mean())
        self.more = {"entropy": -(gates * gates.log()).sum(-1).mean()}
        return sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def with_auxiliary_losses(model, x, y):
    loss = (model(x) - y).square().mean()
    for module in model.modules():
        if isinstance(module, Experts):
            loss = loss + 0.1 * (module.aux_loss + sum(module.losses) - module.more["entropy"])
    return loss


def experts():
    return nn.Sequential(nn.Linear(8, 8), Experts())


def pruned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def hooked(norm):
    return nn.Sequential(norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.each_value
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "build",
    [experts, pruned, lambda: hooked(weight_norm), lambda: hooked(spectral_norm)],
    ids=["experts", "prune", "weight_norm", "spectral_norm"],
)
def test_equals_the_plain_loop(build, accumulate):
    """For more steps than Dynamo recompiles, with one graph, or two where a number was first taken for a constant."""
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for of in (plain, compile_train_step):
        torch.manual_seed(0)
        model = build()
        optimizer = AdEMAMix(model.parameters(), lr=1e-2)
        more = {} if of is plain else {"backend": counter}
        step = of(model, optimizer, with_auxiliary_losses, accumulate=accumulate, **more)
        losses = [step(*batch(i)) for i in range(12)]
        left = [(m.aux_loss.detach(), m.losses, m.more, m.calls) for m in model.modules() if isinstance(m, Experts)]
        results.append(
            copy.deepcopy(
                (losses, model.state_dict(), torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, left))
            )
        )
    assert_identical(results[1], results[0])
    assert counter.frame_count <= 2


def test_left_tensors_are_detached():
    model = experts()
    step = compile_train_step(model, AdEMAMix(model.parameters()), with_auxiliary_losses, backend="aot_eager")
    step(*batch(0))
    assert not model[1].aux_loss.requires_grad
    assert model[1].aux_loss.item() > 0
    with_auxiliary_losses(model, *batch(1)).backward()  # an eager pass between steps
    step(*batch(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 1)

    def forward(self, x):
        return self.rnn(x[None])[0][0]


class Growing(nn.Linear):
    def __init__(self):
        super().__init__(8, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(len(self.seen))
        return super().forward(x)


class Elsewhere(nn.Linear):
    """Leaves a loss where the step doesn't look for one."""

    def __init__(self):
        super().__init__(8, 1)
        self.losses = []

    def forward(self, x):
        y = super().forward(x)
        self.losses.append(y.mean())
        return y


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (Recurrent, Unsupported, "Dynamo does not support RNN, GRU, or LSTM"),
        (lambda: nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1, momentum=None)), UserError, "data-dependent"),
        (Growing, FailOnRecompileLimitHit, "fullgraph=True"),
        (Elsewhere, Unsupported, "consumed returned tensor's grad_fn"),
    ],
)
def test_what_torch_rejects(build, error, message):
    """docs/compile.md has the ways out."""
    model = build()
    step = compile_train_step(model, AdEMAMix(model.parameters()), with_auxiliary_losses, backend="eager")

    def train():
        for i in range(10):
            step(*batch(i))

    with pytest.raises(error, match=message):
        train()

"""Complex parameters in compiled and captured steps: as in the plain loop, bit for bit."""

import copy
from typing import Any

import pytest
import torch

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from tests.helpers.loops import plain
from tests.helpers.spectral import Spectral, inputs, loss_fn
from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step


def trained(make_step: Any) -> Any:
    model = Spectral()
    optimizer = AdEMAMix(model.parameters(), lr=torch.tensor(0.05), max_grad_norm=0.1)
    step = make_step(model, optimizer)
    losses = [step(inputs(i)) for i in range(4)]
    return copy.deepcopy((losses, list(model.parameters()), optimizer.state_dict()["state"]))


def compiled_step_alone(model: Any, optimizer: AdEMAMix) -> Any:
    optimizer.init_state()
    update = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")

    def step(x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(x)
        loss.backward()
        update()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.parametrize("how", ["step", "full step", "captured"])
def test_equals_the_plain_loop(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "captured":
        stand_in(monkeypatch)
    make_step = {
        "step": compiled_step_alone,
        "full step": lambda *made: compile_train_step(*made, loss_fn, backend="aot_eager"),
        "captured": lambda *made: capture_train_step(*made, loss_fn, [inputs(0)]),
    }[how]
    assert_identical(trained(make_step), trained(lambda *made: plain(*made, loss_fn)))

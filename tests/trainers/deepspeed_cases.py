"""DeepSpeed in one process: in each case trains, saves, and goes on from there twice; its argument is a folder.

A program of its own, since DeepSpeed changes the process that it runs in.
"""

import sys
from pathlib import Path

import deepspeed
import torch

from torch_ademamix import AdEMAMix

STEPS = 6
CASES = [  # the stage of ZeRO, the weights' dtype, the bits of the state
    *((stage, dtype, 32) for dtype in ("fp32", "bf16") for stage in (0, 1, 2, 3)),
    *((stage, "bf16", 8) for stage in (1, 2, 3)),
]


def make(stage, dtype, bits):
    model = make_model()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = make_optimizer(model, bits)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))


def make_optimizer(model, bits=32):
    return AdEMAMix(model.parameters(), lr=1e-3, t_alpha=STEPS, t_beta3=STEPS, optim_bits=bits)


def inputs():
    return torch.linspace(-1, 1, 8 * 64).view(8, 64)


def train_plainly():
    model = make_model()
    optimizer = make_optimizer(model)
    losses = []
    for _ in range(STEPS):
        loss = model(inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(engine, dtype, steps):
    x = inputs().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    losses = []
    for _ in range(steps):
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_and_resume(folder, stage, dtype, bits):
    engine, optimizer = make(stage, dtype, bits)
    first = train(engine, dtype, STEPS // 2)
    engine.save_checkpoint(folder, tag="half")
    expected = train(engine, dtype, STEPS // 2)
    states = list(optimizer.state.values())
    # Without ZeRO, DeepSpeed makes the state of bfloat16 weights by a step with gradients of 0.
    assert {state["step"].item() for state in states} == {STEPS + (stage == 0 and dtype == "bf16")}
    assert any("exp_avg_absmax" in state for state in states) == (bits == 8)
    if dtype == "fp32":
        assert [*first, *expected] == train_plainly()
    resumed, _ = make(stage, dtype, bits)
    resumed.load_checkpoint(folder, tag="half")
    assert train(resumed, dtype, STEPS // 2) == expected


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for case in CASES:
        print(*case, file=sys.stderr)
        train_and_resume(str(Path(sys.argv[1]) / "-".join(map(str, case))), *case)

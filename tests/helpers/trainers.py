"""What the tests of trainers share: a small problem, and the plain loop that they have to agree with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.optimizer import MIN_8BIT_SIZE

CLASSES = [AdEMAMix, AdEMAMix8bit]
WIDTH = 64  # of a matrix that is just large enough for quantized state
assert WIDTH**2 >= MIN_8BIT_SIZE

UPDATES = 4
ACCUMULATED = 2  # batches per update
BATCH_SIZE = 4
MAX_NORM = 0.1  # below every gradient's norm
SCALER = {"init_scale": 2.0**10}  # of the loss in float16; a power of two, so that unscaling is exact
OPTIONS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99, 0.999), t_alpha=UPDATES, t_beta3=UPDATES, weight_decay=0.1)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def linear(update: int) -> float:
    return (UPDATES - update) / UPDATES


def make_scheduler(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, linear)


def make_samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    count = UPDATES * ACCUMULATED * BATCH_SIZE
    xs, ys = torch.randn(count, WIDTH, generator=generator), torch.randn(count, 1, generator=generator)
    return [{"x": x, "y": y} for x, y in zip(xs, ys, strict=True)]


def make_batches() -> list[dict[str, Tensor]]:
    """The samples in order, in batches as a DataLoader makes them."""
    return list(DataLoader(make_samples(), batch_size=BATCH_SIZE))  # type: ignore[arg-type]


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse_loss(model(x), y)


def plain_loop(
    cls: type[AdEMAMix],
    decay_biases: bool = True,
    max_norm: float = MAX_NORM,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """What training without a trainer makes: accumulated and clipped gradients, a learning rate per update."""
    model = make_model()
    matrices, biases = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices}, {"params": biases, "weight_decay": 0.0}]
    optimizer = cls(model.parameters() if decay_biases else groups, **OPTIONS)
    scheduler = make_scheduler(optimizer)
    scaler = torch.amp.GradScaler("cpu", **SCALER, enabled=autocast == torch.float16)
    for i, batch in enumerate(make_batches(), 1):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_fn(model, **batch)
        scaler.scale(loss / ACCUMULATED).backward()
        if i % ACCUMULATED == 0:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            assert norm > MAX_NORM
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
    assert is_quantized(optimizer.state_dict()) == (cls is AdEMAMix8bit)
    return model


def is_quantized(state_dict: dict[str, Any]) -> bool:
    return any("exp_avg_absmax" in state for state in state_dict["state"].values())


@contextmanager
def counted_updates() -> Iterator[list[int]]:
    """In the list, one entry per step of any optimizer."""
    updates: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: updates.append(len(updates)))
    try:
        yield updates
    finally:
        handle.remove()

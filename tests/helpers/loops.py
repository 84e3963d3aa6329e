"""The plain loop, which whole steps are compared with, and what it trains on."""

import torch

ROWS = 12
OPTIONS = {
    "32-bit": {},
    "8-bit": {"optim_bits": 8, "min_8bit_size": 16},
    "clipped": {"max_grad_norm": 0.05},
    "8-bit, clipped": {"optim_bits": 8, "min_8bit_size": 16, "max_grad_norm": 0.05},
}


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 1, generator=generator)


def loss_fn(model, x, y):
    return (model(x) - y).square().mean()


def plain(model, optimizer, loss_fn, accumulate=1, average=True, scaler=None):
    def step(*args, **kwargs):
        optimizer.zero_grad()
        total = 0
        for part in zip(*(arg.tensor_split(accumulate) for arg in args), strict=True):
            loss = loss_fn(model, *part, **kwargs)
            loss = loss / accumulate if average and accumulate > 1 else loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            total = total + loss.detach()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        optimizer.zero_grad()
        return total

    return step

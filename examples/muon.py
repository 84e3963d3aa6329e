"""Muon for the matrices, AdEMAMix for the rest: one full training step, eager, compiled or captured.

    python examples/muon.py --mode compiled

`--mode captured` needs a GPU.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step, recommended

VOCABULARY, WIDTH, CONTEXT = 64, 32, 16


def make_model() -> nn.Module:
    hidden = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(2))
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *hidden, nn.Linear(WIDTH, VOCABULARY))


def make_optimizers(model: nn.Module, steps: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of hidden layers; AdEMAMix for embedding, head, biases and norms."""
    matrices = [p for layer in list(model)[1:-1] for p in layer.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return [torch.optim.Muon(matrices, lr=0.02), AdEMAMix(rest, lr=1e-2, **recommended(steps))]


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def batch(i: int, device: str) -> Tensor:
    """Rows that count upwards."""
    first = torch.randint(VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(i))
    return ((first + torch.arange(CONTEXT + 1)) % VOCABULARY).to(device)


def eager(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Callable[[Tensor], Tensor]:
    def step(tokens: Tensor) -> Tensor:
        loss = loss_fn(model, tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def train(mode: str, steps: int, device: str, **compile_options: Any) -> tuple[list[float], nn.Module]:
    """The losses, and the trained model."""
    torch.manual_seed(0)
    model = make_model().to(device)
    optimizers = make_optimizers(model, steps)
    if mode == "compiled":
        step = compile_train_step(model, optimizers, loss_fn, **compile_options)
    elif mode == "captured":
        step = capture_train_step(model, optimizers, loss_fn, (batch(0, device),))
    else:
        step = eager(model, optimizers)
    schedulers = [CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    losses = []
    for i in range(steps):
        losses.append(step(batch(i, device)))
        for scheduler in schedulers:
            scheduler.step()
    return torch.stack(losses).tolist(), model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["eager", "compiled", "captured"], default="compiled")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    losses, _ = train(args.mode, args.steps, args.device)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()

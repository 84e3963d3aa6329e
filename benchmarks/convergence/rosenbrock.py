"""The toy of the AdEMAMix paper (arXiv 2409.03137): how fast, and how wildly, a curved valley is walked along.

The Rosenbrock function has a narrow valley with its minimum at (1, 1). At a small learning rate Adam with β1 = 0.9 is
slow in it, and a larger β1 overshoots; AdEMAMix has a fast and a slow average at once. What each does at the learning
rate at which it arrives first is measured too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from torch_ademamix import AdEMAMix

START, MINIMUM = (-3.0, 5.0), (1.0, 1.0)
SHARED_LR = 1e-3
LEARNING_RATES = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-16, 1))  # 1e-4 to 1
NEAR = 0.1  # a walk has arrived when it stays within this distance of the minimum
Optimizer = Callable[[list[Tensor], float], torch.optim.Optimizer]


def adam(beta1: float) -> Optimizer:
    return lambda params, lr: torch.optim.Adam(params, lr=lr, betas=(beta1, 0.999), fused=True)


def ademamix(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return AdEMAMix(params, lr=lr, betas=(0.9, 0.999, 0.9999), alpha=9.0, weight_decay=0.0)


OPTIMIZERS: dict[str, Optimizer] = {
    "Adam, β1 = 0.9": adam(0.9),
    "Adam, β1 = 0.99": adam(0.99),
    "Adam, β1 = 0.999": adam(0.999),
    "AdEMAMix, β3 = 0.9999, α = 9": ademamix,
}


@dataclass(frozen=True)
class Walk:
    lr: float
    distances: list[float]  # to the minimum, at the start and after each step
    length: float  # of the path

    @property
    def arrival(self) -> int | None:
        """The step from which on it stays near the minimum; None if it doesn't."""
        away = max(step for step, distance in enumerate([NEAR, *self.distances]) if not distance < NEAR)
        return None if away == len(self.distances) else away


def gradient(x: float, y: float) -> tuple[float, float]:
    """Of (1 - x)² + 100 (y - x²)²."""
    return -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)


def walk(make: Optimizer, lr: float, steps: int) -> Walk:
    p = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = make([p], lr)
    places = [START]
    for _ in range(steps):
        p.grad.copy_(torch.tensor(gradient(*places[-1]), dtype=torch.float64))
        optimizer.step()
        places.append(tuple(p.tolist()))
    length = sum(map(math.dist, places, places[1:]))
    return Walk(lr, [math.dist(place, MINIMUM) for place in places], length)


def measure(steps: int) -> Mapping[str, list[Walk]]:
    """Each optimizer's walks, by learning rate."""
    walks: dict[str, list[Walk]] = {name: [] for name in OPTIMIZERS}
    with tqdm(total=len(OPTIMIZERS) * len(LEARNING_RATES), desc="Rosenbrock", leave=False, disable=None) as bar:
        for name, make in OPTIMIZERS.items():
            for lr in LEARNING_RATES:
                walks[name].append(walk(make, lr, steps))
                bar.update()
    return walks


def first_to_arrive(walks: list[Walk]) -> Walk | None:
    arrived = [walk for walk in walks if walk.arrival is not None]
    return min(arrived, key=lambda walk: walk.arrival or 0, default=None)


def at_shared_lr(walks: list[Walk]) -> Walk:
    return next(walk for walk in walks if walk.lr == SHARED_LR)


def summary(walks: Mapping[str, list[Walk]]) -> dict[str, dict[str, float | None]]:
    """By optimizer: its walk at the shared learning rate, and the one that arrives first."""
    found = {}
    for name, of_one in walks.items():
        shared, first = at_shared_lr(of_one), first_to_arrive(of_one)
        found[name] = {
            "distance": shared.distances[-1],
            "length": shared.length,
            "arrival": shared.arrival,
            "best lr": None if first is None else first.lr,
            "best arrival": None if first is None else first.arrival,
            "best length": None if first is None else first.length,
        }
    return found

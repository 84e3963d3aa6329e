"""How far bfloat16 weights get from float32 ones in a long run of tiny updates: `python -m benchmarks.weights`.

At a learning rate of 1e-5 nearly every update is below half an ulp of a bfloat16. All runs have the same gradients,
noise around a mean, and start at the same bfloat16 values. `--write` puts the table in docs/precision.md.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from benchmarks.shared.writing import DOCS, markdown_table, write_table
from torch_ademamix import AdEMAMix, AdEMAMix8bit

STEPS = 5_000
COORDINATES = 16_384
LR = 1e-5
MEAN = 0.3  # of the gradients, over the standard deviation of the noise

OPTIMIZERS = (AdEMAMix, AdEMAMix8bit)
SCHEMES: dict[str, dict[str, Any]] = {
    'master_weights="remainder"': {"master_weights": "remainder"},
    'master_weights="remainder8"': {"master_weights": "remainder8"},
    'param_rounding="stochastic"': {"param_rounding": "stochastic"},
    "rounded to nearest": {},
}

DOCUMENT = DOCS / "precision.md"


@dataclass(frozen=True)
class Drift:
    """Distances from float32 weights, over the weights' displacement."""

    error: float  # root mean squares
    mean: float  # of the error over that of the displacement: what updates that are lost add up to; signed


def measure(
    optimizer_class: type[AdEMAMix], steps: int = STEPS, coordinates: int = COORDINATES, seed: int = 0
) -> Mapping[str, Drift]:
    """Runs all schemes over the same gradients, with weights that are normally distributed at first."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(coordinates, generator=generator).bfloat16()

    def make(dtype: torch.dtype, **options: Any) -> tuple[Tensor, AdEMAMix]:
        p = start.to(dtype, copy=True).requires_grad_()
        return p, optimizer_class([p], lr=LR, **options)

    exact, exact_optimizer = make(torch.float32)
    runs = {name: make(torch.bfloat16, **options) for name, options in SCHEMES.items()}
    for _ in trange(steps, desc="weights", leave=False, disable=None):
        grad = (MEAN + torch.randn(coordinates, generator=generator)).bfloat16()
        for p, optimizer in ((exact, exact_optimizer), *runs.values()):
            p.grad = grad.to(p.dtype)
            optimizer.step()

    moved = exact.detach().double() - start.double()
    drifts = {}
    for name, (p, optimizer) in runs.items():
        error = optimizer.master_weight(p).double() - exact.detach().double()
        drifts[name] = Drift((error.norm() / moved.norm()).item(), (error.mean() / moved.mean()).item())
    return drifts


def table(drifts: Mapping[str, Mapping[str, Drift]]) -> str:
    """In Markdown; `drifts` by optimizer."""

    def percent(value: float, sign: str = "") -> str:
        return "0" if value == 0 else "< 0.001%" if abs(value) < 5e-6 else f"{value:{sign}.3%}"

    heads = ["bfloat16 weights"]
    heads += [f"{name}: {what}" for name in drifts for what in ("error", "mean")]
    rows = []
    for scheme in SCHEMES:
        each = [of[scheme] for of in drifts.values()]
        rows.append([f"`{scheme}`" if SCHEMES[scheme] else scheme])
        rows[-1] += [cell for drift in each for cell in (percent(drift.error), percent(drift.mean, "+"))]
    return markdown_table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--write", action="store_true", help=f"put the table in docs/{DOCUMENT.name}")
    args = parser.parse_args(arguments)
    text = table({cls.__name__: measure(cls, args.steps) for cls in OPTIMIZERS})
    print(text)
    if args.write:
        write_table(DOCUMENT, "weights", text)


if __name__ == "__main__":
    main()

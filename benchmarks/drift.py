"""How far quantized state drifts from the truth over a long run: `make drift` (`python -m benchmarks.drift`).

Gradients are noise around a small mean, which differs from coordinate to coordinate and which a slow average is there
to find. All optimizers see the same ones, and what they hold at the end is compared to a run in float64. `--write` puts
the table in docs/drift.md.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from benchmarks.shared.writing import DOCS, markdown_table, write_table
from torch_ademamix import AdEMAMix

STEPS = 20_000
COORDINATES = 16_384
MEAN = 0.1  # what coordinates' means are normally distributed by, over the standard deviation of the noise
BETA3 = 0.9999

FLOAT32 = "32-bit"
SCHEMES: dict[str, dict[str, Any]] = {
    FLOAT32: {},
    "8-bit": {"optim_bits": 8},
    "8-bit, slow_ema_bits=8": {"optim_bits": 8, "slow_ema_bits": 8},
    "8-bit, stochastic_rounding=False": {"optim_bits": 8, "stochastic_rounding": False},
    # As bitsandbytes has it, in other formats: every moment in 8 bits and rounded to nearest.
    "8-bit, slow_ema_bits=8, stochastic_rounding=False": {
        "optim_bits": 8,
        "slow_ema_bits": 8,
        "stochastic_rounding": False,
    },
}
TO_NEAREST = list(SCHEMES)[-1]

DOCUMENT = DOCS / "drift.md"


@dataclass(frozen=True)
class Drift:
    """Relative errors, of a vector's L2 norm but for the mean's."""

    exp_avg: float
    exp_avg_slow: float
    exp_avg_sq: float
    exp_avg_sq_mean: float  # of the mean of exp_avg_sq over all coordinates; signed
    displacement: float  # of what the parameters moved by, against the 32-bit optimizer's


def moments(optimizer: AdEMAMix, p: Tensor) -> list[Tensor]:
    """exp_avg, exp_avg_slow and exp_avg_sq in float64, by loading them into a 32-bit optimizer."""
    copy = AdEMAMix([torch.zeros_like(p)], optim_bits=32)
    copy.load_state_dict(optimizer.state_dict())
    (state,) = copy.state.values()
    return [state[name].double() for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq")]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def measure(
    steps: int = STEPS, coordinates: int = COORDINATES, seed: int = 0, beta3: float = BETA3
) -> Mapping[str, Drift]:
    """Runs all schemes over the same gradients; the parameters start at 0 and don't decay."""
    generator = torch.Generator().manual_seed(seed)

    def make(dtype: torch.dtype, **options: Any) -> tuple[Tensor, AdEMAMix]:
        p = torch.zeros(coordinates, dtype=dtype, requires_grad=True)
        return p, AdEMAMix([p], betas=(0.9, 0.999, beta3), weight_decay=0.0, **options)

    exact_p, exact = make(torch.float64)
    runs = {name: make(torch.float32, **options) for name, options in SCHEMES.items()}
    mean = MEAN * torch.randn(coordinates, generator=generator)
    for _ in trange(steps, desc="drift", leave=False, disable=None):
        grad = mean + torch.randn(coordinates, generator=generator)
        exact_p.grad = grad.double()
        exact.step()
        for p, optimizer in runs.values():
            p.grad = grad
            optimizer.step()

    true_m1, true_m2, true_nu = moments(exact, exact_p)
    moved = runs[FLOAT32][0].detach()
    drifts = {}
    for name, (p, optimizer) in runs.items():
        m1, m2, nu = moments(optimizer, p)
        drifts[name] = Drift(
            exp_avg=relative_error(m1, true_m1),
            exp_avg_slow=relative_error(m2, true_m2),
            exp_avg_sq=relative_error(nu, true_nu),
            exp_avg_sq_mean=(nu.mean() / true_nu.mean() - 1).item(),
            displacement=relative_error(p.detach(), moved),
        )
    return drifts


def table(drifts: Mapping[str, Drift]) -> str:
    """In Markdown."""

    def percent(value: float, sign: str = "") -> str:
        return "< 0.01%" if abs(value) < 5e-5 else f"{value:{sign}.2%}"

    heads = ["state", "exp_avg", "exp_avg_slow", "exp_avg_sq", "mean of exp_avg_sq", "displacement"]
    rows = []
    for scheme, drift in drifts.items():
        cells = {name: percent(value) for name, value in asdict(drift).items()}
        cells["exp_avg_sq_mean"] = percent(drift.exp_avg_sq_mean, "+")
        if scheme == FLOAT32:
            cells["displacement"] = "-"
        rows.append([scheme, *cells.values()])
    return markdown_table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--beta3", type=float, default=BETA3)
    parser.add_argument("--write", action="store_true", help=f"put the table in docs/{DOCUMENT.name}")
    args = parser.parse_args(arguments)
    text = table(measure(args.steps, beta3=args.beta3))
    print(text)
    if args.write:
        write_table(DOCUMENT, text)


if __name__ == "__main__":
    main()

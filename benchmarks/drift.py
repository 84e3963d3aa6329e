"""How far quantized state drifts from the truth over a long run: `make drift` (`python -m benchmarks.drift`).

Gradients are noise around a small mean, which differs from coordinate to coordinate and which a slow average is there
to find. All optimizers see the same ones, and what they hold at the end is compared to a run in float64. `--write` puts
the table in docs/choosing.md.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from benchmarks.shared.writing import DOCS, markdown_table, write_table
from torch_ademamix import ADANA, AdEMAMix

STEPS = 20_000
COORDINATES = 16_384
MEAN = 0.1  # what coordinates' means are normally distributed by, over the standard deviation of the noise
BETA3 = 0.9999

# How state is stored.
FLOAT32 = "32-bit"
TWELVE_BITS = "8-bit, slow_ema_bits=12"
TO_NEAREST = "8-bit, slow_ema_bits=8, stochastic_rounding=False"  # as bitsandbytes has it, in other formats
STATES: dict[str, dict[str, Any]] = {
    FLOAT32: {},
    "8-bit": {"optim_bits": 8},
    TWELVE_BITS: {"optim_bits": 8, "slow_ema_bits": 12},
    "8-bit, slow_ema_bits=8": {"optim_bits": 8, "slow_ema_bits": 8},
    "8-bit, stochastic_rounding=False": {"optim_bits": 8, "stochastic_rounding": False},
    TO_NEAREST: {"optim_bits": 8, "slow_ema_bits": 8, "stochastic_rounding": False},
}

# What is stored: AdEMAMix's EMAs, or without the fast one, also in logarithmic time.
FORMULAS: dict[str, Callable[..., AdEMAMix]] = {
    "{}": lambda params, beta3, **options: AdEMAMix(params, betas=(0.9, 0.999, beta3), **options),
    "{}, beta1=0": lambda params, beta3, **options: AdEMAMix(params, betas=(0.0, 0.999, beta3), **options),
    "ADANA, {}": lambda params, beta3, **options: ADANA(params, **options),
}
SCHEMES = {
    formula.format(state): (formula, state)
    for formula in FORMULAS
    for state in (STATES if formula == "{}" else (FLOAT32, "8-bit", TWELVE_BITS))
}

DOCUMENT = DOCS / "choosing.md"


@dataclass(frozen=True)
class Drift:
    """Relative errors, of a vector's L2 norm but for the mean's."""

    exp_avg: float | None  # which isn't kept at a β1 of 0
    exp_avg_slow: float
    exp_avg_sq: float
    exp_avg_sq_mean: float  # of the mean of exp_avg_sq over all coordinates; signed
    displacement: float  # of what the parameters moved by, against the same optimizer's with 32-bit state


def moments(optimizer: AdEMAMix, p: Tensor) -> list[Tensor]:
    """exp_avg_slow, exp_avg_sq and, if it is kept, exp_avg in float64."""
    names = ("exp_avg_slow", "exp_avg_sq", "exp_avg")
    return [optimizer.ema(p, name).double() for name in names[: 2 + (optimizer.param_groups[0]["betas"][0] > 0)]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def measure(
    steps: int = STEPS, coordinates: int = COORDINATES, seed: int = 0, beta3: float = BETA3
) -> Mapping[str, Drift]:
    """Runs all schemes over the same gradients; the parameters start at 0 and don't decay."""
    generator = torch.Generator().manual_seed(seed)

    def make(dtype: torch.dtype, formula: str, state: str) -> tuple[Tensor, AdEMAMix]:
        p = torch.zeros(coordinates, dtype=dtype, requires_grad=True)
        return p, FORMULAS[formula]([p], beta3=beta3, weight_decay=0.0, **STATES[state])

    exact = {formula: make(torch.float64, formula, FLOAT32) for formula in FORMULAS}
    runs = {scheme: make(torch.float32, *scheme) for scheme in SCHEMES.values()}
    mean = MEAN * torch.randn(coordinates, generator=generator)
    for _ in trange(steps, desc="drift", leave=False, disable=None):
        grad = mean + torch.randn(coordinates, generator=generator)
        for p, optimizer in (*exact.values(), *runs.values()):
            p.grad = grad.to(p.dtype)
            optimizer.step()

    drifts = {}
    for name, (formula, state) in SCHEMES.items():
        (exact_p, exact_optimizer), (p, optimizer) = exact[formula], runs[formula, state]
        true_m2, true_nu, *true_m1 = moments(exact_optimizer, exact_p)
        m2, nu, *m1 = moments(optimizer, p)
        drifts[name] = Drift(
            exp_avg=relative_error(*m1, *true_m1) if m1 else None,
            exp_avg_slow=relative_error(m2, true_m2),
            exp_avg_sq=relative_error(nu, true_nu),
            exp_avg_sq_mean=(nu.mean() / true_nu.mean() - 1).item(),
            displacement=relative_error(p.detach(), runs[formula, FLOAT32][0].detach()),
        )
    return drifts


def table(drifts: Mapping[str, Drift]) -> str:
    """In Markdown."""

    def percent(value: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        return "< 0.01%" if abs(value) < 5e-5 else f"{value:{sign}.2%}"

    heads = ["state", "exp_avg", "exp_avg_slow", "exp_avg_sq", "mean of exp_avg_sq", "displacement"]
    rows = []
    for scheme, drift in drifts.items():
        cells = {name: percent(value) for name, value in asdict(drift).items()}
        cells["exp_avg_sq_mean"] = percent(drift.exp_avg_sq_mean, "+")
        if SCHEMES[scheme][1] == FLOAT32:
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
        write_table(DOCUMENT, "drift", text)


if __name__ == "__main__":
    main()

"""What `benchmarks.convergence` searches and compares: the optimizers, one run's configuration, and the plan of all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.drift import FLOAT32, STATES, TWELVE_BITS

ADAMW = "AdamW"
NO_MOMENTUM = f"{FLOAT32}, beta1=0"
ADANA = "ADANA"
ADANA_12 = f"{ADANA}, {TWELVE_BITS}"
PERTURBED = f"{FLOAT32}, perturbed"  # initial weights multiplied by 1 + 1e-6 * noise: how much of an end is chance
PERTURBATION = 1e-6


@dataclass(frozen=True)
class Scheme:
    """An optimizer of the tables."""

    base: str | None = None  # whose settings it has, and whose losses its own are compared with; None: a search's
    options: Mapping[str, Any] = field(default_factory=dict)  # besides the learning rate, β3 and α
    best_only: bool = False  # compared at the base's best setting only, where it has several
    varied: bool = False  # one run, with the search's seed: other options of the base


# By the names of tables and files, in the tables' order.
SCHEMES = {
    ADAMW: Scheme(),
    ADANA: Scheme(),
    ADANA_12: Scheme(ADANA, STATES[TWELVE_BITS]),
    "ADANA, delta=4": Scheme(ADANA, {"delta": 4.0}, varied=True),
    "ADANA, delta=16": Scheme(ADANA, {"delta": 16.0}, varied=True),
    "ADANA, kappa=0.75": Scheme(ADANA, {"kappa": 0.75}, varied=True),
    "ADANA, kappa=1": Scheme(ADANA, {"kappa": 1.0}, varied=True),
    # AdEMAMix, at each β3:
    FLOAT32: Scheme(),
    **{name: Scheme(FLOAT32, STATES[name]) for name in ("8-bit", TWELVE_BITS, "8-bit, slow_ema_bits=8")},
    PERTURBED: Scheme(FLOAT32, best_only=True),
    # AdEMAMix with β1 = 0, at the best β3 and α:
    NO_MOMENTUM: Scheme(),
    f"{TWELVE_BITS}, beta1=0": Scheme(NO_MOMENTUM, STATES[TWELVE_BITS]),
}
LONG = (ADAMW, FLOAT32, ADANA, ADANA_12)  # of the long runs


def base_of(scheme: str) -> str:
    return SCHEMES[scheme].base or scheme


@dataclass(frozen=True)
class Config:
    """One run; only AdEMAMix has a β3 and an α."""

    optimizer: str  # a scheme's name
    lr: float
    beta3: float | None
    alpha: float | None
    seed: int
    steps: int

    @property
    def filename(self) -> str:
        name = self.optimizer.replace(", ", "_").replace("=", "-").replace(" ", "-")
        mixture = "" if self.beta3 is None else f"_beta3-{self.beta3:g}_alpha-{self.alpha:g}"
        return f"{name}_lr-{self.lr:g}{mixture}_seed-{self.seed}_steps-{self.steps}.json"


@dataclass(frozen=True)
class Plan:
    """What is searched, and how long."""

    steps: int = 6000
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 16e-3)  # the first line of each optimizer; later ones start at its best
    beta3s: tuple[float, ...] = (0.999, 0.9999)
    alphas: tuple[float, ...] = (2.0, 5.0, 8.0)
    search_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)  # none that the settings were chosen by
    long_steps: int = 24_000
    long_seeds: tuple[int, ...] = (1, 2)  # learning rates are chosen by the first
    extend: bool = True  # lines of learning rates, until the best isn't at the edge; and refine the best
    evaluations: int = 24  # points of a curve
    evaluation_windows: int = 256  # per point, spread evenly over the held-out files
    final_windows: int = 4096
    rosenbrock_steps: int = 10_000


SHORT = Plan(
    steps=24,
    lrs=(2e-3, 4e-3),
    beta3s=(0.999,),
    alphas=(2.0,),
    seeds=(1,),
    long_steps=48,
    long_seeds=(1,),
    extend=False,
    evaluations=3,
    evaluation_windows=32,
    final_windows=32,
    rosenbrock_steps=100,
)

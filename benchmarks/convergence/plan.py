"""What `benchmarks.convergence` searches and compares: one run's configuration, and the plan of all."""

from dataclasses import dataclass

from benchmarks import drift

ADAMW = "AdamW"
COMPARED = (drift.FLOAT32, "8-bit", "8-bit, slow_ema_bits=8")
SMALLER = ("32-bit, beta1=0", "8-bit, slow_ema_bits=12", "8-bit, slow_ema_bits=12, beta1=0")  # by `--smaller`
ADEMAMIX = {name: drift.SCHEMES[name] for name in (*COMPARED, *SMALLER)}
PERTURBED = "32-bit, perturbed"  # initial weights multiplied by 1 + 1e-6 * noise: how much of a run's end is chance
PERTURBATION = 1e-6


@dataclass(frozen=True)
class Config:
    """One run; β3 and α are AdEMAMix's."""

    optimizer: str
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
    extend: bool = True  # lines of learning rates, until the best isn't at the edge; and refine the best
    evaluation_windows: int = 256  # per point of a curve, spread evenly over the held-out files
    final_windows: int = 4096
    rosenbrock_steps: int = 10_000


SHORT = Plan(
    steps=24,
    lrs=(2e-3, 4e-3),
    beta3s=(0.999,),
    alphas=(2.0,),
    seeds=(1,),
    extend=False,
    evaluation_windows=32,
    final_windows=32,
    rosenbrock_steps=100,
)

"""The runs of `benchmarks.convergence`, kept in files, and the search among them."""

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.convergence.plan import ADAMW, FLOAT32, LONG, NO_MOMENTUM, SCHEMES, Config, Plan, base_of
from benchmarks.convergence.training import Trainer
from benchmarks.shared import writing


class Runs:
    """The runs in a folder, made where they are missing."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.trainer: Trainer | None = None
        files = sorted(folder.glob("*.json"))
        self.records = {file.name: json.loads(file.read_text()) for file in files}

    def record(self, config: Config) -> dict[str, Any]:
        file = self.folder / config.filename
        if config.filename not in self.records and file.exists():  # another process' since
            self.records[config.filename] = json.loads(file.read_text())
        if config.filename not in self.records:
            self.records[config.filename] = self._train(config)
            writing.write(file, json.dumps(self.records[config.filename], indent=1) + "\n")
        return self.records[config.filename]

    def _train(self, config: Config) -> dict[str, Any]:
        self.trainer = self.trainer or Trainer(self.plan)
        for name, record in self.records.items():
            if record["text"] != self.trainer.text:
                raise SystemExit(
                    f"{self.folder / name} was trained on another text, Python {record['versions']['python']}'s: "
                    "give --out a folder for runs of your own"
                )
        return self.trainer.run(config)

    def loss(self, config: Config) -> float:
        """The final validation loss; infinite where the run diverged."""
        final = self.record(config)["final"]
        return math.inf if final is None else final

    def best(self, config: Config, lrs: tuple[float, ...], extend: bool, factor: float = 2) -> Config:
        """`config` at the best of the learning rates, whose line goes on by `factor` until it isn't at their edge."""
        line = sorted(lrs)
        while True:
            best = min(line, key=lambda lr: self.loss(replace(config, lr=lr)))
            if not extend or line[0] < best < line[-1]:
                return replace(config, lr=best)
            if best == line[-1]:
                line.append(rounded(best * factor))
            if best == line[0]:
                line.insert(0, rounded(best / factor))

    def refined(self, config: Config) -> Config:
        neighbours = [replace(config, lr=rounded(config.lr * 2**k)) for k in (-0.5, 0.0, 0.5)]
        return min(neighbours, key=self.loss)


def rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def mixtures(plan: Plan, runs: Runs) -> list[Config]:
    """The best settings of AdEMAMix with 32-bit state, one at each β3, the best first."""
    found = []
    lrs = plan.lrs
    for beta3 in plan.beta3s:
        lines = []
        for alpha in plan.alphas:
            config = Config(FLOAT32, lrs[0], beta3, alpha, plan.search_seed, plan.steps)
            lines.append(runs.best(config, lrs, plan.extend))
            if plan.extend:
                lr = lines[-1].lr
                lrs = (rounded(lr / 2), lr, rounded(lr * 2))
        found.append(min(lines, key=runs.loss))
    best, *others = sorted(found, key=runs.loss)
    return [runs.refined(best) if plan.extend else best, *others]


def settings(scheme: str, plan: Plan, runs: Runs) -> list[Config]:
    """What a scheme is compared at: its base's best settings, with the search's seed. Makes the runs they take."""
    base = base_of(scheme)
    if base == FLOAT32:
        found = mixtures(plan, runs)
    else:
        config = Config(base, plan.lrs[0], None, None, plan.search_seed, plan.steps)
        if base == NO_MOMENTUM:
            config = replace(mixtures(plan, runs)[0], optimizer=base)
        lrs = plan.lrs if base == ADAMW else plan.lrs[:2]
        config = runs.best(config, lrs, plan.extend)
        found = [runs.refined(config) if plan.extend else config]
    if SCHEMES[scheme].best_only:
        found = found[:1]
    return [replace(config, optimizer=scheme) for config in found]


def comparison(plan: Plan, runs: Runs, schemes: Collection[str]) -> Iterator[Config]:
    """The runs of the comparison: each scheme's settings with every seed; varied options once."""
    for seed in plan.seeds:
        for scheme in SCHEMES:
            if scheme in schemes and not SCHEMES[scheme].varied:
                yield from (replace(config, seed=seed) for config in settings(scheme, plan, runs))
    for scheme in SCHEMES:
        if scheme in schemes and SCHEMES[scheme].varied:
            yield from settings(scheme, plan, runs)


def long_runs(plan: Plan, runs: Runs, schemes: Collection[str]) -> Iterator[Config]:
    """The long runs of each scheme's best setting.

    The learning rate is the best one with the first seed, in steps of √2, looked for around half of the best one of the
    shorter runs.
    """
    first, *others = plan.long_seeds
    for scheme in LONG:
        if scheme in schemes:
            short = settings(scheme, plan, runs)[0]
            config = replace(short, seed=first, steps=plan.long_steps)
            best = runs.best(config, (rounded(short.lr / 2),), plan.extend, 2**0.5)
            yield best
            yield from (replace(best, seed=seed) for seed in others)


STAGES: dict[str, Callable[[Plan, Runs, Collection[str]], Iterator[Config]]] = {
    "comparison": comparison,
    "long": long_runs,
}

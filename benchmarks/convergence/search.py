"""The runs of `benchmarks.convergence`, kept in files, and the search among them."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import drift
from benchmarks.convergence.plan import ADAMW, COMPARED, PERTURBED, SMALLER, Config, Plan
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

    def best(self, config: Config, lrs: tuple[float, ...], extend: bool) -> Config:
        """`config` at the best of the learning rates, which are doubled and halved until it isn't at their edge."""
        line = sorted(lrs)
        while True:
            best = min(line, key=lambda lr: self.loss(replace(config, lr=lr)))
            if not extend or line[0] < best < line[-1]:
                return replace(config, lr=best)
            line = sorted({*line, rounded(best / 2), rounded(best * 2)})

    def refined(self, config: Config) -> Config:
        neighbours = [replace(config, lr=rounded(config.lr * 2**k)) for k in (-0.5, 0.0, 0.5)]
        return min(neighbours, key=self.loss)


def rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def search(plan: Plan, runs: Runs) -> dict[str, Config]:
    """The best settings of AdamW, and of AdEMAMix at each β3, by their names in the tables."""
    adamw = Config(ADAMW, plan.lrs[0], None, None, plan.search_seed, plan.steps)
    found = {ADAMW: runs.best(adamw, plan.lrs, plan.extend)}
    lrs = plan.lrs
    for beta3 in plan.beta3s:
        lines = []
        for alpha in plan.alphas:
            config = replace(adamw, optimizer=drift.FLOAT32, beta3=beta3, alpha=alpha)
            lines.append(runs.best(config, lrs, plan.extend))
            if plan.extend:
                lr = lines[-1].lr
                lrs = (rounded(lr / 2), lr, rounded(lr * 2))
        found[f"β3 = {beta3:g}"] = min(lines, key=runs.loss)
    if plan.extend:
        mixtures = [name for name in found if name != ADAMW]
        for name in (ADAMW, min(mixtures, key=lambda name: runs.loss(found[name]))):
            found[name] = runs.refined(found[name])
    return found


def comparison(plan: Plan, found: dict[str, Config], runs: Runs) -> Iterator[Config]:
    """The configurations of the final comparison, the best β3 first within a seed."""
    mixtures = sorted((c for name, c in found.items() if name != ADAMW), key=runs.loss)
    for seed in plan.seeds:
        yield replace(found[ADAMW], seed=seed)
        for config in mixtures:
            for scheme in COMPARED:
                yield replace(config, optimizer=scheme, seed=seed)
    for seed in plan.seeds:
        yield replace(mixtures[0], optimizer=PERTURBED, seed=seed)


def smaller(plan: Plan, found: dict[str, Config], runs: Runs) -> Iterator[Config]:
    """Schemes of smaller state at the first β3, each at the best of learning rates of its own, with the same seeds."""
    best = found[f"β3 = {plan.beta3s[0]:g}"]
    for scheme in SMALLER:
        config = runs.best(replace(best, optimizer=scheme), (rounded(best.lr / 2), best.lr), plan.extend)
        config = runs.refined(config) if plan.extend else config
        for seed in plan.seeds:
            yield replace(config, seed=seed)

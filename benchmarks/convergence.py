"""AdEMAMix beside AdamW in training, each at its best: `python -m benchmarks.convergence`.

A small byte-level GPT learns the sources of Python's standard library. First a search on one seed: AdamW over learning
rates; AdEMAMix over learning rates at each pair of β3 and α. Each line of learning rates is extended until its best one
has a neighbour on either side, and around the best of AdamW and of AdEMAMix a factor of √2 is tried as well. Then new
seeds, for AdamW, and for AdEMAMix with 32-bit and quantized state at each β3. The paper's toy comes last.

Each run is kept in a file of its own as soon as it has ended, and isn't repeated: an interrupted search goes on where
it was. Tables and plots are written at the end, and when the search is interrupted.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks import convergence_report, drift, report, rosenbrock
from examples.byte_gpt import ByteGPT, loss_fn, standard_library
from torch_ademamix import AdEMAMix

SIZE, CONTEXT, BATCH = "nano", 64, 4
WEIGHT_DECAY = 0.1
EVALUATIONS = 24  # points of a curve
EVALUATION_BATCH = 32

ADAMW = "AdamW"
ADEMAMIX = {name: drift.SCHEMES[name] for name in (drift.FLOAT32, "8-bit", "8-bit, slow_ema_bits=8")}
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


def warmup_cosine(step: int, steps: int) -> float:
    """The learning rate's factor: up to 1 over a 20th of the run, then down to a tenth."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def make_optimizer(config: Config, model: ByteGPT) -> torch.optim.Optimizer:
    if config.optimizer == ADAMW:
        return torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, fused=True
        )
    return AdEMAMix(
        model.parameters(),
        lr=config.lr,
        betas=(0.9, 0.999, config.beta3),
        alpha=config.alpha,
        t_alpha=config.steps,
        t_beta3=config.steps,
        weight_decay=WEIGHT_DECAY,
        seed=config.seed,
        **ADEMAMIX.get(config.optimizer, {}),
    )


class Trainer:
    """Runs configurations; all share one compiled forward and backward pass."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.training, self.validation = standard_library()
        self.loss = torch.compile(loss_fn, dynamic=False)

    @property
    def text(self) -> dict[str, int]:
        return {"training bytes": len(self.training), "validation bytes": len(self.validation)}

    @torch.no_grad()
    def validation_loss(self, model: ByteGPT, windows: int) -> float:
        spaced = self.validation.unfold(0, CONTEXT + 1, len(self.validation) // windows)[:windows]
        parts = spaced.long().split(EVALUATION_BATCH)
        return torch.stack([self.loss(model, part) for part in parts]).double().mean().item()

    def run(self, config: Config) -> dict[str, Any]:
        """What the run's file holds. The seed decides the initial weights and the order of the data."""
        torch.manual_seed(config.seed)
        model = ByteGPT(SIZE, CONTEXT)
        if config.optimizer == PERTURBED:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + PERTURBATION * torch.randn_like(p))
        optimizer = make_optimizer(config, model)
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, config.steps))
        generator = torch.Generator().manual_seed(config.seed)
        windows = self.training.unfold(0, CONTEXT + 1, 1)  # a view: one window per byte
        every = config.steps // EVALUATIONS
        curve: list[dict[str, float]] = []
        losses: list[Tensor] = []
        started = perf_counter()
        for step in tqdm(range(1, config.steps + 1), config.filename.removesuffix(".json"), leave=False, disable=None):
            rows = torch.randint(len(windows), (BATCH,), generator=generator)
            loss = self.loss(model, windows[rows].long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
            if step % every == 0:
                trained = torch.stack(losses).mean().item()
                losses.clear()
                if not math.isfinite(trained):
                    break
                validation = self.validation_loss(model, self.plan.evaluation_windows)
                curve.append({"step": step, "training": trained, "validation": validation})
        final = self.validation_loss(model, self.plan.final_windows)
        return {
            "config": asdict(config),
            "final": final if math.isfinite(final) else None,
            "curve": curve,
            "parameters": sum(p.numel() for p in model.parameters()),
            "quantized": quantized_parameters(optimizer),
            "seconds": round(perf_counter() - started, 1),
            "text": self.text,
            "date": report.now(),
            "commit": report.commit(),
            "versions": report.versions(),
            "processor": report.processor(),
        }


def quantized_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(p.numel() for p, state in optimizer.state.items() if "exp_avg_absmax" in state)


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
            report.write(file, json.dumps(self.records[config.filename], indent=1) + "\n")
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
            for scheme in ADEMAMIX:
                yield replace(config, optimizer=scheme, seed=seed)
    for seed in plan.seeds:
        yield replace(mixtures[0], optimizer=PERTURBED, seed=seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of a few runs, to try it; not for figures")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report (benchmarks/results/convergence)")
    args = parser.parse_args(arguments)
    plan = SHORT if args.short else Plan()
    out = args.out or (report.ROOT / "out" / "convergence" if args.short else report.RESULTS / "convergence")
    torch.set_num_threads(1)  # the model is small; and one thread adds in one order, so that runs repeat bit for bit

    runs = Runs(out / "runs", plan)
    try:
        found = search(plan, runs)
        for config in comparison(plan, found, runs):
            runs.record(config)
    finally:
        if runs.records:
            convergence_report.write(out, plan, runs, rosenbrock.measure(plan.rosenbrock_steps))
    print((out / "README.md").read_text())


if __name__ == "__main__":
    main()

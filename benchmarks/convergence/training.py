"""Trains one configuration of `benchmarks.convergence`."""

import math
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.convergence.plan import (
    ADAMW,
    ADANA,
    NO_MOMENTUM,
    PERTURBATION,
    PERTURBED,
    SCHEMES,
    Config,
    Plan,
    base_of,
)
from benchmarks.shared import origin
from examples.byte_gpt import ByteGPT, loss_fn, standard_library
from torch_ademamix import ADANA as Adana
from torch_ademamix import AdEMAMix

SIZE, CONTEXT, BATCH = "nano", 64, 4
WEIGHT_DECAY = 0.1
EVALUATION_BATCH = 32


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
    options = {"lr": config.lr, "weight_decay": WEIGHT_DECAY, "seed": config.seed, **SCHEMES[config.optimizer].options}
    if base_of(config.optimizer) == ADANA:
        return Adana(model.parameters(), **options)
    return AdEMAMix(
        model.parameters(),
        betas=(0.0 if base_of(config.optimizer) == NO_MOMENTUM else 0.9, 0.999, config.beta3),
        alpha=config.alpha,
        t_alpha=config.steps,
        t_beta3=config.steps,
        **options,
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
        every = config.steps // self.plan.evaluations
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
            "date": origin.now(),
            "commit": origin.commit(),
            "versions": origin.versions(),
            "processor": origin.processor(),
        }


def quantized_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(p.numel() for p, state in optimizer.state.items() if "exp_avg_sq_absmax" in state)

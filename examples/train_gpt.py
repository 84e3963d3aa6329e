"""Trains a byte-level GPT on the sources of Python's standard library, with AdEMAMix.

    python examples/train_gpt.py
    python examples/train_gpt.py --optimizer AdEMAMix8bit --size medium --device cuda

The defaults take two or three minutes on two CPU cores. The output folder then holds the loss curve
(loss.png), the trained weights (model.pt) and a checkpoint from shortly before the end
(checkpoint.pt), from which a second run has repeated the remaining steps bit for bit.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_gpt import SIZES, ByteGPT, loss_fn, standard_library
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import torch_ademamix

ADEMAMIX = [f"{paged}AdEMAMix{bits}" for paged in ("", "Paged") for bits in ("", "8bit", "32bit")]
STATEFUL = ("model", "optimizer", "scheduler")
# Of the weights, by name: their dtype, and how AdEMAMix keeps what rounding would take away.
WEIGHTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "remainder8": (torch.bfloat16, {"master_weights": "remainder8"}),
    "stochastic": (torch.bfloat16, {"param_rounding": "stochastic"}),
}
REPEATED_STEPS = 10
VALIDATION_POINTS = 10
VALIDATION_WINDOWS = 512
SAMPLE_BYTES = 500


def make_optimizer(args: argparse.Namespace, model: ByteGPT) -> torch.optim.Optimizer:
    if args.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, fused=True)
    if args.optimizer == "ADANA":  # needs no length of the run
        return torch_ademamix.ADANA(model.parameters(), lr=args.lr, weight_decay=0.1, **WEIGHTS[args.weights][1])
    optimizer_class = getattr(torch_ademamix, args.optimizer)
    return optimizer_class(
        model.parameters(),
        lr=args.lr,
        # A short run wants a short memory: beta3 = 0.9999 is for tens of thousands of steps.
        betas=(0.9, 0.999, args.beta3),
        alpha=args.alpha,
        # Both warmups usually last the whole run (arXiv 2409.03137).
        t_alpha=args.steps,
        t_beta3=args.steps,
        weight_decay=0.1,
        **WEIGHTS[args.weights][1],
    )


def make_train_step(model: ByteGPT, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
    """step(tokens) -> loss; AdEMAMix's is one graph from the forward pass to the update."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return torch_ademamix.compile_train_step(model, optimizer, loss_fn)
    compiled_loss = torch.compile(partial(loss_fn, model))

    def step(tokens: Tensor) -> Tensor:
        loss = compiled_loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def warmup_cosine(step: int, steps: int) -> float:
    """The learning rate's factor: up to 1 over a tenth of the run, then down to a tenth."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


class Run:
    """All that a run needs to go on: model, optimizer, schedule and position in the data."""

    def __init__(self, args: argparse.Namespace, text: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = ByteGPT(args.size, args.context).to(args.device, WEIGHTS[args.weights][0])
        self.optimizer = make_optimizer(args, self.model)
        self.train_step = make_train_step(self.model, self.optimizer)
        self.scheduler = LambdaLR(self.optimizer, partial(warmup_cosine, steps=args.steps))
        self.windows = text.unfold(0, args.context + 1, 1)  # a view: one window per byte
        self.batch_size, self.device = args.batch_size, args.device
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> Tensor:
        """Trains on one random batch and returns its loss."""
        rows = torch.randint(len(self.windows), (self.batch_size,), generator=self.generator)
        loss = self.train_step(self.windows[rows].to(self.device, torch.long))
        self.scheduler.step()
        return loss

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        torch.save(parts | {"generator": self.generator.get_state()}, path)

    def load(self, path: Path) -> None:
        """Goes on where the run that wrote the checkpoint was."""
        checkpoint = torch.load(path, weights_only=True)
        for name in STATEFUL:
            getattr(self, name).load_state_dict(checkpoint[name])
        self.generator.set_state(checkpoint["generator"])


@torch.no_grad()
def validation_loss(model: ByteGPT, text: Tensor, device: str) -> float:
    """The mean loss over windows spread evenly over the held-out files."""
    spacing = len(text) // VALIDATION_WINDOWS
    windows = text.unfold(0, model.context + 1, spacing)[:VALIDATION_WINDOWS]
    parts = windows.to(device, torch.long).split(32)
    return torch.stack([loss_fn(model, part) for part in parts]).mean().item()


def plot(path: Path, title: str, losses: Tensor, validation: dict[int, float]) -> None:
    """Writes the loss curve as a PNG."""
    window = max(len(losses) // 50, 1)
    smooth = losses.unfold(0, window, 1).mean(-1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#9ecae1", linewidth=0.4, label="training")
    axes.plot(
        torch.arange(len(smooth)) + (window + 1) / 2,
        smooth,
        color="#08519c",
        linewidth=1.8,
        label=f"training, mean of {window} steps",
    )
    axes.plot(*zip(*validation.items(), strict=True), "o", color="#d94801", label="validation")
    # The fall from ln 256 = 5.5 takes a few dozen steps and would flatten all that follows.
    axes.set_xlim(0, len(losses) * 1.01)
    axes.set_ylim(losses.min().item() - 0.1, 3.5)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    # Otherwise the embedding's gradient is a sum in random order, and no two runs agree in bits.
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for the same
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    training_text, validation_text = standard_library()
    run = Run(args, training_text, args.seed)
    size = f"{sum(p.numel() for p in run.model.parameters()):,} parameters"
    print(f"{args.optimizer}, {size}, {len(training_text):,} bytes of text; compiling")

    tokens = args.batch_size * args.context
    validation_every = max(args.steps // VALIDATION_POINTS, 1)
    losses: list[Tensor] = []
    validation: dict[int, float] = {}
    started = time.perf_counter()
    with tqdm(total=args.steps * tokens, unit="tok", unit_scale=True) as bar:
        for step in range(1, args.steps + 1):
            losses.append(run.step())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
            bar.update(tokens)
            if (args.steps - step) % validation_every == 0:
                validation[step] = validation_loss(run.model, validation_text, args.device)
            if step == args.steps - REPEATED_STEPS:
                run.save(checkpoint)
    seconds = time.perf_counter() - started
    final = f"validation loss {validation[args.steps]:.3f} nats per byte"
    print(f"{final} after {seconds:.0f} s")

    resumed = Run(args, training_text, args.seed + 1)
    resumed.load(checkpoint)
    repeated = [resumed.step() for _ in range(REPEATED_STEPS)]
    for actual, expected in (
        (repeated, losses[-REPEATED_STEPS:]),
        (resumed.model.state_dict(), run.model.state_dict()),
        (resumed.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"]),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    print(f"resumed from {checkpoint}: the last {REPEATED_STEPS} steps repeat bit for bit")

    torch.save(run.model.state_dict(), args.out / "model.pt")
    title = f"{args.optimizer}, {size}: {final}"
    plot(args.out / "loss.png", title, torch.stack(losses).cpu(), validation)
    print(f"wrote {args.out / 'loss.png'} and model.pt; a sample:\n")
    print(run.model.generate(b"def ", SAMPLE_BYTES, torch.Generator().manual_seed(args.seed)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=[*ADEMAMIX, "ADANA", "AdamW"], default="AdEMAMix")
    parser.add_argument("--weights", choices=list(WEIGHTS), default="float32", help="others than float32 are bfloat16")
    parser.add_argument("--lr", type=float, help="peak learning rate (AdamW 6e-3, ADANA 2e-3, others 4e-3)")
    parser.add_argument("--alpha", type=float, default=2.0, help="weight of the slow average")
    parser.add_argument("--beta3", type=float, default=0.999, help="decay of the slow average")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="bytes the model sees")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="the GPU, where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gpt"), help="output folder")
    args = parser.parse_args()
    if args.lr is None:  # the best of four at the default size and number of steps; ADANA's is half of AdEMAMix's
        args.lr = {"AdamW": 6e-3, "ADANA": 2e-3}.get(args.optimizer, 4e-3)
    if args.optimizer == "AdamW" and WEIGHTS[args.weights][1]:
        parser.error(f"--weights {args.weights} is for AdEMAMix and ADANA")
    if args.steps <= REPEATED_STEPS:
        parser.error(f"--steps must be more than {REPEATED_STEPS}, was {args.steps}")
    return args


if __name__ == "__main__":
    main(parse_arguments())

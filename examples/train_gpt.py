"""Trains a byte-level GPT on the sources of Python's standard library, with AdEMAMix.

    python examples/train_gpt.py
    python examples/train_gpt.py --compare
    python examples/train_gpt.py --optimizer AdEMAMix8bit --size medium --device cuda

By default it trains as the comparison in docs/results.md does, with the learning rates that are best there. That
takes two or three minutes on two CPU cores, and twice as long with --compare, which trains AdamW too. The output folder
then holds the loss curves (loss.png), the trained weights (model.pt) and a checkpoint from shortly before the end
(checkpoint.pt), from which a second run has repeated the remaining steps bit for bit.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
# The best peak learning rates of the searches in docs/results.md, with the α below for AdEMAMix.
LEARNING_RATES = {"AdEMAMix": 2.8e-3, "AdamW": 4e-3, "ADANA": 1.4e-3}
ALPHA = 5.0  # in so short a run better than the 8 of recommended()
COLORS = ("#d94801", "#08519c")
REPEATED_STEPS = 10
VALIDATION_POINTS = 10
VALIDATION_WINDOWS = 512
SAMPLE_BYTES = 500


def make_optimizer(args: argparse.Namespace, model: ByteGPT) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": args.lr, "weight_decay": 0.1}
    if args.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), fused=True, **options)
    if args.optimizer != "ADANA":  # which needs no length of the run
        options |= {**torch_ademamix.recommended(args.steps), "alpha": args.alpha}
    return getattr(torch_ademamix, args.optimizer)(model.parameters(), **options, **WEIGHTS[args.weights][1])


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
    """The learning rate's factor: up to 1 over a 20th of the run, then down to a tenth."""
    warmup = max(steps // 20, 1)
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


class Result(NamedTuple):
    """What a run has measured."""

    optimizer: str
    lr: float
    losses: Tensor  # of each step
    validation: dict[int, float]  # by step
    seconds: float

    @property
    def final(self) -> float:
        return self.validation[len(self.losses)]


def train(args: argparse.Namespace, texts: tuple[Tensor, Tensor], checkpoint: Path) -> tuple[Run, Result]:
    """Trains with `args.optimizer`, and writes a checkpoint shortly before the end."""
    training_text, validation_text = texts
    run = Run(args, training_text, args.seed)
    tokens = args.batch_size * args.context
    validation_every = max(args.steps // VALIDATION_POINTS, 1)
    losses: list[Tensor] = []
    validation: dict[int, float] = {}
    started = time.perf_counter()
    with tqdm(total=args.steps * tokens, unit="tok", unit_scale=True, desc=args.optimizer) as bar:
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
    return run, Result(args.optimizer, args.lr, torch.stack(losses).cpu(), validation, seconds)


def check_resuming(args: argparse.Namespace, text: Tensor, checkpoint: Path, run: Run, losses: Tensor) -> None:
    """Raises if a run that goes on from the checkpoint doesn't repeat the last steps bit for bit."""
    resumed = Run(args, text, args.seed + 1)
    resumed.load(checkpoint)
    repeated = torch.stack([resumed.step() for _ in range(REPEATED_STEPS)]).cpu()
    for actual, expected in (
        (repeated, losses[-REPEATED_STEPS:]),
        (resumed.model.state_dict(), run.model.state_dict()),
        (resumed.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"]),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def mean_of_last(losses: Tensor) -> float:
    """The mean training loss of the last tenth of the steps."""
    return losses[-max(len(losses) // 10, 1) :].mean().item()


def table(results: list[Result]) -> str:
    rows = [("optimizer", "lr", "validation loss", "training loss", "seconds")]
    for r in results:
        rows.append((r.optimizer, f"{r.lr:g}", f"{r.final:.4f}", f"{mean_of_last(r.losses):.4f}", f"{r.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot(path: Path, title: str, results: list[Result]) -> None:
    """Writes the loss curves as a PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    shown: list[float] = []  # the losses that the figure is to show
    for result, color in zip(results, COLORS, strict=False):
        losses = result.losses
        window = max(len(losses) // 50, 1)
        smooth = losses.unfold(0, window, 1).mean(-1)
        shown += [result.final, *smooth[len(smooth) // 15 :].tolist()]
        if len(results) == 1:
            axes.plot(range(1, len(losses) + 1), losses, color=color, alpha=0.3, linewidth=0.4, label="training")
        axes.plot(
            torch.arange(len(smooth)) + (window + 1) / 2,
            smooth,
            color=color,
            linewidth=1.5,
            label=f"{result.optimizer}, lr {result.lr:g}: training, mean of {window} steps",
        )
        axes.plot(
            *zip(*result.validation.items(), strict=True),
            "o--",
            color=color,
            linewidth=0.8,
            markersize=5,
            label=f"{result.optimizer}: validation, {result.final:.3f} at the end",
        )
    axes.set_xlim(0, len(results[0].losses) * 1.01)
    # Without the first steps, which fall from ln 256 = 5.5 and would flatten all that follows.
    axes.set_ylim(min(shown) - 0.05, max(shown) + 0.05)
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
    texts = standard_library()
    size = f"{sum(p.numel() for p in ByteGPT(args.size, args.context).parameters()):,} parameters"
    print(f"{args.optimizer}, {size}, {len(texts[0]):,} bytes of text; compiling")

    run, result = train(args, texts, checkpoint)
    check_resuming(args, texts[0], checkpoint, run, result.losses)
    print(f"resumed from {checkpoint}: the last {REPEATED_STEPS} steps repeat bit for bit")
    torch.save(run.model.state_dict(), args.out / "model.pt")
    results = [result]
    if args.compare:
        adamw = argparse.Namespace(**{**vars(args), "optimizer": "AdamW", "lr": LEARNING_RATES["AdamW"]})
        results.append(train(adamw, texts, args.out / "adamw.pt")[1])
    plot(args.out / "loss.png", f"Byte-level GPT of {size}, seed {args.seed}", results)
    print(f"\n{table(results)}\n")
    print("Losses in nats per byte; the training loss is the mean of the last tenth of the steps.")
    print(f"wrote {args.out / 'loss.png'} and model.pt; a sample:\n")
    print(run.model.generate(b"def ", SAMPLE_BYTES, torch.Generator().manual_seed(args.seed)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=[*ADEMAMIX, "ADANA", "AdamW"], default="AdEMAMix")
    parser.add_argument("--weights", choices=list(WEIGHTS), default="float32", help="others than float32 are bfloat16")
    parser.add_argument("--compare", action="store_true", help="train AdamW too, at its own learning rate")
    rates = ", ".join(f"{name} {lr:g}" for name, lr in LEARNING_RATES.items())
    parser.add_argument("--lr", type=float, help=f"peak learning rate of --optimizer ({rates})")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="AdEMAMix' weight of the slow EMA")
    parser.add_argument("--size", choices=list(SIZES), default="nano")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="bytes the model sees")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=gpu, help="the GPU, where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gpt"), help="output folder")
    args = parser.parse_args()
    if args.lr is None:
        args.lr = LEARNING_RATES.get(args.optimizer, LEARNING_RATES["AdEMAMix"])
    if args.compare and args.optimizer == "AdamW":
        parser.error("--compare trains AdamW in addition to --optimizer, which must be another one")
    if args.optimizer == "AdamW" and WEIGHTS[args.weights][1]:
        parser.error(f"--weights {args.weights} is for AdEMAMix and ADANA")
    if args.steps <= REPEATED_STEPS:
        parser.error(f"--steps must be more than {REPEATED_STEPS}, was {args.steps}")
    return args


if __name__ == "__main__":
    main(parse_arguments())

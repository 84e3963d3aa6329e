"""How long a whole training step takes to compile, beside its model alone: `python -m benchmarks.compile_time`.

Of a decoder of 12 layers as Llama's, 111 parameters: `torch.compile(model)`, forward and backward, and
`compile_train_step`, which has the loss, the update and the clearing of gradients besides. Each by turns in a process
of its own, with empty caches, once something small has been compiled there; the clock's seconds, and the process's own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from benchmarks.shared.target import Target
from benchmarks.shared.writing import markdown_table

VOCABULARY, WIDTH, HEADS, LAYERS = 128, 64, 4, 12
BATCH = (4, 64)
WHAT = ("the model", "the whole step")
TARGET = Target(
    "the whole step's, over the model's, by the clock",
    "",
    float,
    "loss, update and clearing are few operations more than the model's",
    at_most=1.25,
)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        inward = self.query, self.key, self.value
        q, k, v = (linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in inward)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Sequential):
    def __init__(self) -> None:
        layers = (Layer() for _ in range(LAYERS))
        head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        super().__init__(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.RMSNorm(WIDTH), head)


def loss_fn(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def first_step(what: str, model: nn.Module, tokens: Tensor, targets: Tensor) -> None:
    from torch_ademamix import AdEMAMix, compile_train_step

    if what == WHAT[0]:
        loss_fn(torch.compile(model), tokens, targets).backward()
    else:
        compile_train_step(model, AdEMAMix(model.parameters()), loss_fn)(tokens, targets)


def measure(what: str) -> None:
    """In a process of its own; prints both times."""
    tokens = torch.zeros(BATCH, dtype=torch.int64)
    for each in WHAT:
        first_step(each, nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY)), tokens, tokens)
    model = Decoder()
    clock, own = time.perf_counter(), time.process_time()
    first_step(what, model, tokens, tokens)
    print(time.perf_counter() - clock, time.process_time() - own)


def measured(what: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as caches:
        command = [sys.executable, "-m", "benchmarks.compile_time", "--of", what]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    clock, own = map(float, result.stdout.split())
    return clock, own


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--of", choices=WHAT, help="only this one, in this process")
    args = parser.parse_args(arguments)
    if args.of:
        return measure(args.of)
    rounds = [[measured(what) for what in WHAT] for _ in trange(args.rounds)]
    columns = [[statistics.median(r[i][k] for r in rounds) for k in range(2)] for i in range(len(WHAT))]
    ratios = [statistics.median(r[1][k] / r[0][k] for r in rounds) for k in range(2)]
    rows = [[name, *(f"{seconds:.1f}" for seconds in column)] for name, column in zip(WHAT, columns, strict=True)]
    print(markdown_table(("", "clock, s", "own, s"), [*rows, ["ratio", *(f"{ratio:.2f}" for ratio in ratios)]]))
    text, value, bound, verdict = TARGET.verdict(ratios[0])
    print(f"target: {text}: {value} ({bound}) {verdict}")


if __name__ == "__main__":
    main()

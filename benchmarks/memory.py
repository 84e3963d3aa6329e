"""What training takes in memory, per optimizer and size of model: `make memory` (`python -m benchmarks.memory`).

Counted from the tensors that each optimizer makes for a parameter of that size, on the meta device, where they take no
memory. Activations are not in it. `--write` puts the table in docs/choosing.md.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.shared.gpt2 import SHAPES
from benchmarks.shared.writing import DOCS, write_table
from torch_ademamix import AdEMAMix, AdEMAMix8bit

SIZES = {"124M": 124_000_000, "1.3B": 1_300_000_000, "8B": 8_000_000_000, "70B": 70_000_000_000}
GB = 1e9
BETA1_0 = (0.0, 0.999, 0.9999)

DOCUMENT = DOCS / "choosing.md"


@dataclass(frozen=True)
class Recipe:
    """How a parameter is trained."""

    name: str
    dtype: torch.dtype
    make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]


RECIPES = (
    Recipe("AdEMAMix", torch.float32, AdEMAMix),
    Recipe("AdEMAMix8bit", torch.float32, AdEMAMix8bit),
    Recipe("AdEMAMix, beta1=0", torch.float32, partial(AdEMAMix, betas=BETA1_0)),
    Recipe("AdEMAMix", torch.bfloat16, AdEMAMix),
    Recipe("AdEMAMix, with remainders", torch.bfloat16, partial(AdEMAMix, master_weights="remainder")),
    Recipe("AdEMAMix8bit", torch.bfloat16, AdEMAMix8bit),
    Recipe("AdEMAMix8bit, with remainders", torch.bfloat16, partial(AdEMAMix8bit, master_weights="remainder")),
    Recipe(
        "AdEMAMix8bit, with remainders in 8 bits", torch.bfloat16, partial(AdEMAMix8bit, master_weights="remainder8")
    ),
    Recipe("AdEMAMix8bit, slow_ema_bits=12", torch.bfloat16, partial(AdEMAMix8bit, slow_ema_bits=12)),
    Recipe("AdEMAMix8bit, beta1=0", torch.bfloat16, partial(AdEMAMix8bit, betas=BETA1_0)),
    Recipe(
        "AdEMAMix8bit, slow_ema_bits=12, beta1=0",
        torch.bfloat16,
        partial(AdEMAMix8bit, slow_ema_bits=12, betas=BETA1_0),
    ),
    Recipe("torch.optim.AdamW", torch.float32, torch.optim.AdamW),
    Recipe("torch.optim.AdamW", torch.bfloat16, torch.optim.AdamW),
)


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    param: int
    grad: int
    state: int

    @property
    def total(self) -> int:
        return self.param + self.grad + self.state


def measure(recipe: Recipe, size: int) -> Memory:
    """What one parameter of so many elements takes, its gradient and the state after a step."""
    p = nn.Parameter(torch.empty(size, dtype=recipe.dtype, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = recipe.make([p])
    optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[p].values() if value.numel() > 1)
    return Memory(p.nbytes, p.grad.nbytes, state)


def gpt2_state(recipe: Recipe) -> float:
    """Bytes of state per parameter, of the flat tensors that GPT-2's parameters share."""
    params = [nn.Parameter(torch.empty(shape, dtype=recipe.dtype, device="meta")) for shape in SHAPES]
    optimizer = recipe.make(params)
    assert isinstance(optimizer, AdEMAMix)
    optimizer.init_state()
    arenas = {id(state.slice.arena): state.slice.arena for state in optimizer.state.values()}.values()
    return sum(flat.nbytes for arena in arenas for flat in arena.flats.values()) / sum(p.numel() for p in params)


def table() -> str:
    """In Markdown."""
    lines = [f"| weights and gradients | optimizer | state, B | in all, B | {' | '.join(SIZES)} |"]
    lines.append(f"|---|---|{'---:|' * (2 + len(SIZES))}")
    for recipe in RECIPES:
        largest = max(SIZES.values())
        memory = measure(recipe, largest)
        each = [memory.state / largest, memory.total / largest]
        totals = [measure(recipe, size).total / GB for size in SIZES.values()]
        cells = [str(recipe.dtype).removeprefix("torch."), recipe.name, *(f"{value:.2f}" for value in each)]
        cells += [f"{value:.1f}" if value < 100 else f"{value:,.0f}" for value in totals]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table in docs/{DOCUMENT.name}")
    args = parser.parse_args(arguments)
    print(table())
    if args.write:
        write_table(DOCUMENT, "memory", table())


if __name__ == "__main__":
    main()

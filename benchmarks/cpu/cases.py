"""What `benchmarks.cpu` measures: cases, and the competitors that take turns in each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.cpu.peers import ADAMW, PLAIN
from benchmarks.shared.gpt2 import SHAPES

IN_PLACE = "in-place multiply"  # of one large buffer: what this machine's memory gives
IN_PLACE_NUMEL = 2**26


@dataclass(frozen=True)
class Group:
    """Competitors that take turns; each group has fused AdamW and the in-place multiply to compare with."""

    names: tuple[str, ...]
    rounds: int
    calls: int = 1  # per round and competitor
    references: tuple[str, ...] = (ADAMW, IN_PLACE)


FLOAT32_STATE = ("AdEMAMix", "AdEMAMix, compiled", PLAIN, "plain loop (Apple's)", "AdamW, foreach")
EAGER_8BIT = ("AdEMAMix8bit", "AdEMAMix8bit, slow 8")
QUANTIZED = tuple(name + how for name in EAGER_8BIT for how in ("", ", compiled"))
SLOW = ("torchao AdamW8bit", "bitsandbytes AdEMAMix", "bitsandbytes AdEMAMix8bit")
GROUPS = (Group(FLOAT32_STATE, rounds=15), Group(QUANTIZED, rounds=10), Group(SLOW, rounds=2))
HOST_8BIT = (Group(("AdEMAMix", "AdEMAMix8bit, any size"), rounds=200, calls=5, references=(ADAMW,)),)
SMALLER = (Group(("AdEMAMix, beta1=0", "ADANA", "AdEMAMix8bit", "AdEMAMix8bit, 12 bits"), rounds=15),)
COMPILED_STEP = ("AdEMAMix, compiled", "AdEMAMix, compiled without size_asserts")
HOST_GROUPS = (
    Group(
        ("AdEMAMix", "AdEMAMix, a group each", "AdamW, fused, a group each"), rounds=200, calls=5, references=(ADAMW,)
    ),
)
HOST = (Group(("AdEMAMix", *COMPILED_STEP), rounds=200, calls=5, references=(ADAMW,)),)


@dataclass(frozen=True)
class Case:
    title: str
    shapes: list[tuple[int, ...]]
    groups: tuple[Group, ...]
    dtype: torch.dtype = torch.float32
    left_out: Mapping[str, str] = field(default_factory=dict)  # why


COMPILED = ("AdEMAMix, compiled", *(name for name in QUANTIZED if name.endswith(", compiled")), PLAIN)
LONG_LIST = {PLAIN: "takes minutes to compile for 1000 tensors"}
AS_IN_FLOAT32 = dict.fromkeys(COMPILED, "compiled in the float32 case only, to save time")

CASES = {
    "host 148": Case("148 tensors of 8", [(8,)] * 148, HOST_8BIT),
    "host 300 groups": Case("300 tensors of 8, in one group and in 300", [(8,)] * 300, HOST_GROUPS),
    "host 400": Case("400 tensors of 1", [(1,)] * 400, HOST),
    "host 400 x 1000": Case("400 tensors of 1000", [(1000,)] * 400, HOST),
    "large": Case("16 tensors of 2048 x 1024", [(2048, 1024)] * 16, GROUPS),
    "small": Case("1000 tensors of 4096", [(4096,)] * 1000, GROUPS, left_out=LONG_LIST),
    "GPT-2": Case("GPT-2 124M, 148 tensors", SHAPES, GROUPS),
    "large, smaller state": Case("16 tensors of 2048 x 1024", [(2048, 1024)] * 16, SMALLER),
    "large, bf16": Case("16 tensors of 2048 x 1024", [(2048, 1024)] * 16, GROUPS, torch.bfloat16),
    "small, bf16": Case("1000 tensors of 4096", [(4096,)] * 1000, GROUPS, torch.bfloat16, AS_IN_FLOAT32),
    "GPT-2, bf16": Case("GPT-2 124M, 148 tensors", SHAPES, GROUPS, torch.bfloat16, AS_IN_FLOAT32),
    "host 1000": Case("1000 tensors of 1", [(1,)] * 1000, HOST),
}
QUICK = ("host 400", "host 400 x 1000", "large")  # without the slow peers
QUICK_ROUNDS = 10

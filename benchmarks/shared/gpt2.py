"""GPT-2's architecture, plainly, for measuring: the output is the input's embedding, transposed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]

SHAPES: Shapes = [
    (50257, 768),
    (1024, 768),
    *[
        shape
        for _ in range(12)
        for shape in (
            *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
            *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
        )
    ],
    (768,),
    (768,),
]


@dataclass(frozen=True)
class Size:
    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attention.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class GPT2(nn.Module):
    """(batch, length) tokens to (batch, length, vocabulary) logits."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of each next token, in float32: bfloat16 has steps of 0.06 at the losses of the beginning."""
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def make_model(size: Size, device: str) -> GPT2:
    """The same weights each time, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2(size).to(torch.bfloat16)


def make_batches(size: Size, batch_size: int, count: int, device: str) -> list[Tensor]:
    """The same random tokens each time: bytes, small ones more often, so that there is something to learn."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (count, batch_size, size.context + 1)
    values = torch.rand(shape, device=device, generator=generator) ** 3 * min(256, size.vocabulary)
    return list(values.long())

"""A byte-level GPT, and a text that every Python has: the sources of its standard library."""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte
HEAD_SIZE = 32
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# name: (width, layers)
SIZES = {"nano": (64, 2), "tiny": (64, 4), "small": (128, 6), "medium": (384, 8), "large": (768, 12)}


def standard_library(validation_every: int = 20) -> tuple[Tensor, Tensor]:
    """The training and the validation text as uint8 vectors; every 20th file is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    if len(paths) < validation_every:
        raise FileNotFoundError(f"{root} holds {len(paths)} sources: too few to train on")
    held_out = paths[::validation_every]
    training = [path for path in paths if path not in set(held_out)]

    def text(files: list[Path]) -> Tensor:
        data = bytearray().join(file.read_bytes() for file in files)
        return torch.frombuffer(data, dtype=torch.uint8)

    return text(training), text(held_out)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; at first both add zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.query_key_value(normalize(x))
        qkv = qkv.view(batch, length, 3, -1, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin)
        heads = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        x = x + self.attention_out(heads.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(normalize(x)), approximate="tanh"))


def normalize(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (batch, heads, length, HEAD_SIZE)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class ByteGPT(nn.Module):
    """A decoder-only transformer: (batch, length) bytes to (batch, length, 256) logits."""

    def __init__(self, size: str, context: int) -> None:
        super().__init__()
        width, layers = SIZES[size]
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)
        frequencies = 1e4 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = torch.arange(context)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(normalize(x))

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, generator: torch.Generator) -> str:
        """The prompt and `length` further bytes, drawn at temperature 0.8."""
        tokens = torch.tensor([list(prompt)], device=self.head.weight.device)
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[0, -1] / 0.8
            token = torch.multinomial(logits.cpu().softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, token[None].to(tokens.device)), dim=1)
        return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of each next byte, in nats, for (batch, length + 1) tokens."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

"""A model that is sharded in each of torch's ways, for the tests with several processes."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torch_ademamix import AdEMAMix
from torch_ademamix.state.sharding import scales_shape

OPTIONS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99, 0.999), t_alpha=6, t_beta3=6, weight_decay=0.1)
BITS: dict[int, dict[str, Any]] = {
    32: {},
    8: {"optim_bits": 8, "min_8bit_size": 16},
}
LAYOUTS = {"fsdp": 1, "tp": 1, "hsdp": 2, "fsdp_tp": 2}  # and the dimensions of the mesh


class Model(nn.Module):
    """Linear layers whose rows are one block, two blocks, or no whole number of blocks."""

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        self.up = nn.Linear(256, hidden)
        self.down = nn.Linear(hidden, 256)
        self.head = nn.Linear(256, 3)  # on four processes, one has nothing of it

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def make_model(layout: str | None = None, hidden: int = 512, dtype: torch.dtype = torch.float32) -> Model:
    """The same weights each time; sharded over all processes in one of LAYOUTS, or plain."""
    torch.manual_seed(1)
    model = Model(hidden).to(dtype)
    if layout is None:
        return model
    size = dist.get_world_size()
    if LAYOUTS[layout] == 1:
        mesh = init_device_mesh("cpu", (size,))
    else:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "model"))
    if "tp" in layout:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["model"] if LAYOUTS[layout] == 2 else mesh, plan)
    if "fsdp" in layout:
        fully_shard(model, mesh=mesh["data"] if LAYOUTS[layout] == 2 else mesh)
    elif layout == "hsdp":
        fully_shard(model, mesh=mesh)
    return model


def backward(model: nn.Module, layout: str | None, batch: int) -> Tensor:
    """Gradients of the mean loss over all processes' parts of a batch, as large however it is divided."""
    p = next(model.parameters())
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(batch)).to(p.dtype)
    if layout == "fsdp_tp":
        x = x.chunk(dist.get_world_size() // 2)[dist.get_rank() // 2]
    elif layout in ("fsdp", "hsdp", "ddp"):
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype == torch.int16:  # which neither gloo nor NCCL send
        return tensor.int().full_tensor().short()
    return tensor.full_tensor()


def full_state(optimizer: AdEMAMix, params: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """The state of each parameter as plain tensors, whole on every process."""
    return [{name: full(value).clone() for name, value in optimizer.state[p].items()} for p in params]


def rounding_of_part(p: Tensor) -> dict[str, Any]:
    """Options by which a parameter is rounded alike in parts and whole: parts of rows draw other random bits."""
    in_rows = isinstance(p, DTensor) and any(placement.is_shard() and placement.dim > 0 for placement in p.placements)
    return {"stochastic_rounding": not in_rows}


def quantizable(p: Tensor) -> bool:
    return scales_shape(p) is not None

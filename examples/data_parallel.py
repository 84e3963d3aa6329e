"""Trains a byte-level GPT on several processes, each step one graph with its collectives.

    torchrun --nproc-per-node 2 examples/data_parallel.py
    torchrun --nproc-per-node 2 examples/data_parallel.py --mode replicate --optimizer AdEMAMix8bit

Parameters are DTensors whose parametrization gathers them, as in SimpleFSDP (arXiv 2411.00284).
"""

import argparse
import os

import torch
import torch.distributed as dist
from byte_gpt import SIZES, ByteGPT, loss_fn, standard_library
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.lr_scheduler import CosineAnnealingLR

import torch_ademamix

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
PLACEMENTS = {"fully_shard": [Shard(0)], "replicate": [Replicate()]}
CONTEXT = 64


class Gather(nn.Module):
    """The whole parameter, on every process; its gradient is averaged, and what the parameter has of it is kept."""

    def forward(self, p: DTensor) -> Tensor:
        return p.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])


def data_parallel(model: nn.Module, mesh: DeviceMesh, mode: str) -> None:
    """Makes each parameter a DTensor, of rank 0's values, that the model sees whole."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, PLACEMENTS[mode])))
            register_parametrization(module, name, Gather())


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(PLACEMENTS), default="fully_shard", help="what a process keeps")
    parser.add_argument("--optimizer", default="AdEMAMix", help="the name of a class of torch_ademamix")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--device", choices=list(BACKENDS), default="cpu")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[args.device])
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    torch.manual_seed(args.seed)
    model = ByteGPT(args.size, CONTEXT).to(args.device)
    data_parallel(model, mesh, args.mode)
    optimizer = getattr(torch_ademamix, args.optimizer)(  # made after the parameters
        model.parameters(),
        lr=2e-3,
        weight_decay=0.1,
        **torch_ademamix.recommended(args.steps),
        max_grad_norm=1.0,  # of all processes' gradients
    )
    train_step = torch_ademamix.compile_train_step(model, optimizer, loss_fn, backend=args.compiler)
    scheduler = CosineAnnealingLR(optimizer, args.steps)

    text, _ = standard_library()
    windows = text.unfold(0, CONTEXT + 1, 1)
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(windows), (args.batch_size,), generator=generator)  # the same on every process
        tokens = windows[rows.chunk(mesh.size())[mesh.get_rank()]]
        loss = train_step(tokens.to(args.device, torch.long))
        scheduler.step()
        dist.all_reduce(loss, dist.ReduceOp.AVG)  # it was that of this process's rows
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % max(args.steps // 10, 1) == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, gradient norm {optimizer.grad_norm.item():.3f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()

"""Checkpoints of sharded state, where :mod:`torch.distributed.checkpoint` alone doesn't serve it.

Saving, loading and resharding go through torch's own functions (docs/distributed.md). What they lack is here: a check
that a checkpoint holds state of the same precision, and whole ("full") state dicts with 16-bit codes or remainders,
which neither NCCL nor gloo can send.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.sharding import is_dtensor

StateDict = dict[str, Any]


class LoadPlanner(DefaultLoadPlanner):
    """For ``torch.distributed.checkpoint.load(..., planner=LoadPlanner())``: refuses state of another precision.

    torch's own planner compares shapes only. It would copy the codes of 8-bit state into float32 state as if they
    were values, leave out remainders of master weights, and has then already overwritten the optimizer's state. This
    one refuses before anything is read.

    Raises:
        ValueError: a tensor is saved as integers and loaded into floating-point numbers, or the other way round, or
            into other integers; or the checkpoint has more entries of a parameter's state than the optimizer. torch
            raises it within a `CheckpointException`.
    """

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries = self.metadata.state_dict_metadata
        hint = "load it with the optim_bits, slow_ema_bits, min_8bit_size and master_weights that it was saved with"
        # Version 0.1.0 doesn't tell the format. What it has in the same dtypes means the same.
        for name in [name for name in self.state_dict if name.endswith(".state_format") and name not in entries]:
            del self.state_dict[name]
        for name, value in self.state_dict.items():
            saved = entries.get(name)
            if not (isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata)):
                continue
            dtype = saved.properties.dtype
            if dtype != value.dtype and not (dtype.is_floating_point and value.dtype.is_floating_point):
                raise ValueError(f"{name} has dtype {dtype} in the checkpoint, but must be {value.dtype}: {hint}")
        params = {name.removesuffix(".exp_avg_slow") for name in self.state_dict if name.endswith(".exp_avg_slow")}
        if lost := [name for name in entries if name not in self.state_dict and name.rpartition(".")[0] in params]:
            raise ValueError(f"the checkpoint has {', '.join(lost)}, which would be lost: {hint}")
        return super().create_local_plan()


def get_full_optimizer_state_dict(model: nn.Module, optimizer: AdEMAMix) -> StateDict:
    """The whole state of a sharded optimizer, on the CPU of rank 0; other ranks get an empty dict.

    As torch's `get_optimizer_state_dict` with ``StateDictOptions(full_state_dict=True, cpu_offload=True)``, which
    fails at 16-bit codes. All processes have to call it.

    Args:
        model: the module whose parameters the optimizer has; their names are the keys.
        optimizer: the optimizer; state that it doesn't have yet is made.

    Returns:
        for torch's `set_optimizer_state_dict`, called with the same dict on every process of a run of any size, or in
        a single process.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = AdEMAMix(model.parameters())
    >>> get_full_optimizer_state_dict(model, optimizer)["state"]["bias"]["exp_avg_slow"]
    tensor([0., 0.])
    """
    optimizer.init_state()  # else torch would make it by a step, and count that
    state_dict: StateDict = get_optimizer_state_dict(model, optimizer)
    first = not dist.is_initialized() or dist.get_rank() == 0
    states: StateDict = {}
    for name, state in state_dict["state"].items():
        states[name] = {}
        for entry, value in state.items():
            whole = _whole(value)
            if first:
                states[name][entry] = whole.cpu()
    return {**state_dict, "state": states} if first else {}


def _whole(value: Tensor) -> Tensor:
    if not is_dtensor(value):
        return value
    dtype = value.dtype
    if dtype == torch.int16:
        value = cast(DTensor, value.int())
    return value.full_tensor().to(dtype)

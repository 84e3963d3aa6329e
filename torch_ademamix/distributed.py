"""Checkpoints of sharded state, where :mod:`torch.distributed.checkpoint` alone doesn't serve it.

Saving, loading and resharding use torch's own functions (docs/distributed.md). This module adds a check that a
checkpoint has state of the same precision, and whole ("full") state dicts with 16-bit codes or remainders, which
neither NCCL nor gloo can send.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.state.arenas import NAMES
from torch_ademamix.state.sharding import is_dtensor

StateDict = dict[str, Any]
_HINT = "load it with the optim_bits, slow_ema_bits, min_8bit_size and master_weights that it was saved with"


class LoadPlanner(DefaultLoadPlanner):
    """For ``torch.distributed.checkpoint.load(..., planner=LoadPlanner())``: raises for state of another precision.

    torch's own planner compares shapes only. It would copy the codes of 8-bit state into float32 state as if they
    were values, leave out remainders of master weights, and has then already overwritten the optimizer's state. This
    one raises before anything is read.

    Raises:
        ValueError: a tensor is saved as integers and loaded into floating-point numbers, or the other way round, or
            into other integers; or the checkpoint has more entries of a parameter's state than the optimizer. torch
            raises it within a `CheckpointException`.
    """

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries = self.metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            saved = entries.get(name)
            if not (isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata)):
                continue
            dtype = saved.properties.dtype
            if dtype != value.dtype and not (dtype.is_floating_point and value.dtype.is_floating_point):
                raise ValueError(f"{name} has dtype {dtype} in the checkpoint, but must be {value.dtype}: {_HINT}")
        params = {name.removesuffix(".exp_avg_slow") for name in self.state_dict if name.endswith(".exp_avg_slow")}
        if lost := [name for name in entries if name not in self.state_dict and name.rpartition(".")[0] in params]:
            raise ValueError(f"the checkpoint has {', '.join(lost)}, which would be lost: {_HINT}")
        return super().create_local_plan()


def get_full_optimizer_state_dict(model: nn.Module, optimizer: AdEMAMix) -> StateDict:
    """The whole state of a sharded optimizer, on the CPU of rank 0; other ranks get an empty dict.

    As torch's `get_optimizer_state_dict` with ``StateDictOptions(full_state_dict=True, cpu_offload=True)``, which
    fails at 16-bit codes. Shards are sent to rank 0 alone, so other ranks need no memory for whole tensors. All
    processes have to call it.

    Args:
        model: the module whose parameters the optimizer has; their names are the keys.
        optimizer: the optimizer; state that it doesn't have yet is made.

    Returns:
        for :func:`set_full_optimizer_state_dict`; or for torch's `set_optimizer_state_dict`, called with the same dict
        on every process of a run of any size, or in a single process.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = AdEMAMix(model.parameters())
    >>> get_full_optimizer_state_dict(model, optimizer)["state"]["bias"]["exp_avg_slow"]
    tensor([0., 0.])
    """
    optimizer.init_state()  # else torch would make it by a step, and count that
    state_dict: StateDict = get_optimizer_state_dict(model, optimizer)
    states = {
        name: {entry: _whole_on_first(value) if isinstance(value, Tensor) else value for entry, value in state.items()}
        for name, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states} if _is_first() else {}


def set_full_optimizer_state_dict(model: nn.Module, optimizer: AdEMAMix, state_dict: StateDict) -> None:
    """Loads a whole state dict that only rank 0 has; each rank keeps its shards.

    As torch's `set_optimizer_state_dict` with ``StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)``,
    which fails at 16-bit codes. All processes have to call it.

    Args:
        model: the module whose parameters the optimizer has.
        optimizer: the optimizer, which stores state in the formats of the state dict.
        state_dict: what :func:`get_full_optimizer_state_dict` returned, on rank 0; not looked at on other ranks.

    Raises:
        ValueError: the state dict has other formats, on every rank; nothing is loaded. torch's
            `set_optimizer_state_dict` converts them where every process has the state dict.

    >>> model = nn.Linear(4, 2)
    >>> optimizer = AdEMAMix(model.parameters())
    >>> saved = get_full_optimizer_state_dict(model, optimizer)
    >>> set_full_optimizer_state_dict(model, optimizer, saved)
    """
    if not dist.is_initialized():
        set_optimizer_state_dict(model, optimizer, state_dict)
        return
    optimizer.init_state()
    ours = _formats(get_optimizer_state_dict(model, optimizer))
    sent = [_formats(state_dict) if _is_first() else None]
    dist.broadcast_object_list(sent, 0)
    theirs = sent[0] or {}
    for name, formats in ours.items():
        if theirs.get(name) != formats:
            raise ValueError(
                f"the state of {name} is {theirs.get(name)} in state_dict, but must be {formats}: {_HINT}; or call "
                "torch's set_optimizer_state_dict with the state dict on every process, which converts it"
            )
    handles = (
        optimizer.register_state_dict_post_hook(lambda _, ours: _with_states(ours, torch.int16, torch.float16)),
        optimizer.register_load_state_dict_pre_hook(lambda _, given: _with_states(given, torch.float16, torch.int16)),
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = _with_states(state_dict, torch.int16, torch.float16) if _is_first() else {}
    try:
        set_optimizer_state_dict(model, optimizer, given, options=options)
    finally:
        for handle in handles:
            handle.remove()


def _formats(state_dict: StateDict) -> dict[str, dict[str, tuple[torch.dtype, list[int]]]]:
    """Dtype and shape of each entry of each parameter's state."""
    return {
        name: {entry: (value.dtype, list(value.shape)) for entry, value in state.items() if entry in NAMES}
        for name, state in state_dict["state"].items()
    }


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _with_states(state_dict: StateDict, dtype: torch.dtype, seen_as: torch.dtype) -> StateDict:
    """The same bits, as a dtype that NCCL and gloo send."""

    def seen(entry: str, value: Any) -> Any:
        return _seen_as(value, seen_as) if entry in NAMES and value.dtype == dtype else value

    states = {
        key: {entry: seen(entry, value) for entry, value in state.items()} for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _seen_as(value: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_dtensor(value):
        return value.view(dtype)
    local = value.to_local().view(dtype)
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _whole_on_first(value: Tensor) -> Tensor | None:
    """The whole tensor on the CPU of rank 0, None on other ranks, which send it what they have as bytes."""
    if not is_dtensor(value):
        return value.cpu() if _is_first() else None
    mesh, placements = value.device_mesh, value.placements
    ranks = mesh.mesh
    if not (ranks == 0).any():  # as where another stage of a pipeline has the parameter
        return None
    for dim, (placement, i) in enumerate(zip(placements, (ranks == 0).nonzero()[0].tolist(), strict=True)):
        if placement.is_replicate():  # each of these has the same; rank 0 is among those that are left
            ranks = ranks.narrow(dim, i, 1)
    if dist.get_rank() not in ranks:
        return None
    offset = list(compute_local_shape_and_global_offset(value.shape, mesh, placements)[1])
    local = value.to_local().to(mesh.device_type).contiguous()
    where = torch.tensor([*offset, *local.shape], dtype=torch.int64, device=local.device)
    if not _is_first():
        dist.send(where, 0)
        if local.numel():
            dist.send(_bytes(local), 0)
        return None
    whole = torch.empty(value.shape, dtype=value.dtype)
    for rank in sorted(ranks.flatten().tolist()):  # this process is the first
        part = local
        if rank:
            dist.recv(where, rank)
            offset = where[: whole.dim()].tolist()
            part = torch.empty(where[whole.dim() :].tolist(), dtype=value.dtype, device=local.device)
            if part.numel():
                dist.recv(_bytes(part), rank)
        whole[tuple(slice(first, first + size) for first, size in zip(offset, part.shape, strict=True))] = part.cpu()
    return whole


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)

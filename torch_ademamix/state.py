"""What the optimizer keeps per parameter: names, shapes and dtypes, and how it is made."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from torch_ademamix import paging, sharding
from torch_ademamix.arenas import (
    MASTER_REMAINDER,
    MOMENTS,
    NAMES,
    SCALES,
    OptimizerState,
    ParamState,
    Storage,
    allocate,
)
from torch_ademamix.blockwise import CODE_DTYPES, Format
from torch_ademamix.options import Options, check_params, is_trained
from torch_ademamix.reference import compute_dtype

# What quantized state may be stored as: first the default, then what `slow_ema_bits=8` gives.
ALLOWED_FORMATS: dict[str, tuple[Format, ...]] = {
    "exp_avg": ("signed_sqrt_int8",),
    "exp_avg_slow": ("linear_int16", "signed_sqrt_int8"),
    "exp_avg_sq": ("fourth_root_uint8",),
}

# The number of these formats: a group's "state_format", by which a state dict tells what its codes mean, also where
# their dtypes don't. Version 0.1.0 had other ones, and no such entry.
STATE_FORMAT = 2


def formats(p: Tensor, group: Mapping[str, Any]) -> dict[str, Format | None]:
    """How each moment of a parameter is stored: None is unquantized."""
    if group["optim_bits"] == 32 or p.numel() < group["min_8bit_size"] or sharding.scales_shape(p) is None:
        return dict.fromkeys(MOMENTS)
    return {
        name: allowed[-1] if group["slow_ema_bits"] == 8 else allowed[0] for name, allowed in ALLOWED_FORMATS.items()
    }


def has_remainder(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether master weights keep what is rounded away from this parameter."""
    return group["master_weights"] == "remainder" and p.dtype == torch.bfloat16


def storage(p: Tensor, number: int, group: Mapping[str, Any]) -> Storage:
    """How the state of a parameter is stored, in a group of that number."""
    entries: list[tuple[str, torch.dtype]] = []
    for name, format in formats(p, group).items():
        if format is None:
            entries.append((name, compute_dtype(p.dtype)))
        else:
            entries += [(name, CODE_DTYPES[format]), (f"{name}{SCALES}", torch.float32)]
    if has_remainder(p, group):
        entries.append((MASTER_REMAINDER, torch.int16))
    return Storage(number, p.device, paging.is_paged(p, group), tuple(entries))


def has_state(state: ParamState | None) -> TypeGuard[ParamState]:
    """Whether an entry of `optimizer.state` has more than others' entries."""
    return state is not None and "exp_avg" in state


def without_state(state: OptimizerState, groups: Sequence[Options]) -> list[tuple[Tensor, Storage]]:
    """The parameters that are to get state, and how it is stored; refuses those that can't be updated."""
    members = []
    for number, group in enumerate(groups):
        params = [p for p in group["params"] if is_trained(p) and not has_state(state.get(p))]
        if params:
            check_params(group, number)
        members += [(p, storage(p, number, group)) for p in params]
    return members


@torch.no_grad()
def make_state(state: OptimizerState, members: Sequence[tuple[Tensor, Storage]]) -> None:
    """Gives parameters state as it is before the first step, in one arena for each kind of storage.

    If state is to be separate, each parameter gets an arena of its own.
    """
    together: dict[Any, tuple[Storage, list[Tensor]]] = {}
    for p, kind in members:
        together.setdefault((kind, id(p) if state.layout.separate else None), (kind, []))[1].append(p)
    for kind, params in together.values():
        for p, (part, entries) in zip(params, allocate(params, kind), strict=True):
            state[p].place(part, entries)


@torch.no_grad()
def separate(state: OptimizerState) -> None:
    """Moves the state of each parameter into an arena of its own, now and whenever state is made."""
    state.layout.separate = True
    members, values = [], []
    for p, own in state.items():
        if isinstance(own, ParamState) and own.part is not None:
            members.append((p, own.part.arena.storage))
            values.append(dict(own))
    make_state(state, members)
    for (p, _), old in zip(members, values, strict=True):
        write(state[p], old)


def write(state: ParamState, values: Mapping[str, Tensor]) -> None:
    """Copies values into a parameter's state, in the tensors that are there; of those that aren't given, zeros."""
    for name in [name for name in NAMES if name in state]:
        target = sharding.local(state[name])
        if name in values:
            target.copy_(sharding.local(values[name]).reshape(target.shape))
        else:
            target.zero_()

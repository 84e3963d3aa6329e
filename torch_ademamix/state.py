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
from torch_ademamix.options import Options, check_params, is_trained, param_name
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


Formats = dict[str, Format | None]  # of the moments that a parameter's state has: None is unquantized


def formats(p: Tensor, group: Mapping[str, Any], has_exp_avg: bool | None = None) -> Formats:
    """How each moment of a parameter is stored. With a β1 of 0 there is no exp_avg: it would be the gradient.

    Args:
        has_exp_avg: whether there is exp_avg, of state that has been made; if not given, β1 decides.
    """
    if has_exp_avg is None:
        has_exp_avg = bool(group["betas"][0] > 0)
    names = [name for name in MOMENTS if has_exp_avg or name != "exp_avg"]
    if group["optim_bits"] == 32 or p.numel() < group["min_8bit_size"] or sharding.scales_shape(p) is None:
        return dict.fromkeys(names)
    return {name: ALLOWED_FORMATS[name][-1 if group["slow_ema_bits"] == 8 else 0] for name in names}


def formats_of(state: Mapping[str, Any]) -> Formats:
    """How the moments of a state are stored, by its entries; of one that lacks some, what it comes nearest to."""
    has_exp_avg = "exp_avg" in state or f"exp_avg{SCALES}" in state
    names = [name for name in MOMENTS if has_exp_avg or name != "exp_avg"]
    if f"{names[0]}{SCALES}" not in state:
        return dict.fromkeys(names)
    dtypes = {name: getattr(state.get(name), "dtype", None) for name in names}
    return {
        name: next((format for format in ALLOWED_FORMATS[name] if CODE_DTYPES[format] == dtypes[name]), allowed[0])
        for name, allowed in ALLOWED_FORMATS.items()
        if name in names
    }


def entries(formats: Mapping[str, Format | None], unquantized: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
    """The entries of a parameter's state beside its step and remainder, and their dtypes.

    >>> list(entries({"exp_avg_slow": "linear_int16", "exp_avg_sq": None}))
    ['exp_avg_slow', 'exp_avg_slow_absmax', 'exp_avg_sq']
    """
    result = {}
    for name, format in formats.items():
        result[name] = unquantized if format is None else CODE_DTYPES[format]
        if format is not None:
            result[f"{name}{SCALES}"] = torch.float32
    return result


def op_entries(formats: Mapping[str, Format | None]) -> tuple[str | None, ...]:
    """The entries that the lists of a step's op have, in their order; None for a list that is empty."""
    own = entries(formats)
    quantized = any(formats.values())
    wanted = (entry for name in MOMENTS for entry in ((name, f"{name}{SCALES}") if quantized else (name,)))
    return (*(name if name in own else None for name in wanted), "step")


def has_remainder(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether master weights keep what is rounded away from this parameter."""
    return group["master_weights"] == "remainder" and p.dtype == torch.bfloat16


def storage(p: Tensor, group: Mapping[str, Any], has_exp_avg: bool | None = None) -> Storage:
    """How the state of a parameter of a group is stored; see :func:`formats`."""
    own = entries(formats(p, group, has_exp_avg), compute_dtype(p.dtype))
    if has_remainder(p, group):
        own[MASTER_REMAINDER] = torch.int16
    return Storage(p.device, paging.is_paged(p, group), tuple(own.items()))


def has_state(state: ParamState | None) -> TypeGuard[ParamState]:
    """Whether an entry of `optimizer.state` has more than others' entries."""
    return state is not None and any(name in state for name in NAMES if name != "step")


def has_exp_avg(state: ParamState | None) -> bool:
    """Whether a parameter has state with an exp_avg."""
    return has_state(state) and "exp_avg" in formats_of(state)


def check_exp_avg(state: OptimizerState, groups: Sequence[Options]) -> None:
    """Refuses a β1 above 0 where state was made at 0.

    Raises:
        ValueError: with the parameter's name.
    """
    for number, group in enumerate(groups):
        if group["betas"][0] == 0:
            continue
        for i, p in enumerate(group["params"]):
            if has_state(state.get(p)) and not has_exp_avg(state[p]):
                raise ValueError(
                    f"betas[0] is {group['betas'][0]}, but the state of {param_name(group, number, i)} has no exp_avg, "
                    "since betas[0] was 0 when it was made. Set betas[0] to 0 (CyclicLR and OneCycleLR: "
                    "cycle_momentum=False), or call optimizer.load_state_dict(optimizer.state_dict()), which starts "
                    "exp_avg at zero"
                )


def without_state(
    state: OptimizerState, groups: Sequence[Options], include_frozen: bool = False
) -> list[tuple[Tensor, Storage]]:
    """The parameters that are to get state, and how it is stored; refuses those that can't be updated."""
    members = []
    for number, group in enumerate(groups):
        params = [p for p in group["params"] if (include_frozen or is_trained(p)) and not has_state(state.get(p))]
        if params:
            check_params(group, number, include_frozen)
        members += [(p, storage(p, group)) for p in params]
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
        for p, (part, own) in zip(params, allocate(params, kind), strict=True):
            state[p].place(part, own)


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

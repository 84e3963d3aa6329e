"""How a parameter's state is stored, and its allocation."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torch_ademamix.numerics.bfloat16 import REMAINDERS
from torch_ademamix.numerics.moments import Formats, codes_in, entries, entries_of, formats_of, quantized_formats
from torch_ademamix.numerics.reference_step import state_dtype
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise
from torch_ademamix.state import paging, sharding
from torch_ademamix.state.arenas import MASTER_REMAINDER, NAMES, OptimizerState, ParamState, StorageSpec, allocate
from torch_ademamix.state.options import Options, check_params, is_trained, param_name

# A group's "state_format": a state dict tells by it which formats its codes have. A later version with other formats
# will have another number.
STATE_FORMAT = 2


def formats(p: Tensor, group: Mapping[str, Any], has_exp_avg: bool | None = None) -> Formats:
    """How each moment of a parameter is stored. With a β1 of 0 there is no exp_avg: it would be the gradient.

    Args:
        has_exp_avg: whether there is exp_avg, of state that has been made; if not given, β1 decides.
    """
    if has_exp_avg is None:
        has_exp_avg = bool(group["betas"][0] > 0)
    quantized = quantized_formats(group["slow_ema_bits"], has_exp_avg)
    is_small = p.numel() < group["min_8bit_size"]
    if group["optim_bits"] == 32 or is_small or p.is_complex() or sharding.scales_shape(p) is None:
        return dict.fromkeys(quantized)
    return quantized


def remainder_dtype(p: Tensor, group: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of a parameter's remainder, which makes it a master weight; None if it has none."""
    return REMAINDERS.get(group["master_weights"]) if p.dtype == torch.bfloat16 else None


def storage_spec(p: Tensor, group: Mapping[str, Any], has_exp_avg: bool | None = None) -> StorageSpec:
    """How the state of a parameter of a group is stored; see :func:`formats`."""
    own = entries(formats(p, group, has_exp_avg), state_dtype(p.dtype))
    if dtype := remainder_dtype(p, group):
        own[MASTER_REMAINDER] = dtype
    return StorageSpec(p.device, paging.is_paged(p, group), tuple(own.items()))


def has_state(state: ParamState | None) -> TypeGuard[ParamState]:
    """Whether an entry of `optimizer.state` has more than others' entries."""
    return state is not None and any(name in state for name in NAMES if name != "step")


def has_exp_avg(state: ParamState | None) -> bool:
    """Whether a parameter has state with an exp_avg."""
    return has_state(state) and "exp_avg" in formats_of(state)


def check_exp_avg(state: OptimizerState, groups: Sequence[Options]) -> None:
    """Checks that state which was created at β1 = 0, and so has no exp_avg, isn't used with a β1 above 0.

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


def params_needing_state(
    state: OptimizerState, groups: Sequence[Options], include_frozen: bool = False
) -> list[tuple[Tensor, StorageSpec]]:
    """The parameters that need state, and how it will be stored.

    Raises:
        ValueError: a parameter can't be updated.
    """
    members = []
    for number, group in enumerate(groups):
        chosen = (p for p in group["params"] if is_trained(p) or (include_frozen and not is_lazy(p)))
        params = [p for p in chosen if not has_state(state.get(p))]
        if params:
            check_params(group, number, include_frozen)
        members += [(p, storage_spec(p, group)) for p in params]
    return members


@torch.no_grad()
def allocate_state(state: OptimizerState, members: Sequence[tuple[Tensor, StorageSpec]]) -> None:
    """Gives parameters state as it is before the first step, in one arena for each kind of storage.

    If state is to be separate, each parameter gets an arena of its own.
    """
    together: dict[Any, tuple[StorageSpec, list[Tensor]]] = {}
    for p, kind in members:
        together.setdefault((kind, id(p) if state.plan_cache.separate else None), (kind, []))[1].append(p)
    for kind, params in together.values():
        for p, (slice, own) in zip(params, allocate(params, kind), strict=True):
            state[p].assign(slice, own)


@torch.no_grad()
def separate(state: OptimizerState) -> None:
    """Moves the state of each parameter into an arena of its own, now and whenever state is made."""
    state.plan_cache.separate = True
    members, values = [], []
    for p, own in state.items():
        if isinstance(own, ParamState) and own.slice is not None:
            members.append((p, own.slice.arena.storage))
            values.append(dict(own))
    allocate_state(state, members)
    for (p, _), old in zip(members, values, strict=True):
        write(state[p], old)


def write(state: ParamState, values: Mapping[str, Tensor]) -> None:
    """Copies values into a parameter's state, in the tensors that are there; of those that aren't given, zeros."""
    given = sharding.local_entries(values)
    for name, target in sharding.local_entries(state).items():
        if name in given:
            target.copy_(given[name].reshape(target.shape))
        elif name in NAMES:
            target.zero_()


def read_ema(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The values of a moment, unquantized, in new memory; of a DTensor those of its local tensor."""
    own = formats_of(state)
    format = own[name]
    local = sharding.local_entries({entry: value for entry, value in state.items() if entry in NAMES})
    if format is None:
        return local[name].detach().clone()  # type: ignore[no-any-return]
    codes, absmax = codes_in(local, own)[name]
    return dequantize_blockwise(codes.contiguous(), absmax.flatten(), format)


def write_ema(state: Mapping[str, Tensor], name: str, values: Tensor) -> None:
    """Stores values, rounded to nearest, where a moment lies; `values` and `state` are local tensors."""
    own = formats_of(state)
    format = own[name]
    if format is None:
        state[name].copy_(values)
        return
    codes, absmax = quantize_blockwise(values.float().contiguous(), format)
    changed = {**codes_in(state, own), name: (codes, absmax)}
    for entry, value in entries_of(changed, own).items():
        state[entry].copy_(value.view(state[entry].shape))

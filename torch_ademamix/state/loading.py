"""Loading a state dict: check its groups, convert its state (saved.py), and write that into the optimizer's state."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from torch_ademamix.numerics.moments import (
    MOMENTS,
    formats_of,
)
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import (
    STATE_FORMAT,
    allocate_state,
    formats,
    has_exp_avg,
    storage_spec,
    write,
)
from torch_ademamix.state.arenas import (
    MASTER_REMAINDER,
    NAMES,
    Arena,
    OptimizerState,
    ParamState,
    StorageSpec,
)
from torch_ademamix.state.options import OPTIONS, check_options, error_context, param_name
from torch_ademamix.state.plain_options import plain_options
from torch_ademamix.state.saved import convert_saved, expect_precision

STATE_DICT = "what an optimizer's state_dict() returns, with 'state' and 'param_groups'"

# The options of a group that say how state is stored. They are the optimizer's own: a checkpoint that was stored
# otherwise is converted when it is loaded.
STORAGE_OPTIONS = ("optim_bits", "slow_ema_bits", "min_8bit_size", "is_paged", "master_weights")

DROPPED_EXP_AVG = "the state dict has exp_avg, which isn't kept, since betas[0] is 0: there it is the gradient"
NARROWED_REMAINDER = (
    "the state dict has remainders of 16 bits, and master_weights is 'remainder8': 8 bits are kept, rounded to nearest"
)
NEW_EXP_AVG = "the state dict has no exp_avg, since betas[0] was 0; now it isn't, and exp_avg starts at zero"


@contextmanager
def real_or_fake(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A state dict for parameters as they are under a FakeTensorMode: fake, or real, which are loaded as without it."""
    mode = torch._guards.active_fake_mode()
    if mode is None:
        yield state_dict
    elif any(isinstance(p, FakeTensor) for group in groups for p in group["params"]):
        check_is_state_dict(state_dict)
        yield {**state_dict, "state": tree_map_only(Tensor, mode.from_tensor, state_dict["state"])}
    else:
        with unset_fake_temporarily():
            yield state_dict


def converted_state_dict(
    state_dict: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]], own_state: Mapping[Any, Any]
) -> dict[str, Any]:
    """Checks a state dict, and converts its state to the formats in which an optimizer keeps it.

    How state is stored is the optimizer's choice. It keeps exp_avg if the loaded β1 is above 0, or if its state has it
    already. A warning says what gets lost or is missing.

    The converted tensors are hidden: torch's `load_state_dict` would cast them to the parameter's dtype. It passes
    them on to `__setstate__`, which calls :func:`write_state`.

    Args:
        own_groups: the optimizer's.
        own_state: the optimizer's.

    Raises:
        ValueError: a state or an option isn't as it has to be.
    """
    check_is_state_dict(state_dict)
    groups = list(map(plain_options, state_dict["param_groups"]))
    state = dict(state_dict["state"])
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own_groups]:
        return {"state": state, "param_groups": groups}  # torch's load_state_dict raises
    for k, group in enumerate(own_groups):
        with error_context(f"state_dict['param_groups'][{k}]"):
            groups[k] = completed(groups[k], group)
            check_options({**group, **groups[k]})
            check_format(groups[k])
    warnings_due: set[str] = set()
    for k, (saved, group) in enumerate(zip(groups, own_groups, strict=True)):
        beta1 = {**group, **saved}["betas"][0]
        for n, (i, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            if i in state:
                keeps_exp_avg = bool(beta1 > 0) or has_exp_avg(own_state.get(p))
                with error_context(param_name(group, k, n)):
                    converted = _converted(p, state[i], saved, group, keeps_exp_avg, f"state_dict['state'][{i!r}]")
                warnings_due |= _warnings(state[i], converted, beta1)
                others = {name: value for name, value in state[i].items() if name not in NAMES}
                state[i] = others | {name: _Hidden(value) for name, value in converted.items()}
    for text in sorted(warnings_due):
        warnings.warn(text, stacklevel=2)
    for k, group in enumerate(own_groups):
        groups[k] |= {name: group[name] for name in STORAGE_OPTIONS} | {"state_format": STATE_FORMAT}
    return {"state": state, "param_groups": groups}


def _converted(
    p: Tensor,
    saved_state: Mapping[str, Any],
    saved_group: Mapping[str, Any],
    group: Mapping[str, Any],
    keeps_exp_avg: bool,
    where: str,
) -> dict[str, Tensor]:
    if is_lazy(p):
        raise ValueError("is not initialized yet: call its lazy module once, then load the state")
    converted = convert_saved(p, saved_state, formats(p, group, keeps_exp_avg), group, where)
    expect_precision(saved_state, saved_group, where)
    return converted


def _warnings(saved: Mapping[str, Any], converted: Mapping[str, Tensor], beta1: float) -> set[str]:
    """What a conversion loses, or starts at zero."""
    texts = set()
    had, has = "exp_avg" in formats_of(saved), "exp_avg" in formats_of(converted)
    if had and not has:
        texts.add(DROPPED_EXP_AVG)
    if not had and beta1 > 0:
        texts.add(NEW_EXP_AVG)
    remainders = [entries[MASTER_REMAINDER] for entries in (saved, converted) if MASTER_REMAINDER in entries]
    if [remainder.dtype for remainder in remainders] == [torch.int16, torch.int8]:
        texts.add(NARROWED_REMAINDER)
    return texts


def completed(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group, with the optimizer's options for those that it lacks, and for a β3 that is None.

    Options of storage aren't added: those that are saved say in which formats state was saved.

    Raises:
        ValueError: the group is AdamW's.
    """
    own = {name: group[name] for name in OPTIONS if name in group and name not in STORAGE_OPTIONS}
    betas = saved.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) == 2:
        raise ValueError(
            f"betas is {betas!r}, but must be three numbers in [0, 1): convert a state dict of AdamW with "
            "torch_ademamix.checkpoint.from_adamw"
        )
    if isinstance(betas, (tuple, list)) and len(betas) == 3 and betas[2] is None:
        saved = {**saved, "betas": (*betas[:2], group["betas"][2])}
    return {**own, **saved}


def check_format(saved: Mapping[str, Any]) -> None:
    """Checks that the state of a saved group is in this version's formats.

    Raises:
        ValueError: its `state_format` is another one.
    """
    if saved.get("state_format", STATE_FORMAT) != STATE_FORMAT:
        raise ValueError(
            f"state_format is {saved['state_format']!r}, but must be {STATE_FORMAT}: another version of torch_ademamix "
            "has saved this, whose formats of state this one doesn't know"
        )


def check_is_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict must be {STATE_DICT}")


class _Hidden:
    """A converted tensor on its way through torch's `load_state_dict`, which looks for tensors in containers only."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _shown(entry: Any) -> dict[str, Any]:
    return {name: value.value if isinstance(value, _Hidden) else value for name, value in entry.items()}


@torch.no_grad()
def write_state(state: OptimizerState, entries: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes `entries` the contents of an optimizer's state: tensors of the right form that are there take the values.

    If that memory has another user, such as a state dict that somebody has kept, or if values come from it, the other
    user keeps it, and state gets new memory. The state of a parameter without entries becomes what it is before the
    first step.

    Args:
        entries: by parameter, its state, of which :func:`converted_state_dict` may have hidden tensors; and what others
            keep under other keys.
        groups: the optimizer's.
    """
    params = {p: group for group in groups for p in group["params"]}
    for key in [key for key in state if key not in entries and key not in params]:
        del state[key]
    values: dict[Tensor, dict[str, Tensor]] = {}
    for p, group in params.items():
        if p in entries or p in state:
            new = _shown(entries.get(p, {}))
            own = {name: new[name] for name in NAMES if name in new}
            if own and not _fits(own, p, storage_spec(p, group, "exp_avg" in formats_of(own))):
                state[p] = new  # an older pickle's, say; the step raises
                continue
            for name in [name for name in state[p] if name not in NAMES]:
                del state[p][name]
            state[p].update({name: value for name, value in new.items() if name not in NAMES})
            values[p] = own
    allocate_state(state, _needing_memory(state, values, params))
    for p, own in values.items():
        if not _is_there(own, state[p]):
            write(state[p], own)
    for key, value in entries.items():
        if key not in params:
            state[key] = value


def _needing_memory(
    state: OptimizerState,
    values: Mapping[Tensor, Mapping[str, Tensor]],
    groups: Mapping[Tensor, Mapping[str, Any]],
) -> list[tuple[Tensor, StorageSpec]]:
    """The parameters whose values can't be written to the memory of their state, and how theirs is to be stored."""
    fresh: list[tuple[Tensor, StorageSpec]] = []
    written: dict[Arena, None] = {}
    for p, own in values.items():
        old = state[p]
        if old.slice is not None and not old.slice.is_of(p, old):  # memory was exchanged behind its tensors
            old.leave()
        kind = storage_spec(p, groups[p], "exp_avg" in formats_of(own))
        if own and (old.slice is None or old.slice.arena.storage != kind):
            fresh.append((p, kind))
        elif old.slice is not None and not _is_there(own, old):
            written[old.slice.arena] = None
    loaded = {id(value) for own in values.values() for value in sharding.local_entries(own).values()}
    for arena in written:
        if arena.is_held(loaded):
            in_arena = [p for p in values if (slice := state[p].slice) is not None and slice.arena is arena]
            fresh += [(p, arena.storage) for p in in_arena]
    return fresh


def _is_there(own: Mapping[str, Tensor], state: ParamState) -> bool:
    """Whether values are already in the memory of the state, as those of a state dict of the optimizer itself are."""
    there = sharding.local_entries(state)
    return bool(own) and all(_is_same(value, there[name]) for name, value in sharding.local_entries(own).items())


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are the same memory."""
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor) or a.is_meta or b.is_meta:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.device) == (b.data_ptr(), b.shape, b.stride(), b.device)


def _fits(own: Mapping[str, Any], p: Tensor, kind: StorageSpec) -> bool:
    """Whether state is of that kind, so that an arena can take its values."""
    dtypes = {"step": torch.float32, **dict(kind.entries)}
    return {name: value.dtype for name, value in own.items() if isinstance(value, Tensor)} == dtypes and all(
        own[name].shape == p.shape for name in dtypes if name in MOMENTS
    )

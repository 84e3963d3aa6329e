"""What conversions of state dicts have in common: each goes over its groups and the state of its parameters."""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from torch_ademamix.numerics.moments import MOMENTS, SCALES, entries, formats_of
from torch_ademamix.numerics.pairs import COMPLEX_DTYPES
from torch_ademamix.numerics.reference_step import state_dtype
from torch_ademamix.ops.check import PARAMETER_DTYPES
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.state.arenas import NAMES
from torch_ademamix.state.loading import check_format, check_is_state_dict
from torch_ademamix.state.options import error_context
from torch_ademamix.state.saved import convert_saved, expect_tensor

StateDict = dict[str, Any]


def convert(
    state_dict: Mapping[str, Any],
    convert_state: Callable[[Mapping[str, Any], Mapping[str, Any], str], StateDict],
    convert_group: Callable[[Mapping[str, Any], str], StateDict],
) -> StateDict:
    """The state dict with each parameter's state, given with its group, and each group converted."""
    check_is_state_dict(state_dict)
    groups = state_dict["param_groups"]
    converted_groups = [
        convert_group(copy.deepcopy(group), f"state_dict['param_groups'][{k}]") for k, group in enumerate(groups)
    ]
    group_of = {i: group for group in groups for i in group["params"]}
    state = {}
    for i, saved in state_dict["state"].items():
        where = f"state_dict['state'][{i!r}]"
        if not isinstance(saved, Mapping):
            raise ValueError(f"{where} is a {type(saved).__name__}, but must be a dict")
        if i not in group_of:
            raise ValueError(f"{where} belongs to no parameter in state_dict['param_groups']")
        state[i] = convert_state(saved, group_of[i], where)
    return {"state": state, "param_groups": converted_groups}


def kept(state: StateDict, group: Mapping[str, Any]) -> StateDict:
    """What AdEMAMix keeps of a parameter's state: at a β1 of 0 no exp_avg, which is the gradient there."""
    return {name: value for name, value in state.items() if name != "exp_avg" or group["betas"][0] > 0}


def renamed(
    group: Mapping[str, Any],
    where: str,
    names: Mapping[str, str],
    *,
    dropped: Collection[str] = (),
    betas: int = 3,
) -> StateDict:
    """The group with its options under the new names, their keys in `names`."""
    for theirs in names.values():
        if theirs not in group:
            raise ValueError(f"{where} has no {theirs!r}, but must have {sorted(names.values())}")
    values = tuple(float(beta) for beta in group["betas"])
    if len(values) != betas:
        raise ValueError(f"{where}['betas'] is {values}, but must be {betas} numbers")
    others = {name: value for name, value in group.items() if name not in {*names.values(), *dropped}}
    return {**others, **{ours: group[theirs] for ours, theirs in names.items()}, "betas": values}


def exported_options(group: Mapping[str, Any], where: str, names: Mapping[str, str], target: str) -> StateDict:
    """A group of AdEMAMix with the options that another implementation has, under its names: the keys of `names`."""
    with error_context(where):
        check_format(group)
    if group.get("maximize"):
        raise ValueError(f"{where}['maximize'] is True, but must be False: {target} only minimizes")
    for name in ("delta", "kappa", "t_weight_decay"):
        if group.get(name) is not None:
            raise ValueError(f"{where}[{name!r}] is {group[name]!r}, but must be None: {target} has no such schedule")
    start = group.get("schedule_start", 0)
    if start > 0 and (group.get("t_alpha") or group.get("t_beta3")):
        raise ValueError(
            f"{where}['schedule_start'] is {start}, but must be 0, or t_alpha and t_beta3 None: "
            f"{target} counts its schedules from the first step"
        )
    arguments = inspect.signature(AdEMAMix).parameters
    options = renamed(group, where, names, dropped={*arguments, "state_format"} - {"params", *names})
    return {**options, "lr": float(options["lr"])}


def unquantized(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    """The step and the three moments of AdEMAMix's saved state; an exp_avg that isn't kept at a β1 of 0 is zero."""
    if others := saved.keys() - set(NAMES):
        raise ValueError(f"{where} has entries {sorted(others)}, but must have AdEMAMix's own only")
    shaped = [name for name in entries(formats_of(saved)) if not name.endswith(SCALES)]  # as the parameter
    name = next((name for name in shaped if name in saved), "exp_avg_slow")
    like = expect_tensor(saved.get(name), f"{where}[{name!r}]", None)
    return convert_saved(like, saved, dict.fromkeys(MOMENTS), {"master_weights": None}, where)


def moment(saved: Mapping[str, Any], name: str, where: str, like: Tensor | None = None) -> Tensor:
    """A moment in the dtype that AdEMAMix keeps it in, in memory of its own; of the shape of `like`."""
    shape = None if like is None else like.shape
    value = expect_tensor(saved[name], f"{where}[{name!r}]", shape, *PARAMETER_DTYPES, *COMPLEX_DTYPES)
    return value.to(state_dtype(value.dtype), copy=True)


def check_entries(saved: Mapping[str, Any], where: str, expected: set[str]) -> None:
    if saved.keys() != expected:
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}")

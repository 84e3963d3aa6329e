"""Saved state on its way into an optimizer: checked, converted to the formats that it is kept in, and taken."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import block_count
from torch_ademamix.numerics.moments import (
    MOMENTS,
    SCALES,
    WITHOUT_EXP_AVG,
    Formats,
    codes_in,
    entries,
    entries_of,
    formats_of,
)
from torch_ademamix.numerics.reference_step import state_dtype
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise
from torch_ademamix.ops.check import in_place_problem
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import (
    STATE_FORMAT,
    formats,
    has_exp_avg,
    make_state,
    remainder_dtype,
    storage,
    write,
)
from torch_ademamix.state.arenas import (
    MASTER_REMAINDER,
    NAMES,
    Arena,
    OptimizerState,
    ParamState,
    Storage,
)
from torch_ademamix.state.options import OPTIONS, check_options, param_name, refusals_of
from torch_ademamix.state.plain_options import plain_options

STATE_DICT = "what an optimizer's state_dict() returns, with 'state' and 'param_groups'"

# The options of a group that say how state is stored. They are the optimizer's own: a checkpoint that was stored
# otherwise is converted when it is loaded.
STORAGE_OPTIONS = ("optim_bits", "slow_ema_bits", "min_8bit_size", "is_paged", "master_weights")

# An entry that only another implementation's state has, and what to do then.
BITSANDBYTES_STATE = "__bnb_optimizer_quant_state__"  # where bitsandbytes nests most of a parameter's state
FOREIGN_STATE = {
    BITSANDBYTES_STATE: "; load bitsandbytes' state with torch_ademamix.checkpoint.from_bitsandbytes",
    "exp_avg_fast": "; load Apple's state with torch_ademamix.checkpoint.from_apple, the Apertus fork's with "
    "from_apertus",
}

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


def checked_state_dict(
    state_dict: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]], own_state: Mapping[Any, Any]
) -> dict[str, Any]:
    """A state dict for an optimizer of `own_groups`, checked, with state in the formats in which that keeps it.

    The state is hidden from torch's `load_state_dict`, which would cast it to the parameter's dtype, and brought out
    by :func:`brought_out`. How state is stored stays the optimizer's own affair. exp_avg is kept where the loaded β1 is
    above 0, or the optimizer's state has it already. What loses or lacks information is warned of.

    Raises:
        ValueError: a state or an option isn't as it has to be.
    """
    check_is_state_dict(state_dict)
    groups = list(map(plain_options, state_dict["param_groups"]))
    state = dict(state_dict["state"])
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
        return {"state": state, "param_groups": groups}  # for torch to refuse
    for number, (saved, group) in enumerate(zip(groups, own_groups, strict=True)):
        with refusals_of(f"state_dict['param_groups'][{number}]"):
            groups[number] = saved = completed(saved, group)
            check_options({**group, **saved})
            check_format(saved)
    warnings_due = set()
    for number, (saved, group) in enumerate(zip(groups, own_groups, strict=True)):
        beta1 = {**group, **saved}["betas"][0]
        for place, (i, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            if i not in state:
                continue
            keeps_exp_avg = bool(beta1 > 0) or has_exp_avg(own_state.get(p))
            where = f"state_dict['state'][{i!r}]"
            with refusals_of(param_name(group, number, place)):
                if is_lazy(p):
                    raise ValueError("is not initialized yet: call its lazy module once, then load the state")
                loaded = loaded_state(p, state[i], formats(p, group, keeps_exp_avg), group, where)
                check_precision(state[i], saved, where)
                was_kept = "exp_avg" in formats_of(state[i])
            if was_kept and not keeps_exp_avg:
                warnings_due.add(DROPPED_EXP_AVG)
            if not was_kept and beta1 > 0:
                warnings_due.add(NEW_EXP_AVG)
            remainders = [entries[MASTER_REMAINDER] for entries in (state[i], loaded) if MASTER_REMAINDER in entries]
            if [remainder.dtype for remainder in remainders] == [torch.int16, torch.int8]:
                warnings_due.add(NARROWED_REMAINDER)
            others = {name: value for name, value in state[i].items() if name not in NAMES}
            state[i] = {**others, **{name: _Hidden(value) for name, value in loaded.items()}}
    for text in sorted(warnings_due):
        warnings.warn(text, stacklevel=2)
    stored = [{name: group[name] for name in STORAGE_OPTIONS} | {"state_format": STATE_FORMAT} for group in own_groups]
    return {"state": state, "param_groups": [{**saved, **own} for saved, own in zip(groups, stored, strict=True)]}


def completed(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group that has the optimizer's own options, and β3, where it has none or None as β3.

    The options of storage aren't completed: those that are saved say in which formats state was saved.

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
    """A loaded tensor on its way past torch's cast, which looks into dicts, sequences and tensors only."""

    def __init__(self, value: Any) -> None:
        self.value = value


def brought_out(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """What `optimizer.state` is after torch's part of loading, with the state that :func:`checked_state_dict` hid."""
    return {key: _brought_out(entry) for key, entry in entries.items()}


def _brought_out(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {name: value.value if isinstance(value, _Hidden) else value for name, value in entry.items()}


@torch.no_grad()
def take_state(state: OptimizerState, entries: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes `entries` what is in an optimizer's state: where its tensors are of the right form, they take the values.

    If the memory that they would be written to has another user, as a state dict that somebody has kept, or is where
    values come from, that user keeps it, and state gets new memory. A parameter that has state, but no entries, is as
    before its first step then.
    """
    params = {p: group for group in groups for p in group["params"]}
    for key in [key for key in state if key not in entries and key not in params]:
        del state[key]
    fresh: list[tuple[Tensor, Storage]] = []
    values: dict[Tensor, dict[str, Tensor]] = {}
    changed: dict[Arena, None] = {}  # those that are written to
    for p, group in params.items():
        if p not in entries and p not in state:
            continue
        new = dict(entries.get(p, ()))
        own = {name: new[name] for name in NAMES if name in new}
        kind = storage(p, group, "exp_avg" in formats_of(own))
        if own and not _fits(own, p, kind):  # an older pickle's, say: the step refuses what it can't use
            state[p] = new
            continue
        old = state[p]
        for name in [name for name in old if name not in NAMES]:
            del old[name]
        old.update({name: value for name, value in new.items() if name not in NAMES})
        values[p] = own
        if old.part is not None and not old.part.is_of(p, old):  # memory was exchanged behind its tensors
            old.leave()
        if own and (old.part is None or old.part.arena.storage != kind):
            fresh.append((p, kind))
        elif old.part is not None and not _is_there(own, old):
            changed[old.part.arena] = None
    loaded = {id(sharding.local(value)) for own in values.values() for value in own.values()}
    for arena in changed:
        if arena.is_held(loaded):
            in_arena = [p for p in values if (part := state[p].part) is not None and part.arena is arena]
            fresh += [(p, arena.storage) for p in in_arena]
    make_state(state, fresh)
    for p, own in values.items():
        if not _is_there(own, state[p]):
            write(state[p], own)
    for key, value in entries.items():
        if key not in params:
            state[key] = value


def _is_there(own: Mapping[str, Tensor], state: ParamState) -> bool:
    """Whether values are where they belong already, as of a state dict of the optimizer itself."""
    return bool(own) and all(
        _is_same(sharding.local(value), sharding.local(state[name])) for name, value in own.items()
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are the same memory."""
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor) or a.is_meta or b.is_meta:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.device) == (b.data_ptr(), b.shape, b.stride(), b.device)


def _fits(own: Mapping[str, Any], p: Tensor, kind: Storage) -> bool:
    """Whether state is of that kind, so that an arena can take its values."""
    dtypes = {"step": torch.float32, **dict(kind.entries)}
    return {name: value.dtype for name, value in own.items() if isinstance(value, Tensor)} == dtypes and all(
        own[name].shape == p.shape for name in dtypes if name in MOMENTS
    )


def loaded_state(
    p: Tensor, saved: Mapping[str, Any], target: Formats, group: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """A parameter's saved state in the formats of `target`, on the devices where it was saved.

    What was stored in another format is converted, rounding to nearest; an exp_avg that wasn't saved is zero; a
    parameter without a saved remainder is its own master weight. A DTensor parameter takes DTensors that are placed as
    it is, and the whole state as plain tensors, of which each process keeps its part.

    Raises:
        ValueError: something is missing, unknown, or of another shape, dtype or placement; `where` begins the text.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is a {type(saved).__name__}, but must be a dict")
    if lost := [name for name, value in saved.items() if isinstance(value, Mapping) and not value]:
        raise ValueError(f"{where} has no {', '.join(lost)}: the flat state dict that torch made it of hasn't either")
    if any(sharding.is_dtensor(value) for value in saved.values()):
        part = sharding.parts(saved, p, where)
        return sharding.sharded(_converted(sharding.local(p), part, target, group, where), p)
    if sharding.is_dtensor(p):
        whole = _converted(sharding.whole(p), saved, target, group, where)
        return sharding.shard({name: value.to(p.device) for name, value in whole.items()}, p)
    return _converted(p, saved, target, group, where)


def check_precision(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    """Refuses loadable state that a distributed checkpoint of another precision was copied into.

    Its loader compares shapes only, and copies codes into tensors of any dtype. `group` has the saved options.

    Raises:
        ValueError: with `where` at its beginning.
    """
    hint = "load the checkpoint with the optim_bits, slow_ema_bits and min_8bit_size that it was saved with"
    otherwise = "or, if the group's option was changed after the state was made, set it back in the state dict"
    kept, wanted = saved.get(MASTER_REMAINDER), bfloat16.REMAINDERS.get(group.get("master_weights", ""))
    if isinstance(kept, Tensor) and wanted is not None and kept.dtype != wanted:
        text = f"{where}[{MASTER_REMAINDER!r}] has dtype {kept.dtype}, but its group has"
        hint = "load the checkpoint with the master_weights that it was saved with"
        raise ValueError(f"{text} master_weights={group['master_weights']!r}: {hint}, {otherwise}")
    if "exp_avg_slow" in saved and "exp_avg_slow_absmax" in saved:
        dtype, bits = saved["exp_avg_slow"].dtype, group.get("slow_ema_bits")
        if bits in WITHOUT_EXP_AVG and bits != 8 * dtype.itemsize:
            text = f"{where}['exp_avg_slow'] has dtype {dtype}, but its group has slow_ema_bits={bits}"
            raise ValueError(f"{text}: {hint}, {otherwise}")
    elif (
        "exp_avg_slow_absmax" not in saved
        and group.get("optim_bits") == 8
        and saved["exp_avg_sq"].numel() >= group.get("min_8bit_size", 0)
    ):
        moments = [sharding.local(saved[name]) for name in MOMENTS if name in saved]
        if any(map(_has_no_values, moments)):
            return
        if any(m.any() for m in moments) and all((m == m.round()).all() for m in moments):
            raise ValueError(f"{where} has codes of 8-bit state where its values should be: {hint}")


def _converted(
    p: Tensor,
    saved: Mapping[str, Any],
    target: Formats,
    group: Mapping[str, Any],
    where: str,
) -> dict[str, Tensor]:
    """:func:`loaded_state` of plain tensors, in the formats of `target`."""
    hints = [hint for entry, hint in FOREIGN_STATE.items() if entry in saved]
    saved = {name: saved[name] for name in NAMES if name in saved} if not hints else dict(saved)
    saved_remainder = saved.pop(MASTER_REMAINDER, None)
    source = formats_of(saved)
    quantized = any(source.values())
    if quantized and p.is_complex():
        raise ValueError(f"{where} is quantized, but the state of a complex parameter can't be; save it in 32 bits")
    expected = {"step", *entries(source)}
    if saved.keys() != expected:
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}{''.join(hints[:1])}")
    step = checked_step(saved["step"], f"{where}['step']")
    if not _finite_and_not_negative(step):
        raise ValueError(f"{where}['step'] is {step.item():g}, but must be finite and at least 0")
    _check_moments(p, saved, source, where)
    state = {"step": step}
    codes = codes_in({name: saved[name].contiguous() for name in entries(source)}, source) if quantized else {}
    converted: dict[str, tuple[Tensor, Tensor]] = {}
    for name, format in target.items():
        if name not in source:
            like = next(saved[entry] for entry in entries(source) if not entry.endswith(SCALES))
            values = torch.zeros_like(like, dtype=state_dtype(p.dtype))
        elif not quantized:
            values = saved[name].contiguous() if in_place_problem(saved[name]) else saved[name]  # a converter's zeros
        else:
            own, absmax = codes[name][0], codes[name][1].flatten()
            if (own_format := source[name]) != format and own_format is not None:
                values = dequantize_blockwise(own, absmax, own_format)
            else:
                converted[name] = own, _shaped(absmax, p)
                continue
        if format is None:
            state[name] = values.to(state_dtype(p.dtype))
        else:
            own, absmax = quantize_blockwise(values.float().contiguous(), format)
            converted[name] = own, _shaped(absmax, p)
    if converted:
        state |= entries_of(converted, target)
    wanted_remainder = remainder_dtype(p, group)
    if saved_remainder is not None and wanted_remainder is None:
        raise ValueError(
            f"{where} has {MASTER_REMAINDER!r}, a part of the float32 weights, which would be lost; load it with "
            "master_weights='remainder' (or 'remainder8') and bfloat16 parameters, or delete the entry"
        )
    if saved_remainder is not None:
        remainder = checked(saved_remainder, f"{where}[{MASTER_REMAINDER!r}]", p.shape, *bfloat16.REMAINDERS.values())
        assert wanted_remainder is not None
        remainder = bfloat16.converted(remainder, wanted_remainder)
        if in_place_problem(remainder):
            remainder = remainder.contiguous()
        state[MASTER_REMAINDER] = remainder
    elif wanted_remainder is not None:
        state[MASTER_REMAINDER] = torch.zeros_like(p, dtype=wanted_remainder, memory_format=torch.preserve_format)
    return state


def _finite_and_not_negative(x: Tensor) -> bool:
    return _has_no_values(x) or bool(((x >= 0) & x.isfinite()).all())


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _check_moments(p: Tensor, saved: Mapping[str, Any], source: Formats, where: str) -> None:
    """Refuses moments that aren't of the shapes and dtypes that state of these formats has."""
    for name, dtype in entries(source, state_dtype(p.dtype)).items():
        entry = f"{where}[{name!r}]"
        if not name.endswith(SCALES):
            # The dtype of exp_avg_slow's codes tells their format.
            is_slow_codes = name == "exp_avg_slow" and any(source.values())
            checked(saved[name], entry, p.shape, *((torch.int16, torch.int8) if is_slow_codes else (dtype,)))
            continue
        absmax = checked(saved[name], entry, None, dtype)
        if absmax.shape != (block_count(p.numel()),):  # the scales in a row, as other implementations have them
            checked(absmax, entry, sharding.scales_shape(p))
        if not _finite_and_not_negative(absmax):
            raise ValueError(f"{entry} has scales that aren't finite or are below 0")


def _shaped(absmax: Tensor, p: Tensor) -> Tensor:
    shape = sharding.scales_shape(p)
    return absmax if shape is None else absmax.view(shape)


def checked_step(step: Any, where: str) -> Tensor:
    """A step count, a number or a tensor of one element, as a float32 tensor without dimensions; else a ValueError."""
    if not isinstance(step, (Tensor, Real)):
        raise ValueError(f"{where} is a {type(step).__name__}, but must be a number or a tensor")
    device = step.device if isinstance(step, Tensor) else "cpu"
    tensor = torch.as_tensor(step, dtype=torch.float32, device=device)
    if tensor.numel() != 1:
        raise ValueError(f"{where} has shape {list(tensor.shape)}, but must hold one element")
    return tensor.reshape(())


def checked(value: Any, where: str, shape: Sequence[int] | None, *dtypes: torch.dtype) -> Tensor:
    """`value`, if it is a tensor of that shape and one of these dtypes (None and none are any); else a ValueError."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, but must be a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{where} has layout {value.layout}, but must be dense")
    if shape is not None and value.shape != tuple(shape):
        raise ValueError(f"{where} has shape {list(value.shape)}, but must have {list(shape)}")
    if dtypes and value.dtype not in dtypes:
        raise ValueError(f"{where} has dtype {value.dtype}, but must be {' or '.join(map(str, dtypes))}")
    return value

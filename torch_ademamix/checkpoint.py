"""State dicts of other implementations made into AdEMAMix's, and bitsandbytes' made of it.

Each function takes what an optimizer's ``state_dict()`` returned, from memory or from a file, and returns what the
other's ``load_state_dict`` takes; no other package needs to be installed. The argument stays as it is, and the result
shares no memory with it; tensors stay on their devices. Keys of ``state`` are passed through, so parameter names serve
as well as numbers. Tensors must be whole: gather the state of sharded parameters first.

Group entries that no table here names, such as an LR scheduler's ``initial_lr``, are passed through too. Options of
AdEMAMix that the source doesn't have are left out: how state is stored (``optim_bits`` and so on) stays each group's
own in the optimizer that loads the result, ``stochastic_rounding``, ``seed`` and ``capturable`` become its defaults.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import dynamic_map
from torch_ademamix.arenas import MOMENTS, NAMES
from torch_ademamix.blockwise import BLOCK_SIZE, block_count
from torch_ademamix.check import PARAMETER_DTYPES
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.reference import compute_dtype
from torch_ademamix.state import BITSANDBYTES_STATE, checked, loaded_state

StateDict = dict[str, Any]

# Our options and what the others call them.
_BITSANDBYTES_OPTIONS = {name: name for name in ("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")}
_APPLE_OPTIONS = {**_BITSANDBYTES_OPTIONS, "t_alpha": "alpha_warmup", "t_beta3": "beta3_warmup"}
_ADAMW_OPTIONS = {name: name for name in ("lr", "betas", "eps", "weight_decay")}

# Options that the target doesn't have, or that are its own affair.
_ADEMAMIX_ONLY = inspect.signature(AdEMAMix).parameters.keys() - {"params", *_BITSANDBYTES_OPTIONS}
_ADAMW_ONLY = {"amsgrad", "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable"}


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> StateDict:
    """Makes a state dict for `AdEMAMix` of one of bitsandbytes' AdEMAMix classes (0.50.2), 32-bit, 8-bit or paged.

    8-bit codes become the float32 values that they stand for, and the optimizer that loads these stores them in its
    own formats: docs/checkpoints.md says what that rounding costs.

    bitsandbytes' CUDA kernel writes the slow average's scales of a tensor whose size isn't a multiple of 256 one entry
    early. Such state is recognized and read as that kernel reads it: the first of these scales is one with the last of
    the fast average's.

    Args:
        state_dict: what bitsandbytes' ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something isn't as bitsandbytes' AdEMAMix has it: missing, unknown, or of another shape or dtype.

    >>> p = torch.nn.Parameter(torch.ones(4096))
    >>> optimizer = AdEMAMix([p], optim_bits=8)
    >>> p.grad = torch.ones(4096)
    >>> optimizer.step()
    >>> state_dict = from_bitsandbytes(to_bitsandbytes(optimizer.state_dict()))
    >>> state_dict["state"][0]["exp_avg"].dtype
    torch.float32
    >>> optimizer.load_state_dict(state_dict)
    >>> optimizer.state[p]["exp_avg"].dtype, optimizer.state[p]["exp_avg_slow"].dtype
    (torch.int8, torch.int16)
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        options = _options(saved, where, _BITSANDBYTES_OPTIONS)
        return {**options, "t_alpha": options["t_alpha"] or None, "t_beta3": options["t_beta3"] or None}

    return _converted(state_dict, _state_from_bitsandbytes, group)


def _state_from_bitsandbytes(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    saved = {**saved, **saved.get(BITSANDBYTES_STATE, {})}  # older versions don't nest it
    saved.pop(BITSANDBYTES_STATE, None)
    quantized = "absmax1" in saved
    entries = {"step", "state1", "state2"}
    _check_entries(saved, where, entries | ({"qmap1", "qmap2", "absmax1", "absmax2"} if quantized else set()))

    dtype = torch.uint8 if quantized else torch.float32
    nu = checked(saved["state2"], f"{where}['state2']", None, dtype)
    m1, m2 = checked(saved["state1"], f"{where}['state1']", (2, *nu.shape), dtype)
    step = _step(saved["step"], f"{where}['step']")
    if not quantized:
        return {"step": step, "exp_avg": m1.clone(), "exp_avg_slow": m2.clone(), "exp_avg_sq": nu.clone()}
    for name, is_signed in (("qmap1", True), ("qmap2", False)):
        qmap = checked(saved[name], f"{where}[{name!r}]", (256,), torch.float32)
        if not torch.allclose(qmap, dynamic_map.dynamic_map(is_signed, qmap.device), rtol=1e-6, atol=0):
            kind = "signed" if is_signed else "unsigned"
            raise ValueError(f"{where}[{name!r}] must be the {kind} dynamic map, but has other values")
    blocks = block_count(nu.numel())
    nu_absmax = checked(saved["absmax2"], f"{where}['absmax2']", (blocks,), torch.float32)
    absmax1 = checked(saved["absmax1"], f"{where}['absmax1']", (2, blocks), torch.float32)
    m1_absmax, m2_absmax = absmax1
    if _written_one_entry_early(m2, m2_absmax, nu_absmax):
        m2_absmax = absmax1.flatten()[blocks - 1 : -1]
    return {
        "step": step,
        "exp_avg": dynamic_map.dequantize(m1, m1_absmax, signed=True),
        "exp_avg_slow": dynamic_map.dequantize(m2, m2_absmax, signed=True),
        "exp_avg_sq": dynamic_map.dequantize(nu, nu_absmax, signed=False),
    }


def _written_one_entry_early(m2: Tensor, m2_absmax: Tensor, nu_absmax: Tensor) -> bool:
    """Whether bitsandbytes' CUDA kernel wrote this state.

    It puts the scale of m2's block i at absmax1[(n + 256 i) // 256], counted over both rows, which is one entry early
    if n isn't a multiple of 256; the last entry stays 0. Elsewhere a block with a gradient has a scale.
    """
    ragged = m2.numel() % BLOCK_SIZE
    if ragged == 0:
        return False
    last_block_has_values = (nu_absmax[-1] > 0) & (m2.flatten()[-ragged:] != dynamic_map.SIGNED_ZERO_CODE).any()
    return bool(last_block_has_values & (m2_absmax[-1] == 0))


def to_bitsandbytes(state_dict: Mapping[str, Any]) -> StateDict:
    """Makes a state dict for bitsandbytes' AdEMAMix classes (0.50.2) of AdEMAMix's.

    State that is quantized here is so there: its values are rounded to the nearest of bitsandbytes' dynamic maps, a
    16-bit exp_avg_slow too, since bitsandbytes has no other format; at β3 = 0.9999 it loses most of its updates from
    then on. Everything else becomes float32, which all its classes continue, the 8-bit ones too. So does the state of
    a tensor whose size isn't a multiple of 256, since bitsandbytes' CUDA kernel would take its scales of exp_avg_slow
    from the wrong places.

    Options without a counterpart there are left out: how state is stored, ``stochastic_rounding``, ``seed``,
    ``capturable``, ``maximize`` and ``schedule_start``. A learning rate becomes a float.

    Args:
        state_dict: what the ``state_dict()`` of an `AdEMAMix` class returned.

    Returns:
        for the ``load_state_dict`` of bitsandbytes' AdEMAMix, AdEMAMix8bit, PagedAdEMAMix and PagedAdEMAMix8bit. (Its
        AdEMAMix32bit and PagedAdEMAMix32bit don't work: bitsandbytes issue 2075.)

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype; or there are remainders of master
            weights, a group maximizes, or its schedules don't begin at step 0, which bitsandbytes can't do.

    >>> p = torch.nn.Parameter(torch.ones(2, 3))
    >>> optimizer = AdEMAMix([p])
    >>> p.grad = torch.ones(2, 3)
    >>> optimizer.step()
    >>> state = to_bitsandbytes(optimizer.state_dict())["state"][0]
    >>> state["step"], list(state["__bnb_optimizer_quant_state__"]["state1"].shape)
    (1, [2, 2, 3])
    """
    return _converted(state_dict, _state_to_bitsandbytes, _group_to_bitsandbytes)


def _state_to_bitsandbytes(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    m1 = checked(saved.get("exp_avg"), f"{where}['exp_avg']", None)
    if others := saved.keys() - set(NAMES):
        raise ValueError(f"{where} has entries {sorted(others)}, but must have AdEMAMix's own only")
    quantized = "exp_avg_absmax" in saved and m1.numel() % BLOCK_SIZE == 0
    storage = dict(optim_bits=32, slow_ema_bits=8, min_8bit_size=0, is_paged=False, master_weights=None)
    state = loaded_state(m1, saved, storage, where)  # m1 stands for the parameter: it has its shape

    moments = [state[name].float() for name in MOMENTS]
    converted = {}
    if quantized:
        signed = (True, True, False)
        stored = [dynamic_map.quantize(m, is_signed) for m, is_signed in zip(moments, signed, strict=True)]
        moments, (m1_absmax, m2_absmax, nu_absmax) = map(list, zip(*stored, strict=True))
        converted = {
            "qmap1": dynamic_map.dynamic_map(True, m1.device),
            "qmap2": dynamic_map.dynamic_map(False, m1.device),
            "absmax1": torch.stack((m1_absmax, m2_absmax)),
            "absmax2": nu_absmax,
        }
    m1, m2, nu = moments
    converted |= {"state1": torch.stack((m1, m2)), "state2": nu.clone(memory_format=torch.contiguous_format)}
    return {"step": int(state["step"].item()), BITSANDBYTES_STATE: converted}


def _group_to_bitsandbytes(group: Mapping[str, Any], where: str) -> StateDict:
    options = _options(group, where, _BITSANDBYTES_OPTIONS, dropped=_ADEMAMIX_ONLY)
    if group.get("maximize"):
        raise ValueError(f"{where}['maximize'] is True, but must be False: bitsandbytes only minimizes")
    start = group.get("schedule_start", 0)
    if start > 0 and (options["t_alpha"] or options["t_beta3"]):
        raise ValueError(
            f"{where}['schedule_start'] is {start}, but must be 0, or t_alpha and t_beta3 None: "
            "bitsandbytes counts its schedules from the first step"
        )
    return {**options, "lr": float(options["lr"])}


def from_apple(state_dict: Mapping[str, Any]) -> StateDict:
    """Makes a state dict for `AdEMAMix` of that of Apple's reference implementation (github.com/apple/ml-ademamix).

    State of 16-bit parameters, which Apple's keeps in 16 bits, becomes float32. At β1 = 0 Apple's keeps no fast
    average: zeros take its place. During its warm-up Apple's β3 is larger than ours, by some 1e-6 at β1 = 0.9 and more
    at smaller β1, since it adds 1e-8 inside its logarithms.

    Args:
        state_dict: what its ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype than there.

    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> moments = {name: torch.zeros(3) for name in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")}
    >>> group = dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), eps=1e-8, alpha=2.0, beta3_warmup=500, alpha_warmup=500,
    ...              weight_decay=0.1, params=[0])
    >>> optimizer = AdEMAMix([p])
    >>> optimizer.load_state_dict(from_apple({"state": {0: {"step": 7, **moments}}, "param_groups": [group]}))
    >>> optimizer.state[p]["step"].item(), optimizer.param_groups[0]["t_beta3"]
    (7.0, 500)
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        options = _options(saved, where, _APPLE_OPTIONS)
        return {**options, "t_alpha": options["t_alpha"] or None, "t_beta3": options["t_beta3"] or None}

    return _converted(state_dict, _state_from_apple, group)


def _state_from_apple(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    saved = {"exp_avg_fast": None, **saved}
    _check_entries(saved, where, {"step", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"})
    m2 = _moment(saved, "exp_avg_slow", where)
    if saved["exp_avg_fast"] is None and group["betas"][0] == 0:
        m1 = torch.zeros_like(m2)
    else:
        m1 = _moment(saved, "exp_avg_fast", where, m2)
    return {
        "step": _step(saved["step"], f"{where}['step']"),
        "exp_avg": m1,
        "exp_avg_slow": m2,
        "exp_avg_sq": _moment(saved, "exp_avg_sq", where, m2),
    }


def from_adamw(
    state_dict: Mapping[str, Any],
    *,
    beta3: float = 0.9999,
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
) -> StateDict:
    """Makes a state dict for `AdEMAMix` of that of `torch.optim.AdamW`, to switch over in mid-run.

    exp_avg, exp_avg_sq and the step count are carried over, so the part of the update that is AdamW's goes on as if
    nothing had happened; exp_avg_slow begins at zero, and the schedules at the switch: each group's ``schedule_start``
    becomes the largest step of its parameters. (A parameter that has done fewer steps than that, for want of
    gradients, has α = 0 and β3 = β1 until it has done as many.)

    The paper switches over without schedules, and with a small α of 1 to 2 (arXiv 2409.03137, section 4): the loss
    rises for a moment, then falls below AdamW's.

    A state dict of `torch.optim.Adam` is the same, if it has no weight decay.

    Args:
        state_dict: what the ``state_dict()`` of AdamW returned.
        beta3, alpha, t_alpha, t_beta3: AdEMAMix's options that AdamW doesn't have, for all groups.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: the state is AMSGrad's, or the weight decay Adam's (an L2 penalty, not decoupled), neither of which
            AdEMAMix has; or something is missing, unknown, or of another shape or dtype than in AdamW.

    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> adamw = torch.optim.AdamW([p], lr=1e-3)
    >>> p.grad = torch.ones(3)
    >>> adamw.step()
    >>> optimizer = AdEMAMix([p])
    >>> optimizer.load_state_dict(from_adamw(adamw.state_dict(), alpha=2.0))
    >>> optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["schedule_start"]
    ((0.9, 0.999, 0.9999), 1)
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        options = _options(saved, where, _ADAMW_OPTIONS, dropped=_ADAMW_ONLY, betas=2)
        if saved.get("amsgrad"):
            raise ValueError(f"{where}['amsgrad'] is True, but must be False: AdEMAMix has no AMSGrad variant")
        # Before torch 2.7 only Adam's and AdamW's classes told them apart, not their options.
        if options["weight_decay"] != 0 and not saved.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{where}['weight_decay'] is {options['weight_decay']}, but must be 0 where decoupled_weight_decay is "
                "False: AdEMAMix has no L2 penalty"
            )
        beta1, beta2 = options["betas"]
        return {**options, "betas": (beta1, beta2, beta3), "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}

    converted = _converted(state_dict, _state_from_adamw, group)
    for options in converted["param_groups"]:
        steps = [converted["state"][i]["step"].item() for i in options["params"] if i in converted["state"]]
        options["schedule_start"] = int(max(steps, default=0))
    return converted


def _state_from_adamw(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    _check_entries(saved, where, {"step", "exp_avg", "exp_avg_sq"})
    m1 = _moment(saved, "exp_avg", where)
    return {
        "step": _step(saved["step"], f"{where}['step']"),
        "exp_avg": m1,
        "exp_avg_slow": torch.zeros_like(m1),
        "exp_avg_sq": _moment(saved, "exp_avg_sq", where, m1),
    }


def _converted(
    state_dict: Mapping[str, Any],
    convert_state: Callable[[Mapping[str, Any], Mapping[str, Any], str], StateDict],
    convert_group: Callable[[Mapping[str, Any], str], StateDict],
) -> StateDict:
    """The state dict with each parameter's state, given with its group, and each group converted."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must be what an optimizer's state_dict() returns, with 'state' and 'param_groups'")
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


def _options(
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


def _check_entries(saved: Mapping[str, Any], where: str, expected: set[str]) -> None:
    if saved.keys() != expected:
        raise ValueError(f"{where} has entries {sorted(saved)}, but must have {sorted(expected)}")


def _step(step: Any, where: str) -> Tensor:
    """A step count, kept as a number or a tensor, as a tensor of its own."""
    tensor = torch.as_tensor(step)
    if tensor.numel() != 1:
        raise ValueError(f"{where} has shape {list(tensor.shape)}, but must hold one element")
    return tensor.reshape(()).to(torch.float32, copy=True)


def _moment(saved: Mapping[str, Any], name: str, where: str, like: Tensor | None = None) -> Tensor:
    """A moment in the dtype that AdEMAMix keeps it in, in memory of its own; of the shape of `like`."""
    shape = None if like is None else like.shape
    value = checked(saved[name], f"{where}[{name!r}]", shape, *PARAMETER_DTYPES)
    return value.to(compute_dtype(value.dtype), copy=True)

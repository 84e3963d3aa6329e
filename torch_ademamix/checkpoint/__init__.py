"""State dicts of other implementations made into AdEMAMix's, and bitsandbytes' and the Apertus fork's made of it.

Each function takes what an optimizer's ``state_dict()`` returned, from memory or from a file, and returns what the
other's ``load_state_dict`` takes; no other package needs to be installed. The argument stays as it is, and the result
shares no memory with it; tensors stay on their devices. Keys of ``state`` are passed through, so parameter names serve
as well as numbers. Tensors must be whole: gather the state of sharded parameters first.

Group entries that no table here names, such as an LR scheduler's ``initial_lr``, are passed through too. Options of
AdEMAMix that the source doesn't have are left out: how state is stored (``optim_bits`` and so on) stays each group's
own in the optimizer that loads the result, ``stochastic_rounding``, ``seed`` and ``capturable`` become its defaults.
"""

from collections.abc import Mapping
from typing import Any

import torch

from torch_ademamix.checkpoint.adana import from_adana, to_adana
from torch_ademamix.checkpoint.apertus import OPTIONS as _APPLE_OPTIONS  # the fork has Apple's names
from torch_ademamix.checkpoint.apertus import from_apertus, to_apertus
from torch_ademamix.checkpoint.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from torch_ademamix.checkpoint.conversion import StateDict, check_entries, convert, kept, moment, renamed
from torch_ademamix.state.loading import checked_step

__all__ = [
    "from_adamw",
    "from_adana",
    "from_apertus",
    "from_apple",
    "from_bitsandbytes",
    "to_adana",
    "to_apertus",
    "to_bitsandbytes",
]

# Our options and what AdamW calls them.
_ADAMW_OPTIONS = {name: name for name in ("lr", "betas", "eps", "weight_decay")}

# Options of AdamW that AdEMAMix doesn't have, or that are its own affair.
_ADAMW_ONLY = {"amsgrad", "decoupled_weight_decay", "foreach", "fused", "capturable", "differentiable"}


def from_apple(state_dict: Mapping[str, Any]) -> StateDict:
    """Makes a state dict for `AdEMAMix` of that of Apple's reference implementation (github.com/apple/ml-ademamix).

    State of 16-bit parameters, which Apple's keeps in 16 bits, becomes float32. At β1 = 0 neither keeps a fast EMA.
    During its warm-up Apple's β3 is larger than ours, by some 1e-6 at β1 = 0.9 and more at smaller β1, since it adds
    1e-8 inside its logarithms.

    Args:
        state_dict: what its ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype than there.

    >>> from torch_ademamix import AdEMAMix
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
        options = renamed(saved, where, _APPLE_OPTIONS)
        return {**options, "t_alpha": options["t_alpha"] or None, "t_beta3": options["t_beta3"] or None}

    return convert(state_dict, _state_from_apple, group)


def _state_from_apple(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    if "step" in group and "step" not in saved:
        raise ValueError(
            f"{where} has no 'step', which its group has instead; load a state dict of the Apertus fork of Megatron-LM "
            "with torch_ademamix.checkpoint.from_apertus"
        )
    saved = {"exp_avg_fast": None, **saved}
    check_entries(saved, where, {"step", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq"})
    m2 = moment(saved, "exp_avg_slow", where)
    state = {
        "step": checked_step(saved["step"], f"{where}['step']").clone(),
        "exp_avg_slow": m2,
        "exp_avg_sq": moment(saved, "exp_avg_sq", where, m2),
    }
    if saved["exp_avg_fast"] is None and group["betas"][0] == 0:
        return state
    return kept({**state, "exp_avg": moment(saved, "exp_avg_fast", where, m2)}, group)


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

    >>> from torch_ademamix import AdEMAMix
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
        options = renamed(saved, where, _ADAMW_OPTIONS, dropped=_ADAMW_ONLY, betas=2)
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

    converted = convert(state_dict, _state_from_adamw, group)
    for options in converted["param_groups"]:
        steps = [converted["state"][i]["step"].item() for i in options["params"] if i in converted["state"]]
        options["schedule_start"] = int(max(steps, default=0))
    return converted


def _state_from_adamw(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    check_entries(saved, where, {"step", "exp_avg", "exp_avg_sq"})
    m1 = moment(saved, "exp_avg", where)
    state = {
        "step": checked_step(saved["step"], f"{where}['step']").clone(),
        "exp_avg": m1,
        "exp_avg_slow": torch.zeros_like(m1),
        "exp_avg_sq": moment(saved, "exp_avg_sq", where, m1),
    }
    return kept(state, group)

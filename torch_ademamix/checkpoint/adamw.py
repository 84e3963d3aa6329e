"""State dicts of torch.optim.AdamW, to switch to AdEMAMix during a run."""

from collections.abc import Mapping
from typing import Any

import torch

from torch_ademamix.checkpoint.conversion import StateDict, check_entries, convert, kept, moment, renamed
from torch_ademamix.state.options import ADAMW_OPTIONS
from torch_ademamix.state.saved import expect_step

# Our options and what AdamW calls them.
_OPTIONS = {name: name for name in ("lr", "betas", "eps", "weight_decay")}

# AdamW's options that AdEMAMix doesn't have, and capturable, which the optimizer that loads the result decides itself.
_DROPPED = {*ADAMW_OPTIONS, "decoupled_weight_decay", "capturable"}


def from_adamw(
    state_dict: Mapping[str, Any],
    *,
    beta3: float | None = None,
    alpha: float | None = None,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
) -> StateDict:
    """Converts a state dict of `torch.optim.AdamW`, so that a run can switch to AdEMAMix.

    exp_avg, exp_avg_sq, the step count, and lr, β1, β2, eps and weight decay are carried over. exp_avg_slow starts at
    zero. AdamW has no β3, α, t_alpha and t_beta3: the AdEMAMix that loads the result keeps those that it was
    constructed with, unless they are given here. Its warm-ups begin at the switch: each group's ``schedule_start``
    becomes the largest step of its parameters. (A parameter that has done fewer steps, because it had no gradient,
    has α = 0 and β3 = β1 until it has done as many.) So construct it with :func:`torch_ademamix.recommended` of the
    steps that remain.

    With warm-ups the first step after the switch is AdamW's. The paper switches without them, and with a small α of 1
    to 2 (arXiv 2409.03137, section 4): the loss rises for a moment, then falls below AdamW's.

    A state dict of `torch.optim.Adam` is the same, if it has no weight decay.

    Args:
        state_dict: what the ``state_dict()`` of AdamW returned.
        beta3, alpha, t_alpha, t_beta3: for all groups, instead of the optimizer's own; 0 steps are no warm-up.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class. A β3 that isn't known is None in ``betas``, which
        ``load_state_dict`` replaces by the optimizer's own.

    Raises:
        ValueError: the state is AMSGrad's, or the weight decay Adam's (an L2 penalty, not decoupled), neither of which
            AdEMAMix has; or something is missing, unknown, or of another shape or dtype than in AdamW.

    >>> from torch_ademamix import AdEMAMix, recommended
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> adamw = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.95))
    >>> p.grad = torch.ones(3)
    >>> adamw.step()
    >>> optimizer = AdEMAMix([p], **recommended(10_000))
    >>> optimizer.load_state_dict(from_adamw(adamw.state_dict()))
    >>> group = optimizer.param_groups[0]
    >>> group["betas"], group["alpha"], group["t_alpha"], group["schedule_start"]
    ((0.9, 0.95, 0.999), 8.0, 10000, 1)
    """
    given = {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        options = renamed(saved, where, _OPTIONS, dropped=_DROPPED, betas=2)
        if saved.get("amsgrad"):
            raise ValueError(f"{where}['amsgrad'] is True, but must be False: AdEMAMix has no AMSGrad variant")
        # Before torch 2.7 only Adam's and AdamW's classes told them apart, not their options.
        if options["weight_decay"] != 0 and not saved.get("decoupled_weight_decay", True):
            raise ValueError(
                f"{where}['weight_decay'] is {options['weight_decay']}, but must be 0 where decoupled_weight_decay is "
                "False: AdEMAMix has no L2 penalty"
            )
        beta1, beta2 = options["betas"]
        known = {name: value for name, value in given.items() if value is not None}
        return {**options, **known, "betas": (beta1, beta2, beta3)}

    converted = convert(state_dict, _state_from_adamw, group)
    for options in converted["param_groups"]:
        steps = [converted["state"][i]["step"].item() for i in options["params"] if i in converted["state"]]
        options["schedule_start"] = int(max(steps, default=0))
    return converted


def _state_from_adamw(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    check_entries(saved, where, {"step", "exp_avg", "exp_avg_sq"})
    m1 = moment(saved, "exp_avg", where)
    state = {
        "step": expect_step(saved["step"], f"{where}['step']").clone(),
        "exp_avg": m1,
        "exp_avg_slow": torch.zeros_like(m1),
        "exp_avg_sq": moment(saved, "exp_avg_sq", where, m1),
    }
    return kept(state, group)

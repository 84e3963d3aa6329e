"""State dicts of the Apertus fork of Megatron-LM (github.com/swiss-ai/Megatron-LM); torch_ademamix.checkpoint has the
rules for all."""

from collections.abc import Mapping
from typing import Any

import torch

from torch_ademamix.checkpoint.conversion import (
    StateDict,
    check_entries,
    convert,
    exported_options,
    kept,
    moment,
    renamed,
    unquantized,
)
from torch_ademamix.numerics.moments import MOMENTS
from torch_ademamix.state.saved import expect_step

# Our options and what the fork calls them, as Apple's reference implementation does; and its names of the moments.
OPTIONS = {
    **{name: name for name in ("lr", "betas", "alpha", "eps", "weight_decay")},
    "t_alpha": "alpha_warmup",
    "t_beta3": "beta3_warmup",
}
MOMENT_NAMES = {"exp_avg": "exp_avg_fast", "exp_avg_slow": "exp_avg_slow", "exp_avg_sq": "exp_avg_sq"}

NO_WARMUP = -1  # the default of its --ademamix-alpha-warmup and --ademamix-beta3-warmup


def warmup_steps(warmup: int | None) -> int | None:
    """The steps of one of the fork's warm-ups as AdEMAMix's options have them."""
    return warmup if warmup is not None and warmup > 0 else None


def from_apertus(state_dict: Mapping[str, Any]) -> StateDict:
    """Converts a state dict of the AdEMAMix class in the fork of Megatron-LM that trained Apertus.

    It counts steps per group, as Transformer Engine's FusedAdam does, keeps no fast EMA at β1 = 0,
    and writes -1 for no warm-up. During its warm-up its β3 is larger, by some 1e-6 at β1 = 0.9 and more at smaller
    β1, since it adds 1e-8 inside its logarithms.

    `torch_ademamix.megatron` reads the fork's distributed checkpoints.

    Args:
        state_dict: what its ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype than there.

    Source: github.com/swiss-ai/Megatron-LM at 81d44dbe, megatron/core/optimizer/ademamix.py.

    >>> from torch_ademamix import AdEMAMix
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> moments = {name: torch.zeros(3) for name in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")}
    >>> group = dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), eps=1e-8, alpha=8.0, beta3_warmup=-1, alpha_warmup=500,
    ...              weight_decay=0.1, step=7, params=[0])
    >>> optimizer = AdEMAMix([p])
    >>> optimizer.load_state_dict(from_apertus({"state": {0: moments}, "param_groups": [group]}))
    >>> optimizer.state[p]["step"].item(), optimizer.param_groups[0]["t_alpha"], optimizer.param_groups[0]["t_beta3"]
    (7.0, 500, None)
    """
    return convert(state_dict, _state_from_apertus, group_from_apertus)


def group_from_apertus(saved: Mapping[str, Any], where: str) -> StateDict:
    options = renamed(saved, where, OPTIONS, dropped={"step"})
    return {**options, "t_alpha": warmup_steps(options["t_alpha"]), "t_beta3": warmup_steps(options["t_beta3"])}


def _state_from_apertus(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    if "step" not in group:
        hint = "" if "step" not in saved else "; load Apple's state with torch_ademamix.checkpoint.from_apple"
        raise ValueError(f"{where} belongs to a group without 'step', which the fork's groups have{hint}")
    saved = {"exp_avg_fast": None, **saved}
    check_entries(saved, where, set(MOMENT_NAMES.values()))
    m2 = moment(saved, "exp_avg_slow", where)
    state = {
        "step": expect_step(group["step"], f"the 'step' of the group of {where}").clone(),
        "exp_avg_slow": m2,
        "exp_avg_sq": moment(saved, "exp_avg_sq", where, m2),
    }
    if saved["exp_avg_fast"] is None and group["betas"][0] == 0:
        return state
    return kept({**state, "exp_avg": moment(saved, "exp_avg_fast", where, m2)}, group)


def to_apertus(state_dict: Mapping[str, Any]) -> StateDict:
    """Converts a state dict of AdEMAMix for the class in the fork of Megatron-LM that trained Apertus.

    Quantized state becomes float32 values. Options without a counterpart there are left out, as in
    `to_bitsandbytes`.

    Args:
        state_dict: what the ``state_dict()`` of an `AdEMAMix` class returned.

    Returns:
        for the ``load_state_dict`` of the fork's class.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype; or parameters of a group have done
            different numbers of steps, there are remainders of master weights, a group maximizes, or its schedules
            don't begin at step 0, which the fork can't do.

    >>> from torch_ademamix import AdEMAMix
    >>> p = torch.nn.Parameter(torch.ones(2, 3))
    >>> optimizer = AdEMAMix([p])
    >>> p.grad = torch.ones(2, 3)
    >>> optimizer.step()
    >>> state_dict = to_apertus(optimizer.state_dict())
    >>> state_dict["param_groups"][0]["step"], state_dict["param_groups"][0]["alpha_warmup"]
    (1, -1)
    >>> sorted(state_dict["state"][0])
    ['exp_avg_fast', 'exp_avg_slow', 'exp_avg_sq']
    """
    converted = convert(state_dict, _state_to_apertus, group_to_apertus)
    for k, group in enumerate(converted["param_groups"]):
        states = [converted["state"][i] for i in group["params"] if i in converted["state"]]
        steps = sorted({int(state.pop("step").item()) for state in states})
        if len(steps) > 1:
            raise ValueError(
                f"the parameters of state_dict['param_groups'][{k}] have done {', '.join(map(str, steps))} steps, but "
                "the fork counts the steps of a group: put those that have done equally many into groups of their own"
            )
        group["step"] = steps[0] if steps else 0
    return converted


def _state_to_apertus(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    state = unquantized(saved, group, where)
    names = MOMENTS[1:] if group["betas"][0] == 0 else MOMENTS
    values = {MOMENT_NAMES[name]: state[name].clone(memory_format=torch.contiguous_format) for name in names}
    return {"step": state["step"], **values}


def group_to_apertus(group: Mapping[str, Any], where: str) -> StateDict:
    names = {theirs: ours for ours, theirs in OPTIONS.items()}
    options = exported_options(group, where, names, "the Apertus fork")
    warmups = {name: options[name] or NO_WARMUP for name in ("alpha_warmup", "beta3_warmup")}
    return {**options, **warmups}

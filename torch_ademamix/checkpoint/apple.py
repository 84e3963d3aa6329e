"""State dicts of Apple's reference implementation (github.com/apple/ml-ademamix)."""

from collections.abc import Mapping
from typing import Any

from torch_ademamix.checkpoint.apertus import OPTIONS  # the fork has Apple's names
from torch_ademamix.checkpoint.conversion import StateDict, check_entries, convert, kept, moment, renamed
from torch_ademamix.state.saved import expect_step


def from_apple(state_dict: Mapping[str, Any]) -> StateDict:
    """Converts a state dict of Apple's reference implementation (github.com/apple/ml-ademamix).

    Apple's keeps the state of 16-bit parameters in 16 bits; it becomes float32. At β1 = 0 neither keeps a fast EMA.
    During its warm-up Apple's β3 is larger, by some 1e-6 at β1 = 0.9 and more at smaller β1, since it adds 1e-8 inside
    its logarithms.

    Args:
        state_dict: what its ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype than there.

    >>> import torch
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
        options = renamed(saved, where, OPTIONS)
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
        "step": expect_step(saved["step"], f"{where}['step']").clone(),
        "exp_avg_slow": m2,
        "exp_avg_sq": moment(saved, "exp_avg_sq", where, m2),
    }
    if saved["exp_avg_fast"] is None and group["betas"][0] == 0:
        return state
    return kept({**state, "exp_avg": moment(saved, "exp_avg_fast", where, m2)}, group)

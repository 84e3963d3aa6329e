"""State dicts of the reference implementation of ADANA (github.com/mlexpos/adana), both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_ademamix.checkpoint.conversion import StateDict, convert, moment, unquantized
from torch_ademamix.state.saved import expect_step
from torch_ademamix.variants import ADANA_OPTIONS

# Options of its groups besides params; other entries are passed through.
_OPTIONS = ("lr", "delta", "epsilon", "weight_decay")
_STATE = ("step", "m", "v")  # it only logs the others


def from_adana(
    state_dict: Mapping[str, Any],
    *,
    peak_lr: float,
    kappa: float = 0.85,
    t_weight_decay: float | None = None,
) -> StateDict:
    """Converts a state dict of the reference implementation of ADANA (github.com/mlexpos/adana).

    Its weight decay λ is independent of the peak learning rate; ours is λ / peak_lr. It also acts on the new parameter,
    and ours on the old one, which differ by λ in the size of the update. Its SNR clipping has no counterpart.

    Args:
        state_dict: what its ``state_dict()`` returned.
        peak_lr: the learning rate that its optimizer was made with.
        kappa: its κ, which its groups don't have.
        t_weight_decay: its ``wd_ts`` where ``wd_decaying`` is set.

    Returns:
        for the ``load_state_dict`` of :class:`torch_ademamix.ADANA`.

    Raises:
        ValueError: an entry is missing, or has another shape or dtype.

    >>> import torch
    >>> from torch_ademamix import ADANA
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> group = dict(lr=1e-3, delta=8.0, epsilon=1e-8, weight_decay=1e-4, weighted_step_count=7.0, params=[0])
    >>> state = {0: {"step": 7, "m": torch.zeros(3), "v": torch.zeros(3)}}
    >>> optimizer = ADANA([p])
    >>> optimizer.load_state_dict(from_adana({"state": state, "param_groups": [group]}, peak_lr=1e-3))
    >>> optimizer.state[p]["step"].item(), optimizer.param_groups[0]["weight_decay"]
    (7.0, 0.1)
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        if lost := [name for name in _OPTIONS if name not in saved]:
            raise ValueError(f"{where} has no {', '.join(lost)}, but must have {', '.join(_OPTIONS)}")
        others = {name: value for name, value in saved.items() if name not in (*_OPTIONS, "weighted_step_count")}
        return {
            **others,
            **ADANA_OPTIONS,
            "lr": saved["lr"],
            "delta": saved["delta"],
            "kappa": kappa,
            "eps": saved["epsilon"],
            "weight_decay": saved["weight_decay"] / peak_lr,
            "t_weight_decay": t_weight_decay,
        }

    def state(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
        if lost := [name for name in _STATE if name not in saved]:
            raise ValueError(f"{where} has no {', '.join(lost)}, but must have {', '.join(_STATE)}")
        m = moment(saved, "m", where)
        step = expect_step(saved["step"], f"{where}['step']").clone()
        return {"step": step, "exp_avg_slow": m, "exp_avg_sq": moment(saved, "v", where, m)}

    return convert(state_dict, state, group)


def to_adana(state_dict: Mapping[str, Any], *, peak_lr: float) -> StateDict:
    """Converts a state dict of :class:`torch_ademamix.ADANA` for the reference implementation.

    Its groups have no κ and no timescale of the weight decay: pass them to its constructor.

    Args:
        state_dict: what our ``state_dict()`` returned, in any format of state.
        peak_lr: the learning rate that its optimizer is made with.

    Raises:
        ValueError: a group isn't ADANA's.
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        for name in ("log_time_beta2", "delta", "kappa"):
            if not saved.get(name):
                raise ValueError(f"{where}[{name!r}] is {saved.get(name)!r}, but must be set as in ADANA")
        if saved["betas"][0] != 0 or saved["alpha"] != 1 or saved["maximize"] or saved["schedule_start"]:
            raise ValueError(
                f"{where} must have ADANA's options: betas[0] = 0, alpha = 1, no maximize, no schedule_start"
            )
        return {
            "params": saved["params"],
            "lr": float(saved["lr"]),
            "delta": saved["delta"],
            "epsilon": saved["eps"],
            "weight_decay": saved["weight_decay"] * peak_lr,
            "weighted_step_count": 0,  # which it only counts
        }

    def state(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
        own: dict[str, Tensor] = unquantized(saved, group, where)
        return {"step": int(own["step"]), "m": own["exp_avg_slow"], "v": own["exp_avg_sq"]}

    return convert(state_dict, state, group)

"""The options of a parameter group: what they may be, and how the ops take them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Integral
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torch_ademamix.numerics.bfloat16 import REMAINDERS
from torch_ademamix.numerics.hyperparameters import HYPERPARAMETERS, Hyperparameters, hyperparameters
from torch_ademamix.numerics.pairs import COMPLEX_DTYPES
from torch_ademamix.ops.check import PARAMETER_DTYPES, floating_problem, grad_dtypes, in_place_problem
from torch_ademamix.state import sharding
from torch_ademamix.state.plain_options import plain_options

Options = dict[str, Any]

# Options that aren't numbers of the update, which a graph has as constants.
CONSTANT_OPTIONS = ("maximize", "seed", "stochastic_rounding", "param_rounding")


_LR = itemgetter("lr")


class _Seen(NamedTuple):
    """A group when it was last looked at."""

    options: Options
    row: Hyperparameters
    constants: tuple[Any, ...]


class GroupOptions:
    """The options of all groups, checked, in the form in which the ops take them; checked again only after a change."""

    def __init__(self) -> None:
        self.rows: list[Hyperparameters] = []  # of each group
        self.constants: list[tuple[Any, ...]] = []  # of each group
        self._groups: list[_Seen] = []
        self._lrs: list[Any] = []  # of each group
        self._values: list[Any] = []  # of all groups' options; empty where one may change its contents
        self.has_both_kinds_of_lr = False  # numbers and tensors

    def update(self, groups: Sequence[Options]) -> None:
        """Brings rows and constants up to date.

        Raises:
            what :func:`check_options` and :func:`check_params` do.
        """
        values = [*chain.from_iterable(map(dict.values, groups))]
        lrs = [*map(_LR, groups)]
        try:
            # The quickest way to compare thousands of values: a list compares identical objects by identity, and
            # tensors here are identical or differ in `lrs`.
            if len(lrs) == len(self._lrs) and all(map(is_, lrs, self._lrs)) and self._values == values:
                return
        except (RuntimeError, ValueError):  # a tensor or an array has taken the place of a number
            pass
        self._values = []
        self._groups = [self._look(k, group) for k, group in enumerate(groups)]
        self.rows = [seen.row for seen in self._groups]
        self.constants = [seen.constants for seen in self._groups]
        self.has_both_kinds_of_lr = len({isinstance(row.lr, Tensor) for row in self.rows}) > 1
        if not any(_may_change(name, value) for group in groups for name, value in group.items()):
            self._values = [*chain.from_iterable(map(dict.values, groups))]  # plain now
            self._lrs = [*map(_LR, groups)]

    def _look(self, k: int, group: Options) -> _Seen:
        seen = self._groups[k] if k < len(self._groups) else None
        before = {} if seen is None else seen.options
        changed = [name for name, x in group.items() if before.get(name, before) is not x or _may_change(name, x)]
        if seen is not None and not changed and len(before) == len(group):
            return seen
        group.update(plain_options(group))
        with error_context(f"param_groups[{k}]"):
            check_options(group, changed)
        if group["param_rounding"] == "stochastic":
            check_params(group, k)
        return _Seen(dict(group), hyperparameters(group), constant_options(group))


def _may_change(name: str, value: Any) -> bool:
    """Whether an option may have other contents and be the same object; parameters and lr are looked at elsewhere."""
    return isinstance(value, (list, Tensor)) and name not in ("params", "param_names", "lr")


def constant_options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in CONSTANT_OPTIONS)


def _is_lr(lr: Any) -> bool:
    if isinstance(lr, Tensor):
        return lr.numel() == 1 and lr.dtype in (torch.float32, torch.float64)
    return not math.isnan(lr)  # a schedule that ends at 0 may pass it by rounding


def _at_least_0(value: Any) -> bool:
    return bool(value >= 0)


def _is_flag(value: Any) -> bool:
    return value in (True, False)


# What each option may be: as a text, and as a function. That may raise a TypeError, or a RuntimeError for a tensor that
# isn't one number.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number, or a float32 or float64 tensor of one element", _is_lr),
    **dict.fromkeys(("alpha", "eps", "weight_decay", "min_8bit_size"), ("at least 0", _at_least_0)),
    "betas": ("three numbers in [0, 1)", lambda betas: len(betas) == 3 and all(0 <= beta < 1 for beta in betas)),
    **dict.fromkeys(("t_alpha", "t_beta3"), ("at least 0, or None", lambda steps: steps is None or steps >= 0)),
    **dict.fromkeys(("delta", "t_weight_decay"), ("positive, or None", lambda value: value is None or value > 0)),
    "kappa": ("in (0, 1], or None", lambda kappa: kappa is None or 0 < kappa <= 1),
    "schedule_start": ("an int of at least 0", lambda start: isinstance(start, int) and 0 <= start < 2**63),
    "seed": ("an int of 64 bits", lambda seed: isinstance(seed, Integral) and -(2**63) <= int(seed) < 2**63),
    **dict.fromkeys(
        ("log_time_beta2", "maximize", "stochastic_rounding", "capturable", "is_paged"), ("True or False", _is_flag)
    ),
    "optim_bits": ("8 or 32", lambda bits: bits in (8, 32)),
    "slow_ema_bits": ("8, 12 or 16", lambda bits: bits in (8, 12, 16)),
    "master_weights": ("'remainder', 'remainder8' or None", lambda kind: kind in (*REMAINDERS, None)),
    "param_rounding": ("'nearest' or 'stochastic'", lambda rounding: rounding in ("nearest", "stochastic")),
}


OPTIONS = tuple(_ALLOWED)

# Arguments of torch.optim.AdamW that AdEMAMix accepts and has no use for; and what to do if one of them is True.
ADAMW_OPTIONS = ("foreach", "fused", "amsgrad", "differentiable")
_WITHOUT = {
    "amsgrad": "AdEMAMix has no AMSGrad variant; leave amsgrad out",
    "differentiable": "autograd can't differentiate through a step of AdEMAMix; leave differentiable out, or use "
    "torch.optim.AdamW",
}


def check_adamw_options(options: Mapping[str, Any]) -> None:
    """Raises a ValueError for options of AdamW that AdEMAMix doesn't have."""
    for name, advice in _WITHOUT.items():
        if options.get(name):
            raise ValueError(f"{name} is {options[name]!r}, but must be False: {advice}")


def check_options(options: Mapping[str, Any], names: Iterable[str] | None = None, first: bool = False) -> None:
    """Refuses options out of their range.

    Args:
        options: all options of a group.
        names: those to check; None for all.
        first: whether they come from the user.

    Raises:
        ValueError: a value is out of its range.
        TypeError: a value is of a type that can't be compared with it.
    """
    if "max_grad_norm" in options:
        raise ValueError(
            f"max_grad_norm is {options['max_grad_norm']!r}, but can't be an option of a group: pass it to the "
            "constructor, which clips the gradients of all groups together"
        )
    for name in _ALLOWED if names is None else names:
        if name in _ALLOWED:
            allowed, ok = _ALLOWED[name]
            if name == "lr" and not isinstance(options["lr"], Tensor):
                allowed = "at least 0" if first else "a number"
                ok = _at_least_0 if first else ok
            if name == "betas":
                _check_number_of_betas(options["betas"])
            _require(name, options[name], allowed, ok)
    _check_log_time(options)
    if options["master_weights"]:
        _require("param_rounding", options["param_rounding"], "'nearest'", lambda rounding: rounding == "nearest")
    if first:
        _check_order(options)


def _check_number_of_betas(betas: Any) -> None:
    """Raises for AdamW's two betas."""
    if isinstance(betas, (tuple, list)) and len(betas) == 2:
        raise ValueError(
            f"betas is {betas!r}, but must be three numbers in [0, 1): append β3, as in betas=({betas[0]!r}, "
            f"{betas[1]!r}, 0.999), or pass **torch_ademamix.recommended(steps)"
        )


def _check_log_time(options: Mapping[str, Any]) -> None:
    """Raises for schedules that contradict one another."""
    if options["delta"] is None and options["log_time_beta2"]:
        raise ValueError("log_time_beta2 is True, but delta is None: give delta, such as 8.0")
    for name, other, what in (("delta", "t_beta3", "β3"), ("kappa", "t_alpha", "α")):
        if options[name] is not None and options[other]:
            raise ValueError(
                f"{name} is {options[name]!r} and {other} is {options[other]!r}, but both are schedules of {what}: "
                "leave one of them None"
            )


def _require(name: str, value: Any, allowed: str, ok: Callable[[Any], bool]) -> None:
    try:
        error: type[Exception] | None = None if ok(value) else ValueError
    except (TypeError, RuntimeError):
        error = TypeError
    if error is not None:
        raise error(f"{name} is {value!r}, but must be {allowed}")


# Positional arguments are in bitsandbytes' order. In AdamW's, eps would be alpha, and weight_decay t_alpha.
ORDER = (
    "positional arguments after params are lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay; unlike AdamW's, so "
    "pass eps and weight_decay by name"
)
LARGEST_EPS = 1e-3  # that anybody uses, and a smaller alpha than anybody does


def _check_order(options: Mapping[str, Any]) -> None:
    """Raises for values that must have been meant for other arguments.

    With kappa, which only a keyword sets, alpha is a summand of α(t) and may be small.

    Raises:
        ValueError: alpha is as small as an eps, or a number of steps is below 1, as a weight decay.
    """
    if 0 < options["alpha"] <= LARGEST_EPS and options["kappa"] is None:
        raise ValueError(f"alpha is {options['alpha']!r}, but must be 0 or above {LARGEST_EPS}: {ORDER}")
    for name in ("t_alpha", "t_beta3"):
        if 0 < (options[name] or 0) < 1:
            raise ValueError(f"{name} is {options[name]!r}, but must be None, 0 or at least 1 step: {ORDER}")


def check_params(group: Options, number: int, include_frozen: bool = False) -> None:
    """Refuses parameters of a group that can't be updated. Frozen ones may be anything, unless they are included.

    Raises:
        ValueError: a parameter that requires a gradient has another dtype or layout.
    """
    for i, p in enumerate(group["params"]):
        if is_lazy(p) or not (include_frozen or is_trained(p)):
            continue
        name = param_name(group, number, i)
        if problem := floating_problem(p, PARAMETER_DTYPES + COMPLEX_DTYPES) or in_place_problem(p):
            raise ValueError(f"{name} {problem}")
        if p.is_complex():
            _check_complex(p, group, name)
        if p.dtype == torch.float16 and (group["master_weights"] or group["param_rounding"] == "stochastic"):
            option = "master_weights" if group["master_weights"] else "param_rounding"
            raise ValueError(
                f"{option} is {group[option]!r}, which is for bfloat16 parameters, but {name} has dtype {p.dtype}"
            )


def _check_complex(p: Tensor, group: Options, name: str) -> None:
    """Checks that a complex parameter's group has only options that such parameters have."""
    if p.is_conj():
        raise ValueError(f"{name} is a lazy conjugate of another tensor; pass a parameter of p.resolve_conj()")
    plain = {"optim_bits": 32, "master_weights": None, "param_rounding": "nearest"}
    for option, value in plain.items():
        if group[option] != value and (option != "optim_bits" or p.numel() >= group["min_8bit_size"]):
            raise ValueError(
                f"{option} is {group[option]!r}, which is for real parameters, but {name} has dtype {p.dtype}; put "
                f"complex parameters into a group of their own with {option}={value!r}"
            )


def check_grads(group: Mapping[str, Any], number: int) -> None:
    """Refuses gradients of a group that no op call can take.

    Raises:
        RuntimeError: a gradient has another dtype or layout, or isn't sharded as its parameter.
    """
    for i, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        problem = floating_problem(p.grad, grad_dtypes(p))
        if sharding.is_dtensor(p) and not sharding.is_dtensor(p.grad):
            problem = "is a plain tensor, but its parameter is a DTensor"
        if problem:
            raise RuntimeError(f"the gradient of {param_name(group, number, i)} {problem}")


def is_trained(p: Tensor) -> bool:
    """Whether a parameter needs state; one of a lazy module doesn't before that has made it."""
    return (p.requires_grad or p.grad is not None) and not is_lazy(p)


def param_name(group: Mapping[str, Any], number: int, i: int) -> str:
    """How messages name a parameter: by its indices, and by its name if the optimizer was given named parameters."""
    place = f"param_groups[{number}]['params'][{i}]"
    return f"{place} ({group['param_names'][i]})" if "param_names" in group else place


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Prefixes errors that are raised within with the group or parameter that they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


class HyperparameterTables:
    """The rows of all groups in one tensor on each device, for steps that are compiled or captured.

    Such a step reads them each time, so it follows every change without recompiling or re-capturing.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}  # by the devices' names
        self._written: dict[str, list[Hyperparameters]] = {}

    def write(self, rows: Sequence[Hyperparameters], devices: Iterable[torch.device]) -> dict[str, Tensor]:
        """Brings the tables up to date, and returns them."""
        lrs = [(i, row.lr) for i, row in enumerate(rows) if isinstance(row.lr, Tensor)]
        for device in devices:
            name = str(device)
            if name not in self.tables or len(self.tables[name]) != len(rows):
                table = torch.zeros(len(rows), len(HYPERPARAMETERS), dtype=number_dtype(device), device=device)
                torch._dynamo.mark_static_address(table)
                self.tables[name], self._written[name] = table, []
            table, written = self.tables[name], self._written[name]
            if len(written) != len(rows) or not all(map(is_, written, rows)):
                values = [row._replace(lr=0.0) if isinstance(row.lr, Tensor) else row for row in rows]
                table.copy_(torch.tensor(values, dtype=table.dtype, device="cpu"), non_blocking=True)
                self._written[name] = list(rows)
            if lrs:  # which may have been written to, where others can't see it
                targets, sources = [table[i, :1] for i, _ in lrs], [lr.detach().reshape(1) for _, lr in lrs]
                torch._foreach_copy_(targets, sources, non_blocking=True)
        return self.tables


def own_lr_tensors(groups: Sequence[Options]) -> None:
    """Makes lr a tensor in `capturable` groups, and each group's tensor its own: LR schedulers write to it in place."""
    seen: set[int] = set()
    for group in groups:
        if group["capturable"] and group["params"]:
            _make_lr_tensor(group)
        if id(group["lr"]) in seen and isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].detach().clone()
        seen.add(id(group["lr"]))


def _make_lr_tensor(group: Options) -> None:
    """Turns a group's lr into a tensor on its parameters' device, which compiled and captured steps read each time."""
    device = group["params"][0].device
    if isinstance(group["lr"], Tensor) and group["lr"].device == device:
        return
    # One element, not 0-dim: Dynamo unspecializes 0-dim float64 CPU tensors and traces again.
    group["lr"] = torch.as_tensor(group["lr"], dtype=number_dtype(device), device=device).reshape(1)


def number_dtype(device: torch.device) -> torch.dtype:
    """The dtype of tensors with hyperparameters: float64, or float32 if the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64

"""The options of a parameter group: what they may be, and how the ops take them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import sharding
from torch_ademamix.check import floating_problem, in_place_problem

Options = dict[str, Any]

# What an update reads of a group beside hyperparameters(): part of a graph for good.
CONSTANT_OPTIONS = ("maximize", "seed", "stochastic_rounding", "param_rounding")


class Checked:
    """Refuses options out of their range; of those that haven't changed since the last time, without looking again."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Any]] = {}  # by the group's number

    def __call__(self, number: int, group: Options) -> None:
        values = list(group.values())
        seen = self._seen.get(number)
        # What was seen is kept, so an object of the same identity is the same; only lists change their contents.
        if seen is not None and len(seen) == len(values) and all(map(_unchanged, seen, values)):
            return
        with refusals_of(f"param_groups[{number}]"):
            check_options(group)
        if group["param_rounding"] == "stochastic":
            check_params(group, number)
        self._seen[number] = values


def _unchanged(seen: Any, value: Any) -> bool:
    return seen is value and (type(value) is not list or (len(value) > 0 and isinstance(value[0], Tensor)))


def check_options(options: Mapping[str, Any], first: bool = False) -> None:
    """Refuses options out of their range; `first` is where they come from the user.

    Raises:
        ValueError: a value is out of its range.
        TypeError: a value is of a type that can't be compared with it.
    """

    def require(name: str, allowed: str, ok: Callable[[Any], bool]) -> None:
        try:
            error: type[Exception] | None = None if ok(options[name]) else ValueError
        except (TypeError, RuntimeError):  # the latter of a tensor that isn't one number
            error = TypeError
        if error is not None:
            raise error(f"{name} is {options[name]!r}, but must be {allowed}")

    if isinstance(options["lr"], Tensor):
        lr_dtypes = (torch.float32, torch.float64)
        allowed = "a number, or a float32 or float64 tensor of one element"
        require("lr", allowed, lambda lr: lr.numel() == 1 and lr.dtype in lr_dtypes)
    else:
        # A schedule that ends at 0 may pass it by rounding, so a step takes any number.
        require("lr", "at least 0" if first else "a number", lambda lr: lr >= 0 if first else not math.isnan(lr))
    for name in ("alpha", "eps", "weight_decay", "min_8bit_size"):
        require(name, "at least 0", lambda value: value >= 0)
    require("betas", "three numbers in [0, 1)", lambda betas: len(betas) == 3 and all(0 <= b < 1 for b in betas))
    for name in ("t_alpha", "t_beta3"):
        require(name, "at least 0, or None", lambda steps: steps is None or steps >= 0)
    require("schedule_start", "an int of at least 0", lambda start: isinstance(start, int) and 0 <= start < 2**63)
    require("seed", "an int of 64 bits", lambda seed: isinstance(seed, Integral) and -(2**63) <= int(seed) < 2**63)
    for name in ("maximize", "stochastic_rounding", "capturable", "is_paged"):
        require(name, "True or False", lambda flag: flag in (True, False))
    require("optim_bits", "8 or 32", lambda bits: bits in (8, 32))
    require("slow_ema_bits", "8 or 16", lambda bits: bits in (8, 16))
    require("master_weights", "'remainder' or None", lambda kind: kind in ("remainder", None))
    roundings = ("nearest",) if options["master_weights"] else ("nearest", "stochastic")
    require("param_rounding", " or ".join(map(repr, roundings)), lambda rounding: rounding in roundings)


def check_params(group: Options, number: int) -> None:
    """Refuses parameters of a group that can't be updated. Frozen ones may be anything: they need no update.

    Raises:
        ValueError: a parameter that requires a gradient has another dtype or layout.
    """
    for i, p in enumerate(group["params"]):
        if not is_trained(p):
            continue
        name = param_name(group, number, i)
        if problem := floating_problem(p) or in_place_problem(p):
            raise ValueError(f"{name} {problem}")
        if p.dtype == torch.float16 and (group["master_weights"] or group["param_rounding"] == "stochastic"):
            option = "master_weights" if group["master_weights"] else "param_rounding"
            raise ValueError(
                f"{option} is {group[option]!r}, which is for bfloat16 parameters, but {name} has dtype {p.dtype}"
            )


def check_grads(group: Mapping[str, Any], number: int) -> None:
    """Refuses gradients of a group that no op call can take.

    Raises:
        RuntimeError: a gradient has another dtype or layout, or isn't sharded as its parameter.
    """
    for i, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        problem = floating_problem(p.grad)
        if sharding.is_dtensor(p) and not sharding.is_dtensor(p.grad):
            problem = "is a plain tensor, but its parameter is a DTensor"
        if problem:
            raise RuntimeError(f"the gradient of {param_name(group, number, i)} {problem}")


def is_trained(p: Tensor) -> bool:
    return p.requires_grad or p.grad is not None


def param_name(group: Mapping[str, Any], number: int, i: int) -> str:
    """What refusals call a parameter: its place, and its name where the optimizer was given named ones."""
    place = f"param_groups[{number}]['params'][{i}]"
    return f"{place} ({group['param_names'][i]})" if "param_names" in group else place


@contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """What is refused within is said to be of a group, or a parameter."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def hyperparameters(group: Mapping[str, Any]) -> Options:
    """The numbers of a group's update, by the names that the ops have for them."""
    beta1, beta2, beta3 = group["betas"]
    return dict(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        alpha=group["alpha"],
        t_alpha=group["t_alpha"] or None,  # 0 is bitsandbytes' none
        t_beta3=group["t_beta3"] or None,
        schedule_start=group["schedule_start"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


class HyperparameterTensors:
    """The numbers of each group in a small tensor on its parameters' device, for steps that are compiled or captured.

    Such a step reads them anew each time, so that it follows every change without a recompilation or a new capture.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._written: list[list[float]] = []

    def write(self, groups: Sequence[Options]) -> list[Tensor]:
        """Brings the tensors up to date, and returns them, one for each group."""
        for number, group in enumerate(groups):
            numbers = hyperparameters(group)
            lr = numbers["lr"]
            if isinstance(lr, Tensor):  # it may have been written to, where others can't see it
                numbers["lr"] = 0.0
            values = [0.0 if value is None else float(value) for value in numbers.values()]
            device = next((p.device for p in group["params"]), torch.device("cpu"))
            if number < len(self.tensors) and self.tensors[number].device != device:  # the parameters have been moved
                del self.tensors[number:], self._written[number:]
            if number == len(self.tensors):
                tensor = torch.zeros(len(values), dtype=number_dtype(device), device=device)
                torch._dynamo.mark_static_address(tensor)
                self.tensors.append(tensor)
                self._written.append([])
            if values != self._written[number]:
                tensor = self.tensors[number]
                tensor.copy_(torch.tensor(values, dtype=tensor.dtype), non_blocking=True)
                self._written[number] = values
            if isinstance(lr, Tensor):
                self.tensors[number][:1].copy_(lr.detach().reshape(1), non_blocking=True)
        return self.tensors


def settle_lrs(groups: Sequence[Options]) -> None:
    """Makes lr a tensor in `capturable` groups, and each group's tensor its own: LR schedulers write to it in place."""
    seen: set[int] = set()
    for group in groups:
        if group["capturable"] and group["params"]:
            _make_lr_tensor(group)
        if id(group["lr"]) in seen and isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].detach().clone()
        seen.add(id(group["lr"]))


def _make_lr_tensor(group: Options) -> None:
    """Turns a group's lr into a tensor on its parameters' device: a compiled or captured step reads it anew."""
    device = group["params"][0].device
    if isinstance(group["lr"], Tensor) and group["lr"].device == device:
        return
    # Of a float64 CPU tensor without dimensions, Dynamo would track the value, and trace everything twice.
    group["lr"] = torch.as_tensor(group["lr"], dtype=number_dtype(device)).reshape(1).to(device)


def number_dtype(device: torch.device) -> torch.dtype:
    """Of a tensor that holds hyperparameters: as exact as a float, where the device has such numbers."""
    return torch.float32 if device.type == "mps" else torch.float64

"""The conditions that tensors and numbers must meet, with the error texts of those that don't.

The native kernels check the same conditions, but only raise that a call is invalid (ops/check.h); these checks then say
why. arguments.py has the conditions of each op's arguments.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torch_ademamix.numerics.bfloat16 import draws
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count
from torch_ademamix.numerics.hyperparameters import HYPERPARAMETERS, Hyperparameters
from torch_ademamix.numerics.pairs import COMPLEX_DTYPES
from torch_ademamix.numerics.reference_step import compute_dtype
from torch_ademamix.ops.offsets import OFFSETS_PER_PARAM

BETAS = ("beta1", "beta2", "beta3")
LOG_TIME = ("delta", "log_time_beta2", "kappa", "t_weight_decay")

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of the ops


def grad_dtypes(p: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that a parameter's gradient may have."""
    return COMPLEX_DTYPES if p.is_complex() else PARAMETER_DTYPES


def floating_problem(tensor: Tensor, allowed: tuple[torch.dtype, ...] = PARAMETER_DTYPES) -> str | None:
    """Why a tensor can't be a parameter or a gradient, as a text that goes on after its name."""
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; only dense tensors are allowed"
    if tensor.dtype not in allowed:
        return f"has dtype {tensor.dtype}; allowed are {', '.join(map(str, allowed))}"
    return None


def in_place_problem(tensor: Tensor) -> str | None:
    """Why a tensor can't be updated in place, in the same way."""
    overlapping = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if overlapping and tensor.numel() > 0:
        return "has elements that share memory, so it can't be updated in place"
    return None


class Checker:
    """The checks of one op call; `op` begins every text.

    Without `offsets` the lists of state have one tensor for each parameter, else flat ones, the arenas, that the
    parameters share.
    """

    def __init__(self, op: str, params: Sequence[Tensor], offsets: Sequence[int]) -> None:
        self._op = op
        self._params = params
        self._offsets = offsets
        self._has_exp_avg = True
        self._arenas: tuple[str, int] | None = None  # the first list of state, and its length
        self._capacities: list[tuple[str, list[int]]] = []  # of each list, how many elements of parameters fit in
        for i, param in enumerate(params):
            self._floating("params", i, param)
            self._uniform("params", params, i)
            self._in_place("params", i, param)
        if offsets and len(offsets) != (wanted := OFFSETS_PER_PARAM * len(params)):
            self.fail(
                f"offsets has length {len(offsets)}, but must have {wanted}, {OFFSETS_PER_PARAM} for each of params, "
                "or none"
            )

    def fail(self, text: str) -> NoReturn:
        raise RuntimeError(f"{self._op}: {text}")

    def length(self, name: str, tensors: Sequence[object]) -> None:
        if len(tensors) != len(self._params):
            self.fail(f"{name} has length {len(tensors)}, but params has length {len(self._params)}")

    def grads(self, grads: Sequence[Tensor]) -> None:
        self.length("grads", grads)
        for i, grad in enumerate(grads):
            self._floating("grads", i, grad)
            self._uniform("grads", grads, i)
            self._on_device("grads", i, grad, i)
            self._shaped_as_param("grads", i, grad)

    def has_exp_avg(self, exp_avgs: Sequence[Tensor]) -> bool:
        """Whether there are exp_avgs, without which beta1 must be 0."""
        self._has_exp_avg = len(exp_avgs) > 0 or not self._params
        return self._has_exp_avg

    def state(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A list of unquantized state: of the parameter's shape, in the dtype of its arithmetic."""
        self._state(name, tensors, compute_dtype(self._params[0].dtype) if self._params else torch.float32)

    def codes(self, name: str, tensors: Sequence[Tensor], *dtypes: torch.dtype) -> None:
        """A list of codes: of the parameter's shape; blocks are counted in row-major order."""
        self._state_length(name, tensors)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                allowed = " or ".join(map(str, dtypes))
                self.fail(f"{name}[{i}] has dtype {tensor.dtype}, but must be {allowed}")
            self._uniform(name, tensors, i)
            self._on_device(name, i, tensor, self._param_of(i))
            if self._flat(name, i, tensor):
                continue
            self._shaped_as_param(name, i, tensor)
            self._contiguous(name, i, tensor)
        self._holds(name, tensors)

    def absmaxs(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A list of scales, one per block of the parameter."""
        self._state_length(name, tensors)
        for i, tensor in enumerate(tensors):
            self._of_dtype(name, i, tensor, torch.float32)
            self._on_device(name, i, tensor, self._param_of(i))
            if self._flat(name, i, tensor):
                continue
            blocks = block_count(self._params[i].numel())
            if tensor.numel() != blocks:
                self.fail(
                    f"{name}[{i}] has {tensor.numel()} elements, but must have {blocks}, one per block of params[{i}]"
                )
            self._contiguous(name, i, tensor)
        self._holds(name, tensors, BLOCK_SIZE)

    def steps(self, steps: Sequence[Tensor]) -> None:
        self._state_length("steps", steps)
        for i, step in enumerate(steps):
            self._of_dtype("steps", i, step, torch.float32)
            self._on_device("steps", i, step, self._param_of(i))
            if self._flat("steps", i, step):
                continue
            if step.numel() != 1:
                self.fail(f"steps[{i}] has shape {list(step.shape)}, but must hold one element")

    def param_rounding(self, remainders: Sequence[Tensor], stochastic: bool) -> None:
        """How the new parameters are rounded: to nearest, or, of bfloat16 ones, in one of the other ways."""
        if remainders:
            self._state("remainders", remainders, torch.int8 if draws(remainders) else torch.int16)
            if stochastic:
                self.fail("stochastic_param_rounding is true, but with remainders nothing is rounded away")
        if (remainders or stochastic) and self._params and self._params[0].dtype != torch.bfloat16:
            what = "stochastic_param_rounding is" if stochastic else "remainders are"
            self.fail(f"params[0] has dtype {self._params[0].dtype}, but {what} for torch.bfloat16")

    def offsets(self, steps: Sequence[Tensor]) -> None:
        """After all lists of state."""
        if not self._offsets:
            return
        rooms = [min(elements) for elements in zip(*(elements for _, elements in self._capacities), strict=True)]
        counts = [step.numel() for step in steps]
        arenas, firsts, indices = (self._offsets[i::OFFSETS_PER_PARAM] for i in range(OFFSETS_PER_PARAM))
        for i, (param, arena, first, step) in enumerate(zip(self._params, arenas, firsts, indices, strict=True)):
            if not (
                0 <= arena < len(rooms)
                and 0 <= first <= rooms[arena] - param.numel()
                and first % BLOCK_SIZE == 0
                and 0 <= step < counts[arena]
            ):
                self._fail_offsets(i, arena, first, step, counts)

    def _fail_offsets(self, i: int, arena: int, first: int, step: int, counts: Sequence[int]) -> NoReturn:
        at, numel = OFFSETS_PER_PARAM * i, self._params[i].numel()
        if not 0 <= arena < len(counts):
            self.fail(f"offsets[{at}] is {arena}, but must be in [0, {len(counts)})")
        if first < 0 or first % BLOCK_SIZE != 0:
            self.fail(f"offsets[{at + 1}] is {first}, but must be a multiple of {BLOCK_SIZE}")
        for name, elements in self._capacities:
            if first > elements[arena] - numel:
                self.fail(
                    f"offsets[{at + 1}] is {first}, but {name}[{arena}] has room for {elements[arena]} elements, "
                    f"and params[{i}] has {numel}"
                )
        self.fail(f"offsets[{at + 2}] is {step}, but must be in [0, {counts[arena]})")

    def hyperparameters(self, given: Tensor | Sequence[float], lrs: Sequence[Tensor], rows: Sequence[int]) -> None:
        """The rows of hyperparameters: as numbers, of which lrs may be tensors, or in one tensor."""
        if isinstance(given, Tensor):
            self._hyperparameter_tensor(given)
            return self._rows(rows, given.shape[0])
        count, rest = divmod(len(given), len(HYPERPARAMETERS))
        if count == 0 or rest:
            self.fail(f"hyperparameters has length {len(given)}, but must have {len(HYPERPARAMETERS)} for each row")
        if lrs and len(lrs) != count:
            self.fail(f"lrs has length {len(lrs)}, but must have {count}, one for each row, or none")
        for i, lr in enumerate(lrs):
            self._float_scalar(f"lrs[{i}]", lr)
        self._rows(rows, count)
        for i in range(count):
            row = Hyperparameters(*given[i * len(HYPERPARAMETERS) : (i + 1) * len(HYPERPARAMETERS)])
            self._row(row, f" of row {i}" if count > 1 else "")

    def scaler(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """GradScaler's tensors: one element each, on the parameters' device."""
        if grad_scale is not None:
            self._float_scalar("grad_scale", grad_scale)
        if found_inf is not None:
            if found_inf.dtype != torch.float32:
                self.fail(f"found_inf has dtype {found_inf.dtype}, but must be torch.float32")
            self._one_element("found_inf", found_inf)

    def _hyperparameter_tensor(self, tensor: Tensor) -> None:
        """The tensor of all, whose values aren't looked at."""
        name, count = "hyperparameters", len(HYPERPARAMETERS)
        self._float(name, tensor)
        if tensor.dim() != 2 or tensor.shape[0] == 0 or tensor.shape[1] != count:
            self.fail(f"{name} has shape {list(tensor.shape)}, but must have shape [rows, {count}]")
        if not tensor.is_contiguous():
            self.fail(f"{name} must be contiguous")
        self._on_params_device(name, tensor)

    def _rows(self, rows: Sequence[int], count: int) -> None:
        """Each parameter's row of hyperparameters."""
        if rows:
            self.length("rows", rows)
        for i, row in enumerate(rows):
            if not 0 <= row < count:
                self.fail(f"rows[{i}] is {row}, but must be in [0, {count})")

    def _row(self, row: Hyperparameters, which: str) -> None:
        """alpha and weight_decay may have any value, and so may lr."""
        for name in (*BETAS, "t_alpha", "t_beta3", "schedule_start", "eps", *LOG_TIME):
            value, allowed = getattr(row, name), "at least 0"
            ok = value >= 0
            if name in BETAS:
                ok, allowed = 0 <= value < 1, "in [0, 1)"
                if ok and name == "beta1" and not self._has_exp_avg:
                    ok, allowed = value == 0, "0 without exp_avgs"
            elif name == "log_time_beta2":
                ok, allowed = value == 0 or row.delta > 0, "0, or delta positive"
            if not ok:
                self.fail(f"{name}{which} is {value:g}, but must be {allowed}")

    def _state(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._state_length(name, tensors)
        for i, tensor in enumerate(tensors):
            self._of_dtype(name, i, tensor, dtype)
            self._on_device(name, i, tensor, self._param_of(i))
            if self._flat(name, i, tensor):
                continue
            self._shaped_as_param(name, i, tensor)
            self._in_place(name, i, tensor)
        self._holds(name, tensors)

    def _state_length(self, name: str, tensors: Sequence[Tensor]) -> None:
        """The first list of state says how many arenas there are."""
        if not self._offsets:
            return self.length(name, tensors)
        self._arenas = self._arenas or (name, len(tensors))
        first, length = self._arenas
        if len(tensors) != length:
            self.fail(f"{name} has length {len(tensors)}, but {first} has length {length}")

    def _flat(self, name: str, i: int, tensor: Tensor) -> bool:
        """Whether it is an arena."""
        if not self._offsets:
            return False
        if tensor.dim() != 1:
            self.fail(f"{name}[{i}] has shape {list(tensor.shape)}, but must have one dimension")
        self._contiguous(name, i, tensor)
        return True

    def _holds(self, name: str, tensors: Sequence[Tensor], scale: int = 1) -> None:
        """`scale` elements of a parameter take one of an arena."""
        if self._offsets:
            self._capacities.append((name, [tensor.numel() * scale for tensor in tensors]))

    def _param_of(self, i: int) -> int:
        """The parameter that tensor i of a list of state is compared to."""
        return 0 if self._offsets else i

    def _floating(self, name: str, i: int, tensor: Tensor) -> None:
        if problem := floating_problem(tensor):
            self.fail(f"{name}[{i}] {problem}")

    def _uniform(self, name: str, tensors: Sequence[Tensor], i: int) -> None:
        a, b = tensors[i], tensors[0]
        if a.dtype != b.dtype or a.device != b.device:
            self.fail(
                f"{name}[{i}] is {a.dtype} on {a.device}, but {name}[0] is {b.dtype} on {b.device}; "
                "one call takes one dtype and one device"
            )

    def _of_dtype(self, name: str, i: int, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            self.fail(f"{name}[{i}] has dtype {tensor.dtype}, but must be {dtype}")

    def _on_device(self, name: str, i: int, tensor: Tensor, param: int) -> None:
        if tensor.device != self._params[param].device:
            self.fail(f"{name}[{i}] is on {tensor.device}, but params[{param}] is on {self._params[param].device}")

    def _shaped_as_param(self, name: str, i: int, tensor: Tensor) -> None:
        if tensor.shape != self._params[i].shape:
            self.fail(
                f"{name}[{i}] has shape {list(tensor.shape)}, but params[{i}] has shape {list(self._params[i].shape)}"
            )

    def _contiguous(self, name: str, i: int, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            self.fail(f"{name}[{i}] must be contiguous")

    def _in_place(self, name: str, i: int, tensor: Tensor) -> None:
        if problem := in_place_problem(tensor):
            self.fail(f"{name}[{i}] {problem}")

    def _float(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in (torch.float32, torch.float64):
            self.fail(f"{name} has dtype {tensor.dtype}, but must be torch.float32 or torch.float64")

    def _float_scalar(self, name: str, tensor: Tensor) -> None:
        self._float(name, tensor)
        self._one_element(name, tensor)

    def _one_element(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() != 1:
            self.fail(f"{name} has shape {list(tensor.shape)}, but must hold one element")
        self._on_params_device(name, tensor)

    def _on_params_device(self, name: str, tensor: Tensor) -> None:
        if self._params and tensor.device != self._params[0].device:
            self.fail(f"{name} is on {tensor.device}, but params are on {self._params[0].device}")

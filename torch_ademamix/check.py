"""What arguments the ops accept: for fake tensors and the reference kernels.

The native kernels ask the same, in the same words and order (ops/check.h).
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from torch_ademamix.blockwise import CODE_DTYPES, Format, block_count
from torch_ademamix.reference import compute_dtype

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating_problem(name: str, i: int, tensor: Tensor) -> str | None:
    """Why a tensor can't be a parameter or a gradient."""
    if tensor.layout != torch.strided:
        return f"{name}[{i}] has layout {tensor.layout}; only dense tensors are allowed"
    if tensor.dtype not in PARAMETER_DTYPES:
        return f"{name}[{i}] has dtype {tensor.dtype}; allowed are {', '.join(map(str, PARAMETER_DTYPES))}"
    return None


def in_place_problem(name: str, i: int, tensor: Tensor) -> str | None:
    """Why a tensor can't be updated in place."""
    overlapping = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if overlapping and tensor.numel() > 0:
        return f"{name}[{i}] has elements that share memory, so it can't be updated in place"
    return None


class Checker:
    """The checks of one op call; `op` begins every text."""

    def __init__(self, op: str, params: Sequence[Tensor]) -> None:
        self._op = op
        self._params = params
        for i, param in enumerate(params):
            self._floating("params", i, param)
            self._uniform("params", params, i)
            self._in_place("params", i, param)

    def refuse(self, text: str) -> NoReturn:
        raise RuntimeError(f"{self._op}: {text}")

    def length(self, name: str, tensors: Sequence[object]) -> None:
        if len(tensors) != len(self._params):
            self.refuse(f"{name} has length {len(tensors)}, but params has length {len(self._params)}")

    def grads(self, grads: Sequence[Tensor]) -> None:
        self.length("grads", grads)
        for i, grad in enumerate(grads):
            self._floating("grads", i, grad)
            self._uniform("grads", grads, i)
            self._on_device("grads", i, grad)
            self._shaped_as_param("grads", i, grad)

    def state(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A list of unquantized state: of the parameter's shape, in the dtype of its arithmetic."""
        self.length(name, tensors)
        for i, tensor in enumerate(tensors):
            self._of_dtype(name, i, tensor, compute_dtype(self._params[i].dtype))
            self._on_device(name, i, tensor)
            self._shaped_as_param(name, i, tensor)
            self._in_place(name, i, tensor)

    def codes(self, name: str, tensors: Sequence[Tensor], *dtypes: torch.dtype) -> None:
        """A list of codes: of the parameter's shape; blocks are counted in row-major order."""
        self.length(name, tensors)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes:
                allowed = " or ".join(map(str, dtypes))
                self.refuse(f"{name}[{i}] has dtype {tensor.dtype}, but must be {allowed}")
            self._uniform(name, tensors, i)
            self._on_device(name, i, tensor)
            self._shaped_as_param(name, i, tensor)
            self._contiguous(name, i, tensor)

    def absmaxs(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A list of scales, one per block of the parameter."""
        self.length(name, tensors)
        for i, tensor in enumerate(tensors):
            self._of_dtype(name, i, tensor, torch.float32)
            self._on_device(name, i, tensor)
            blocks = block_count(self._params[i].numel())
            if tensor.numel() != blocks:
                self.refuse(
                    f"{name}[{i}] has {tensor.numel()} elements, but must have {blocks}, one per block of params[{i}]"
                )
            self._contiguous(name, i, tensor)

    def steps(self, steps: Sequence[Tensor]) -> None:
        self.length("steps", steps)
        for i, step in enumerate(steps):
            self._of_dtype("steps", i, step, torch.float32)
            self._on_device("steps", i, step)
            if step.numel() != 1:
                self.refuse(f"steps[{i}] has shape {list(step.shape)}, but must hold one element")

    def param_rounding(self, remainders: Sequence[Tensor], stochastic: bool) -> None:
        """How the new parameters are rounded: to nearest, or, of bfloat16 ones, in one of two other ways."""
        if remainders:
            self.length("remainders", remainders)
            for i, tensor in enumerate(remainders):
                self._of_dtype("remainders", i, tensor, torch.int16)
                self._on_device("remainders", i, tensor)
                self._shaped_as_param("remainders", i, tensor)
                self._in_place("remainders", i, tensor)
            if stochastic:
                self.refuse("stochastic_param_rounding is true, but with remainders nothing is rounded away")
        if (remainders or stochastic) and self._params and self._params[0].dtype != torch.bfloat16:
            what = "stochastic_param_rounding is" if stochastic else "remainders are"
            self.refuse(f"params[0] has dtype {self._params[0].dtype}, but {what} for torch.bfloat16")

    def scalars(self, lr: Tensor | float, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The scalars that may be tensors: one element each, on the parameters' device."""
        if isinstance(lr, Tensor):
            self._float_scalar("lr", lr)
        if grad_scale is not None:
            self._float_scalar("grad_scale", grad_scale)
        if found_inf is not None:
            if found_inf.dtype != torch.float32:
                self.refuse(f"found_inf has dtype {found_inf.dtype}, but must be torch.float32")
            self._one_element("found_inf", found_inf)

    def hyperparameters(
        self,
        *,
        beta1: float,
        beta2: float,
        beta3: float,
        t_alpha: float | None,
        t_beta3: float | None,
        schedule_start: int,
        eps: float,
        **_: Any,  # alpha, weight_decay and the flags may have any value
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2), ("beta3", beta3)):
            self._in_range(name, beta, 0 <= beta < 1, "in [0, 1)")
        for name, steps in (("t_alpha", t_alpha), ("t_beta3", t_beta3)):
            if steps is not None:
                self._in_range(name, steps, steps > 0, "positive or None")
        self._in_range("schedule_start", schedule_start, schedule_start >= 0, "at least 0")
        self._in_range("eps", eps, eps >= 0, "at least 0")

    def _in_range(self, name: str, value: float, ok: bool, allowed: str) -> None:
        if not ok:
            self.refuse(f"{name} is {value:g}, but must be {allowed}")

    def _floating(self, name: str, i: int, tensor: Tensor) -> None:
        if problem := floating_problem(name, i, tensor):
            self.refuse(problem)

    def _uniform(self, name: str, tensors: Sequence[Tensor], i: int) -> None:
        a, b = tensors[i], tensors[0]
        if a.dtype != b.dtype or a.device != b.device:
            self.refuse(
                f"{name}[{i}] is {a.dtype} on {a.device}, but {name}[0] is {b.dtype} on {b.device}; "
                "one call takes one dtype and one device"
            )

    def _of_dtype(self, name: str, i: int, tensor: Tensor, dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            self.refuse(f"{name}[{i}] has dtype {tensor.dtype}, but must be {dtype}")

    def _on_device(self, name: str, i: int, tensor: Tensor) -> None:
        if tensor.device != self._params[i].device:
            self.refuse(f"{name}[{i}] is on {tensor.device}, but params[{i}] is on {self._params[i].device}")

    def _shaped_as_param(self, name: str, i: int, tensor: Tensor) -> None:
        if tensor.shape != self._params[i].shape:
            self.refuse(
                f"{name}[{i}] has shape {list(tensor.shape)}, but params[{i}] has shape {list(self._params[i].shape)}"
            )

    def _contiguous(self, name: str, i: int, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            self.refuse(f"{name}[{i}] must be contiguous")

    def _in_place(self, name: str, i: int, tensor: Tensor) -> None:
        if problem := in_place_problem(name, i, tensor):
            self.refuse(problem)

    def _float_scalar(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in (torch.float32, torch.float64):
            self.refuse(f"{name} has dtype {tensor.dtype}, but must be torch.float32 or torch.float64")
        self._one_element(name, tensor)

    def _one_element(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() != 1:
            self.refuse(f"{name} has shape {list(tensor.shape)}, but must hold one element")
        if self._params and tensor.device != self._params[0].device:
            self.refuse(f"{name} is on {tensor.device}, but params are on {self._params[0].device}")


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor | float,
    *,
    remainders: Sequence[Tensor],
    stochastic_param_rounding: bool,
    streams: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    check = Checker("ademamix_step_", params)
    check.grads(grads)
    check.state("exp_avgs", exp_avgs)
    check.state("exp_avg_slows", exp_avg_slows)
    check.state("exp_avg_sqs", exp_avg_sqs)
    check.steps(steps)
    check.param_rounding(remainders, stochastic_param_rounding)
    if stochastic_param_rounding:
        check.length("streams", streams)
    check.scalars(lr, grad_scale, found_inf)
    check.hyperparameters(**options)


def check_blockwise_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_absmaxs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_slow_absmaxs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_sq_absmaxs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor | float,
    *,
    remainders: Sequence[Tensor],
    stochastic_param_rounding: bool,
    streams: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    check = Checker("ademamix_blockwise_step_", params)
    check.grads(grads)
    check.codes("exp_avgs", exp_avgs, torch.int8)
    check.absmaxs("exp_avg_absmaxs", exp_avg_absmaxs)
    check.codes("exp_avg_slows", exp_avg_slows, torch.int16, torch.int8)
    check.absmaxs("exp_avg_slow_absmaxs", exp_avg_slow_absmaxs)
    check.codes("exp_avg_sqs", exp_avg_sqs, torch.uint8)
    check.absmaxs("exp_avg_sq_absmaxs", exp_avg_sq_absmaxs)
    check.steps(steps)
    check.param_rounding(remainders, stochastic_param_rounding)
    check.length("streams", streams)
    check.scalars(lr, grad_scale, found_inf)
    check.hyperparameters(**options)


def checked_format(op: str, format: int) -> Format:
    formats = tuple(CODE_DTYPES)
    if not 0 <= format < len(formats):
        allowed = "0 (signed_sqrt_int8), 1 (fourth_root_uint8) or 2 (linear_int16)"
        raise RuntimeError(f"{op}: format is {format}, but must be {allowed}")
    return formats[format]


def check_quantize(x: Tensor, format: int, stochastic: bool) -> Format:
    op = "quantize_blockwise"
    checked = checked_format(op, format)
    if x.dtype != torch.float32:
        raise RuntimeError(f"{op}: x has dtype {x.dtype}, but must be torch.float32")
    if stochastic and checked != "fourth_root_uint8":
        raise RuntimeError(f"{op}: seed is given, but only fourth_root_uint8 is rounded stochastically")
    return checked


def check_dequantize(codes: Tensor, absmax: Tensor, format: int) -> Format:
    op = "dequantize_blockwise"
    checked = checked_format(op, format)
    if codes.dtype != CODE_DTYPES[checked]:
        raise RuntimeError(f"{op}: codes has dtype {codes.dtype}, but must be {CODE_DTYPES[checked]}")
    if absmax.dtype != torch.float32:
        raise RuntimeError(f"{op}: absmax has dtype {absmax.dtype}, but must be torch.float32")
    if absmax.device != codes.device:
        raise RuntimeError(f"{op}: absmax is on {absmax.device}, but codes is on {codes.device}")
    blocks = block_count(codes.numel())
    if absmax.shape != (blocks,):
        raise RuntimeError(
            f"{op}: absmax has shape {list(absmax.shape)}, but must have shape [{blocks}], one per block of codes"
        )
    return checked

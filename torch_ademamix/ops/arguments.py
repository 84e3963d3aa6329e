"""Which arguments each op accepts: checked for fake tensors and for the reference kernels.

The native kernels check the same (ops/step_arguments.h, and ops/check.h for quantizing), but have no error texts: if
they raise, the functions here raise the error that says why.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import CODE_DTYPES, POSITION_BITS, Format, block_count
from torch_ademamix.numerics.moments import op_formats, packed_moment
from torch_ademamix.ops.check import Checker


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor],
    hyperparameters: Tensor | Sequence[float],
    lrs: Sequence[Tensor] = (),
    **options: Any,
) -> None:
    check = Checker("ademamix_step_", params, options["offsets"])
    check.grads(grads)
    if check.has_exp_avg(exp_avgs):
        check.state("exp_avgs", exp_avgs)
    check.state("exp_avg_slows", exp_avg_slows)
    check.state("exp_avg_sqs", exp_avg_sqs)
    draws = options["stochastic_param_rounding"]
    _check_options(check, steps, remainders, hyperparameters, lrs, draws=draws, **options)


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
    remainders: Sequence[Tensor],
    hyperparameters: Tensor | Sequence[float],
    lrs: Sequence[Tensor] = (),
    *,
    stochastic_rounding: bool,
    **options: Any,
) -> None:
    check = Checker("ademamix_blockwise_step_", params, options["offsets"])
    check.grads(grads)
    packed = packed_moment(op_formats(exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_sqs))
    if check.has_exp_avg(exp_avgs or exp_avg_absmaxs):
        if packed != "exp_avg":
            check.codes("exp_avgs", exp_avgs, torch.int8)
        check.absmaxs("exp_avg_absmaxs", exp_avg_absmaxs)
    check.codes("exp_avg_slows", exp_avg_slows, *((torch.int16,) if packed else (torch.int16, torch.int8)))
    check.absmaxs("exp_avg_slow_absmaxs", exp_avg_slow_absmaxs)
    if packed != "exp_avg_sq":
        check.codes("exp_avg_sqs", exp_avg_sqs, torch.uint8)
    check.absmaxs("exp_avg_sq_absmaxs", exp_avg_sq_absmaxs)
    _check_options(check, steps, remainders, hyperparameters, lrs, draws=True, **options)


def _check_options(
    check: Checker,
    steps: Sequence[Tensor],
    remainders: Sequence[Tensor],
    hyperparameters: Tensor | Sequence[float],
    lrs: Sequence[Tensor],
    *,
    rows: Sequence[int],
    draws: bool,
    maximize: bool,
    stochastic_param_rounding: bool,
    seed: int,
    subsequences: Sequence[int],
    offsets: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    dry_run: bool = False,
) -> None:
    """What both ops have.

    Args:
        draws: whether each parameter must have a subsequence of random bits.
    """
    check.steps(steps)
    check.param_rounding(remainders, stochastic_param_rounding)
    check.offsets(steps)
    if draws or bfloat16.draws(remainders):
        check.length("subsequences", subsequences)
    check.hyperparameters(hyperparameters, lrs, rows)
    check.scaler(grad_scale, found_inf)


def checked_format(op: str, format: int) -> Format:
    formats = tuple(CODE_DTYPES)
    if not 0 <= format < len(formats):
        raise RuntimeError(f"{op}: format is {format}, but must be in [0, {len(formats)})")
    return formats[format]


def check_quantize(x: Tensor, format: int, stochastic: bool) -> Format:
    op = "quantize_blockwise"
    checked = checked_format(op, format)
    if x.dtype != torch.float32:
        raise RuntimeError(f"{op}: x has dtype {x.dtype}, but must be torch.float32")
    if stochastic and checked not in POSITION_BITS:
        raise RuntimeError(f"{op}: seed is given, but {checked} isn't rounded stochastically")
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

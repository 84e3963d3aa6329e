"""AdEMAMix in float64 NumPy, from the paper's formula, with how far a step in another arithmetic may be from it.

It shares no code with the package. Errors are carried through the formula as intervals: each operation may add
some roundings of its operands' size, so what cancels, vanishes or is divided by nearly nothing gets the room that it
needs and no more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

ROUNDINGS = 4.0  # of half an eps each, twice over: of a scalar, its product, a sum, and one to spare
U = 2.0**-53  # half an ulp of 1 in float64, in which all scalars are computed


@dataclass
class Interval:
    """Values, and how far others may be from them; infinitely far where an arithmetic may overflow."""

    value: Array
    error: Array

    @property
    def most(self) -> Array:
        return np.abs(self.value) + self.error


@dataclass
class Arithmetic:
    """Of a compute dtype: the relative and the absolute size of its roundings, and its largest value."""

    eps: float
    tiny: float
    largest: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Arithmetic":
        info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        factor = ROUNDINGS * (2 if dtype == torch.float64 else 1)  # where the oracle rounds no less
        return cls(eps=factor * info.eps, tiny=factor * info.tiny * info.eps, largest=info.max / 8)

    def rounded(self, value: Array, error: Array, summands: Array) -> Interval:
        """A sum or product that was exact but for `error`, and is rounded at the size of its summands."""
        error = error + self.eps * summands + self.tiny
        with np.errstate(invalid="ignore"):
            overflows = ~(np.abs(summands) + error < self.largest)
        return Interval(value, np.where(overflows, np.inf, error))


def alpha_at(t: float, alpha: float, t_alpha: float | None) -> float:
    return alpha if t_alpha is None else min(t * alpha / t_alpha, alpha)


def beta3_at(t: float, beta1: float, beta3: float, t_beta3: float | None) -> tuple[float, float]:
    """β3(t), and its error in another float64 arithmetic."""
    if t_beta3 is None or t >= t_beta3:
        return beta3, 0.0
    s = t / t_beta3
    reciprocal = ((1 - s) / np.log(beta1) if beta1 > 0 else 0.0) + (s / np.log(beta3) if beta3 > 0 else 0.0)
    if reciprocal == 0:  # a half-life of 0
        return 0.0, 0.0
    value = float(np.exp(1 / reciprocal))
    return min(value, beta3), U * value * (8 * abs(1 / reciprocal) + 2)


def log_time_beta(t: float, delta: float) -> tuple[float, float]:
    """1 - δ/(δ + t), and its error."""
    return 1 - delta / (delta + t), 4 * U


def bias_correction(beta: float, t: float) -> tuple[float, float]:
    """1 - β^t, and its error."""
    return float(1 - np.power(beta, t)), 0.0 if beta == 0 else 4 * U


def step(
    weight: Array,
    dtype: torch.dtype,
    grad: Tensor,
    exp_avg: Interval,
    exp_avg_slow: Interval,
    exp_avg_sq: Interval,
    t: float,
    lr: float,
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    t_alpha: float | None,
    t_beta3: float | None,
    schedule_start: int,
    eps: float,
    weight_decay: float,
    delta: float | None = None,
    log_time_beta2: bool = False,
    kappa: float | None = None,
    t_weight_decay: float | None = None,
    maximize: bool,
    grad_scale: float = 1.0,
    grad_scale_error: float = 0.0,
) -> tuple[Interval, Interval, Interval, Interval]:
    """One step of a tensor, its t-th: the new weight, before it is rounded to the parameter's dtype, and m1, m2, ν.

    The moments have the weight's shape; `grad_scale_error` is relative.
    """
    with np.errstate(all="ignore"):
        a = Arithmetic.of(dtype)
        p, g = weight, float64(grad) / grad_scale * (-1 if maximize else 1)
        g_error = (a.eps + grad_scale_error) * np.abs(g) + a.tiny
        warm_up = max(t - schedule_start, 0)
        alpha_t = alpha_at(warm_up, alpha, t_alpha)
        beta3_t, beta3_error = log_time_beta(warm_up, delta) if delta else beta3_at(warm_up, beta1, beta3, t_beta3)
        beta2_t, beta2_error = log_time_beta(t, delta) if delta and log_time_beta2 else (beta2, 0.0)
        if kappa:
            alpha_t += (1 + warm_up) ** (1 - kappa)
        if t_weight_decay:
            weight_decay = weight_decay / (1 + t / t_weight_decay)

        def average(beta: float, old: Interval, new: Array, new_error: Array, beta_error: float = 0.0) -> Interval:
            parts = beta * old.most + (1 - beta) * np.abs(new)
            error = beta * old.error + (1 - beta) * new_error + beta_error * (old.most + np.abs(new))
            error = error + a.tiny * old.most  # of a beta so small that it vanishes
            return a.rounded(beta * old.value + (1 - beta) * new, error, parts)

        m1 = average(beta1, exp_avg, g, g_error)
        m2 = average(beta3_t, exp_avg_slow, g, g_error, beta3_error)
        square = a.rounded(g * g, 2 * np.abs(g) * g_error, g * g)
        nu = average(beta2_t, exp_avg_sq, square.value, square.error, beta2_error)

        bias1, bias1_error = bias_correction(beta1, t)
        bias2, bias2_error = (1.0, 0.0) if log_time_beta2 else bias_correction(beta2, t)
        unbiased = divided(m1, Interval(np.full_like(p, bias1), np.full_like(p, bias1_error)))
        slow = abs(alpha_t) * np.abs(m2.value)
        numerator = a.rounded(
            unbiased.value + alpha_t * m2.value,
            unbiased.error + abs(alpha_t) * m2.error + (8 * U if kappa else 0.0) * slow + a.tiny * np.abs(m2.value),
            unbiased.most + slow,
        )
        corrected = divided(nu, Interval(np.full_like(p, bias2), np.full_like(p, bias2_error)))
        root = np.sqrt(corrected.value)
        lowest = np.sqrt(np.maximum(corrected.value - corrected.error, 0))
        root_error = np.maximum(np.sqrt(corrected.most) - root, root - lowest)
        denominator = a.rounded(root + eps, root_error, root + eps)
        ratio = divided(numerator, denominator)
        ratio = a.rounded(ratio.value, ratio.error, ratio.most)
        parts = ratio.most + np.abs(weight_decay * p)
        decay_error = (4 * U if t_weight_decay else 0.0) * np.abs(weight_decay * p)
        change = a.rounded(ratio.value + weight_decay * p, ratio.error + decay_error + a.tiny * np.abs(p), parts)
        new_error = (lr + a.tiny) * change.error + a.tiny * parts
        new = a.rounded(p - lr * change.value, new_error, np.abs(p) + lr * parts)
        return new, m1, m2, nu


def divided(a: Interval, b: Interval) -> Interval:
    """a / b, where b isn't negative; unbounded where it may be 0."""
    value = a.value / b.value
    low, high = b.value - b.error, b.value + b.error
    up = a.most / low - np.abs(value)
    down = np.abs(value) - (np.abs(a.value) - a.error) / np.where(np.abs(a.value) < a.error, low, high)
    error = np.where(low > 0, np.maximum(up, down), np.inf)
    return Interval(value, np.where(np.isnan(error), np.inf, error))


def stored_as(x: Interval, dtype: torch.dtype, ulps: float = 0.5) -> Interval:
    """Rounded to a parameter's dtype, if that is a 16-bit one: to nearest, or to one of two values around."""
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    info = torch.finfo(dtype)
    exponents = np.frexp(np.where(np.isfinite(x.most), x.most, 1))[1] - 1
    ulp = np.maximum(np.ldexp(info.eps, exponents), info.tiny * info.eps)
    error = np.where(x.most + ulp < info.max, x.error + ulps * ulp, np.inf)
    return Interval(x.value, error)


def master_weight(param: Tensor, remainder: Tensor) -> Array:
    """The float32 weight that bfloat16 parameters and their int16 or int8 remainders are."""
    bits = param.detach().contiguous().view(torch.int16).numpy().astype(np.int64)
    unit = 2**8 if remainder.dtype == torch.int8 else 1
    magnitude = np.maximum((bits & 0x7FFF) * 2**16 + remainder.numpy().astype(np.int64) * unit, 0)
    with np.errstate(invalid="ignore"):
        values = magnitude.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.asarray(np.where(bits < 0, -values, values))


def float64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def assert_within(actual: Tensor, expected: Interval, where: str) -> None:
    """That a tensor's elements are finite and in their intervals, where these are bounded."""
    bounded = np.isfinite(expected.error) & np.isfinite(expected.value)
    values = float64(actual)[bounded]
    off = np.abs(values - expected.value[bounded]) - expected.error[bounded]
    bad = np.flatnonzero(~(off <= 0))
    if bad.size:
        i = bad[0]
        raise AssertionError(
            f"{where}: {bad.size} of {bounded.size} elements are out of bounds, the first is {values[i]!r}, "
            f"and should be {expected.value[bounded][i]!r} +- {expected.error[bounded][i]:.3g}"
        )


LARGEST_CODES = {"signed_sqrt_int8": 127, "fourth_root_uint8": 255, "linear_int16": 32767}
CODE_DTYPES = {"signed_sqrt_int8": torch.int8, "fourth_root_uint8": torch.uint8, "linear_int16": torch.int16}
BLOCK_SIZE = 256
SMALLEST_CODE = 4  # of a positive value in fourth_root_uint8
SMALLEST_SCALE = 2.0**-100  # below, the product of a scale and a constant loses digits, as documented
CODE_ERROR = 0.01  # of a value in units of codes, by float32 arithmetic: 2^-22 of the largest, and 2^-16 positions


def exactly(values: Array) -> Interval:
    return Interval(values, np.zeros_like(values))


def scales_of(absmax: Tensor, count: int) -> Array:
    """Each element's."""
    return np.repeat(float64(absmax).reshape(-1), BLOCK_SIZE)[:count]


def decoded(codes: Tensor, absmax: Tensor, format: str) -> Interval:
    """The values of codes, which are float32 and some roundings from the formula."""
    x = codes.numpy().astype(np.float64).reshape(-1) / LARGEST_CODES[format]
    scales = scales_of(absmax, x.size)
    with np.errstate(over="ignore"):
        if format == "linear_int16":
            values = x * scales
        else:
            values = x * np.abs(x) * scales
            values = values if format == "signed_sqrt_int8" else values**2
    values = values.reshape(codes.shape)
    lost = np.where(scales < SMALLEST_SCALE, np.abs(scales), 0).reshape(codes.shape)
    return Interval(values, np.abs(values) * 2**-20 + 2**-149 + lost)


def in_codes(values: Array, scale: float, format: str) -> Array:
    """What is rounded to the codes of values, in a block of this scale."""
    if format == "linear_int16":
        x = values / scale
    elif format == "signed_sqrt_int8":
        x = np.sign(values) * np.sqrt(np.abs(values) / scale)
    else:
        x = np.sqrt(np.sqrt(values.clip(0)) / scale)
    return np.asarray(x * LARGEST_CODES[format])


def assert_quantized(
    codes: Tensor, absmax: Tensor, expected: Interval, format: str, *, nearest: bool, lost: Any, where: str
) -> None:
    """That codes and scales are a rounding of values in these intervals; `lost` are the elements that must be 0."""
    a = Arithmetic.of(torch.float32)
    lost = lost.reshape(-1)
    values = np.where(lost, 0, expected.value.reshape(-1))
    errors = np.where(lost, 0, expected.error.reshape(-1))
    errors = np.where(np.abs(values) < a.largest, errors + a.eps * np.abs(values) + a.tiny, np.inf)
    actual, scales = codes.numpy().astype(np.int64).reshape(-1), float64(absmax).reshape(-1)
    unsigned = format == "fourth_root_uint8"
    for block, scale in enumerate(scales):
        part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        v, error, code, gone = values[part], errors[part], actual[part], lost[part]
        if not np.isfinite(error).all():
            continue
        here = f"{where}, block {block}"
        magnitudes = v if unsigned else np.abs(v)
        low, high = max((magnitudes - error).max(), 0), max((magnitudes + error).max(), 0)
        if unsigned:
            low, high = np.sqrt(low) * (1 - a.eps), np.sqrt(high) * (1 + a.eps)
        assert low <= scale <= high, f"{here}: absmax is {scale!r}, not in [{low!r}, {high!r}]"
        assert (code[gone] == 0).all(), f"{here}: values that aren't finite must be stored as 0"
        if unsigned:
            assert (code[v > error] >= SMALLEST_CODE).all(), f"{here}: a positive value is stored as too small a code"
        if scale < SMALLEST_SCALE:
            continue
        low_code = in_codes(v - error, scale, format) - CODE_ERROR
        high_code = in_codes(v + error, scale, format) + CODE_ERROR
        least, most = (low_code - 0.5, high_code + 0.5) if nearest else (np.floor(low_code), np.ceil(high_code))
        if unsigned:  # what is positive, or may be, may become the smallest code
            most = np.where(v + error > 0, np.maximum(most, SMALLEST_CODE), most)
        bad = np.flatnonzero(~((least <= code) & (code <= most)))
        assert bad.size == 0, f"{here}: {v[bad[0]]!r} is stored as {code[bad[0]]!r}"

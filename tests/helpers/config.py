"""What the tests share: tolerances, the kernels under test, and makers of inputs."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from torch_ademamix import ops
from torch_ademamix.numerics.hyperparameters import Hyperparameters
from torch_ademamix.numerics.reference_step import ademamix_update, compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TOLERANCES = {
    # Vectors: max |error| / max |expected| of a tensor after 50 steps; the design's bounds.
    ("vectors", torch.float32, "param"): 2e-6,  # 50 roundings of a parameter to 2**-24 each
    ("vectors", torch.float32, "moment"): 2e-6,  # the same of a moment; the design sets no bound
    ("vectors", torch.float64, "param"): 1e-12,
    ("vectors", torch.float64, "moment"): 1e-10,  # 1 - beta3 of a schedule keeps some 12 digits
    # Relative; exp() and log() of two libraries differ by a few units of 2**-53.
    "schedule": 1e-13,
    # One step of one element against float64 arithmetic on the same inputs, in units of the compute
    # dtype's eps times the sum of the absolute values of all that is added: some ten roundings of
    # half an eps each at most (the native kernels reach 2.3 in random trials, the reference 2.5).
    ("step", torch.float32): 4.0,
    # Twice that: the oracle itself is computed in float64.
    ("step", torch.float64): 8.0,
    # Inductor fuses and reorders forward and backward; relative, after 20 steps.
    "inductor": 1e-5,
}

FORMULA: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "beta3": 0.9999,
    "alpha": 5.0,
    "t_alpha": None,
    "t_beta3": None,
    "schedule_start": 0,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "delta": None,
    "log_time_beta2": False,
    "kappa": None,
    "t_weight_decay": None,
    "maximize": False,
}
# And what a call has besides.
HYPERPARAMETERS: dict[str, Any] = {
    **FORMULA,
    "remainders": [],
    "stochastic_param_rounding": False,
    "seed": 0,
    "subsequences": [],
}

# Options of one op call, beside HYPERPARAMETERS.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schedules": {"t_alpha": 8, "t_beta3": 8},
    "no_decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "beta1_0": {"beta1": 0.0, "t_beta3": 40},
    "schedule_start": {"t_alpha": 8, "t_beta3": 8, "schedule_start": 5},
    "log_time": {"alpha": 1.0, "delta": 8.0, "log_time_beta2": True, "kappa": 0.85, "t_weight_decay": 30.0},
    "log_time_beta3": {"delta": 8.0, "schedule_start": 5},
    "grad_scale": {"grad_scale": torch.tensor(1000.0), "found_inf": torch.tensor([0.0])},
    "tensor_lr": {"lr": torch.tensor([3e-3], dtype=torch.float64)},
}

KERNELS = {"native": DispatchKey.CPU, "reference": DispatchKey.PrivateUse1}


def step(kernel: str, lists: Iterable[list[Tensor]], lr: Tensor | float = 1e-2, **options: Any) -> None:
    """One op call served by `kernel`; by the reference as for a device without native kernels."""
    op, args, kwargs = step_call(torch.ops.torch_ademamix.ademamix_step_, lists, lr, **options)
    op.redispatch(DispatchKeySet(KERNELS[kernel]), *args, **kwargs)


def step_call(
    packet: Any, lists: Iterable[list[Tensor]], lr: Tensor | float = 1e-2, **options: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The overload of an op, and its positional and keyword arguments.

    Args:
        options: `hyperparameters` take the place of numbers, of which an lr that is a tensor is one of `lrs`.
    """
    options = {**HYPERPARAMETERS, "offsets": [], "rows": [], **options}
    numbers = {name: options.pop(name) for name in Hyperparameters._fields[1:]}
    lists = (*lists, options.pop("remainders"))
    hyperparameters = options.pop("hyperparameters", None)
    lrs = options.pop("lrs", [lr] if isinstance(lr, Tensor) else [])
    if isinstance(hyperparameters, Tensor):
        return packet.tensor_hyperparameters, (*lists, hyperparameters), options
    if hyperparameters is None:
        hyperparameters = row_of(0.0 if isinstance(lr, Tensor) else lr, **numbers)
    return packet.default, (*lists, hyperparameters, lrs), options


def row_of(lr: float = 1e-2, **options: Any) -> list[float]:
    """What a call with these options has, as one row of numbers."""
    numbers = {**FORMULA, "lr": lr, **options}
    return [float(numbers[name] or 0) for name in Hyperparameters._fields]


def hyperparameter_tensor(lr: Tensor | float = 1e-2, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """The same in a tensor."""
    return torch.tensor([row_of(float(lr), **options)], dtype=dtype)


@dataclass
class StepLists:
    """The lists of one op call, in its order."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_slows: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (getattr(self, field.name) for field in fields(self))

    def clone(self) -> "StepLists":
        return copy.deepcopy(self)  # unlike Tensor.clone, it keeps every stride


def _strided(values: Tensor) -> Tensor:
    """The same values, two elements apart in memory."""
    return torch.stack((values, values), dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "transposed": lambda values: values.mT.contiguous().mT,
    "channels_last": lambda values: values.to(memory_format=torch.channels_last),
    "strided": _strided,
    "offset": lambda values: torch.cat((values.flatten(), values.flatten()))[values.numel() :].view(values.shape),
    "expanded": lambda values: values[:1].expand(values.shape),
}

# Shape, and the layouts of parameter, gradient and state.
CONTIGUOUS = [((n,), "contiguous", "contiguous", "contiguous") for n in (0, 1, 3, 255, 256, 257, 4095, 65537)]
MIXED = [
    *CONTIGUOUS,
    ((), "contiguous", "contiguous", "contiguous"),
    ((257,), "offset", "offset", "offset"),
    ((63, 65), "transposed", "transposed", "transposed"),
    ((63, 65), "contiguous", "transposed", "contiguous"),
    ((3, 63, 65), "strided", "strided", "contiguous"),
    ((16, 16), "contiguous", "expanded", "contiguous"),
    ((2, 3, 5, 7), "channels_last", "channels_last", "channels_last"),
    ((2, 3, 5, 7), "channels_last", "contiguous", "transposed"),
    ((0, 5), "transposed", "strided", "contiguous"),
]


def make_lists(
    entries: Iterable[tuple[tuple[int, ...], str, str, str]] = MIXED,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> StepLists:
    """Arguments as in mid-training; each tensor's first element never had a gradient."""
    generator = torch.Generator().manual_seed(seed)
    lists = StepLists([], [], [], [], [], [])
    for i, (shape, param_layout, grad_layout, state_layout) in enumerate(entries):
        layouts = (param_layout, grad_layout, *[state_layout] * 3)
        state_dtype = compute_dtype(param_dtype)
        dtypes = (param_dtype, grad_dtype or param_dtype, *[state_dtype] * 3)
        for j, (target, layout, dtype) in enumerate(zip(lists, layouts, dtypes, strict=False)):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            if j == 4:
                values = values.square()
            if j > 0 and values.numel() > 0:
                values.view(-1)[0] = 0
            target.append(LAYOUTS[layout](values.to(dtype)))
        lists.steps.append(torch.tensor(float(i % 50)))
    return lists


@dataclass
class Expected:
    """An element's exact new values, and how far a kernel may be from them."""

    values: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]


def expected_step(lists: StepLists, lr: Tensor | float = 1e-2, **options: Any) -> list[Expected]:
    """What a step of `lists` should give, per parameter: new parameter and moments."""
    options = {**FORMULA, **options}
    options |= {name: options[name] or 0 for name in Hyperparameters._fields[1:]}
    factor = -1.0 if options.pop("maximize") else 1.0
    options.pop("found_inf", None)
    if (grad_scale := options.pop("grad_scale", None)) is not None:
        factor /= grad_scale.item()
    expected = []
    for p, g, *moments, t in zip(*lists, strict=True):
        p64, g64, m1, m2, nu = (x.double() for x in (p, g, *moments))
        g64 = g64 * factor
        values = ademamix_update(p64, g64, m1, m2, nu, t + 1, Hyperparameters(lr, **options))
        # With these signs nothing cancels: the sums of the absolute values of what is added.
        decay = {**options, "weight_decay": -options["weight_decay"]}
        sums = ademamix_update(p64.abs(), -g64.abs(), -m1.abs(), -m2.abs(), nu, t + 1, Hyperparameters(lr, **decay))
        dtype = compute_dtype(p.dtype)
        relative = TOLERANCES["step", dtype] * torch.finfo(dtype).eps
        errors = [x.abs() * relative for x in sums]
        if p.dtype != dtype:
            errors[0] = errors[0] + ulp(values[0], p.dtype) / 2
        expected.append(Expected(values, tuple(errors)))
    return expected


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` around float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent).clamp(min=info.tiny * info.eps)


def assert_stepped(lists: StepLists, before: StepLists, expected: list[Expected]) -> None:
    """That one step brought `before` to `lists`, as `expected`."""
    moved = zip(lists.params, lists.exp_avgs, lists.exp_avg_slows, lists.exp_avg_sqs, strict=True)
    for i, (actual, e) in enumerate(zip(moved, expected, strict=True)):
        for name, x, value, error in zip(
            ("param", "exp_avg", "exp_avg_slow", "exp_avg_sq"),
            actual,
            e.values,
            e.errors,
            strict=True,
        ):
            off = (x.double() - value).abs() / error.clamp(min=1e-300)
            assert off.numel() == 0 or off.max() <= 1, f"{name}[{i}] is {off.max():.3g} times the tolerance off"
    assert_identical(lists.grads, before.grads)
    assert_identical(lists.steps, [t + 1 for t in before.steps])


def assert_identical(actual: Any, expected: Any, where: str = "") -> None:
    """Bit for bit the same tensors, in any nesting of containers; other values are equal."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            assert_identical(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        # Its text tells more, but -0.0 and NaNs of any kind are equal to it.
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: where + m)
        assert torch.equal(bits(actual), bits(expected)), where
    else:
        assert actual == expected or (actual != actual and expected != expected), where


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, with one bit pattern for every NaN: vector and scalar instructions make different ones."""
    tensor = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.view(torch.uint8)


def native_built() -> bool:
    return ops.native is not None

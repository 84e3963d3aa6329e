"""What the fuzz tests share: arguments of a step as Hypothesis draws them.

`make test` tries the same few examples each time; `make fuzz` others, for as long as it is told.
"""

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.config import DTYPES, StepLists
from torch_ademamix.numerics.reference_step import compute_dtype

torch.set_printoptions(threshold=8, edgeitems=2)  # of the arguments in a report

# `make fuzz` gives each of its rounds a seed.
SEED = int(os.environ.get("FUZZ_SEED", "0"))

fuzz = pytest.mark.fuzz


def effort(examples: int, **options: Any) -> settings:
    """The settings of a test that tries so many examples, or five times as many under `make fuzz`."""
    return settings(
        max_examples=5 * examples if SEED else examples,
        derandomize=not SEED,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
        **options,
    )


def some(common: list[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(common), rare)


BETAS = some([0.9, 0.0, 0.999, 0.9999, 1 - 1e-7, 1 - 2**-53, 1e-300], st.floats(0, 1, exclude_max=True))
WARM_UPS = some([None, 1, 30, 0.5, math.inf], st.floats(1e-3, 1e7))

# The options of a step, as groups and ops name them, each with what it may be.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "beta1": BETAS,
    "beta2": BETAS,
    "beta3": BETAS,
    "alpha": some([5.0, 0.0], st.floats(0, 1e4)),
    "t_alpha": WARM_UPS,
    "t_beta3": WARM_UPS,
    "schedule_start": st.sampled_from([0, 0, 1, 3, 1000]),
    "eps": some([1e-8, 0.0, 1e-30, 1e-300], st.floats(0, 10)),
    "weight_decay": some([0.0, 0.01], st.floats(0, 100)),
    "maximize": st.booleans(),
}
LEARNING_RATES = some([1e-3, 0.0, 1.0, 1e-40], st.floats(0, 100))
GRAD_SCALES = st.sampled_from([None, 1.0, 65536.0, 3.0])

# Schedules in logarithmic time, of which log_time_beta2 needs a delta.
LOG_TIME = st.fixed_dictionaries(
    {"delta": some([8.0], st.floats(1e-3, 1e4))},
    optional={
        "log_time_beta2": st.booleans(),
        "kappa": some([0.85, 1.0], st.floats(0.5, 1)),
        "t_weight_decay": some([1.0], st.floats(1e-3, 1e7)),
    },
)
step_options = st.builds(
    lambda options, log_time: {**options, **log_time},
    st.fixed_dictionaries(OPTIONS),
    st.one_of(st.just({}), LOG_TIME),
)

SIZES = [*range(6), 255, 256, 257, 511, 513, 1023, 1024, 1025, 2049]
shapes = st.one_of(
    st.just(()),
    st.sampled_from([(n,) for n in SIZES]),
    st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple),
    st.sampled_from([(33, 65), (16, 16), (2, 3, 5, 7), (1, 300), (300, 1), (1, 1, 1), (4, 0, 256)]),
)


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], *, square: bool = False, finite: bool = True) -> Tensor:
    """float64 values of mixed magnitudes, some of them special."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["normal", "normal", "decades", "wild", "zeros"]))
    x = rng.standard_normal(shape)
    if kind == "decades":
        x = x * 10.0 ** rng.integers(-9, 5, shape)
    elif kind == "wild":  # denormal and overflowing ones too
        x = x * 10.0 ** rng.integers(-45, 38, shape)
    if kind == "zeros":
        x = np.zeros(shape)
    elif kind != "normal":
        x = np.where(rng.random(shape) < 0.1, 0, x)
    if not finite:
        x = np.where(rng.random(shape) < 0.02, rng.choice([np.inf, -np.inf, np.nan], shape), x)
    # What doesn't fit into float32 state was never there.
    x = np.asarray(x).clip(-1e38, 1e38)
    return torch.from_numpy(np.asarray(np.abs(x) if square else x))


@st.composite
def laid_out(draw: st.DrawFn, x: Tensor, *, expanded: bool = False) -> Tensor:
    """The same values, somewhere in a larger memory: dimensions in any order, with gaps, at an offset.

    `expanded` also lets dimensions share their memory.
    """
    if draw(st.booleans()):
        return x.clone()
    if expanded and x.dim() and draw(st.booleans()):
        dim = draw(st.integers(0, x.dim() - 1))
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape) if x.shape[dim] else x.clone()
    strides, extent = [0] * x.dim(), draw(st.sampled_from([1, 1, 2]))
    for dim in draw(st.permutations(range(x.dim()))):
        strides[dim] = extent
        extent *= max(x.shape[dim], 1) + draw(st.sampled_from([0, 0, 1]))
    offset = draw(st.integers(0, 3))
    memory = torch.full((offset + extent,), 7, dtype=x.dtype)
    view = memory.as_strided(x.shape, strides, offset)
    return view.copy_(x)


@st.composite
def step_lists(draw: st.DrawFn, *, most: int = 4, finite: bool = True, plain_state: bool = False) -> StepLists:
    """The lists of an op call, as in mid-training; `plain_state` is contiguous, as for quantizing."""
    param_dtype, grad_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    state_dtype = compute_dtype(param_dtype)
    lists = StepLists([], [], [], [], [], [])
    alike = draw(st.booleans())  # shares the layout, which the kernels make use of
    for shape in draw(st.lists(shapes, max_size=most)):
        tensors = [
            draw(values(shape)).to(param_dtype),
            draw(values(shape, finite=finite)).to(grad_dtype),
            draw(values(shape)).to(state_dtype),
            draw(values(shape)).to(state_dtype),
            draw(values(shape, square=True)).to(state_dtype),
        ]
        order = draw(st.permutations(range(len(shape))))
        for j, (target, x) in enumerate(zip(lists, tensors, strict=False)):
            if alike:
                target.append(x.permute(order).contiguous().permute([order.index(d) for d in range(len(order))]))
            elif plain_state and j >= 2:
                target.append(x)
            else:
                target.append(draw(laid_out(x, expanded=j == 1)))
        lists.steps.append(torch.tensor(float(draw(st.sampled_from([0, 0, 1, 2, 49, 1000, 2**24 - 2, 2**24])))))
    return lists


@st.composite
def param_roundings(draw: st.DrawFn, lists: StepLists) -> dict[str, Any]:
    """The options of an op call that say how bfloat16 parameters are rounded."""
    way = draw(st.sampled_from(["nearest", "remainders", "stochastic"]))
    if way == "nearest" or not lists.params or lists.params[0].dtype != torch.bfloat16:
        return {}
    numbers = st.integers(-(2**63), 2**63 - 1)
    random = {"seed": draw(numbers), "subsequences": [draw(numbers) for _ in lists.params]}
    if way == "stochastic":
        return {"stochastic_param_rounding": True, **random}
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([np.int16, np.int8]))
    limits = np.iinfo(dtype)
    values = [np.asarray(rng.integers(limits.min, limits.max + 1, p.shape, dtype)) for p in lists.params]
    return {"remainders": [draw(laid_out(torch.from_numpy(x))) for x in values], **random}


learning_rates = st.one_of(
    LEARNING_RATES,
    st.tuples(LEARNING_RATES, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([(), (1,)])).map(
        lambda drawn: torch.full(drawn[2], drawn[0], dtype=drawn[1])
    ),
)


# Scalars of an op call that may be tensors of either dtype.
def scalars(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Tensor | None]:
    dtypes = st.sampled_from([torch.float32, torch.float64])
    return st.builds(lambda x, dtype: None if x is None else torch.tensor(x, dtype=dtype), values, dtypes)


def gaps(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's memory that are none of its elements'."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    mine = torch.zeros(memory.shape, dtype=torch.bool)
    mine.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return memory[~mine].clone()

"""Arguments changed in several places at once: native kernels, reference and fakes accept and reject the same calls.

If only the native kernels rejected a call, the error would have their own text; if only the Python checks did, there
would be none.
"""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.helpers.config import CONTIGUOUS, HYPERPARAMETERS, StepLists, assert_identical, make_lists, step, step_call
from tests.helpers.fuzzing import effort, fuzz
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import blockwise_call, blockwise_step, make_blockwise

pytestmark = [fuzz, pytest.mark.filterwarnings("ignore:ComplexHalf")]

ENTRIES = [CONTIGUOUS[0], *CONTIGUOUS[3:5], ((5, 7), "transposed", "strided", "contiguous")]

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)

# Each turns a tensor into another; what it gives may still be allowed.
CHANGES = {
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
    "meta": lambda t: t.to("meta"),
    "unsqueezed": lambda t: t.unsqueeze(-1),
    "flat": lambda t: t.reshape(-1),
    "shorter": lambda t: t[1:],
    "twice": lambda t: torch.cat((t, t)),
    "scalar": lambda t: t.flatten()[:1].reshape(()),
    "transposed": lambda t: t.transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded in the last": lambda t: t[..., :1].expand(t.shape),
    "strided": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "an empty one": lambda t: t.new_empty(3, 0),
}

# Values that an option may be given; most of them are refused.
NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]), st.floats(allow_nan=False))
SCALARS = st.sampled_from([torch.tensor(1.0), torch.ones(1), torch.ones(2), torch.ones(1, dtype=torch.float64)])
SCALARS |= st.sampled_from([torch.ones(1, dtype=torch.int64), torch.ones((), device="meta"), torch.ones(0)])
OPTIONS = {
    **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps", "weight_decay"), NUMBERS),
    **{name: st.none() | NUMBERS for name in ("t_alpha", "t_beta3")},
    "schedule_start": st.integers(-(2**63), 2**63 - 1),
    "lr": NUMBERS | SCALARS,
    **{name: st.none() | SCALARS for name in ("grad_scale", "found_inf")},
    "stochastic_param_rounding": st.booleans(),
    "subsequences": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=len(ENTRIES) + 1),
    "remainders": st.builds(list),
}


@st.composite
def bends(draw, lists, options):
    """Changes lists and options in one to three places."""
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 2)) == 0:
            name = draw(st.sampled_from(sorted(OPTIONS)))
            options[name] = draw(OPTIONS[name])
            continue
        if options["offsets"] and draw(st.integers(0, 2)) == 0:
            number = draw(st.integers(0, len(options["offsets"]) - 1))
            options["offsets"][number] = draw(st.sampled_from([-1, 0, 1, 2, 255, 256, 512, 1 << 20, 2**63 - 256]))
            continue
        name = draw(st.sampled_from([*vars(lists), "remainders"]))
        tensors = options["remainders"] if name == "remainders" else getattr(lists, name)
        i = draw(st.integers(-1, len(ENTRIES) - 1))
        if i < 0 or i >= len(tensors):
            tensors.append(torch.ones(3)) if draw(st.booleans()) or not tensors else tensors.pop()
            continue
        change = draw(st.sampled_from(sorted(CHANGES)))
        try:
            tensors[i] = CHANGES[change](tensors[i])
        except (RuntimeError, IndexError):  # not of this tensor
            continue
    return lists, options


def call_op(lists, lr, **options):
    if isinstance(lists, StepLists):
        op, args, kwargs = step_call(torch.ops.torch_ademamix.ademamix_step_, lists, lr, **options)
    else:
        op, args, kwargs = blockwise_call(lists, lr, **options)
    op(*args, **kwargs)


def call_fake(lists, lr, **options):
    with FakeTensorMode() as mode:
        tensors, lr, options = tree_map_only(Tensor, mode.from_tensor, (list(lists), lr, options))
        call_op(type(lists)(*tensors), lr, **options)


def call_reference(lists, lr, **options):
    if isinstance(lists, StepLists):
        step("reference", lists, lr, **options)
    else:
        blockwise_step("reference", lists, lr=lr, **options)


def refusal(call, lists, options):
    """The text of a refusal, or None."""
    written = [tensors for tensors in lists if tensors is not lists.grads] + [options["remainders"]]
    written = [t for tensors in written for t in tensors if not t.is_meta]
    before = [t.clone() for t in written]
    try:
        call(lists, **options)
    except RuntimeError as error:
        assert_identical(written, before)
        return str(error)
    return None


def assert_alike(lists, options):
    fake, native = (refusal(call, lists, options) for call in (call_fake, call_op))
    assert native == fake
    # What meta tensors there are, the native kernels would have refused.
    on_cpu = not any(t.is_meta for tensors in (*lists, options["remainders"]) for t in tensors)
    if on_cpu or native is not None:
        assert refusal(call_reference, lists, options) == native


def options_for(lists, with_remainders, placed):
    """Of a good call; if it is placed, the lists' state is put into arenas."""
    remainders, offsets = [], []
    if with_remainders and lists.params[0].dtype == torch.bfloat16:
        remainders = [torch.zeros(p.shape, dtype=torch.int16) for p in lists.params]
    if placed:
        arenas = in_arenas(lists, remainders)
        remainders, offsets = arenas.remainders, arenas.offsets
        for field, tensors in zip(fields(lists), arenas, strict=True):
            setattr(lists, field.name, tensors)
    return {"lr": 1e-2, **HYPERPARAMETERS, "subsequences": [1, 2, 3, 4], "remainders": remainders, "offsets": offsets}


PARAM_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@given(st.data(), PARAM_DTYPES, st.booleans(), st.booleans())
@effort(80)
def test_step(data, dtype, with_remainders, placed):
    lists = make_lists(ENTRIES, dtype)
    assert_alike(*data.draw(bends(lists, options_for(lists, with_remainders, placed))))


@given(st.data(), PARAM_DTYPES, st.booleans(), st.booleans(), st.sampled_from([8, 16]))
@effort(80)
def test_blockwise_step(data, dtype, with_remainders, placed, slow_ema_bits):
    lists = make_blockwise(ENTRIES, dtype, slow_ema_bits=slow_ema_bits)
    assert_alike(*data.draw(bends(lists, options_for(lists, with_remainders, placed))))

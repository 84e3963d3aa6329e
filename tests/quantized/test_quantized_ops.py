"""The blockwise ops as torch sees them: schema, fake, tracing, version counters."""

import pytest
import torch

from tests.helpers.config import DTYPES, MIXED, OPTIONS
from tests.helpers.quantized import (
    PACKET,
    blockwise_call,
    make_blockwise,
)
from torch_ademamix.numerics.blockwise import CODE_DTYPES

FORMATS = tuple(CODE_DTYPES)
QUANTIZE = torch.ops.torch_ademamix.quantize_blockwise.default
DEQUANTIZE = torch.ops.torch_ademamix.dequantize_blockwise.default

LR = pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])


@pytest.mark.each_value
@pytest.mark.parametrize(("number", "options"), list(enumerate(OPTIONS)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_options(dtype, number, options):
    number += DTYPES.index(dtype)
    lists = make_blockwise(MIXED[2:4] + MIXED[10:12], dtype, slow_ema_bits=8 + 8 * (number % 2))
    stochastic = number % 4 < 2
    call = blockwise_call(lists, **OPTIONS[options], stochastic_rounding=stochastic)
    torch.library.opcheck(*call)


@pytest.mark.each_value
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7])
@LR
def test_opcheck_of_lengths(lr, length, grad_dtype):
    lists = make_blockwise((MIXED[1:5] * 2)[:length], grad_dtype=grad_dtype)
    torch.library.opcheck(*blockwise_call(lists, lr))


@pytest.mark.nightly
@pytest.mark.slow
def test_opcheck_of_400_tensors():
    lists = make_blockwise(MIXED[1:5] * 100)
    torch.library.opcheck(*blockwise_call(lists, torch.tensor(1e-2)))


@pytest.mark.parametrize("shape", [(), (0,), (300,), (7, 5, 11)])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_the_formats(format, shape):
    x = torch.rand(shape)
    if x.dim() > 1:
        x = x.mT.contiguous().mT
    number = FORMATS.index(format)
    codes, absmax = QUANTIZE(x, number)
    torch.library.opcheck(QUANTIZE, (x, number))
    torch.library.opcheck(DEQUANTIZE, (codes, absmax, number))
    if format == "fourth_root_uint8":
        torch.library.opcheck(QUANTIZE, (x, number), {"seed": 1, "step": 2, "subsequence": 3})


@LR
def test_version_counters(lr):
    lists = make_blockwise(MIXED)

    def versions():
        return [[tensor._version for tensor in tensors] for tensors in lists]

    before = versions()
    op, args, kwargs = blockwise_call(lists, lr)
    op(*args, **kwargs)
    for i, (new, old) in enumerate(zip(versions(), before, strict=True)):
        assert new == [version + (i != 1) for version in old]  # gradients are only read


def test_mutations_are_declared():
    """Of every overload: all lists but the gradients, and the remainders."""
    names = [field for field in make_blockwise([]).__dataclass_fields__ if field != "grads"] + ["remainders"]
    for overload in PACKET.overloads():
        schema = getattr(PACKET, overload)._schema
        mutated = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert mutated == names
        assert not schema.returns

"""The ops as torch sees them: schema, fake, tracing, version counters."""

import pytest
import torch
from config import DTYPES, HYPERPARAMETERS, MIXED, OPTIONS, make_lists

from torch_ademamix import AdEMAMix, ademamix

PACKET = torch.ops.torch_ademamix.ademamix_step_


def op_call(lists, lr=1e-2, **options):
    """The overload, and its positional and keyword arguments."""
    op = PACKET.tensor_lr if isinstance(lr, torch.Tensor) else PACKET.default
    return op, (*lists, lr), {**HYPERPARAMETERS, **options}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, options):
    lists = make_lists([MIXED[2], *MIXED[8:13]], dtype)
    torch.library.opcheck(*op_call(lists, **OPTIONS[options]))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_lengths(lr, length, grad_dtype):
    lists = make_lists((MIXED[1:5] * 2)[:length], grad_dtype=grad_dtype)
    torch.library.opcheck(*op_call(lists, lr))


def test_400_tensors():
    """All but tracing, which takes half a minute for so many (compile_tests do it, for 1,000)."""
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = op_call(make_lists(MIXED[1:5] * 100), torch.tensor(1e-2))
    torch.library.opcheck(*call, test_utils=untraced)


def as_op(lists, lr):
    op, args, kwargs = op_call(lists, lr)
    op(*args, **kwargs)


def as_function(lists, lr):
    ademamix(*lists, lr=lr, **HYPERPARAMETERS)


@pytest.mark.parametrize("call", [as_op, as_function])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_version_counters(call, lr):
    lists = make_lists(MIXED)

    def versions():
        return [[tensor._version for tensor in tensors] for tensors in lists]

    before = versions()
    call(lists, lr)
    for i, (new, old) in enumerate(zip(versions(), before, strict=True)):
        assert new == [version + (i != 1) for version in old]  # gradients are only read


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, AdEMAMix])
def test_backward_after_a_step_raises(optimizer):
    p = torch.nn.Parameter(torch.randn(300))
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    optimizer([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mutations_are_declared():
    """Of every overload: all lists but the gradients."""
    for name in PACKET.overloads():
        arguments = getattr(PACKET, name)._schema.arguments
        mutated = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        assert mutated == ["params", "exp_avgs", "exp_avg_slows", "exp_avg_sqs", "steps", "remainders"]
        assert not getattr(PACKET, name)._schema.returns

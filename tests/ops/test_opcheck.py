"""The ops as torch sees them: schema, fake, tracing, version counters."""

import pytest
import torch

from tests.helpers.config import (
    DTYPES,
    HYPERPARAMETERS,
    MIXED,
    OPTIONS,
    hyperparameter_tensor,
    make_lists,
    row_of,
    step_call,
)
from tests.helpers.offsets import in_arenas
from torch_ademamix import AdEMAMix, ademamix

PACKET = torch.ops.torch_ademamix.ademamix_step_


@pytest.mark.each_value
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, options):
    lists = make_lists([MIXED[2], *MIXED[8:13]], dtype)
    torch.library.opcheck(*step_call(PACKET, lists, **OPTIONS[options]))


@pytest.mark.each_value
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_lengths(lr, length, grad_dtype):
    lists = make_lists((MIXED[1:5] * 2)[:length], grad_dtype=grad_dtype)
    torch.library.opcheck(*step_call(PACKET, lists, lr))


@pytest.mark.each_value
@pytest.mark.parametrize("hyperparameters", [None, hyperparameter_tensor()], ids=["numbers", "tensor"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("remainder_dtype", [None, torch.int16, torch.int8], ids=str)
def test_places(remainder_dtype, count, hyperparameters):
    lists = make_lists([MIXED[2], *MIXED[8:14]], torch.bfloat16)
    remainders = [torch.zeros(p.shape, dtype=remainder_dtype) for p in lists.params if remainder_dtype]
    arenas = in_arenas(lists, remainders, count)
    options = {"hyperparameters": hyperparameters, "subsequences": range(len(lists.params)), **arenas.options}
    torch.library.opcheck(*step_call(PACKET, arenas, **options))


@pytest.mark.parametrize("length", [0, 1, 7])
def test_hyperparameters_in_a_tensor(length):
    lists = make_lists((MIXED[1:5] * 2)[:length])
    torch.library.opcheck(*step_call(PACKET, lists, hyperparameters=hyperparameter_tensor()))


@pytest.mark.parametrize("in_tensor", [False, True])
def test_rows_of_hyperparameters(in_tensor):
    rows = [*row_of(), *row_of(beta1=0.0, t_beta3=40)]
    options = {"hyperparameters": rows, "lrs": [torch.tensor(0.1), torch.tensor(0.2)], "rows": [0, 1, 1, 0]}
    if in_tensor:
        options["hyperparameters"] = torch.tensor(rows, dtype=torch.float64).view(2, -1)
    torch.library.opcheck(*step_call(PACKET, make_lists(MIXED[1:5]), **options))


def test_dry_run():
    torch.library.opcheck(*step_call(PACKET, make_lists(MIXED[1:5]), dry_run=True), test_utils="test_faketensor")


def test_400_tensors():
    """All but tracing, which takes half a minute for so many (compile_tests do it, for 1,000)."""
    untraced = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = step_call(PACKET, make_lists(MIXED[1:5] * 100), torch.tensor(1e-2))
    torch.library.opcheck(*call, test_utils=untraced)


def as_op(lists, lr):
    op, args, kwargs = step_call(PACKET, lists, lr)
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


def test_mutation_of_saved_tensors_is_allowed():
    """Its mode takes keyword-only lists that are written to for out arguments."""
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        p = torch.nn.Parameter(torch.randn(3))
        loss = p.square().sum()
        loss.backward(retain_graph=True)
        before = p.grad.clone()
        AdEMAMix([p]).step()
        p.grad = None
        loss.backward()
        assert torch.equal(p.grad, before)


def test_mutations_are_declared():
    """Of every overload: all lists but the gradients."""
    for name in PACKET.overloads():
        arguments = getattr(PACKET, name)._schema.arguments
        mutated = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        assert mutated == ["params", "exp_avgs", "exp_avg_slows", "exp_avg_sqs", "steps", "remainders"]
        assert not getattr(PACKET, name)._schema.returns

"""Batches of accumulated micro-batches are split as the plain loop would, or rejected."""

import copy
import dataclasses
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from tests.helpers.config import assert_identical
from tests.helpers.cuda_graphs import stand_in
from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Opaque:
    def __init__(self, x, y):
        self.x, self.y = x, y


def make_model():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, AdEMAMix(model.parameters(), lr=1e-2)


def loss_fn(model, batch):
    x, y = (batch["x"], batch["y"]) if isinstance(batch, (dict, UserDict)) else (batch.x, batch.y)
    return (model(x) - y).square().sum()


def make_step(model, optimizer, batch, captured, loss_fn=loss_fn):
    if captured:
        return capture_train_step(model, optimizer, loss_fn, (batch,), accumulate=4, average=False)
    return compile_train_step(model, optimizer, loss_fn, accumulate=4, average=False, backend="aot_eager")


@pytest.fixture(params=[False, True], ids=["compiled", "captured"])
def captured(request, monkeypatch):
    stand_in(monkeypatch)
    return request.param


def tensors():
    return torch.arange(32.0).view(8, 4), torch.ones(8, 1)


def of_transformers(**tensors):
    BatchEncoding = pytest.importorskip("transformers").BatchEncoding
    return BatchEncoding(tensors)


@pytest.mark.parametrize("kind", [dict, Pair])
def test_opened(captured, kind):
    x, y = tensors()
    expected, optimizer = make_model()
    loss = sum(loss_fn(expected, Pair(*parts)) for parts in zip(x.split(2), y.split(2), strict=True))
    loss.backward()
    optimizer.step()
    model, optimizer = make_model()
    batch = kind(x=x, y=y)
    assert_identical(make_step(model, optimizer, batch, captured)(batch), loss.detach())
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    "kind", [UserDict, Data, Opaque, pytest.param(of_transformers, marks=pytest.mark.integrations)]
)
def test_what_cannot_be_opened_raises(captured, kind):
    """Each micro-batch would be the whole batch."""
    x, y = tensors()
    model, optimizer = make_model()
    before = copy.deepcopy(model.state_dict())
    batch = kind(x=x, y=y)
    with pytest.raises(TypeError, match=r"leaf 0 of the batch is a \w+, but must be a tensor.*pass dict\(batch\)"):
        make_step(model, optimizer, batch, captured)(batch)
    assert_identical(model.state_dict(), before)


def jagged(x):
    return torch.nested.nested_tensor(list(x.split([3, 1, 2, 2])), layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (jagged, "leaf 0 of the batch is a nested tensor, which accumulate=4 can't split; pass its values"),
        (torch.Tensor.to_sparse, "leaf 0 of the batch is a torch.sparse_coo tensor, which accumulate=4 can't split"),
        (lambda x: x[:4], "leaves 0 and 1 of the batch have 4 and 8 rows, but accumulate=4 splits each tensor"),
        (lambda x: x[:6], "leaf 0 of the batch has shape .6, 4., whose first dimension isn't a multiple of"),
    ],
)
def test_tensors_that_cannot_be_split_raise(change, message):
    x, y = tensors()
    model, optimizer = make_model()
    step = compile_train_step(model, optimizer, loss_fn, accumulate=4, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        step({"x": change(x), "y": y})


def test_what_has_no_rows_goes_to_each():
    """Numbers, text, modules, and tensors without dimensions."""
    teacher, seen = nn.Linear(4, 1), []

    def loss_fn(model, x, scale, teacher, reduction):
        seen.append((x.shape[0], scale.item(), reduction))
        return scale * (model(x) - teacher(x).detach()).square().sum()

    model, optimizer = make_model()
    step = compile_train_step(model, optimizer, loss_fn, accumulate=4, backend="eager")
    with torch._dynamo.config.patch(disable=True):
        step(tensors()[0], torch.tensor(0.5), teacher=teacher, reduction="sum")
    assert seen == [(2, 0.5, "sum")] * 4

"""What README's table of features says of other packages, asked of those packages.

A cell in italics there rests on documentation: it would take a GPU or several processes to ask, or the package isn't on
the index. Every other cell of bitsandbytes, torchao and torch has its question here.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ademamix

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes.optim")
    torchao = pytest.importorskip("torchao.optim")

README = Path(__file__).parents[2] / "README.md"
TENSORS = 3


class Calls(TorchDispatchMode):
    """The op calls of an optimizer, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if re.search("bitsandbytes|fused_adam|_ademamix", str(op)):
            self.calls.append(args)
        return op(*args, **(kwargs or {}))


def optimizer(cls: Callable[..., Optimizer], **options: object) -> Optimizer:
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    return cls(params, **options)


def calls(made: Optimizer) -> list[tuple[object, ...]]:
    made.step()  # makes the state
    with Calls() as mode:
        made.step()
    return mode.calls


def names(module: ModuleType, pattern: str) -> list[str]:
    return [name for name in dir(module) if re.search(pattern, name)]


def options(cls: Callable[..., Optimizer], pattern: str) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if re.search(pattern, name)]


def tensors(state: object) -> Iterator[Tensor]:
    """Those that an optimizer's state consists of, a tensor subclass' own among them."""
    for values in state.values():
        for value in values.values():
            if isinstance(value, Tensor):
                yield from [getattr(value, name) for name in getattr(value, "tensor_attrs", ())] or [value]


def has_8bit_state(made: Optimizer) -> bool:
    made.step()
    return any(t.dtype == torch.uint8 for t in tensors(made.state))


def keeps_slow_updates(made: Optimizer, slow_ema: Callable[[dict[str, Tensor]], Tensor]) -> bool:
    """Whether a hundred gradients of 0.1 change a slow average of that size."""
    p = made.param_groups[0]["params"][0]
    p.grad = 1000 * torch.randn_like(p)
    made.step()  # now it is 0.1, normally distributed
    codes = slow_ema(made.state[p]).clone()
    p.grad = torch.full_like(p, 0.1)
    for _ in range(100):
        made.step()
    return (slow_ema(made.state[p]) != codes).double().mean().item() > 0.5


def compiled_frames(made: Optimizer) -> int:
    """How often three compiled steps are traced; -1 where they don't trace as one graph."""
    made.step()
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(made.step, fullgraph=True, backend=counter)
    try:
        for _ in range(3):
            step()
    except torch._dynamo.exc.Unsupported:
        return -1
    return counter.frame_count


def compiled_inside(made: Optimizer, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a step calls something that it compiles itself."""
    compiled = []
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
        made.step()
    return len(compiled)


def test_ademamix():
    assert says("AdEMAMix") == ("✓", "–", "–")
    assert [bool(names(module, "AdEMAMix")) for module in (bitsandbytes, torchao, torch.optim)] == [True, False, False]


def test_one_call(monkeypatch):
    assert says("one call for many tensors") == ("–", "compiled, each", "✓")
    assert len(calls(optimizer(torch_ademamix.AdEMAMix))) == 1
    assert len(calls(optimizer(bitsandbytes.AdEMAMix))) == TENSORS
    assert compiled_inside(optimizer(torchao.AdamW8bit), monkeypatch) == TENSORS
    assert len(calls(optimizer(torch.optim.AdamW, fused=True))) == 1


@pytest.mark.nightly
def test_8bit_state():
    assert says("8-bit state") == ("✓", "✓, and fp8", "–")
    assert has_8bit_state(optimizer(bitsandbytes.AdEMAMix8bit))
    assert has_8bit_state(optimizer(torchao.AdamW8bit))
    assert names(torchao, "AdamWFp8")
    assert not has_8bit_state(optimizer(torch.optim.AdamW))


def test_slow_average():
    assert says("8-bit state whose slow EMA keeps its updates") == ("–", "–", "–")
    assert keeps_slow_updates(optimizer(torch_ademamix.AdEMAMix8bit), lambda state: state["exp_avg_slow"])
    assert not keeps_slow_updates(optimizer(bitsandbytes.AdEMAMix8bit), lambda state: state["state1"][1])


def test_bfloat16_weights():
    assert says("bfloat16 weights, stochastic or exact") == ("–", "stochastic", "–")
    found = [options(cls, "round|master") for cls in (bitsandbytes.AdEMAMix, torchao.AdamW8bit, torch.optim.AdamW)]
    assert found == [[], ["bf16_stochastic_round"], []]


@pytest.mark.nightly
def test_compiled_step(monkeypatch):
    assert says("`torch.compile`, full graph") == ("recompiles", "inside only", "breaks")
    assert compiled_frames(optimizer(torch_ademamix.AdEMAMix, lr=torch.tensor(1e-3))) == 1
    assert compiled_frames(optimizer(bitsandbytes.AdEMAMix)) == 3
    assert compiled_frames(optimizer(torchao.AdamW8bit)) == -1
    assert compiled_frames(optimizer(torch.optim.AdamW, fused=True)) == -1
    assert compiled_frames(optimizer(torch.optim.AdamW, foreach=True)) == -1


def test_grad_scaler():
    assert says("`GradScaler` inside the step") == ("–", "–", "✓")
    made = [optimizer(bitsandbytes.AdEMAMix), optimizer(torchao.AdamW8bit), optimizer(torch.optim.AdamW, fused=True)]
    assert [getattr(each, "_step_supports_amp_scaling", False) for each in made] == [False, False, True]


def test_clipping():
    assert says("clipping inside the step") == ("–", "–", "–")
    assert options(torch_ademamix.AdEMAMix, "max_grad_norm")
    assert not any(options(cls, "clip|norm") for cls in (bitsandbytes.AdEMAMix, torchao.AdamW8bit, torch.optim.AdamW))


def test_paging():
    assert says("paged state") == ("✓", "offloaded", "–")
    assert names(bitsandbytes, "^PagedAdEMAMix")
    assert names(torchao, "CPUOffloadOptimizer")
    assert not names(torch.optim, "(?i)paged|offload")


def table() -> dict[str, list[str]]:
    """The cells of each feature in README's table."""
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in README.read_text().splitlines() if line.startswith("| ")]
    (head,) = [i for i, row in enumerate(rows) if "bitsandbytes" in row]
    return {row[0]: row[1:] for row in rows[head:]}


def says(feature: str) -> tuple[str, ...]:
    """The cells of bitsandbytes, torchao and torch."""
    return tuple(table()[feature][1:4])


def test_every_plain_cell_is_asked():
    asked = set(re.findall(r'says\("(.*?)"\)', Path(__file__).read_text()))
    for feature, cells in table().items():
        if feature in asked or "bitsandbytes" in cells:
            continue
        assert all(cell == "" or re.fullmatch(r"\*.*\*", cell) for cell in cells[1:4]), feature

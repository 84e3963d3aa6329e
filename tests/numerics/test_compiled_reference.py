"""The reference kernels through torch.compile: what they compute plain, one compilation for every shape."""

import subprocess
import sys
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.config import HYPERPARAMETERS, MIXED, bits, hyperparameter_tensor, make_lists
from tests.helpers.quantized import SEED, make_blockwise
from torch_ademamix.numerics import reference_step
from torch_ademamix.numerics.hyperparameters import Hyperparameters
from torch_ademamix.ops import compiled_reference

KINDS = pytest.mark.parametrize("kind", ["32", "blockwise"])
STEPS = {"32": reference_step.ademamix_step_, "blockwise": reference_step.ademamix_blockwise_step_}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7 + 1e-4}
REST: dict[str, Any] = {"remainders": [], "seed": SEED, "grad_scale": None, "found_inf": None}
REST |= {"maximize": False, "stochastic_param_rounding": False}


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Of every size, and how many graphs that takes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = cache(partial(torch.compile, dynamic=True, fullgraph=True, backend=counter))
    monkeypatch.setattr(compiled_reference, "_compiled", compiled)
    monkeypatch.setattr(compiled_reference, "MIN_NUMEL", 0)
    return counter


def make(kind: str, entries: Any = MIXED, *dtypes: torch.dtype, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    if kind == "32":
        return make_lists(entries, *dtypes, **kwargs), {"subsequences": []}
    lists = make_blockwise(entries, *dtypes, **kwargs)
    return lists, {"subsequences": lists.subsequences, "stochastic_rounding": True}


def row(lr: Any, options: dict[str, Any]) -> Hyperparameters:
    """The numbers among options, which it takes out of them."""
    numbers = [options.pop(name) for name in Hyperparameters._fields[1:]]
    return Hyperparameters(lr, *(0.0 if x is None else x for x in numbers))


def check(kind: str, lists: Any, lr: Any = 1e-2, **options: Any) -> None:
    """In two rows, of which the first has another lr."""
    expected = lists.clone()
    before = [p.clone() for p in lists.params]
    remainders = options.pop("remainders")
    expected_remainders = [r.clone() for r in remainders]
    second = row(lr, options)
    rows = [second._replace(lr=second.lr * 3), second]
    numbers = [i % 2 for i in range(len(before))]
    compiled_reference.run(STEPS[kind], [*lists, remainders], rows, numbers, **options)
    STEPS[kind](*expected, expected_remainders, [rows[i] for i in numbers], **options)
    assert any(not torch.equal(bits(a), bits(b)) for a, b in zip(lists.params, before, strict=True))
    for actual, wanted in zip(lists, expected, strict=True):
        for a, b in zip(actual, wanted, strict=True):
            if a.dtype.is_floating_point:
                torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=1e-7, equal_nan=True)
            else:  # a fused multiply-add may round a value to the other side
                difference = (a.int() - b.int()).abs()
                assert bool((difference <= 1).all())
                assert difference.count_nonzero() <= 1 + 1e-3 * a.numel()


@pytest.mark.first_case
@KINDS
def test_one_graph_serves_every_shape(kind: str, graphs: CompileCounterWithBackend) -> None:
    """Permuted tensors too; strided ones are updated plain. Sizes of 1 are compiled in."""
    lists, options = make(kind)
    check(kind, lists, **{**REST, **HYPERPARAMETERS, **options})
    before = graphs.frame_count
    lists, options = make(kind, [((n, 3), *["contiguous"] * 3) for n in (7, 100, 2000)])
    check(kind, lists, **{**REST, **HYPERPARAMETERS, **options})
    assert graphs.frame_count == before


@KINDS
def test_no_number_is_compiled_in(kind: str, graphs: CompileCounterWithBackend) -> None:
    entries = [((300,), *["contiguous"] * 3), ((7, 40), *["contiguous"] * 3)]
    counts = set()
    for i in range(3):
        lists, options = make(kind, entries)
        numbers = {**HYPERPARAMETERS, "eps": 1e-8 * (i + 1), "weight_decay": 0.1 * i, "t_alpha": 10.0 * i or None}
        check(kind, lists, 1e-2 / (i + 1), **{**REST, **numbers, **options, "seed": SEED + i})
        counts.add(graphs.frame_count)
    assert len(counts) == 1


@pytest.mark.each_value
@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    lists, options = make(kind, MIXED[2:4], dtype, torch.float32)
    check(kind, lists, **{**REST, **HYPERPARAMETERS, **options})


@pytest.mark.first_case
@KINDS
def test_scaler_and_tensors_of_numbers(kind: str) -> None:
    lists, options = make(kind, MIXED[2:4])
    numbers = dict(zip(Hyperparameters._fields, hyperparameter_tensor()[0].unbind(), strict=True))
    options |= {**numbers, "grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    check(kind, lists, options.pop("lr"), **{**REST, **options})


@pytest.mark.first_case
@pytest.mark.parametrize("rounding", ["remainders", "stochastic"])
def test_bfloat16_weights(rounding: str) -> None:
    lists, options = make("32", [((300,), *["contiguous"] * 3), ((5, 60), *["contiguous"] * 3)], torch.bfloat16)
    options |= {**REST, **HYPERPARAMETERS}
    if rounding == "remainders":
        options["remainders"] = [torch.randint_like(p, -(1 << 15), 1 << 15, dtype=torch.int16) for p in lists.params]
    else:
        options |= {"stochastic_param_rounding": True, "subsequences": [0, 1]}
    check("32", lists, **options)


def test_where_torch_compile_fails_it_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no compiler"), None)

    monkeypatch.setattr(compiled_reference, "_compiled", lambda function: fails)
    monkeypatch.setattr(compiled_reference, "_unable", set())
    lists, options = make("32", MIXED[:6])
    expected = lists.clone()
    arguments = {**REST, **HYPERPARAMETERS, **options}
    remainders, numbers = arguments.pop("remainders"), row(1e-2, arguments)
    with pytest.warns(UserWarning, match="torch.compile doesn't serve cpu here"):
        compiled_reference.run(STEPS["32"], [*lists, remainders], [numbers], [], **arguments)
    assert compiled_reference._unable == {"cpu"}
    STEPS["32"](*expected, remainders, [numbers] * len(expected.params), **arguments)
    for actual, wanted in zip(lists, expected, strict=True):
        torch.testing.assert_close(list(actual), list(wanted))


def test_small_calls_are_not_compiled(monkeypatch: pytest.MonkeyPatch, graphs: CompileCounterWithBackend) -> None:
    monkeypatch.setattr(compiled_reference, "MIN_NUMEL", 10**9)
    lists, options = make("32", MIXED[1:3])
    check("32", lists, **{**REST, **HYPERPARAMETERS, **options})
    assert graphs.frame_count == 0


PROGRAM = """
import sys, warnings
sys.modules["torch_ademamix._native"] = None  # as if it hadn't been built
warnings.simplefilter("ignore")
import torch
import torch_ademamix
from torch_ademamix import ops
from torch_ademamix.ops import compiled_reference
assert ops.native is None
if sys.argv[1] == "plain":
    compiled_reference._unable.add("cpu")
compiled_reference.MIN_NUMEL = 0
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 30), (700,), (5000,))]
optimizer = getattr(torch_ademamix, sys.argv[3])(params, lr=1e-2, t_alpha=9, min_8bit_size=256)
step = torch.compile(optimizer.step) if sys.argv[4] == "True" else optimizer.step
for _ in range(3):
    for p in params:
        p.grad = torch.randn_like(p)
    step()
torch.save([p.detach() for p in params], sys.argv[2])
"""


@pytest.mark.first_case
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
def test_optimizer_without_native_kernels(tmp_path: Any, name: str, compiled: bool) -> None:
    """Eager, and as part of a compiled step."""
    results: dict[str, list[Tensor]] = {}
    for how in ("fused", "plain"):
        subprocess.run([sys.executable, "-c", PROGRAM, how, str(tmp_path / how), name, str(compiled)], check=True)
        results[how] = torch.load(tmp_path / how)
    torch.testing.assert_close(results["fused"], results["plain"], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(results["fused"], results["plain"], strict=True))

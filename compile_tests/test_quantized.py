"""torch.compile of steps with quantized state: the graph, the generated code, and eager's bits."""

import copy
import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._dynamo.utils import ReinplaceCounters
from torch._inductor.utils import run_and_get_code
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.helpers.config import assert_identical
from tests.helpers.graphs import assert_only_op_calls, describe, op_calls
from torch_ademamix import AdEMAMix, AdEMAMix8bit, compile_train_step
from torch_ademamix.numerics.blockwise import CODE_DTYPES
from torch_ademamix.ops import dequantize_blockwise, quantize_blockwise

SHAPES = [(70, 60), (4,), (4096,), (3, 5)]
SLOW_BITS = pytest.mark.parametrize("slow_ema_bits", [8, 16])


def make(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params[0].data = params[0].mT.contiguous().mT
    optimizer = AdEMAMix8bit(params, **{"lr": torch.tensor(1e-2), "t_alpha": 20, "t_beta3": 20, "seed": 5, **options})
    optimizer.init_state()
    set_grads(params, 0)
    return params, optimizer


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_graph():
    """One call for the small parameters, one for the quantized ones."""
    _, optimizer = make()
    backend = EagerAndRecordGraphs()
    torch.compile(optimizer.step, fullgraph=True, backend=backend)()
    (module,) = backend.graphs
    assert_expected_inline(
        describe(module.graph),
        """\
_set_grad_enabled(
    False)
_ademamix_blockwise_step_.default(
    [f32[70, 60], f32[4096]]
    [f32[70, 60], f32[4096]]
    [i8[8448]]
    [f32[33]]
    [i16[8448]]
    [f32[33]]
    [u8[8448]]
    [f32[33]]
    [f32[2]]
    []
    [0.0, 0.9, 0.999, 0.9999, 5.0, 20.0, 20.0, 0.0, 1e-08, 0.01, 0.0, 0.0, 0.0, 0.0]
    [f32[]]
    rows=[]
    maximize=False
    stochastic_param_rounding=False
    seed=5
    subsequences=[0, 2]
    offsets=[0, 0, 0, 0, 4352, 1]
    grad_scale=None
    found_inf=None
    stochastic_rounding=True)
increment_version(
    [f32[70, 60], f32[4096], i8[8448], f32[33], i16[8448], f32[33], u8[8448], f32[33], f32[2]])
_ademamix_step_.default(
    [f32[4], f32[3, 5]]
    [f32[4], f32[3, 5]]
    [f32[512]]
    [f32[512]]
    [f32[512]]
    [f32[2]]
    []
    [0.0, 0.9, 0.999, 0.9999, 5.0, 20.0, 20.0, 0.0, 1e-08, 0.01, 0.0, 0.0, 0.0, 0.0]
    [f32[]]
    rows=[]
    maximize=False
    stochastic_param_rounding=False
    seed=5
    subsequences=[]
    offsets=[0, 0, 0, 0, 256, 1]
    grad_scale=None
    found_inf=None)
increment_version(
    [f32[4], f32[3, 5], f32[512], f32[512], f32[512], f32[2]])
_set_grad_enabled(
    True)""",
    )


@pytest.mark.each_value
@pytest.mark.parametrize("stochastic_rounding", [True, False], ids=["stochastic", "nearest"])
@SLOW_BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_generated_code(dtype, slow_ema_bits, stochastic_rounding):
    options = {"slow_ema_bits": slow_ema_bits, "stochastic_rounding": stochastic_rounding}
    _, optimizer = make(dtype, **options)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert_only_op_calls(code, 2)


def test_generated_code_of_quantized_parameters_alone():
    _, optimizer = make(min_8bit_size=0)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    assert_only_op_calls(code, 1)


@pytest.mark.each_value
@SLOW_BITS
def test_compiles_once_and_draws_the_bits_of_eager(counter, slow_ema_bits):
    """Over 50 steps with a scheduler, past the warm-ups."""
    params, optimizer = make(slow_ema_bits=slow_ema_bits)
    expected, eager = make(slow_ema_bits=slow_ema_bits)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    schedulers = [CosineAnnealingLR(o, 50) for o in (optimizer, eager)]
    for i in range(50):
        set_grads(params, i)
        set_grads(expected, i)
        optimizer._opt_called = True  # the compiled step isn't the one that the scheduler watches
        compiled()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_identical((params, optimizer.state_dict()), (expected, eager.state_dict()))


def test_converted_checkpoint_between_steps(counter):
    """State that was stored in 32 bits, or with exp_avg_slow in other bits, into a compiled step."""
    params, optimizer = make()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    compiled()
    for options in ({"optim_bits": 32}, {"optim_bits": 8, "slow_ema_bits": 8}):
        other = AdEMAMix([nn.Parameter(p.detach().clone()) for p in params], lr=1e-2, **options)
        set_grads(other.param_groups[0]["params"], 1)
        other.step()
        saved = copy.deepcopy(other.state_dict())
        saved["param_groups"][0]["lr"] = torch.tensor(1e-2)
        expected, eager = make()
        eager.load_state_dict(copy.deepcopy(saved))
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, q in zip(params, expected, strict=True):
                q.copy_(p)
        for i in range(3):
            set_grads(params, i)
            set_grads(expected, i)
            compiled()
            eager.step()
        assert_identical((params, optimizer.state_dict()), (expected, eager.state_dict()))


def test_skipped_step(counter):
    """found_inf is read at each call."""
    params, optimizer = make()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    compiled()
    before = copy.deepcopy((params, optimizer.state_dict()))
    optimizer.found_inf.fill_(1)
    compiled()
    assert_identical((params, optimizer.state_dict()), before)
    assert counter.frame_count == 1


def make_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdEMAMix8bit(groups, lr=torch.tensor(1e-2), min_8bit_size=512, t_alpha=10, t_beta3=10)
    return model, optimizer


def loss_fn(model, x, y):
    return (model(x) - y).square().mean()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 64, generator=generator), torch.randn(16, 8, generator=generator)) for _ in range(count)]


def eager_train_step(model, optimizer, *batch):
    loss = loss_fn(model, *batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_train_step_is_eager_to_the_bit():
    """A whole train step in one graph; aot_eager's arithmetic is eager's."""
    model, optimizer = make_training()
    expected_model, eager = make_training()
    counter = CompileCounterWithBackend("aot_eager")
    step = compile_train_step(model, optimizer, loss_fn, backend=counter)
    schedulers = [CosineAnnealingLR(o, 20) for o in (optimizer, eager)]
    for batch in batches(20):
        assert_identical(step(*batch), eager_train_step(expected_model, eager, *batch))
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_identical(
        (list(model.parameters()), optimizer.state_dict()["state"]),
        (list(expected_model.parameters()), eager.state_dict()["state"]),
    )


def test_train_step_with_inductor():
    """Two op calls, on the parameters and the state themselves; fusions around them round otherwise."""
    model, optimizer = make_training()
    expected_model, eager = make_training()
    step = compile_train_step(model, optimizer, loss_fn)
    first, *others = batches(20)
    _, codes = run_and_get_code(step, *first)
    (code,) = [code for code in codes if op_calls(code)]
    assert len(op_calls(code)) == 2
    assert not re.search("clone|copy_|auto_functionalized", code)
    assert not ReinplaceCounters._values
    eager_train_step(expected_model, eager, *first)
    for batch in others:
        loss, expected = step(*batch), eager_train_step(expected_model, eager, *batch)
        # A value near the middle of two codes may be rounded to the other one.
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("format", CODE_DTYPES)
def test_formats(counter, format):
    """quantize and dequantize inside of a graph, with computation around them."""

    def there_and_back(x, **key):
        codes, absmax = quantize_blockwise(x * 2, format, **key)
        return codes, absmax, dequantize_blockwise(codes, absmax, format) + 1

    x = torch.rand(3, 700)
    keys = [{}] + ([{"seed": 1, "step": 2, "subsequence": 3}] if format == "fourth_root_uint8" else [])
    for key in keys:
        compiled = torch.compile(there_and_back, fullgraph=True, backend=counter)
        assert_identical(compiled(x, **key), there_and_back(x, **key))

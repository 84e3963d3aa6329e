"""On a GPU: the CUDA ops against the CPU ops, streams, graphs, paging; `make gpu-check` runs these."""

import gc
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import torch_ademamix
from benchmarks.shared.gpt2 import SHAPES
from tests.helpers.config import (
    DTYPES,
    MIXED,
    OPTIONS,
    StepLists,
    assert_identical,
    bits,
    hyperparameter_tensor,
    make_lists,
    step_call,
)
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import SEED, BlockwiseLists, assert_codes_within, code_bounds, make_blockwise
from torch_ademamix import AdEMAMix, capture_train_step, compile_train_step, ops
from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.blockwise import CODE_DTYPES, quantize
from torch_ademamix.numerics.hyperparameters import Hyperparameters
from torch_ademamix.state import paging

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SLOW_BITS = pytest.mark.parametrize("slow_ema_bits", [8, 12, 16])
STOCHASTIC = pytest.mark.parametrize("stochastic_rounding", [True, False], ids=["stochastic", "nearest"])
KINDS = pytest.mark.parametrize("kind", ["32", "blockwise"])

# The root and the quotient of quantized steps are approximate: relative to the step that an element makes.
APPROXIMATION = 1e-6

PAGED_ELEMENTS = 2**20  # of a tensor in managed memory, of which tests take little
CLASSES = ("AdEMAMix", "AdEMAMix32bit", "AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix32bit", "PagedAdEMAMix8bit")


@pytest.fixture(autouse=True)
def _finish() -> Iterator[None]:
    yield
    torch.cuda.synchronize()  # an error of a kernel belongs to its test
    gc.collect()  # so does managed memory


def on_gpu(lists: Any, device: str = "cuda") -> Any:
    """A copy there, with every stride and offset."""

    def move(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storage = storage.clone().cpu() if device == "cpu" else storage.cuda(torch.device(device).index or 0)
        empty = torch.empty(0, dtype=t.dtype, device=device)
        return empty.set_(storage, t.storage_offset(), t.shape, t.stride())

    return type(lists)(*tree_map_only(Tensor, move, [list(tensors) for tensors in lists]))


def to_cpu(lists: Any) -> Any:
    return on_gpu(lists, "cpu")


def make(kind: str, *args: Any, **kwargs: Any) -> Any:
    return make_lists(*args, **kwargs) if kind == "32" else make_blockwise(*args, **kwargs)


def take_step(lists: Any, lr: float | Tensor = 1e-2, **options: Any) -> None:
    is_plain = isinstance(lists, StepLists)
    if not is_plain:
        options = {"stochastic_rounding": True, "seed": SEED, "subsequences": lists.subsequences, **options}
    packet = torch.ops.torch_ademamix.ademamix_step_ if is_plain else torch.ops.torch_ademamix.ademamix_blockwise_step_
    op, args, kwargs = step_call(packet, lists, lr, **options)
    op(*args, **kwargs)


def assert_near(actual: Tensor, expected: Tensor, before: Tensor, spacing: float = 0.0) -> None:
    """To an ulp, or to what the approximations may change of the step that was made.

    `spacing` is that of the values which stochastic rounding goes to, over the value.
    """
    actual, expected, before = (t.detach() for t in (actual, expected, before))
    low = torch.nextafter(expected, torch.full_like(expected, -torch.inf))
    high = torch.nextafter(expected, torch.full_like(expected, torch.inf))
    within_ulp = (actual >= low) & (actual <= high) | (actual == expected) | (actual.isnan() & expected.isnan())
    error = (actual.double() - expected.double()).abs()
    allowed = APPROXIMATION * (expected.double() - before.double()).abs() + spacing * expected.double().abs()
    assert bool((within_ulp | (error <= allowed)).all())


def check_step(kind: str, lists: Any, **options: Any) -> None:
    actual, expected = on_gpu(lists), to_cpu(lists)
    take_step(actual, **tree_map_only(Tensor, lambda t: t.cuda(), options))
    take_step(expected, **options)
    (params, *others), (expected_params, *expected_others) = to_cpu(actual), expected
    for i, (p, wanted) in enumerate(zip(params, expected_params, strict=True)):
        assert_near(p, wanted, lists.params[i])
    if lists.params and lists.params[0].dtype == torch.float64 and options.get("t_beta3") is not None:
        # exp and log of another library: beta3 differs by some units of 2**-53, and so do the moments.
        torch.testing.assert_close(others[:4], expected_others[:4], rtol=1e-12, atol=1e-14)
    else:
        assert_same_state(to_cpu(actual), expected, lists, **options)


def assert_same_state(actual: Any, expected: Any, before: Any, **options: Any) -> None:
    """After a step of `before`: bit for bit, but for codes that the approximate roots may round to the other side."""
    assert_identical(without_codes(actual), without_codes(expected))
    if isinstance(actual, BlockwiseLists):
        assert_codes_within(actual, code_bounds(before, **options))


def without_codes(lists: Any) -> list[list[Tensor]]:
    """All but the parameters and the codes."""
    return [[t for t in tensors if t.dtype not in CODE_DTYPES.values()] for tensors in list(lists)[1:]]


def test_native_kernels_serve_cuda() -> None:
    for op in ("_ademamix_step_", "_ademamix_blockwise_step_", "quantize_blockwise", "paged_empty"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_ademamix::{op}", "CUDA")


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_dtypes(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    check_step("32", make_lists(MIXED, param_dtype, grad_dtype))


@STOCHASTIC
@SLOW_BITS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_blockwise_dtypes(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, slow_ema_bits: int, stochastic_rounding: bool
) -> None:
    lists = make_blockwise(MIXED, param_dtype, grad_dtype, slow_ema_bits=slow_ema_bits)
    check_step("blockwise", lists, stochastic_rounding=stochastic_rounding)


@KINDS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("remainder_dtype", [torch.int16, torch.int8], ids=str)
def test_remainders(kind: str, grad_dtype: torch.dtype, remainder_dtype: torch.dtype) -> None:
    """The weights are right to what the approximations change; of 24 bits to one of their ulps."""
    lists = make(kind, MIXED, torch.bfloat16, grad_dtype)
    limits = torch.iinfo(remainder_dtype)
    remainders = [torch.randint_like(p, limits.min, limits.max + 1, dtype=remainder_dtype) for p in lists.params]
    before = [bfloat16.join(p, r) for p, r in zip(lists.params, remainders, strict=True)]
    actual, gpu_remainders = on_gpu(lists), [r.cuda() for r in remainders]
    expected, expected_remainders = to_cpu(lists), deepcopy(remainders)
    random = {"seed": SEED, "subsequences": list(range(len(lists.params)))}
    take_step(actual, remainders=gpu_remainders, **random)
    take_step(expected, remainders=expected_remainders, **random)
    for i, (p, r) in enumerate(zip(to_cpu(actual).params, gpu_remainders, strict=True)):
        wanted = bfloat16.join(expected.params[i], expected_remainders[i])
        spacing = 2.0**-15 if remainder_dtype == torch.int8 else 0.0
        assert_near(bfloat16.join(p, r.cpu()), wanted, before[i], spacing)
    assert_same_state(to_cpu(actual), expected, lists, remainders=remainders, **random)


@KINDS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_stochastic_parameters(kind: str, grad_dtype: torch.dtype) -> None:
    """The same bits are drawn: only an ulp of the float32 weight may round one to the other side."""
    lists = make(kind, [*MIXED, ((2**18 + 5,), *["contiguous"] * 3)], torch.bfloat16, grad_dtype)
    options = {
        "stochastic_param_rounding": True,
        "seed": SEED,
        "subsequences": [3 * i for i in range(len(lists.params))],
    }
    actual, expected = on_gpu(lists), to_cpu(lists)
    take_step(actual, **options)
    take_step(expected, **options)
    moved = [(a != b).flatten() for a, b in zip(to_cpu(actual).params, expected.params, strict=True)]
    assert torch.cat(moved).double().mean() < 1e-3
    assert_same_state(to_cpu(actual), expected, lists, **options)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kind: str, options: str, dtype: torch.dtype) -> None:
    check_step(kind, make(kind, MIXED[:8], dtype), **OPTIONS[options])


@KINDS
@pytest.mark.parametrize("length", [0, 1, 400, 1200])
def test_list_lengths(kind: str, length: int) -> None:
    check_step(kind, make(kind, (MIXED[:6] * 200)[:length]))


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_elements_that_are_not_finite(kind: str, dtype: torch.dtype, value: float) -> None:
    lists = make(kind, MIXED[4:7], dtype, torch.float32)
    for grad in lists.grads:
        grad[[3, 255 % grad.numel()]] = value
    check_step(kind, lists)


@KINDS
def test_many_random_steps(kind: str) -> None:
    """A million elements of all magnitudes, and each next step from the GPU's own state."""
    lists = make(kind, [((2**20 + 77,), *["contiguous"] * 3)], torch.bfloat16)
    for _ in range(10):
        lists.grads[0] = (torch.randn_like(lists.grads[0]) * torch.randn_like(lists.grads[0]).mul(4).exp()).detach()
        check_step(kind, lists)
        gpu = on_gpu(lists)
        take_step(gpu)
        lists = to_cpu(gpu)


@pytest.mark.parametrize("format", CODE_DTYPES)
def test_quantize_and_dequantize(format: str) -> None:
    for n in (0, 1, 255, 256, 257, 10**6 + 1):
        x = torch.randn(n) * torch.randn(n).mul(3).exp()
        for seed in (None, SEED) if format == "fourth_root_uint8" else (None,):
            actual = ops.quantize_blockwise(x.cuda(), format, seed=seed, step=3, subsequence=1)
            assert_identical([t.cpu() for t in actual], list(quantize(x, format, seed=seed, step=3, subsequence=1)))
            values = ops.dequantize_blockwise(*actual, format)
            assert_identical(values.cpu(), ops.dequantize_blockwise(*(t.cpu() for t in actual), format))


@KINDS
def test_opcheck(kind: str) -> None:
    packet = torch.ops.torch_ademamix.ademamix_step_
    options: dict[str, Any] = {}
    lists = on_gpu(make(kind, MIXED[1:4]))
    if isinstance(lists, BlockwiseLists):
        packet = torch.ops.torch_ademamix.ademamix_blockwise_step_
        options |= {"stochastic_rounding": True, "seed": SEED, "subsequences": lists.subsequences}
    hyperparameters = hyperparameter_tensor().cuda()
    torch.library.opcheck(*step_call(packet, lists, **options))
    torch.library.opcheck(*step_call(packet, lists, torch.tensor(1e-2, device="cuda"), **options))
    torch.library.opcheck(*step_call(packet, lists, hyperparameters=hyperparameters, **options))


@KINDS
@pytest.mark.parametrize("count", [1, 3])
def test_offsets(kind: str, count: int) -> None:
    """As plain lists, bit for bit."""
    plain = on_gpu(make(kind, MIXED))
    arenas = in_arenas(plain.clone(), count=count)
    take_step(plain)
    options = {} if kind == "32" else {"stochastic_rounding": True, "seed": SEED, "subsequences": plain.subsequences}
    step_packet = torch.ops.torch_ademamix.ademamix_step_
    packet = step_packet if kind == "32" else torch.ops.torch_ademamix.ademamix_blockwise_step_
    op, args, kwargs = step_call(packet, arenas, **options, **arenas.options)
    op(*args, **kwargs)
    arenas.assert_holds(plain, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyperparameters_in_a_tensor(dtype: torch.dtype) -> None:
    """Bit for bit what they are as numbers."""
    lists = on_gpu(make("32", MIXED))
    numbers = lists.clone()
    hyperparameters = hyperparameter_tensor(dtype=dtype, t_alpha=8.0, t_beta3=8.0)
    values = dict(zip(Hyperparameters._fields, hyperparameters[0].tolist(), strict=True))
    take_step(numbers, **{**values, "schedule_start": 0})
    op, args, kwargs = step_call(torch.ops.torch_ademamix.ademamix_step_, lists, hyperparameters=hyperparameters.cuda())
    op(*args, **kwargs)
    assert_identical(list(lists), list(numbers))


@KINDS
def test_current_stream(kind: str) -> None:
    """The step waits for what its stream does, and for nothing else."""
    lists = on_gpu(make(kind, MIXED[4:8]))
    expected = to_cpu(lists)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for grad in lists.grads:
            grad.mul_(2)
        take_step(lists)
    torch.cuda.current_stream().wait_stream(stream)
    for grad in expected.grads:
        grad.mul_(2)
    before = to_cpu(expected)
    take_step(expected)
    assert_same_state(to_cpu(lists), expected, before)


@KINDS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(kind: str) -> None:
    lists = make(kind, MIXED[:8])
    actual, expected = on_gpu(lists, "cuda:1"), to_cpu(lists)
    take_step(actual)
    take_step(expected)
    assert torch.cuda.current_device() == 0
    assert_same_state(to_cpu(actual), expected, lists)


@KINDS
def test_no_host_synchronization(kind: str) -> None:
    lists = on_gpu(make(kind, MIXED[4:8]))
    lr, scale, found_inf = (torch.full((), value, device="cuda") for value in (1e-2, 2.0, 0.0))
    take_step(lists, lr=lr, grad_scale=scale, found_inf=found_inf)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(lists, lr=lr, grad_scale=scale, found_inf=found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(2_000_000_000)  # clocks: about a second
    busy = torch.cuda.Event()
    busy.record()
    take_step(lists, lr=lr, grad_scale=scale, found_inf=found_inf)
    assert not busy.query()  # nor does anything wait that torch doesn't know of


@KINDS
def test_nothing_is_allocated_after_the_first_step(kind: str) -> None:
    """What a step takes, torch's allocator has from the step before."""
    lists = on_gpu(make(kind, MIXED))

    def taken() -> tuple[int, int]:
        return torch.cuda.memory_allocated(), torch.cuda.memory_stats()["segment.all.allocated"]

    take_step(lists)
    before = taken()
    for _ in range(5):
        take_step(lists)
    assert taken() == before


@KINDS
def test_two_launches(kind: str) -> None:
    """For GPT-2's 148 tensors, in one dtype."""
    entries = [((min(torch.Size(shape).numel(), 5000),), *["contiguous"] * 3) for shape in SHAPES]
    lists = on_gpu(make(kind, entries, torch.bfloat16))
    take_step(lists)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take_step(lists)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "emset" not in name and "emcpy" not in name]) == 2


# ------------------------------------------------------------------------------------------------ training


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 64), nn.BatchNorm1d(64)).cuda()


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def make_batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(i)
    return torch.randn(32, 64, device="cuda", generator=generator), torch.ones(32, 64, device="cuda")


def train(name: str, steps: int, make_step: Any, **options: Any) -> tuple[list[Tensor], list[Tensor], AdEMAMix]:
    """Losses, the parameters and buffers afterwards, and the optimizer."""
    model = make_model()
    optimizer = getattr(torch_ademamix, name)(
        model.parameters(), lr=1e-2, t_alpha=15, t_beta3=15, min_8bit_size=256, **options
    )
    step = make_step(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    losses = []
    for i in range(steps):
        losses.append(step(*make_batch(i)))
        scheduler.step()
    return losses, [t.detach() for t in (*model.parameters(), *model.buffers())], optimizer


def eager(model: nn.Module, optimizer: AdEMAMix, loss_fn: Any = loss_fn) -> Any:
    def step(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, *batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(model: nn.Module, optimizer: AdEMAMix, loss_fn: Any = loss_fn) -> Any:
    return capture_train_step(model, optimizer, loss_fn, make_batch(99))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=repr)
@pytest.mark.parametrize("name", CLASSES)
def test_replays_equal_eager_steps(name: str, options: dict[str, Any]) -> None:
    """20 of them, with a changing lr and both schedules, bit for bit."""
    for actual, expected in zip(
        train(name, 20, captured, capturable=True, **options)[:2],
        train(name, 20, eager, capturable=True, **options)[:2],
        strict=True,
    ):
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(bits(a), bits(b))


def test_replays_of_what_is_checkpointed() -> None:
    """Recomputed within the graph."""

    def loss_fn(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return (model[2:](checkpoint(model[:2], x, use_reentrant=False)) - y).square().mean()

    actual, expected = (train("AdEMAMix", 5, partial(step, loss_fn=loss_fn))[:2] for step in (captured, eager))
    assert_identical(actual, expected)


def test_capture_trains_nothing_by_itself() -> None:
    model = make_model()
    before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    optimizer = AdEMAMix(model.parameters())
    random = torch.cuda.get_rng_state()
    capture_train_step(model, optimizer, loss_fn, make_batch(0))
    assert_identical([t.detach() for t in (*model.parameters(), *model.buffers())], before)
    assert all(state["step"] == 0 for state in optimizer.state.values())
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_captured_step_after_load_state_dict() -> None:
    model = make_model()
    optimizer = AdEMAMix(model.parameters())
    step = captured(model, optimizer)
    step(*make_batch(0))
    saved = optimizer.state_dict()
    steps = [state["step"].item() for state in optimizer.state.values()]
    optimizer.load_state_dict(saved)
    step(*make_batch(1))
    assert [state["step"].item() for state in optimizer.state.values()] == [t + 1 for t in steps]


def test_captured_step_refuses_other_batches() -> None:
    model = make_model()
    step = captured(model, AdEMAMix(model.parameters()))
    x, y = make_batch(0)
    with pytest.raises(ValueError, match=r"leaf 0 of the batch is a torch.float32 tensor of shape \[31, 64\]"):
        step(x[1:], y)


def test_lr_that_is_replaced_between_replays() -> None:
    model = make_model()
    optimizer = AdEMAMix(model.parameters(), lr=1e-2, weight_decay=0)
    step = captured(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    step(*make_batch(0))
    assert_identical([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("name", CLASSES)
def test_step_alone_in_a_graph(name: str) -> None:
    model = make_model()
    optimizer = getattr(torch_ademamix, name)(model.parameters(), capturable=True, t_beta3=10, min_8bit_size=256)
    optimizer.init_state()
    loss_fn(model, *make_batch(0)).backward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    assert {state["step"].item() for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix8bit"])
def test_compiled_training(name: str, mode: str) -> None:
    def compiled(model: nn.Module, optimizer: AdEMAMix) -> Any:
        step = compile_train_step(model, optimizer, loss_fn, mode=mode)
        return lambda *batch: step(*batch).clone()  # the next replay overwrites it

    losses, _, _ = train(name, 5, compiled)
    expected, _, _ = train(name, 5, eager)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-3, atol=1e-3)


@KINDS
def test_version_counters(kind: str) -> None:
    lists = on_gpu(make(kind, MIXED[1:4]))
    before = [p._version for p in lists.params]
    take_step(lists)
    assert all(p._version > version for p, version in zip(lists.params, before, strict=True))


def test_gradient_scaler() -> None:
    model = make_model()
    optimizer = AdEMAMix(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda")
    before = [p.detach().clone() for p in model.parameters()]
    x, y = make_batch(0)
    scaler.scale(loss_fn(model, x * torch.inf, y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical([p.detach() for p in model.parameters()], before)
    optimizer.zero_grad()
    scaler.scale(loss_fn(model, x, y)).backward()
    scaler.step(optimizer)
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_out_of_memory_leaves_everything_as_it_was() -> None:
    """Non-contiguous tensors need copies: where there is no room for them, nothing has been written."""
    lists = make_lists([((512, 1024), "strided", "contiguous", "contiguous")])
    before, actual = on_gpu(lists), on_gpu(lists)
    actual.params = [torch.stack((p, p), dim=-1)[..., 0] for p in actual.params]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**16) / total)
    hog = []
    try:
        while True:  # as large as the copies: smaller ones would come out of other segments
            hog.append(torch.empty_like(actual.grads[0]))
    except torch.cuda.OutOfMemoryError:
        pass
    try:
        with pytest.raises(RuntimeError):
            take_step(actual)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del hog
    assert_identical([t.cpu() for ts in actual for t in ts], [t.cpu() for ts in before for t in ts])


# ------------------------------------------------------------------------------------------------ paging

PAGED_TENSORS = {"AdEMAMix": 3, "AdEMAMix32bit": 3, "AdEMAMix8bit": 6}  # the scales, too


def make_optimizer(name: str) -> tuple[Tensor, AdEMAMix]:
    """Each time of the same parameter, with the same gradient."""
    p, grad = torch.randn(2, PAGED_ELEMENTS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    p = nn.Parameter(p)
    p.grad = grad
    return p, getattr(torch_ademamix, name)([p], capturable=True)


@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
def test_paged_state_behaves_as_other_state(name: str) -> None:
    assert paging.statistics().tensors == 0
    results = []
    for prefix in ("Paged", ""):
        p, optimizer = make_optimizer(prefix + name)
        for _ in range(3):
            optimizer.step()
        assert paging.statistics().tensors == (PAGED_TENSORS[name] if prefix else 0)
        results.append([p.detach().cpu(), *(t.cpu() for t in optimizer.state[p].values())])
        del p, optimizer
        gc.collect()
    assert_identical(*results)
    assert paging.statistics()[:2] == (0, 0)  # freed with the tensors


@pytest.mark.parametrize("name", ["AdEMAMix32bit", "AdEMAMix8bit"])
def test_paged_state_stays_paged(name: str) -> None:
    p, optimizer = make_optimizer("Paged" + name)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert paging.statistics().tensors == PAGED_TENSORS[name]
    copy = deepcopy(optimizer)
    assert paging.statistics().tensors == 2 * PAGED_TENSORS[name]
    (q,) = copy.param_groups[0]["params"]
    q.grad = p.grad.clone()
    optimizer.step()
    copy.step()
    assert_identical(list(copy.state[q].values()), list(optimizer.state[p].values()))


@pytest.mark.parametrize("how", ["eager", "replayed"])
@pytest.mark.parametrize("name", ["AdEMAMix32bit", "AdEMAMix8bit"])
def test_paged_out_and_in(name: str, how: str) -> None:
    """State that lies in the host's memory comes back, prefetched or (in a graph) page by page, as it was."""
    p, optimizer = make_optimizer("Paged" + name)
    q, ordinary = make_optimizer(name)
    optimizer.init_state()
    step = optimizer.step
    if how == "replayed":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        step = graph.replay
    fetched = paging.statistics().prefetched_bytes
    for _ in range(3):
        step()
        ordinary.step()
        for tensor in optimizer.state[p].values():
            if tensor.numel() >= paging.MIN_PAGED_SIZE:
                paging.page_out(tensor)
    step()
    ordinary.step()
    assert (paging.statistics().prefetched_bytes > fetched) == (how == "eager")
    assert_identical([p.detach(), *optimizer.state[p].values()], [q.detach(), *ordinary.state[q].values()])

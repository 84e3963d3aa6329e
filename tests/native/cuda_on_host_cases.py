"""The CUDA ops, run on the host, against the CPU ops: what test_cuda_on_host.py runs under the sanitizers."""

import copy
import os
import threading
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.config import (
    DTYPES,
    MIXED,
    OPTIONS,
    StepLists,
    assert_identical,
    hyperparameter_tensor,
    make_lists,
    row_of,
    step_call,
)
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import (
    SEED,
    BlockwiseLists,
    boundaries,
    make_blockwise,
    neighbours,
    with_absmax_one,
    without_exp_avg,
)
from tests.native.host import driver, managed_memory, take_log
from torch_ademamix import ops
from torch_ademamix.numerics.blockwise import CODE_DTYPES

# What all variants are built for (cuda_driver.cpp).
COMMON_DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
SAME_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)

TILE = 2048  # elements that one CTA does at a time

Lists = StepLists | BlockwiseLists


def assert_within_ulp(actual: Tensor, expected: Tensor) -> None:
    low = torch.nextafter(expected, torch.full_like(expected, -torch.inf))
    high = torch.nextafter(expected, torch.full_like(expected, torch.inf))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool((same | ((actual >= low) & (actual <= high))).all())


def call(namespace: Any, kind: str, lists: Any, **options: Any) -> None:
    name = "_ademamix_step_"
    if kind == "blockwise":
        name = "_ademamix_blockwise_step_"
        options = {"stochastic_rounding": True, "seed": SEED, "subsequences": lists.subsequences, **options}
    op, args, kwargs = step_call(getattr(namespace, name), lists, **options)
    op(*args, **kwargs)


def check_step(lists: Lists, **options: Any) -> int:
    """Compares a step of both ops, and leaves its result in the lists; the number of launches."""
    kind = "blockwise" if isinstance(lists, BlockwiseLists) else "32"
    expected, expected_options = lists.clone(), copy.deepcopy(options)
    call(torch.ops.torch_ademamix, kind, expected, **expected_options)
    take_log()
    call(torch.ops.cuda_on_host, kind, lists, **options)
    assert_identical(options.get("remainders"), expected_options.get("remainders"))
    (params, *others), (expected_params, *expected_others) = lists, expected
    for actual, wanted in zip(params, expected_params, strict=True):
        assert_within_ulp(actual, wanted)
    assert_identical(others, expected_others)
    log = take_log()
    assert set(log) <= {"launch"}
    return len(log)


def make(kind: str, *args: Any, **kwargs: Any) -> Lists:
    return make_lists(*args, **kwargs) if kind == "32" else make_blockwise(*args, **kwargs)


# How bfloat16 parameters are rounded, as options of a step.
def with_remainders(lists: Lists) -> dict[str, Any]:
    """Of weights that aren't bfloat16; in the parameters' order in memory."""
    return {
        "remainders": [torch.randint_like(p, -(1 << 15), 1 << 15, dtype=torch.int16) for p in lists.params],
    }


def with_remainders_of_8_bits(lists: Lists) -> dict[str, Any]:
    subsequences = [7 * i + 1 for i in range(len(lists.params))]
    remainders = [torch.randint_like(p, -(1 << 7), 1 << 7, dtype=torch.int8) for p in lists.params]
    return {"remainders": remainders, "seed": SEED, "subsequences": subsequences}


def stochastically(lists: Lists) -> dict[str, Any]:
    subsequences = [7 * i + 1 for i in range(len(lists.params))]
    return {"stochastic_param_rounding": True, "seed": SEED, "subsequences": subsequences}


ROUNDINGS = pytest.mark.parametrize("rounding", [with_remainders, with_remainders_of_8_bits, stochastically])
KINDS = pytest.mark.parametrize("kind", ["32", "blockwise"])


def contiguous(*sizes: int) -> list[Any]:
    return [((n,), *["contiguous"] * 3) for n in sizes]


EDGES = contiguous(1, 7, 8, 9, 31, 256, TILE - 1, TILE, TILE + 1, 13 * TILE + 13)


@pytest.mark.each_value
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_dtypes_layouts_and_sizes(param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    launches = check_step(make_lists([*MIXED, *EDGES], param_dtype, grad_dtype))
    assert launches == 2


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype", "slow_ema_bits", "stochastic_rounding"),
    [
        *((param, grad, 16, True) for param in DTYPES for grad in DTYPES),
        *((dtype, dtype, 16, False) for dtype in DTYPES),
        *((param, grad, bits, True) for param, grad in COMMON_DTYPES for bits in (8, 12)),
        *((torch.float32, torch.float32, bits, False) for bits in (8, 12)),
    ],
    ids=str,
)
def test_blockwise_dtypes_layouts_and_sizes(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, slow_ema_bits: int, stochastic_rounding: bool
) -> None:
    lists = make_blockwise([*MIXED[8:], *EDGES], param_dtype, grad_dtype, slow_ema_bits=slow_ema_bits)
    assert check_step(lists, stochastic_rounding=stochastic_rounding) == 2


@pytest.mark.each_value
@pytest.mark.parametrize("slow_ema_bits", [8, 12, 16, 32])
@pytest.mark.parametrize(("dtype", "grad_dtype"), COMMON_DTYPES, ids=str)
def test_without_exp_avg(dtype: torch.dtype, grad_dtype: torch.dtype, slow_ema_bits: int) -> None:
    entries = [*MIXED, *EDGES]
    if slow_ema_bits == 32:
        lists: Lists = without_exp_avg(make_lists(entries, dtype, grad_dtype))
    else:
        lists = make_blockwise(entries, dtype, grad_dtype, slow_ema_bits=slow_ema_bits, has_exp_avg=False)
    assert check_step(lists, beta1=0.0) == 2
    lists.grads[-1][[3, 300, -1]] = torch.nan
    check_step(lists, beta1=0.0)
    if dtype == torch.bfloat16:
        for rounding in (with_remainders, stochastically):
            check_step(lists, beta1=0.0, **rounding(lists))


@pytest.mark.each_value
@KINDS
@ROUNDINGS
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_bfloat16_parameters(kind: str, rounding: Any, grad_dtype: torch.dtype) -> None:
    """On the host both ops divide exactly: the float32 weights are equal, and so is what they are rounded to."""
    lists = make(kind, [*MIXED, *EDGES], torch.bfloat16, grad_dtype)
    options = rounding(lists)
    for _ in range(2):
        check_step(lists, **options)


@pytest.mark.each_value
@KINDS
@ROUNDINGS
def test_misaligned_bfloat16_parameters(kind: str, rounding: Any) -> None:
    for shift in (1, 2, 8):
        for others in (shift, 0, 3):
            lists = make(kind, contiguous(2 * TILE + 5, 3, 600), torch.bfloat16)
            options = rounding(lists)
            shifted = [(lists.params, shift), (lists.grads, others), (options.get("remainders", []), others)]
            if isinstance(lists, StepLists):
                shifted += [(lists.exp_avgs, others), (lists.exp_avg_slows, others), (lists.exp_avg_sqs, others)]
            for tensors, at in shifted:
                tensors[:] = [torch.cat((tensor.new_zeros(at), tensor))[at:] for tensor in tensors]
            check_step(lists, **options)


@pytest.mark.each_value
@KINDS
@ROUNDINGS
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_bfloat16_parameters_that_are_not_finite(kind: str, rounding: Any, value: float) -> None:
    lists = make(kind, contiguous(700, 256), torch.bfloat16, torch.float32)
    lists.params[0][[3, 300, 699]] = value
    lists.grads[0][[5, 300, 301]] = value
    check_step(lists, **rounding(lists))


@KINDS
def test_several_steps(kind: str) -> None:
    lists = make(kind, contiguous(5000, 700))
    for _ in range(5):
        check_step(lists, t_alpha=3, t_beta3=4)


@KINDS
@pytest.mark.parametrize("past_the_limit", [0, 1])
def test_lists_past_one_launch(kind: str, past_the_limit: int) -> None:
    limit = driver.tensors_of_a_launch() if kind == "32" else driver.blockwise_tensors_of_a_launch()
    lists = make(kind, contiguous(*(1 + i % 3 for i in range(limit + past_the_limit))))
    assert check_step(lists) == 2 + past_the_limit


def test_steps_past_one_launch() -> None:
    count = driver.steps_of_a_launch() + 1
    lists = make_lists(contiguous(*(5 if i % 10 == 1 or i == count - 1 else 0 for i in range(count))))
    assert check_step(lists) == 2 + -(-count // driver.tensors_of_a_launch())


@KINDS
def test_only_empty_tensors(kind: str) -> None:
    lists = make(kind, contiguous(0, 0))
    assert check_step(lists) == 1
    assert [step.item() for step in lists.steps] == [1, 2]


@pytest.mark.each_value
@KINDS
@SAME_DTYPES
def test_misaligned(kind: str, dtype: torch.dtype) -> None:
    """Views into flat buffers: parameters and gradients shifted alike with the state, and differently."""
    for shift in (1, 2, 3, 5, 8):
        for others in (shift, 0, 1):
            lists = make(kind, contiguous(2 * TILE + 5, 3, 600), dtype)
            for i, tensors in enumerate(lists):
                if i < len(list(lists)) - 1:
                    for j, tensor in enumerate(tensors):
                        at = shift if i == 0 else others
                        tensors[j] = torch.cat((tensor.new_zeros(at), tensor))[at:]
            check_step(lists)


@pytest.mark.each_value
@KINDS
@SAME_DTYPES
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kind: str, options: str, dtype: torch.dtype) -> None:
    check_step(make(kind, contiguous(700, 5), dtype), **OPTIONS[options])


@KINDS
@pytest.mark.parametrize("found_inf", [1.0, torch.nan])
def test_found_inf(kind: str, found_inf: float) -> None:
    lists = make(kind, contiguous(700, 5))
    before = lists.clone()
    check_step(lists, grad_scale=torch.tensor(128.0), found_inf=torch.tensor(found_inf))
    assert_identical(list(lists), list(before))


@pytest.mark.each_value
@KINDS
@SAME_DTYPES
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_elements_that_are_not_finite(kind: str, dtype: torch.dtype, value: float) -> None:
    lists = make(kind, contiguous(700, 256), dtype, torch.float32)
    lists.grads[0][[3, 300, 301, 699]] = value
    lists.grads[1][:] = value
    check_step(lists)


def test_blocks_of_zeros_and_of_denormal_numbers() -> None:
    lists = make_blockwise(contiguous(1024))
    for tensors in (lists.exp_avg_absmaxs, lists.exp_avg_slow_absmaxs, lists.exp_avg_sq_absmaxs):
        tensors[0][:] = torch.tensor([0, 1e-42, 1e-38, 3e38])
    lists.grads[0][:512] = 0
    check_step(lists)


@pytest.mark.parametrize("format", CODE_DTYPES)
def test_quantize_and_dequantize(format: str) -> None:
    number = ops.FORMATS.index(format)
    near_edges, _ = with_absmax_one(neighbours(boundaries(), 2))
    inputs = [near_edges, -near_edges, *(torch.randn(n).exp() for n in (0, 1, 255, 257, 3000))]
    inputs.append(torch.tensor([1.0, torch.inf, torch.nan, -torch.inf, 0.5, -1.0]))
    inputs.append(torch.randn(40, 30).t())
    for x in inputs:
        for seed in (None, SEED) if format == "fourth_root_uint8" else (None,):
            options = {"seed": seed, "step": 5, "subsequence": 3}
            quantized = torch.ops.cuda_on_host.quantize_blockwise(x, number, **options)
            assert_identical(list(quantized), list(torch.ops.torch_ademamix.quantize_blockwise(x, number, **options)))
            assert_identical(
                torch.ops.cuda_on_host.dequantize_blockwise(*quantized, number),
                torch.ops.torch_ademamix.dequantize_blockwise(*quantized, number),
            )


@pytest.mark.each_value
@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_places(kind: str, dtype: torch.dtype, count: int) -> None:
    """As plain lists, bit for bit; also of parameters that are strided, or in another order in memory."""
    lists = make(kind, MIXED[2:6] + MIXED[8:], dtype)
    roundings: list[dict[str, Any]] = [{}]
    if dtype == torch.bfloat16:
        roundings += [with_remainders(lists), with_remainders_of_8_bits(lists), stochastically(lists)]
    for options in roundings:
        plain, remainders = lists.clone(), options.pop("remainders", [])
        arenas = in_arenas(plain.clone(), remainders, count)
        call(torch.ops.cuda_on_host, kind, plain, remainders=remainders, **options)
        take_log()
        call(torch.ops.cuda_on_host, kind, arenas, **arenas.options, **options)
        assert take_log() == ["launch", "launch"]
        arenas.assert_holds(plain, remainders)


@pytest.mark.each_value
@KINDS
@SAME_DTYPES
@pytest.mark.parametrize("options", ["plain", "schedules", "schedule_start", "maximize"])
def test_hyperparameters_in_a_tensor(kind: str, options: str, dtype: torch.dtype) -> None:
    """Bit for bit what they are as numbers."""
    numbers = make(kind, contiguous(700, 5), dtype)
    tensor = numbers.clone()
    hyperparameters = hyperparameter_tensor(**OPTIONS[options])
    call(torch.ops.cuda_on_host, kind, numbers, **OPTIONS[options])
    maximize = {"maximize": options == "maximize"}
    call(torch.ops.cuda_on_host, kind, tensor, hyperparameters=hyperparameters, **maximize)
    assert_identical(list(tensor), list(numbers))
    check_step(tensor, hyperparameters=hyperparameters.float(), **maximize)


@pytest.mark.each_value
@KINDS
@pytest.mark.parametrize("given", ["numbers", "lrs", "float32 table", "float64 table"])
@pytest.mark.parametrize("count", [3, "all of a launch", "more than a launch"])
def test_rows_of_hyperparameters(kind: str, given: str, count: int | str) -> None:
    """Each parameter has its row; those in the arguments are split over launches."""
    limit = driver.rows_of_a_launch()
    number = count if isinstance(count, int) else limit + (count == "more than a launch")
    table = torch.tensor([row_of(lr=0.01 + 1e-4 * i, t_alpha=i % 4, t_beta3=i % 3) for i in range(number)]).double()
    lists = make(kind, contiguous(*(1 + i % 3 for i in range(number + 5))))
    rows = [(7 * i) % number for i in range(number + 5)]
    options: dict[str, Any] = {"hyperparameters": table.float() if given == "float32 table" else table}
    if given in ("numbers", "lrs"):
        options["hyperparameters"] = table.flatten().tolist()
    if given == "lrs":
        options["lrs"] = [row[:1].float() if i % 2 else row[0].clone() for i, row in enumerate(table + 1)]
    launches = check_step(lists, rows=rows, **options)
    split = count == "more than a launch" and given in ("numbers", "lrs")
    assert launches == 2 + split


@KINDS
def test_dry_run(kind: str) -> None:
    lists = make(kind, contiguous(700, 5))
    before = lists.clone()
    take_log()
    call(torch.ops.cuda_on_host, kind, lists, dry_run=True)
    assert take_log() == []
    assert_identical(list(lists), list(before))


@KINDS
@pytest.mark.parametrize("position", [1, 2, -1])
def test_refuses_before_writing(kind: str, position: int) -> None:
    lists = make(kind, contiguous(700, 5))
    before = lists.clone()
    bent = lists.clone()
    name = [field.name for field in fields(lists)][position]
    getattr(bent, name).pop()
    with pytest.raises(RuntimeError, match="invalid arguments"):
        call(torch.ops.cuda_on_host, kind, bent)
    getattr(bent, name).append(getattr(lists, name)[-1])
    assert_identical(list(bent), list(before))


def paged(tensor: Tensor) -> Tensor:
    return torch.ops.cuda_on_host.paged_empty(tensor, tensor.numel(), tensor.dtype).copy_(tensor)


@KINDS
@pytest.mark.parametrize("placed", [False, True])
def test_paged_state(kind: str, placed: bool) -> None:
    """In chunks of at least 1000 bytes, each of which is fetched while the one before it is computed."""
    plain = make(kind, contiguous(300, 300, 300, 300))
    lists: Any = in_arenas(plain.clone(), count=1) if placed else plain.clone()
    options = lists.options if placed else {}
    for field, tensors in list(zip(fields(plain), lists, strict=True))[2:-1]:
        if not field.name.endswith("absmaxs"):
            tensors[:] = [t if i == 2 else paged(t) for i, t in enumerate(tensors)]
    assert managed_memory()[0] == (3 if placed else 9)
    chunks = 4 if placed else 3
    bytes_of_a_chunk = 300 * (12 if kind == "32" else 4)

    def step(lists: Any, launches: list[str]) -> None:
        call(torch.ops.torch_ademamix, kind, plain)
        take_log()
        prefetched = managed_memory()[2]
        call(torch.ops.cuda_on_host, kind, lists, **options)
        assert take_log() == ["launch", *launches]  # after the prologue
        assert managed_memory()[2] - prefetched == (chunks * bytes_of_a_chunk if "prefetch" in launches else 0)
        if placed:
            lists.assert_holds(plain, [])
        else:
            assert_identical(list(lists), list(plain))

    fetch = ["main-records", "side-waits", *["prefetch"] * 3]  # after what is being computed
    join = ["side-records", "main-waits"]
    in_chunks = [*fetch, *[*join, *fetch, "launch"] * (chunks - 1), *join, "launch"]

    step(lists, ["launch"])  # the GPU has room: all is there
    driver.set_free_bytes(0)
    step(lists, in_chunks)
    driver.set_capturing(True)
    step(lists, ["launch"])
    driver.set_capturing(False)
    driver.set_free_bytes(1 << 40)
    torch.ops.cuda_on_host.page_out(list(lists)[2][0][7:])
    assert take_log() == ["page-out"]
    step(lists, in_chunks)
    step(lists, ["launch"])
    del lists, tensors
    assert managed_memory()[:2] == [0, 0]


@KINDS
def test_what_lies_between_sparse_gradients_is_not_fetched(kind: str) -> None:
    lists = in_arenas(make(kind, contiguous(300, 300, 300, 300)), count=1)
    params, grads, *state, steps = lists.lists
    state = [[paged(arena) for arena in arenas] for arenas in state]
    first_and_last = [0, 3]
    some = copy.copy(lists)
    some.lists = [[tensors[i] for i in first_and_last] for tensors in (params, grads)] + [*state, steps]
    some.offsets = [number for i in first_and_last for number in lists.offsets[3 * i : 3 * i + 3]]
    driver.set_free_bytes(0)
    prefetched = managed_memory()[2]
    call(torch.ops.cuda_on_host, kind, some, **some.options)
    driver.set_free_bytes(1 << 40)
    of_a_parameter = 300 * 12 if kind == "32" else 300 * 4 + 3 * 8
    assert managed_memory()[2] - prefetched == 2 * of_a_parameter


def test_a_forked_process_leaves_the_driver_alone() -> None:
    tensors = [torch.ops.cuda_on_host.paged_empty(torch.zeros(1), 300, torch.float32)]
    before = driver.freed_blocks()
    child = os.fork()
    if child == 0:
        tensors.clear()
        os._exit(driver.freed_blocks() - before + 10 * managed_memory()[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tensors.clear()
    assert driver.freed_blocks() == before + 1


def test_managed_memory_that_cannot_be_had() -> None:
    t = torch.zeros(9)
    driver.fail_next(b"cuMemAllocManaged", 2)
    with pytest.raises(RuntimeError, match=r"managed memory: CUDA error: out of memory \(CUDA_ERROR_OUT_OF_MEMORY\)"):
        torch.ops.cuda_on_host.paged_empty(t, 5, torch.int16)
    assert managed_memory()[:2] == [0, 0]
    driver.fail_next(b"cuMemAdvise", 1)  # which is a hint
    paged = torch.ops.cuda_on_host.paged_empty(t, 5, torch.int16)
    assert (paged.dtype, paged.shape, managed_memory()[:2]) == (torch.int16, (5,), [1, 10])
    driver.fail_next(b"cuMemPrefetchAsync", 1)
    with pytest.raises(RuntimeError, match="page out: CUDA error"):
        torch.ops.cuda_on_host.page_out(paged)
    del paged
    assert managed_memory()[:2] == [0, 0]
    assert driver.pushed_contexts() == 0
    with pytest.raises(RuntimeError, match="isn't in managed memory"):
        torch.ops.cuda_on_host.page_out(t)


def test_managed_memory_is_freed_in_any_thread() -> None:
    """The stand-in frees nothing without a context, and address sanitizer sees what is used afterwards."""
    tensors = [torch.ops.cuda_on_host.paged_empty(torch.zeros(1), n, torch.float32) for n in (0, 1, 300, 5000)]
    assert managed_memory()[:2] == [3, 4 * 5301]  # nothing is ordinary memory
    thread = threading.Thread(target=tensors.clear)
    thread.start()
    thread.join()
    assert managed_memory()[:2] == [0, 0]

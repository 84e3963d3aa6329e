"""The same bits from every thread count, instruction set, process and place in a list."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.config import CONTIGUOUS, DTYPES, FORMULA, OPTIONS, assert_identical, native_built
from tests.helpers.quantized import (
    SEED,
    SMALL,
    BlockwiseLists,
    blockwise_call,
    blockwise_step,
    boundaries,
    make_blockwise,
    neighbours,
    with_absmax_one,
)
from torch_ademamix import ops
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, CODE_DTYPES, POSITION_BITS

NATIVE = pytest.mark.skipif(not native_built(), reason="built without native kernels")


def test_random_bits_go_by_seed_stream_step_and_element(kernel):
    """Not by the place in a list or by a tensor's size."""
    (entry,) = [entry for entry in CONTIGUOUS if entry[0] == (4095,)]
    one = make_blockwise([entry], seed=1)
    two = make_blockwise([entry, entry], seed=1)
    for state in (two.params, *list(two)[1:]):
        state[1].copy_(state[0])
    blockwise_step(kernel, two, subsequences=[4, 9])
    nu = [two.exp_avg_sqs[i] for i in (0, 1)]
    changed = (nu[0] != nu[1]).double().mean()
    assert 0.1 < changed < 0.9
    for other in (two.params, *list(two)[2:6], two.exp_avg_sq_absmaxs):
        assert_identical(other[0], other[1])

    def step_of_one(lists=one, **options):
        lists = lists.clone()
        blockwise_step(kernel, lists, **{"subsequences": [9], **options})
        return lists.exp_avg_sqs[0]

    assert torch.equal(step_of_one(), nu[1])
    for options in ({"seed": 3}, {"seed": 2**62}, {"subsequences": [10]}, {"subsequences": [9 + 2**32]}):
        assert not torch.equal(step_of_one(**options), nu[1])

    short = one.clone()
    for tensors in (*list(short)[:3], short.exp_avg_slows, short.exp_avg_sqs):
        tensors[0] = tensors[0][: 3 * BLOCK_SIZE].clone()
    for tensors in (short.exp_avg_absmaxs, short.exp_avg_slow_absmaxs, short.exp_avg_sq_absmaxs):
        tensors[0] = tensors[0][:3].clone()
    assert torch.equal(step_of_one(short), nu[1][: 3 * BLOCK_SIZE])

    # A part that knows its place draws what the whole draws there.
    part = one.clone()
    for tensors in (*list(part)[:3], part.exp_avg_slows, part.exp_avg_sqs):
        tensors[0] = tensors[0][2 * BLOCK_SIZE :].clone()
    for tensors in (part.exp_avg_absmaxs, part.exp_avg_slow_absmaxs, part.exp_avg_sq_absmaxs):
        tensors[0] = tensors[0][2:].clone()
    assert torch.equal(step_of_one(part, subsequences=[9 + 2 * BLOCK_SIZE // 8 * 2**32]), nu[1][2 * BLOCK_SIZE :])


@NATIVE
@pytest.mark.parametrize("slow_ema_bits", [8, 12, 16])
def test_threads_do_not_change_bits(slow_ema_bits):
    """Tensors past torch's threads, and many small ones."""
    sizes = [(300_000,), *[(999,)] * 50, (70_001,)]
    before = make_blockwise([(n, *["contiguous"] * 3) for n in sizes], slow_ema_bits=slow_ema_bits)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            lists = before.clone()
            blockwise_step("native", lists)
            results.append([*lists, quantize_and_back(before.grads[0])])
    finally:
        torch.set_num_threads(threads)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def quantize_and_back(values):
    """In every format and by both ways of rounding."""
    result = []
    for format in CODE_DTYPES:
        for seed in (None, SEED) if format in POSITION_BITS else (None,):
            codes, absmax = ops.quantize_blockwise(values, format, seed=seed, step=7, subsequence=3)
            result += [codes, absmax, ops.dequantize_blockwise(codes, absmax, format)]
    return result


def values_of_every_kind():
    """Floats of any bits, and each value where rounding to nearest changes, with its neighbours."""
    any_bits = torch.randint(-(2**31), 2**31, (100_003,)).to(torch.int32).view(torch.float32)
    near = neighbours(boundaries(), 3)
    return any_bits, with_absmax_one(torch.cat([near, -near]))[0]


def run_calls(calls, values):
    for tensors, options in calls:
        lists = BlockwiseLists(*tensors)
        op, args, kwargs = blockwise_call(lists, **{**options, "subsequences": lists.subsequences})
        op(*args, **kwargs)
    return [lists for lists, _ in calls], [quantize_and_back(x) for x in values]


def lesser_capabilities():
    """The instruction sets of the build that this processor has beside the one in use."""
    if ops.native is None:
        return []
    names = ops.native.cpu_capabilities.split()
    return names[: names.index(ops.cpu_capability(ops.native))]


RUN_WITH_CAPABILITY = """
import sys, torch
from tests.quantized.test_quantized_bits import ops, run_calls
capability, source, target = sys.argv[1:]
assert ops.cpu_capability(ops.native) == capability
torch.save(run_calls(*torch.load(source)), target)
"""


@pytest.mark.parametrize("capability", lesser_capabilities())
def test_instruction_sets_agree(capability, tmp_path):
    """The one in use is held against the formulas by the other tests."""
    calls = [
        (
            list(make_blockwise(SMALL, param_dtype, grad_dtype, slow_ema_bits=8 + 4 * (i % 3))),
            {"lr": 1e-2, **FORMULA, **options, "stochastic_rounding": i < 6, "seed": SEED},
        )
        for param_dtype in DTYPES
        for i, (grad_dtype, options) in enumerate(zip(DTYPES * 2, list(OPTIONS.values()) * 2, strict=False))
    ]
    for dtype in DTYPES:
        lists = make_blockwise(SMALL, dtype, slow_ema_bits=12, has_exp_avg=False)
        calls.append((list(lists), {"lr": 1e-2, **FORMULA, "beta1": 0.0, "seed": SEED}))
    values = values_of_every_kind()
    torch.save((calls, values), tmp_path / "calls.pt")
    subprocess.run(
        [
            sys.executable,
            "-c",
            RUN_WITH_CAPABILITY,
            capability,
            tmp_path / "calls.pt",
            tmp_path / "stepped.pt",
        ],
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        check=True,
    )
    assert_identical(torch.load(tmp_path / "stepped.pt"), run_calls(calls, values))

"""The 32-bit step's numbers: golden vectors, and every kernel against float64 arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.config import (
    CONTIGUOUS,
    DTYPES,
    HYPERPARAMETERS,
    MIXED,
    OPTIONS,
    TOLERANCES,
    StepLists,
    assert_identical,
    assert_stepped,
    expected_step,
    make_lists,
    step,
)
from torch_ademamix import ops
from torch_ademamix.numerics.schedules import alpha_schedule, beta3_schedule

DATA = Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "ademamix_float64.npz")
SETTINGS = json.loads((DATA / "ademamix_float64.json").read_text())
CASES = {case["name"]: case for case in SETTINGS["cases"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_vectors(kernel, case, dtype):
    def load(name):
        return torch.from_numpy(GOLDEN[f"{case}/{name}"]).to(dtype)

    options = {k: v for k, v in CASES[case].items() if k not in ("name", "shape", "steps")}
    param = load("param_before")
    moments = [torch.zeros_like(param) for _ in range(3)]
    t = torch.zeros(())
    for grad in load("grads"):
        step(kernel, StepLists([param], [grad], *([m] for m in moments), [t]), **options)
    assert t == CASES[case]["steps"]
    for name, actual in zip(("param", "exp_avg", "exp_avg_slow", "exp_avg_sq"), (param, *moments), strict=True):
        expected = torch.from_numpy(GOLDEN[f"{case}/{name}"])
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        kind = "param" if name == "param" else "moment"
        assert error <= TOLERANCES["vectors", dtype, kind], name


def schedule_errors(alpha, beta3):
    """The relative errors of functions of a row of the JSON's schedules."""
    pairs = [
        (f(row), row[name]) for row in SETTINGS["schedules"] for f, name in ((alpha, "alpha_t"), (beta3, "beta3_t"))
    ]
    return [abs(actual - expected) / expected for actual, expected in pairs]


def test_schedules():
    errors = schedule_errors(
        lambda row: alpha_schedule(row["t"], row["alpha"], row["t_alpha"]).item(),
        lambda row: beta3_schedule(row["t"], row["beta1"], row["beta3"], row["t_beta3"]).item(),
    )
    assert max(errors) <= TOLERANCES["schedule"]


def test_schedules_of_the_op(kernel):
    def slow_average_and_param(row):
        """After a step from m2 = 1 with a gradient of 0: m2 = beta3(t) and p = -alpha(t)·m2."""
        p, g, m1, nu = (torch.zeros(1, dtype=torch.float64) for _ in range(4))
        m2 = torch.ones(1, dtype=torch.float64)
        t = torch.tensor(float(row["t"] - 1))
        options = {k: row[k] for k in ("beta1", "beta3", "alpha", "t_alpha", "t_beta3")}
        lists = StepLists([p], [g], [m1], [m2], [nu], [t])
        step(kernel, lists, lr=1.0, eps=1.0, weight_decay=0.0, **options)
        return m2.item(), p.item()

    def alpha(row):
        m2, p = slow_average_and_param(row)
        return -p / m2

    errors = schedule_errors(alpha, lambda row: slow_average_and_param(row)[0])
    assert max(errors) <= TOLERANCES["schedule"]


def test_beta3_waits_at_a_beta1_of_0(kernel):
    lists = make_lists(CONTIGUOUS[1:4])
    for t in lists.steps:
        t.zero_()
    step(kernel, lists, beta1=0.0, t_beta3=10, schedule_start=1)
    assert_identical(lists.exp_avg_slows, lists.grads)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_dtypes_options_and_layouts(kernel, param_dtype, grad_dtype):
    before = make_lists(MIXED, param_dtype, grad_dtype)
    for options in OPTIONS.values():
        lists = before.clone()
        step(kernel, lists, **options)
        assert_stepped(lists, before, expected_step(before, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 400])
def test_list_lengths(kernel, length, dtype):
    small = [entry for entry in MIXED if entry[0] != (65537,)]
    entries = [*reversed(CONTIGUOUS), *small * 30][:length]
    before = make_lists(entries, dtype)
    lists = before.clone()
    step(kernel, lists)
    assert_stepped(lists, before, expected_step(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("found", [1.0, 3.0, float("inf"), float("nan")])
def test_found_inf_skips_the_whole_step(kernel, dtype, found):
    before = make_lists(MIXED, dtype)
    before.grads[3].fill_(float("inf"))
    lists = before.clone()
    step(kernel, lists, found_inf=torch.tensor(found))
    assert_identical(list(lists), list(before))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_gradient_stays_in_its_element(kernel, dtype, bad):
    lists = make_lists([((1027,), "contiguous", "contiguous", "contiguous")], dtype)
    clean = lists.clone()
    lists.grads[0][300] = bad
    step(kernel, lists)
    step(kernel, clean)
    assert not lists.params[0][300].isfinite()
    elsewhere = torch.arange(1027) != 300
    for actual, expected in zip(list(lists)[:1] + list(lists)[2:5], list(clean)[:1] + list(clean)[2:5], strict=True):
        assert_identical(actual[0][elsewhere], expected[0][elsewhere])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_between_elements_stays(kernel, dtype):
    """A step writes the elements of a strided parameter and nothing else."""
    lists = make_lists([((513,), "strided", "contiguous", "strided")], dtype)
    bases = [tensors[0]._base for tensors in (lists.params, lists.exp_avgs, lists.exp_avg_slows, lists.exp_avg_sqs)]
    before = [base.clone() for base in bases]
    step(kernel, lists)
    assert_identical([base[:, 1] for base in bases], [base[:, 1] for base in before])
    assert not torch.equal(bases[0][:, 0], before[0][:, 0])


def test_strides_that_cross_leave_the_memory_between(kernel):
    """Nine elements in five places, spread over nine: as far as a full tensor reaches."""
    lists = StepLists(*([torch.full((9,), float(i)).as_strided((3, 3), (2, 2))] for i in range(5)), [torch.zeros(())])
    step(kernel, lists)
    for i, tensors in enumerate(list(lists)[:5]):
        assert (tensors[0].as_strided((4,), (2,), 1) == i).all()
    assert (lists.params[0] != 0).all()


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(grad_dtype):
    """Tensors past torch's threads, and many small ones."""
    sizes = [(300_000,), *[(999,)] * 50, (70_001,)]
    lists = make_lists([(n, "contiguous", "contiguous", "contiguous") for n in sizes], grad_dtype=grad_dtype)
    results = {}
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results[n] = lists.clone()
            step("native", results[n], t_beta3=100)
    finally:
        torch.set_num_threads(threads)
    assert_identical(list(results[2]), list(results[1]))
    assert_identical(list(results[3]), list(results[1]))


RUN_WITH_CAPABILITY = """
import sys, torch
from torch_ademamix import ademamix, ops
capability, source, target = sys.argv[1:]
assert ops.cpu_capability(ops.native) == capability
calls = torch.load(source)
for lists, options in calls:
    ademamix(*lists, **options)
torch.save([lists for lists, _ in calls], target)
"""
CAPABILITIES = ("default", "avx2", "avx512")  # each processor has those before its own


def capabilities_here():
    if ops.native is None:
        return []
    return CAPABILITIES[: CAPABILITIES.index(ops.cpu_capability(ops.native)) + 1]


@pytest.mark.first_case
@pytest.mark.parametrize("capability", capabilities_here())
def test_instruction_sets_agree(capability, tmp_path):
    """Bit for bit: the processor rounds divisions and roots alike in all of them."""
    calls = [
        (
            list(make_lists(MIXED, param_dtype, grad_dtype)),
            {"lr": 1e-2, **HYPERPARAMETERS, **options},
        )
        for param_dtype in DTYPES
        for grad_dtype, options in zip(DTYPES, list(OPTIONS.values())[:4], strict=True)
    ]
    torch.save(calls, tmp_path / "calls.pt")
    subprocess.run(
        [
            sys.executable,
            "-c",
            RUN_WITH_CAPABILITY,
            capability,
            tmp_path / "calls.pt",
            tmp_path / "stepped.pt",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
    )
    for lists, options in calls:
        step("native", StepLists(*lists), **options)
    assert_identical(torch.load(tmp_path / "stepped.pt"), [lists for lists, _ in calls])

"""State in flat tensors that parameters share, and hyperparameters in one tensor: the bits of any other call."""

import pytest
import torch

from tests.helpers.config import (
    DTYPES,
    MIXED,
    OPTIONS,
    assert_identical,
    hyperparameter_tensor,
    make_lists,
    row_of,
    step,
    step_call,
)
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import SEED, blockwise_step, make_blockwise, subsequences_of
from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.hyperparameters import HYPERPARAMETERS

KINDS = pytest.mark.parametrize("kind", ["32", "blockwise"])
ARENAS = pytest.mark.parametrize("count", [1, 3])

ENTRIES = [entry for entry in MIXED if entry[0] != (65537,)]  # also strided ones, and such as fill their memory


def make(kind, *args, **kwargs):
    return make_lists(*args, **kwargs) if kind == "32" else make_blockwise(*args, **kwargs)


def run(kernel, kind, lists, **options):
    (step if kind == "32" else blockwise_step)(kernel, lists, **options)


def roundings(lists):
    """How bfloat16 parameters may be rounded, as options of a step; remainders in the parameters' order in memory."""
    remainders = [torch.randint_like(p, -(1 << 15), 1 << 15, dtype=torch.int16) for p in lists.params]
    random = {"seed": SEED, "subsequences": subsequences_of(lists.params)}
    return {
        "nearest": {},
        "remainders": {"remainders": remainders},
        "remainders of 8 bits": {"remainders": [bfloat16.converted(r, torch.int8) for r in remainders], **random},
        "stochastic": {"stochastic_param_rounding": True, **random},
    }


def check(kernel, kind, lists, count=2, **options):
    """Two steps of plain lists and of arenas."""
    plain, remainders = lists.clone(), options.pop("remainders", [])
    arenas = in_arenas(lists, remainders, count)
    for _ in range(2):
        run(kernel, kind, plain, remainders=remainders, **options)
        run(kernel, kind, arenas, **arenas.options, **options)
        arenas.assert_holds(plain, remainders)


@ARENAS
@KINDS
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(kernel, kind, dtype, grad_dtype, count):
    check(kernel, kind, make(kind, ENTRIES, dtype, grad_dtype), count)


@KINDS
@pytest.mark.parametrize("options", OPTIONS)
def test_options(kernel, kind, options):
    check(kernel, kind, make(kind, ENTRIES), **OPTIONS[options])


@KINDS
@pytest.mark.parametrize("rounding", ["nearest", "remainders", "remainders of 8 bits", "stochastic"])
def test_bfloat16_parameters(kernel, kind, rounding):
    lists = make(kind, ENTRIES, torch.bfloat16)
    check(kernel, kind, lists, **roundings(lists)[rounding])


@pytest.mark.parametrize("slow_ema_bits", [8, 12, 16])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_formats(kernel, stochastic_rounding, slow_ema_bits):
    lists = make_blockwise(ENTRIES, slow_ema_bits=slow_ema_bits)
    check(kernel, "blockwise", lists, stochastic_rounding=stochastic_rounding)


@KINDS
def test_found_inf(kernel, kind):
    check(kernel, kind, make(kind, ENTRIES), found_inf=torch.tensor(1.0))


@KINDS
def test_parameters_of_no_elements(kernel, kind):
    check(kernel, kind, make(kind, [MIXED[0], MIXED[-1]]))


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "tensor_lr"])
def test_hyperparameters_in_a_tensor(kernel, kind, options, dtype):
    """Bit for bit what they are as numbers."""
    lists = make(kind, ENTRIES, dtype)
    numbers, tensor = lists.clone(), lists
    others = {name: x for name, x in OPTIONS[options].items() if name not in HYPERPARAMETERS}
    hyperparameters = hyperparameter_tensor(**OPTIONS[options])
    for _ in range(2):
        run(kernel, kind, numbers, **OPTIONS[options])
        run(kernel, kind, tensor, hyperparameters=hyperparameters, **others)
        assert_identical(list(tensor), list(numbers))


@KINDS
def test_hyperparameters_in_float32(kernel, kind):
    lists = make(kind, ENTRIES)
    double, single = lists.clone(), lists
    hyperparameters = hyperparameter_tensor(dtype=torch.float32, t_alpha=3.0, t_beta3=30.0)
    run(kernel, kind, double, hyperparameters=hyperparameters.double())
    run(kernel, kind, single, hyperparameters=hyperparameters)
    assert_identical(list(single), list(double))


ROWS = [row_of(), row_of(lr=0.3, beta1=0.0, alpha=2.0, t_alpha=9, t_beta3=9), row_of(eps=1e-3, weight_decay=0.3)]


@KINDS
@pytest.mark.parametrize("given", ["numbers", "lrs", "tensor"])
def test_rows_of_hyperparameters(kernel, kind, given):
    """Parameters of several rows: bit for bit as in a call for each row."""
    lists = make(kind, ENTRIES)
    expected, rows = lists.clone(), [2 - i % 3 for i in range(len(ENTRIES))]
    subsequences = subsequences_of(lists.params)
    for row, numbers in enumerate(ROWS):
        chosen = [i for i in range(len(rows)) if rows[i] == row]
        some = type(lists)(*([tensors[i] for i in chosen] for tensors in expected))
        run(kernel, kind, some, hyperparameters=numbers, subsequences=[subsequences[i] for i in chosen])
    options = {"hyperparameters": [x for row in ROWS for x in row]}
    if given == "lrs":
        options = {"hyperparameters": [x for row in ROWS for x in (7.0, *row[1:])]}
        options["lrs"] = [torch.tensor([row[0]], dtype=torch.float64) for row in ROWS]
    if given == "tensor":
        options = {"hyperparameters": torch.tensor(ROWS, dtype=torch.float64)}
    run(kernel, kind, lists, rows=rows, subsequences=subsequences, **options)
    assert_identical(list(lists), list(expected))


@KINDS
@pytest.mark.parametrize("placed", [False, True])
def test_dry_run_writes_nothing(kernel, kind, placed):
    lists = make(kind, ENTRIES)
    arguments = in_arenas(lists) if placed else lists
    before = arguments.clone()
    run(kernel, kind, arguments, dry_run=True, **(arguments.options if placed else {}))
    assert_identical(list(arguments), list(before))


@KINDS
def test_dry_run_refuses(kernel, kind):
    lists = make(kind, ENTRIES)
    lists.grads.pop()
    with pytest.raises(RuntimeError, match="grads has length"):
        run(kernel, kind, lists, dry_run=True)


@pytest.mark.parametrize("dry_run", [False, True])
def test_version_counters(dry_run):
    """Of parameters and arenas, and of none in a dry run; gradients are only read."""
    arenas = in_arenas(make_lists(ENTRIES, torch.bfloat16), [torch.zeros(0, dtype=torch.int16)] * 0)

    def versions():
        return [[tensor._version for tensor in tensors] for tensors in arenas]

    before = versions()
    op, args, kwargs = step_call(torch.ops.torch_ademamix.ademamix_step_, arenas, dry_run=dry_run, **arenas.options)
    op(*args, **kwargs)
    for i, (new, old) in enumerate(zip(versions(), before, strict=True)):
        assert new == [version + (i != 1 and not dry_run) for version in old]

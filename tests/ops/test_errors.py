"""The op's errors: their texts, and that nothing has been written when they are raised."""

import re
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.helpers.config import (
    CONTIGUOUS,
    HYPERPARAMETERS,
    assert_identical,
    hyperparameter_tensor,
    make_lists,
    native_built,
    row_of,
    step,
    step_call,
)
from tests.helpers.offsets import in_arenas
from torch_ademamix import ademamix, ops

NAN = float("nan")
STATE = ("exp_avgs", "exp_avg_slows", "exp_avg_sqs")
SCALARS = {"lr": "lrs[0]", "grad_scale": "grad_scale", "found_inf": "found_inf"}  # and what the op calls them
PARAMETER_DTYPES = "torch.float32, torch.bfloat16, torch.float16, torch.float64"
OTHER_DTYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)


def replace(name, i, change):
    """Changes one tensor of a list."""

    def bend(lists, options):
        tensors = getattr(lists, name)
        tensors[i] = change(tensors[i])

    return bend


def convert(name, i, dtype_or_device):
    return replace(name, i, lambda tensor: tensor.to(dtype_or_device))


def shorten(name):
    return lambda lists, options: getattr(lists, name).pop()


def lengthen(name):
    return lambda lists, options: getattr(lists, name).append(torch.zeros(1))


def give(**values):
    return lambda lists, options: options.update(values)


def expand(tensor):
    return tensor[:1].expand(tensor.shape)


def remain(count, i=None, change=None, dtype=torch.bfloat16, **options):
    """Makes the parameters bfloat16 and gives some of them remainders, of which one is bent."""

    def bend(lists, call_options):
        lists.params = [p.to(dtype) for p in lists.params]
        remainders = [torch.zeros(p.shape, dtype=torch.int16) for p in lists.params[:count]]
        if i is not None:
            remainders[i] = change(remainders[i])
        call_options.update(remainders=remainders, **options)

    return bend


def place(change=None):
    """Puts the state into one arena of 1536 elements and 7 steps, and bends what says so."""

    def bend(lists, options):
        arenas = in_arenas(lists, options["remainders"], count=1)
        for name, tensors in zip((*STATE, "steps"), arenas.lists[2:], strict=True):
            setattr(lists, name, tensors)
        options.update(arenas.options)
        if change is not None:
            change(lists, options)

    return bend


def move(number, to):
    """Changes one of the numbers 0, 1536, 6, 0, 1024, 4, 0, 768, 3, 0, 256, 1."""

    def bend(lists, options):
        options["offsets"][number] = to

    return place(bend)


# How good arguments of an op call (vectors of 0, 1, 3 and 255 elements) are bent, and what is said then.
REFUSALS = {
    **{f"{x} has length 3, but params has length 4": shorten(x) for x in ("grads", *STATE, "steps")},
    **{
        f"{x}[0] has dtype {dtype}; allowed are {PARAMETER_DTYPES}": convert(x, 0, dtype)
        for x in ("params", "grads")
        for dtype in OTHER_DTYPES
    },
    "grads[2] has layout torch.sparse_coo; only dense tensors are allowed": replace("grads", 2, torch.Tensor.to_sparse),
    **{
        f"{x}[3] has shape [255, 1], but params[3] has shape [255]": replace(x, 3, lambda tensor: tensor.view(255, 1))
        for x in ("grads", *STATE)
    },
    "grads[3] has shape [], but params[3] has shape [255]": replace("grads", 3, lambda g: g[0]),
    **{
        f"{x}[2] has dtype torch.bfloat16, but must be torch.float32": convert(x, 2, torch.bfloat16)
        for x in (*STATE, "steps")
    },
    "steps[2] has dtype torch.int64, but must be torch.float32": convert("steps", 2, torch.int64),
    **{f"{x}[1] is on meta, but params[1] is on cpu": convert(x, 1, "meta") for x in (*STATE, "steps")},
    **{
        f"{x}[2] has elements that share memory, so it can't be updated in place": replace(x, 2, expand)
        for x in ("params", *STATE)
    },
    "steps[3] has shape [2], but must hold one element": replace("steps", 3, lambda t: t.repeat(2)),
    "lrs[0] has dtype torch.int64, but must be torch.float32 or torch.float64": give(lr=torch.tensor(1)),
    "grad_scale has dtype torch.float16, but must be torch.float32 or torch.float64": give(
        grad_scale=torch.ones(1).half()
    ),
    "found_inf has dtype torch.float64, but must be torch.float32": give(found_inf=torch.ones(1).double()),
    **{f"{SCALARS[x]} has shape [2], but must hold one element": give(**{x: torch.ones(2)}) for x in SCALARS},
    **{
        f"{x} is {value:g}, but must be in [0, 1)": give(**{x: value})
        for x in ("beta1", "beta2", "beta3")
        for value in (1.0, -0.1, NAN)
    },
    **{
        f"{x} is {value:g}, but must be at least 0": give(**{x: value})
        for x in ("t_alpha", "t_beta3")
        for value in (-100.0, NAN)
    },
    "remainders has length 3, but params has length 4": remain(3),
    "remainders[1] is on meta, but params[1] is on cpu": remain(4, 1, lambda r: r.to("meta")),
    "remainders[3] has shape [255, 1], but params[3] has shape [255]": remain(4, 3, lambda r: r.view(255, 1)),
    "remainders[2] has elements that share memory, so it can't be updated in place": remain(4, 2, expand),
    "params[0] has dtype torch.float16, but remainders are for torch.bfloat16": remain(4, dtype=torch.float16),
    "params[0] has dtype torch.float16, but stochastic_param_rounding is for torch.bfloat16": remain(
        0, dtype=torch.float16, stochastic_param_rounding=True, subsequences=[0, 1, 2, 3]
    ),
    "stochastic_param_rounding is true, but with remainders nothing is rounded away": remain(
        4, stochastic_param_rounding=True, subsequences=[0, 1, 2, 3]
    ),
    "subsequences has length 3, but params has length 4": remain(
        0, stochastic_param_rounding=True, subsequences=[0, 1, 2]
    ),
    "schedule_start is -1, but must be at least 0": give(schedule_start=-1),
    "eps is -1e-08, but must be at least 0": give(eps=-1e-8),
    "beta1 is 0.9, but must be 0 without exp_avgs": lambda lists, options: lists.exp_avgs.clear(),
}
# The function makes several calls of mixed lists, and moves scalars to their parameters.
ONE_CALL = "one call takes one dtype and one device"
OP_REFUSALS = {
    **REFUSALS,
    "remainders[2] has dtype torch.int32, but must be torch.int16": remain(4, 2, torch.Tensor.int),
    "remainders[2] has dtype torch.int8, but must be torch.int16": remain(4, 2, torch.Tensor.char),
    "remainders[1] has dtype torch.int16, but must be torch.int8": remain(4, 0, torch.Tensor.char),
    **{
        f"{x}[1] is torch.bfloat16 on cpu, but {x}[0] is torch.float32 on cpu; {ONE_CALL}": convert(
            x, 1, torch.bfloat16
        )
        for x in ("params", "grads")
    },
    f"params[1] is torch.float32 on meta, but params[0] is torch.float32 on cpu; {ONE_CALL}": convert(
        "params", 1, "meta"
    ),
    **{f"{SCALARS[x]} is on meta, but params are on cpu": give(**{x: torch.ones((), device="meta")}) for x in SCALARS},
    "offsets has length 11, but must have 12, 3 for each of params, or none": place(
        lambda lists, options: options["offsets"].pop()
    ),
    **{f"{x} has length 2, but exp_avgs has length 1": place(lengthen(x)) for x in (*STATE[1:], "steps")},
    **{
        f"{x}[0] has shape [1, {n}], but must have one dimension": place(replace(x, 0, lambda arena: arena[None]))
        for x, n in (*((name, 1536) for name in STATE), ("steps", 7))
    },
    **{f"{x}[0] must be contiguous": place(replace(x, 0, lambda a: a[::2])) for x in (*STATE, "steps")},
    **{
        f"{x}[0] has dtype torch.float64, but must be torch.float32": place(convert(x, 0, torch.float64))
        for x in (*STATE, "steps")
    },
    **{f"{x}[0] is on meta, but params[0] is on cpu": place(convert(x, 0, "meta")) for x in (*STATE, "steps")},
    **{f"offsets[3] is {k}, but must be in [0, 1)": move(3, k) for k in (-1, 1, 2**40)},
    **{f"offsets[4] is {n}, but must be a multiple of 256": move(4, n) for n in (-1, -256, 100, 2**62 + 1)},
    **{
        f"offsets[10] is {n}, but exp_avgs[0] has room for 1536 elements, and params[3] has 255": move(10, n)
        for n in (1536, 2**62)
    },
    **{
        f"offsets[1] is 1536, but {x}[0] has room for 1535 elements, and params[0] has 0": place(
            replace(x, 0, lambda arena: arena[1:])
        )
        for x in STATE
    },
    **{f"offsets[8] is {n}, but must be in [0, 7)": move(8, n) for n in (-1, 7)},
    "hyperparameters has dtype torch.int64, but must be torch.float32 or torch.float64": give(
        hyperparameters=torch.zeros(1, 14, dtype=torch.int64)
    ),
    **{
        f"hyperparameters has shape {list(shape)}, but must have shape [rows, 14]": give(
            hyperparameters=torch.zeros(shape)
        )
        for shape in ((), (14,), (1, 10), (0, 14), (1, 1, 14))
    },
    "hyperparameters must be contiguous": give(hyperparameters=torch.zeros(14, 2).mT),
    "hyperparameters is on meta, but params are on cpu": give(hyperparameters=torch.zeros(1, 14, device="meta")),
    **{
        f"hyperparameters has length {n}, but must have 14 for each row": give(hyperparameters=[0.0] * n)
        for n in (0, 10, 29)
    },
    "lrs has length 1, but must have 2, one for each row, or none": give(
        hyperparameters=row_of() * 2, lrs=[torch.tensor(0.1)]
    ),
    "lrs[1] has dtype torch.int64, but must be torch.float32 or torch.float64": give(
        hyperparameters=row_of() * 2, lrs=[torch.tensor(0.1), torch.tensor(1)]
    ),
    **{
        f"rows has length {n}, but params has length 4": give(hyperparameters=hyperparameters, rows=[0] * n)
        for n, hyperparameters in ((3, row_of()), (5, hyperparameter_tensor()))
    },
    **{
        f"rows[2] is {row}, but must be in [0, 2)": give(hyperparameters=hyperparameters, rows=[0, 1, row, 7])
        for row, hyperparameters in ((2, row_of() * 2), (-1, hyperparameter_tensor().repeat(2, 1)))
    },
    "beta2 of row 1 is 1, but must be in [0, 1)": give(hyperparameters=row_of() + row_of(beta2=1.0)),
    **{f"{x} is -1, but must be at least 0": give(**{x: -1.0}) for x in ("delta", "kappa", "t_weight_decay")},
    "log_time_beta2 is 1, but must be 0, or delta positive": give(log_time_beta2=True),
    "eps of row 2 is -1, but must be at least 0": give(hyperparameters=row_of() * 2 + row_of(eps=-1.0)),
}


def call_op(lists, lr, **options):
    op, args, kwargs = step_call(torch.ops.torch_ademamix.ademamix_step_, lists, lr, **options)
    op(*args, **kwargs)


def call_fake(lists, lr, **options):
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, (list(lists), lr, options))
        call_op(fakes[0], fakes[1], **fakes[2])


def call_function(lists, lr, **options):
    ademamix(*lists, lr=lr, **options)


CALLS = {
    "op": call_op,
    "reference": partial(step, "reference"),
    "fake": call_fake,
    "function": call_function,
}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("call", "text"),
    [(c, text) for c in CALLS for text in (REFUSALS if c == "function" else OP_REFUSALS)],
)
def test_op(call, text):
    lists, options = make_lists(CONTIGUOUS[:4]), {"lr": 1e-2, **HYPERPARAMETERS}
    OP_REFUSALS[text](lists, options)
    written = [*(tensors for tensors in lists if tensors is not lists.grads), options["remainders"]]
    written = [tensor for tensors in written for tensor in tensors if not tensor.is_meta]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(RuntimeError) as raised:
        CALLS[call](lists, **options)
    assert str(raised.value) == f"ademamix_step_: {text}"
    assert_identical(written, before)


@pytest.mark.skipif(not native_built(), reason="built without native kernels")
def test_native_kernels_alone_only_say_that_a_call_is_invalid():
    lists = make_lists(CONTIGUOUS[:4])
    lists.grads.pop()
    op, args, kwargs = step_call(torch.ops.torch_ademamix._ademamix_step_, lists, 1e-2, **HYPERPARAMETERS)
    with pytest.raises(RuntimeError, match=r"^ademamix_step_: invalid arguments; torch_ademamix/ops/arguments\.py has"):
        op(*args, **kwargs)


def test_errors_that_arguments_do_not_explain_are_kept():
    def kernel(params):
        raise RuntimeError("the kernel doesn't compile")

    op = ops._define_in_place("failing_(Tensor(a!)[] params) -> ()", fake=lambda params: None, kernel=kernel)
    with pytest.raises(RuntimeError, match=r"^the kernel doesn't compile$"):
        op([torch.ones(3)])


@pytest.mark.parametrize("call", CALLS)
def test_empty_tensors_share_no_memory(call):
    lists = make_lists([((0, 5), "contiguous", "contiguous", "contiguous")])
    lists.params[0] = lists.exp_avgs[0] = torch.zeros(0, 1).expand(0, 5)
    CALLS[call](lists, 1e-2, **HYPERPARAMETERS)


def test_second_op_call_is_checked_before_the_first_writes():
    lists = make_lists(CONTIGUOUS[1:4])
    lists.grads[2] = lists.grads[2].bfloat16()
    lists.exp_avg_sqs[2] = lists.exp_avg_sqs[2][1:]
    before = lists.clone()
    with pytest.raises(RuntimeError, match=re.escape("exp_avg_sqs[0] has shape [254]")):
        ademamix(*lists, lr=1e-2, **HYPERPARAMETERS)
    assert_identical(list(lists), list(before))

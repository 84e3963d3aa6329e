"""The errors of the blockwise ops: their texts, and that nothing has been written when they are raised."""

from dataclasses import fields

import pytest
import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.helpers.config import MIXED, assert_identical, native_built
from tests.helpers.offsets import in_arenas
from tests.helpers.quantized import blockwise_call, blockwise_step, make_blockwise
from torch_ademamix import ops
from torch_ademamix.ops import FORMATS

QUANTIZE = torch.ops.torch_ademamix.quantize_blockwise.default
DEQUANTIZE = torch.ops.torch_ademamix.dequantize_blockwise.default


def replacing(name, change, i):
    def bend(lists, options):
        getattr(lists, name)[i] = change(getattr(lists, name)[i])

    return bend


def shortening(name):
    return lambda lists, options: getattr(lists, name).pop()


def setting(**values):
    return lambda lists, options: options.update(values)


def to(x):
    return lambda tensor: tensor.to(x)


def strided(tensor):
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def placing(change):
    """Puts the state into one arena of 1536 elements, 6 blocks and 7 steps, and bends it."""

    def bend(lists, options):
        arenas = in_arenas(lists, count=1)
        for field, tensors in zip(fields(lists), arenas, strict=True):
            setattr(lists, field.name, tensors)
        options.update(arenas.options)
        change(lists, options)

    return bend


CODES = ("exp_avgs", "exp_avg_slows", "exp_avg_sqs")
ABSMAXS = tuple(f"{name[:-1]}_absmaxs" for name in CODES)
ONE_CALL = "one call takes one dtype and one device"

# What is changed in good arguments of four vectors (of 0, 1, 3 and 255 elements), and what is said.
REFUSALS = [
    *[
        (shortening(name), f"{name} has length 3, but params has length 4")
        for name in ("grads", *CODES, *ABSMAXS, "steps")
    ],
    (setting(subsequences=[0, 1, 2]), "subsequences has length 3, but params has length 4"),
    *[
        (
            replacing(name, to(dtype), 0),
            f"{name}[0] has dtype {dtype}, but must be {right}",
        )
        for name, right, wrong in (("exp_avgs", torch.int8, torch.uint8), ("exp_avg_sqs", torch.uint8, torch.int8))
        for dtype in (wrong, torch.int16, torch.float32)
    ],
    *[
        (
            replacing("exp_avg_slows", to(dtype), 0),
            f"exp_avg_slows[0] has dtype {dtype}, but must be torch.int16 or torch.int8",
        )
        for dtype in (torch.uint8, torch.int32, torch.float32)
    ],
    (
        replacing("exp_avg_slows", to(torch.int8), 2),
        "exp_avg_slows[2] is torch.int8 on cpu, but exp_avg_slows[0] is torch.int16 on cpu; " + ONE_CALL,
    ),
    *[
        (
            replacing(name, to(torch.float64), 1),
            f"{name}[1] has dtype torch.float64, but must be torch.float32",
        )
        for name in (*ABSMAXS, "steps")
    ],
    *[
        (
            replacing(name, lambda tensor: tensor.reshape(-1, 1), 3),
            f"{name}[3] has shape [255, 1], but params[3] has shape [255]",
        )
        for name in ("grads", *CODES)
    ],
    *[
        (
            replacing(name, lambda tensor: tensor.repeat(2), 3),
            f"{name}[3] has 2 elements, but must have 1, one per block of params[3]",
        )
        for name in ABSMAXS
    ],
    *[
        (
            replacing(name, lambda tensor: torch.ones(1), 0),
            f"{name}[0] has 1 elements, but must have 0, one per block of params[0]",
        )
        for name in ABSMAXS
    ],
    *[(replacing(name, strided, 3), f"{name}[3] must be contiguous") for name in CODES],
    *[
        (replacing(name, to("meta"), 2), f"{name}[2] is on meta, but params[2] is on cpu")
        for name in (*ABSMAXS, "steps")
    ],
    (
        replacing("params", lambda tensor: tensor[:1].expand(3), 2),
        "params[2] has elements that share memory, so it can't be updated in place",
    ),
    (
        replacing("grads", lambda grad: grad.to_sparse(), 2),
        "grads[2] has layout torch.sparse_coo; only dense tensors are allowed",
    ),
    (setting(beta3=1.0), "beta3 is 1, but must be in [0, 1)"),
    (setting(t_alpha=-1.0), "t_alpha is -1, but must be at least 0"),
    (setting(eps=float("nan")), "eps is nan, but must be at least 0"),
    (setting(found_inf=torch.ones(2)), "found_inf has shape [2], but must hold one element"),
    (
        placing(lambda lists, options: options["offsets"].pop()),
        "offsets has length 11, but must have 12, 3 for each of params, or none",
    ),
    *[
        (placing(shortening(name)), f"{name} has length 0, but exp_avgs has length 1")
        for name in (*ABSMAXS, *CODES[1:], "steps")
    ],
    *[
        (
            placing(replacing(name, lambda arena: arena[None], 0)),
            f"{name}[0] has shape [1, {n}], but must have one dimension",
        )
        for name, n in (*((name, 1536) for name in CODES), *((name, 6) for name in ABSMAXS), ("steps", 7))
    ],
    *[(placing(replacing(name, strided, 0)), f"{name}[0] must be contiguous") for name in (*CODES, *ABSMAXS, "steps")],
    *[
        (placing(replacing(name, to("meta"), 0)), f"{name}[0] is on meta, but params[0] is on cpu")
        for name in (*CODES, *ABSMAXS, "steps")
    ],
    *[
        (
            placing(replacing(name, lambda arena: arena[:-1], 0)),
            f"offsets[1] is 1536, but {name}[0] has room for {room} elements, and params[0] has 0",
        )
        for names, room in ((CODES, 1535), (ABSMAXS, 1280))
        for name in names
    ],
    (
        setting(hyperparameters=torch.zeros(1, 9)),
        "hyperparameters has shape [1, 9], but must have shape [rows, 14]",
    ),
]


def call_op(lists, **options):
    op, args, kwargs = blockwise_call(lists, **options)
    op(*args, **kwargs)


def call_fake(lists, **options):
    op, *arguments = blockwise_call(lists, **options)
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        op(*args, **kwargs)


def call_reference(lists, **options):
    blockwise_step("reference", lists, **options)


@pytest.mark.parametrize(
    ("call", "bend", "text"),
    [
        pytest.param(call, bend, text, id=f"{call.__name__}-{text}")
        for call in (call_op, call_reference, call_fake)
        for bend, text in REFUSALS
    ],
)
def test_refusals_of_the_step(call, bend, text):
    lists, options = make_blockwise(MIXED[:4]), {}
    bend(lists, options)
    written = [tensor for tensors in lists if tensors is not lists.grads for tensor in tensors]
    written = [tensor for tensor in written if not tensor.is_meta]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(RuntimeError) as raised:
        call(lists, **options)
    assert str(raised.value) == f"ademamix_blockwise_step_: {text}"
    assert_identical(written, before)


def format_function(op, args, options):
    x, *rest, format = args
    if not 0 <= format < len(FORMATS):
        pytest.skip("the function takes the name of a format")
    function = {QUANTIZE: ops.quantize_blockwise, DEQUANTIZE: ops.dequantize_blockwise}[op]
    function(x, *rest, FORMATS[format], **options)


def format_reference(op, args, options):
    op.redispatch(DispatchKeySet(DispatchKey.PrivateUse1), *args, **options)


def format_fake(op, args, options):
    with FakeTensorMode() as mode:
        op(*tree_map_only(torch.Tensor, mode.from_tensor, args), **options)


FORMAT_TEXT = "but must be in [0, 6)"
CODES_300 = torch.zeros(300, dtype=torch.uint8)


FORMAT_REFUSALS = pytest.mark.parametrize(
    ("op", "args", "options", "text"),
    [
        (QUANTIZE, (torch.ones(3), 6), {}, f"format is 6, {FORMAT_TEXT}"),
        (QUANTIZE, (torch.ones(3), -1), {}, f"format is -1, {FORMAT_TEXT}"),
        (
            QUANTIZE,
            (torch.ones(3).double(), 0),
            {},
            "x has dtype torch.float64, but must be torch.float32",
        ),
        *[
            (
                QUANTIZE,
                (torch.ones(3), format),
                {"seed": 0},
                f"seed is given, but {name} isn't rounded stochastically",
            )
            for format, name in ((0, "signed_sqrt_int8"), (2, "linear_int16"), (3, "linear_int12"))
        ],
        (DEQUANTIZE, (CODES_300, torch.ones(2), 6), {}, f"format is 6, {FORMAT_TEXT}"),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(2), 2),
            {},
            "codes has dtype torch.uint8, but must be torch.int16",
        ),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(2), 0),
            {},
            "codes has dtype torch.uint8, but must be torch.int8",
        ),
        (
            DEQUANTIZE,
            (CODES_300.short(), torch.ones(2), 1),
            {},
            "codes has dtype torch.int16, but must be torch.uint8",
        ),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(2).double(), 1),
            {},
            "absmax has dtype torch.float64, but must be torch.float32",
        ),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(2, device="meta"), 1),
            {},
            "absmax is on meta, but codes is on cpu",
        ),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(3), 1),
            {},
            "absmax has shape [3], but must have shape [2], one per block of codes",
        ),
        (
            DEQUANTIZE,
            (CODES_300, torch.ones(2, 1), 1),
            {},
            "absmax has shape [2, 1], but must have shape [2], one per block of codes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)


@FORMAT_REFUSALS
@pytest.mark.parametrize("call", [format_function, format_reference, format_fake])
def test_refusals_of_the_formats(call, op, args, options, text):
    with pytest.raises(RuntimeError) as raised:
        call(op, args, options)
    assert str(raised.value) == f"{op._schema.name.split('::')[1]}: {text}"


@pytest.mark.skipif(not native_built(), reason="built without native kernels")
@FORMAT_REFUSALS
def test_native_kernels_only_say_that_formats_are_invalid(op, args, options, text):
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
        pytest.skip("meta tensors have no native kernel")
    with pytest.raises(RuntimeError, match=r"blockwise: invalid arguments; torch_ademamix/ops/arguments\.py has"):
        op(*args, **options)


def test_names_of_formats():
    codes, absmax = ops.quantize_blockwise(torch.ones(3), "linear_int16")
    for call in (
        lambda: ops.quantize_blockwise(torch.ones(3), "int7"),
        lambda: ops.dequantize_blockwise(codes, absmax, "int7"),
    ):
        with pytest.raises(ValueError, match="format is 'int7', but must be one of signed_sqrt_int8"):
            call()

"""What the tests of quantized state share: the lists of the blockwise op, and what it must give."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._C import DispatchKeySet

from tests.helpers.config import KERNELS, MIXED, StepLists, make_lists, step, step_call
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.numerics import blockwise
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, POSITION_BITS, decode, quantize
from torch_ademamix.numerics.moments import (
    QUANTIZED,
    WORDS,
    codes_in,
    entries_of,
    op_entries,
    op_formats,
    packed_moment,
    quantized_formats,
)
from torch_ademamix.numerics.reference_step import compute_dtype

PACKET = torch.ops.torch_ademamix.ademamix_blockwise_step_

SEED = -(2**62) - 12345  # both words of the key count, and so does the sign

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
ABSMAXS = tuple(f"{name}_absmax" for name in MOMENTS)

SMALL = [entry for entry in MIXED if entry[0] not in ((65537,), (3, 63, 65))]


@dataclass
class BlockwiseLists:
    """The lists of one op call, in its order."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_absmaxs: list[Tensor]
    exp_avg_slows: list[Tensor]
    exp_avg_slow_absmaxs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avg_sq_absmaxs: list[Tensor]
    steps: list[Tensor]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (getattr(self, field.name) for field in fields(self))

    def clone(self) -> "BlockwiseLists":
        return copy.deepcopy(self)

    @property
    def subsequences(self) -> list[int]:
        return subsequences_of(self.params)


def subsequences_of(params: list[Tensor]) -> list[int]:
    """As an optimizer numbers them, but from another number on and with gaps."""
    return [3 * i + 7 for i in range(len(params))]


def stored(slow_ema_bits: int) -> tuple[str, str, str]:
    """The formats of exp_avg, exp_avg_slow and exp_avg_sq."""
    return tuple(QUANTIZED[slow_ema_bits][name] for name in MOMENTS)  # type: ignore[return-value]


def formats_of(lists: "BlockwiseLists") -> dict[str, str]:
    """The formats of the moments of one op call."""
    return dict(op_formats(lists.exp_avgs, lists.exp_avg_absmaxs, lists.exp_avg_slows, lists.exp_avg_sqs))


def state_of(lists: "BlockwiseLists", i: int) -> dict[str, Tensor]:
    """The entries of a parameter's state, but for its step."""
    _, _, *state, _ = lists
    names = op_entries(formats_of(lists))[:-1]
    return {name: tensors[i] for name, tensors in zip(names, state, strict=True) if name is not None}


def codes_of(lists: "BlockwiseLists", i: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The codes and scales of a parameter's moments; of codes in words, copies."""
    return dict(codes_in(state_of(lists, i), formats_of(lists)))


def quantized(lists: StepLists, slow_ema_bits: int = 16, has_exp_avg: bool = True) -> BlockwiseLists:
    params, grads, *moments, steps = lists
    result = BlockwiseLists(params, grads, [], [], [], [], [], [], steps)
    formats = quantized_formats(slow_ema_bits, has_exp_avg)
    for i in range(len(params)):
        values = {name: tensors[i].float().contiguous() for name, tensors in zip(MOMENTS, moments, strict=True)}
        state = entries_of({name: quantize(values[name], format) for name, format in formats.items()}, formats)
        for name, target in zip(op_entries(formats)[:-1], list(result)[2:-1], strict=True):
            if name is not None:
                target.append(state[name])
    return result


def dequantized(lists: BlockwiseLists) -> StepLists:
    """The same parameters, gradients and steps, with unquantized moments."""
    params, grads, *_, steps = lists
    result = StepLists(params, grads, [], [], [], steps)
    targets = dict(zip(MOMENTS, list(result)[2:-1], strict=True))
    formats = formats_of(lists)
    for i, p in enumerate(params):
        for name, (codes, absmax) in codes_of(lists, i).items():
            targets[name].append(decode(codes, absmax, formats[name]).to(compute_dtype(p.dtype)))
    return result


def moments_of(lists: BlockwiseLists, i: int) -> list[tuple[Tensor, Tensor]]:
    """Codes, or words with them, and absmax of the moments of parameter i, in the lists."""
    state = state_of(lists, i)
    packed = WORDS.get(formats_of(lists)[packed_moment(formats_of(lists)) or "exp_avg_slow"])
    return [(state.get(name, state.get(packed)), state[f"{name}_absmax"]) for name in formats_of(lists)]


def make_blockwise(
    entries: Any = MIXED, *args: Any, slow_ema_bits: int = 16, has_exp_avg: bool = True, **kwargs: Any
) -> BlockwiseLists:
    """Arguments as in mid-training; see `make_lists`."""
    return quantized(make_lists(entries, *args, **kwargs), slow_ema_bits, has_exp_avg)


def blockwise_call(
    lists: BlockwiseLists, lr: Tensor | float = 1e-2, **options: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The overload of the op, and its positional and keyword arguments."""
    defaults = {"stochastic_rounding": True, "seed": SEED, "subsequences": lists.subsequences}
    return step_call(PACKET, lists, lr, **{**defaults, **options})


def blockwise_step(kernel: str, lists: BlockwiseLists, **options: Any) -> None:
    """One op call served by `kernel`, as in `config.step`."""
    op, args, kwargs = blockwise_call(lists, **options)
    op.redispatch(DispatchKeySet(KERNELS[kernel]), *args, **kwargs)


def expected_blockwise_step(
    kernel: str,
    before: BlockwiseLists,
    *,
    stochastic_rounding: bool = True,
    seed: int = SEED,
    subsequences: list[int] | None = None,
    **options: Any,
) -> BlockwiseLists:
    """What a step must give, bit for bit: the same kernel's step of the dequantized state, quantized anew."""
    after = before.clone()
    plain = dequantized(after)
    subsequences = after.subsequences if subsequences is None else subsequences
    step(kernel, plain, seed=seed, subsequences=subsequences, **options)
    formats = formats_of(after)
    for i, subsequence in enumerate(subsequences):
        values = {name: getattr(plain, f"{name}s")[i].float() for name in formats}
        # An element of which one moment isn't finite loses all.
        finite = torch.stack([value.isfinite() for value in values.values()]).all(0)
        codes = {}
        for name, format in formats.items():
            key = {}
            if stochastic_rounding and format in POSITION_BITS:
                key = {"seed": seed, "step": plain.steps[i], "subsequence": subsequence}
            codes[name] = quantize(torch.where(finite, values[name], 0), format, **key)
        state = state_of(after, i)
        for name, value in entries_of(codes, formats).items():
            state[name].copy_(value)
    return after


def without_exp_avg(lists: Any) -> Any:
    """The same lists for a step with a beta1 of 0."""
    lists.exp_avgs.clear()
    if isinstance(lists, BlockwiseLists):
        lists.exp_avg_absmaxs.clear()
    return lists


def code_bounds(before: BlockwiseLists, ulps: int = 4, **options: Any) -> tuple[BlockwiseLists, BlockwiseLists]:
    """What a step gives where the roots that codes are made of are so many units of float32 too small, or too large."""
    root, results = blockwise._sqrt, []
    for error in (-ulps, ulps):
        with patch.object(blockwise, "_sqrt", lambda x, factor=1 + error * 2**-24: root(x) * factor):
            results.append(expected_blockwise_step("native", before, **copy.deepcopy(options)))
    return results[0], results[1]


def assert_codes_within(lists: BlockwiseLists, bounds: tuple[BlockwiseLists, BlockwiseLists]) -> None:
    for i in range(len(lists.params)):
        low, high = (codes_of(bound, i) for bound in bounds)
        for name, (a, _) in codes_of(lists, i).items():
            b, c = low[name][0], high[name][0]
            assert bool(((torch.minimum(b, c) <= a) & (a <= torch.maximum(b, c))).all()), name


def with_absmax_one(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values in full blocks whose first element is 1, and which elements they are."""
    rows = -(-values.numel() // (BLOCK_SIZE - 1))
    blocks = torch.zeros(rows, BLOCK_SIZE)
    blocks[:, 0] = 1
    is_value = torch.ones(rows, BLOCK_SIZE, dtype=torch.bool)
    is_value[:, 0] = False
    padded = torch.zeros(rows * (BLOCK_SIZE - 1))
    padded[: values.numel()] = values
    blocks[:, 1:] = padded.view(rows, -1)
    return blocks.view(-1), is_value.view(-1).nonzero().view(-1)[: values.numel()]


def boundaries() -> Tensor:
    """In [0, 1], the values of every code of the 8-bit formats, and where rounding passes from one to the next."""
    halves = torch.arange(511, dtype=torch.float64) / 2
    return torch.cat([(halves[:255] / 127).square(), (halves / 255) ** 4]).float()


def neighbours(values: Tensor, ulps: int) -> Tensor:
    """The values in [0, 1] and the floats up to so many ulps beside them."""
    bits = values.view(torch.int32)
    shifts = torch.arange(-ulps, ulps + 1, dtype=torch.int32)
    one = torch.tensor(1.0).view(torch.int32).item()
    return (bits[:, None] + shifts).clamp(0, one).view(-1).view(torch.float32)


# Optimizers with quantized state.

SIZES = (5000, 4096, 4095, 300)  # two quantized, ragged and not, and two below min_8bit_size


def make_optimizer(
    dtype: torch.dtype = torch.float32, cls: type = AdEMAMix8bit, **options: Any
) -> tuple[list[nn.Parameter], AdEMAMix]:
    """Parameters in two groups, the second of which stores exp_avg_slow in 8 bits if not told otherwise."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]
    second = {"params": [params[1], params[3]], "slow_ema_bits": 8, "weight_decay": 0.1, **options}
    defaults = dict(lr=1e-2, betas=(0.9, 0.99, 0.999), t_alpha=30, t_beta3=30, seed=9)
    return params, cls([{"params": [params[0], params[2]]}, second], **{**defaults, **options})


def train(params: list[nn.Parameter], optimizer: AdEMAMix, steps: int) -> None:
    """The gradients depend on the step and on the parameters."""
    for _ in range(steps):
        for p in params:
            state = optimizer.state.get(p)
            t = int(state["step"]) if state else 0
            generator = torch.Generator().manual_seed(1000 * t + p.numel())
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) + p.detach()
        optimizer.step()


def everything(params: list[nn.Parameter], optimizer: AdEMAMix) -> tuple[list[Tensor], dict[str, Any]]:
    return [p.detach() for p in params], optimizer.state_dict()

"""Conversions of bitsandbytes' state dicts, both ways; torch_ademamix.checkpoint has the rules for all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.checkpoint import dynamic_map
from torch_ademamix.checkpoint.conversion import (
    StateDict,
    check_entries,
    convert,
    exported_options,
    kept,
    renamed,
    unquantized,
)
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count
from torch_ademamix.numerics.moments import MOMENTS, formats_of
from torch_ademamix.state.saved import BITSANDBYTES_STATE, expect_step, expect_tensor

# Our options and what they are called there.
OPTIONS = {name: name for name in ("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")}


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> StateDict:
    """Converts a state dict of bitsandbytes' AdEMAMix classes (0.50.2), 32-bit, 8-bit or paged.

    8-bit codes become float32 values, which the optimizer that loads them stores in its own formats. docs/migration.md
    says what that rounding costs.

    bitsandbytes' CUDA kernel writes the slow EMA's scales of a tensor whose size isn't a multiple of 256 one entry
    early. Such state is recognized and read as that kernel reads it: the first of these scales is also the last of the
    fast EMA's.

    Args:
        state_dict: what bitsandbytes' ``state_dict()`` returned.

    Returns:
        for the ``load_state_dict`` of any `AdEMAMix` class.

    Raises:
        ValueError: something isn't as bitsandbytes' AdEMAMix has it: missing, unknown, or of another shape or dtype.

    >>> from torch_ademamix import AdEMAMix
    >>> p = torch.nn.Parameter(torch.ones(4096))
    >>> optimizer = AdEMAMix([p], optim_bits=8)
    >>> p.grad = torch.ones(4096)
    >>> optimizer.step()
    >>> state_dict = from_bitsandbytes(to_bitsandbytes(optimizer.state_dict()))
    >>> state_dict["state"][0]["exp_avg"].dtype
    torch.float32
    >>> optimizer.load_state_dict(state_dict)
    >>> optimizer.state[p]["exp_avg"].dtype, optimizer.state[p]["exp_avg_slow"].dtype
    (torch.int8, torch.int16)
    """

    def group(saved: Mapping[str, Any], where: str) -> StateDict:
        options = renamed(saved, where, OPTIONS)
        return {**options, "t_alpha": options["t_alpha"] or None, "t_beta3": options["t_beta3"] or None}

    return convert(state_dict, _state_from_bitsandbytes, group)


def _state_from_bitsandbytes(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    saved = {**saved, **saved.get(BITSANDBYTES_STATE, {})}  # older versions don't nest it
    saved.pop(BITSANDBYTES_STATE, None)
    quantized = "absmax1" in saved
    entries = {"step", "state1", "state2"}
    check_entries(saved, where, entries | ({"qmap1", "qmap2", "absmax1", "absmax2"} if quantized else set()))

    dtype = torch.uint8 if quantized else torch.float32
    nu = expect_tensor(saved["state2"], f"{where}['state2']", None, dtype)
    m1, m2 = expect_tensor(saved["state1"], f"{where}['state1']", (2, *nu.shape), dtype)
    step = expect_step(saved["step"], f"{where}['step']").clone()
    if not quantized:
        state = {"step": step, "exp_avg": m1.clone(), "exp_avg_slow": m2.clone(), "exp_avg_sq": nu.clone()}
        return kept(state, group)
    for name, is_signed in (("qmap1", True), ("qmap2", False)):
        qmap = expect_tensor(saved[name], f"{where}[{name!r}]", (256,), torch.float32)
        if not torch.allclose(qmap, dynamic_map.dynamic_map(is_signed, qmap.device), rtol=1e-6, atol=0):
            kind = "signed" if is_signed else "unsigned"
            raise ValueError(f"{where}[{name!r}] must be the {kind} dynamic map, but has other values")
    blocks = block_count(nu.numel())
    nu_absmax = expect_tensor(saved["absmax2"], f"{where}['absmax2']", (blocks,), torch.float32)
    absmax1 = expect_tensor(saved["absmax1"], f"{where}['absmax1']", (2, blocks), torch.float32)
    m1_absmax, m2_absmax = absmax1
    if _written_one_entry_early(m2, m2_absmax, nu_absmax):
        m2_absmax = absmax1.flatten()[blocks - 1 : -1]
    state = {
        "step": step,
        "exp_avg": dynamic_map.dequantize(m1, m1_absmax, signed=True),
        "exp_avg_slow": dynamic_map.dequantize(m2, m2_absmax, signed=True),
        "exp_avg_sq": dynamic_map.dequantize(nu, nu_absmax, signed=False),
    }
    return kept(state, group)


def _written_one_entry_early(m2: Tensor, m2_absmax: Tensor, nu_absmax: Tensor) -> bool:
    """Whether bitsandbytes' CUDA kernel wrote this state.

    It puts the scale of m2's block i at absmax1[(n + 256 i) // 256], counted over both rows, which is one entry early
    if n isn't a multiple of 256; the last entry stays 0. Elsewhere a block with a gradient has a scale.
    """
    ragged = m2.numel() % BLOCK_SIZE
    if ragged == 0:
        return False
    last_block_has_values = (nu_absmax[-1] > 0) & (m2.flatten()[-ragged:] != dynamic_map.SIGNED_ZERO_CODE).any()
    return bool(last_block_has_values & (m2_absmax[-1] == 0))


def to_bitsandbytes(state_dict: Mapping[str, Any]) -> StateDict:
    """Converts a state dict of AdEMAMix for bitsandbytes' AdEMAMix classes (0.50.2).

    Quantized state stays quantized: its values are rounded to the nearest of bitsandbytes' dynamic maps. That includes
    a 16-bit exp_avg_slow, since bitsandbytes has no other format; from then on it loses most of its updates at β3 =
    0.9999. Everything else becomes float32, from which all its classes continue. So does the state of a tensor whose
    size isn't a multiple of 256, since bitsandbytes' CUDA kernel would read the scales of exp_avg_slow from the wrong
    offset.

    Options without a counterpart there are left out: how state is stored, ``stochastic_rounding``, ``seed``,
    ``capturable``, ``maximize`` and ``schedule_start``. A learning rate becomes a float.

    Args:
        state_dict: what the ``state_dict()`` of an `AdEMAMix` class returned.

    Returns:
        for the ``load_state_dict`` of bitsandbytes' AdEMAMix, AdEMAMix8bit, PagedAdEMAMix and PagedAdEMAMix8bit. (Its
        AdEMAMix32bit and PagedAdEMAMix32bit don't work: bitsandbytes issue 2075.)

    Raises:
        ValueError: something is missing, unknown, or of another shape or dtype; or there are remainders of master
            weights, a group maximizes, or its schedules don't begin at step 0, which bitsandbytes can't do.

    >>> from torch_ademamix import AdEMAMix
    >>> p = torch.nn.Parameter(torch.ones(2, 3))
    >>> optimizer = AdEMAMix([p])
    >>> p.grad = torch.ones(2, 3)
    >>> optimizer.step()
    >>> state = to_bitsandbytes(optimizer.state_dict())["state"][0]
    >>> state["step"], list(state["__bnb_optimizer_quant_state__"]["state1"].shape)
    (1, [2, 2, 3])
    """
    return convert(state_dict, _state_to_bitsandbytes, _group_to_bitsandbytes)


def _state_to_bitsandbytes(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> StateDict:
    state = unquantized(saved, group, where)
    size, device = state["exp_avg_sq"].numel(), state["exp_avg_sq"].device
    quantized = any(formats_of(saved).values()) and size % BLOCK_SIZE == 0

    moments = [state[name].float() for name in MOMENTS]
    converted = {}
    if quantized:
        signed = (True, True, False)
        stored = [dynamic_map.quantize(m, is_signed) for m, is_signed in zip(moments, signed, strict=True)]
        moments, (m1_absmax, m2_absmax, nu_absmax) = map(list, zip(*stored, strict=True))
        converted = {
            "qmap1": dynamic_map.dynamic_map(True, device),
            "qmap2": dynamic_map.dynamic_map(False, device),
            "absmax1": torch.stack((m1_absmax, m2_absmax)),
            "absmax2": nu_absmax,
        }
    m1, m2, nu = moments
    converted |= {"state1": torch.stack((m1, m2)), "state2": nu.clone(memory_format=torch.contiguous_format)}
    return {"step": int(state["step"].item()), BITSANDBYTES_STATE: converted}


def _group_to_bitsandbytes(group: Mapping[str, Any], where: str) -> StateDict:
    return exported_options(group, where, OPTIONS, "bitsandbytes")

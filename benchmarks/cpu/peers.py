"""The competitors of `benchmarks.cpu`: each takes parameters that have gradients, and makes its state and its step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shared import formula
from benchmarks.shared.formula import ALPHA, BETA1, BETA2, BETA3, EPS, LR, WEIGHT_DECAY
from torch_ademamix import ADANA, AdEMAMix, AdEMAMix8bit


@dataclass(frozen=True)
class Peer:
    step: Callable[[], object]
    state: object  # nested dicts and lists of tensors


Make = Callable[[list[Tensor]], Peer]  # raises ImportError where the peer isn't installed


def stepping(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Make:
    def peer(params: list[Tensor]) -> Peer:
        optimizer = make(params)
        return Peer(optimizer.step, optimizer.state)

    return peer


def compiled(make: Callable[[list[Tensor]], AdEMAMix], **options: bool) -> Make:
    def peer(params: list[Tensor]) -> Peer:
        optimizer = make(params)
        optimizer.init_state()
        return Peer(torch.compile(optimizer.step, fullgraph=True, options=options), optimizer.state)

    return peer


def ademamix_8bit_slow_8(params: list[Tensor]) -> AdEMAMix:
    return AdEMAMix8bit(params, slow_ema_bits=8)


def ademamix_12_bits(params: list[Tensor]) -> AdEMAMix:
    return AdEMAMix8bit(params, slow_ema_bits=12)


def ademamix_without_exp_avg(params: list[Tensor]) -> AdEMAMix:
    return AdEMAMix(params, betas=(0.0, BETA2, BETA3))


def ademamix_8bit_of_any_size(params: list[Tensor]) -> AdEMAMix:
    return AdEMAMix8bit(params, min_8bit_size=1)


def ademamix_group_each(params: list[Tensor]) -> AdEMAMix:
    """As with layer-wise learning rates, taken to the extreme."""
    return AdEMAMix([{"params": [p], "lr": LR * (1 + i)} for i, p in enumerate(params)])


def adamw_group_each(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p], "lr": LR * (1 + i)} for i, p in enumerate(params)], fused=True)


def bitsandbytes_32bit(params: list[Tensor]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdEMAMix as Other

    return Other(params)


def bitsandbytes_8bit(params: list[Tensor]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdEMAMix8bit as Other

    return Other(params)


def torchao_8bit(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit as Other

    return Other(params)


def adamw_fused(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True)


def adamw_foreach(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, foreach=True)


def plain_compiled(params: list[Tensor]) -> Peer:
    grads = [p.grad for p in params]
    states = [tuple(torch.zeros_like(p, dtype=torch.float32) for _ in range(3)) for p in params]
    step = 0

    @torch.compile(fullgraph=True)
    def update(bias1: Tensor, sqrt_bias2: Tensor) -> None:
        for p, grad, state in zip(params, grads, states, strict=True):
            formula.update(p, grad, state, bias1, sqrt_bias2)

    @torch.no_grad()
    def step_all() -> None:
        nonlocal step
        step += 1
        update(torch.tensor(1 - BETA1**step), torch.tensor((1 - BETA2**step) ** 0.5))

    return Peer(step_all, states)


def plain_loop(params: list[Tensor]) -> Peer:
    """A loop of in-place operations over the parameters, state in their dtype, as in Apple's reference.

    That reference also has 1e-8 in the logarithms of its β3 schedule; no competitor here has a schedule.
    """
    state = [[torch.zeros_like(p) for _ in range(3)] for p in params]
    step = 0

    @torch.no_grad()
    def step_all() -> None:
        nonlocal step
        step += 1
        bias1, bias2 = 1 - BETA1**step, 1 - BETA2**step
        for p, (m1, m2, nu) in zip(params, state, strict=True):
            m1.mul_(BETA1).add_(p.grad, alpha=1 - BETA1)
            m2.mul_(BETA3).add_(p.grad, alpha=1 - BETA3)
            nu.mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
            denominator = nu.sqrt().div_(bias2**0.5).add_(EPS)
            update = (m1 / bias1 + ALPHA * m2) / denominator
            update.add_(p, alpha=WEIGHT_DECAY)
            p.add_(update, alpha=-LR)

    return Peer(step_all, state)


ADAMW = "AdamW, fused"
PLAIN = "plain formula, compiled"

PEERS: dict[str, Make] = {
    "AdEMAMix": stepping(AdEMAMix),
    "AdEMAMix, a group each": stepping(ademamix_group_each),
    "AdEMAMix, compiled": compiled(AdEMAMix),
    "AdEMAMix, compiled without size_asserts": compiled(AdEMAMix, size_asserts=False),
    "AdEMAMix, beta1=0": stepping(ademamix_without_exp_avg),
    "ADANA": stepping(ADANA),
    "AdEMAMix8bit": stepping(AdEMAMix8bit),
    "AdEMAMix8bit, 12 bits": stepping(ademamix_12_bits),
    "AdEMAMix8bit, any size": stepping(ademamix_8bit_of_any_size),
    "AdEMAMix8bit, compiled": compiled(AdEMAMix8bit),
    "AdEMAMix8bit, slow 8": stepping(ademamix_8bit_slow_8),
    "AdEMAMix8bit, slow 8, compiled": compiled(ademamix_8bit_slow_8),
    PLAIN: plain_compiled,
    "plain loop (Apple's)": plain_loop,
    ADAMW: stepping(adamw_fused),
    "AdamW, fused, a group each": stepping(adamw_group_each),
    "AdamW, foreach": stepping(adamw_foreach),
    "torchao AdamW8bit": stepping(torchao_8bit),
    "bitsandbytes AdEMAMix": stepping(bitsandbytes_32bit),
    "bitsandbytes AdEMAMix8bit": stepping(bitsandbytes_8bit),
}
SAME_FORMULA = ("AdEMAMix", "AdEMAMix, compiled", PLAIN, "plain loop (Apple's)")

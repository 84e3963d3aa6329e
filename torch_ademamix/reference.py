"""AdEMAMix as its paper writes it: to read, and to test everything else against. It shares no code with the ops."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix (arXiv 2409.03137, algorithm 1), one parameter after another, with float32 or float64 state.

    Arguments, defaults and state names are :class:`torch_ademamix.AdEMAMix`'s.

    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = ReferenceAdEMAMix([p], lr=0.1)
    >>> p.grad = torch.ones(3)
    >>> optimizer.step()
    >>> sorted(optimizer.state[p])
    ['exp_avg', 'exp_avg_slow', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Tensor | float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: float | None = None,
        t_beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        schedule_start: int = 0,
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        maximize: bool = False,
    ) -> None:
        options = dict(locals())
        defaults = {name: options[name] for name in options if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: Mapping[str, Any]) -> None:
        dtype = torch.promote_types(p.dtype, torch.float32)  # 16-bit parameters are updated in float32
        beta1, beta2, beta3 = map(float, group["betas"])
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            if beta1 > 0:  # else m1 is the gradient
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_slow"] = torch.zeros_like(p, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
        state["step"] += 1
        t = state["step"].item()

        # The schedules: of α and β3 (section 3), and in logarithmic time (arXiv 2602.05298).
        s = max(t - group["schedule_start"], 0)
        alpha, weight_decay, delta = group["alpha"], group["weight_decay"], group["delta"]
        if group["t_alpha"]:
            alpha *= min(s / group["t_alpha"], 1)
        if group["t_beta3"] and s < group["t_beta3"]:  # from β1 to β3, linear in the half-life
            done = s / group["t_beta3"]
            time = (1 - done) * _per_log(beta1) + done * _per_log(beta3)
            beta3 = min(math.exp(1 / time), beta3) if time else 0.0
        if delta:
            beta3 = 1 - delta / (delta + s)
        if group["kappa"]:
            alpha += (1 + s) ** (1 - group["kappa"])
        if group["t_weight_decay"]:
            weight_decay /= 1 + t / group["t_weight_decay"]
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        if group["log_time_beta2"]:
            beta2, bias2 = 1 - delta / (delta + t), 1.0

        theta, g = _real(p).to(dtype.to_real()), _real(p.grad).to(dtype.to_real())  # type: ignore[arg-type]
        if group["maximize"]:
            g = -g
        m1 = _real(state["exp_avg"]) if "exp_avg" in state else g.clone()
        m2, nu = _real(state["exp_avg_slow"]), _real(state["exp_avg_sq"])
        m1.copy_(beta1 * m1 + (1 - beta1) * g)
        m2.copy_(beta3 * m2 + (1 - beta3) * g)
        nu.copy_(beta2 * nu + (1 - beta2) * g**2)
        update = (m1 / bias1 + alpha * m2) / ((nu / bias2).sqrt() + group["eps"])
        _real(p).copy_(theta - float(group["lr"]) * (update + weight_decay * theta))


def _per_log(beta: float) -> float:
    """1/ln β, which is 0 at β = 0."""
    return 1 / math.log(beta) if beta > 0 else 0.0


def _real(tensor: Tensor) -> Tensor:
    """The same memory; of complex numbers as pairs of reals, which torch.optim updates them as."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor

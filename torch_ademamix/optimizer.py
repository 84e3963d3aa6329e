"""The AdEMAMix optimizer (arXiv 2409.03137) and the variants that fix how its state is stored."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from torch_ademamix import bfloat16, functional, ops, paging, sharding
from torch_ademamix.check import floating_problem, in_place_problem
from torch_ademamix.clipping import clip_scale, total_norm
from torch_ademamix.state import (
    MASTER_REMAINDER,
    QUANTIZED_STATE,
    STORAGE_OPTIONS,
    check_precision,
    loaded_state,
    mark_static,
    new_state,
)

MIN_8BIT_SIZE = 4096  # bitsandbytes' default: smaller tensors save too little

Lists = tuple[list[Any], ...]
Call = tuple[Callable[..., None], Sequence[Any], dict[str, Any]]  # an op, its lists and its options


class AdEMAMix(Optimizer):
    r"""AdamW with a second, slow average of the gradient (arXiv 2409.03137), as one op call per step.

    The update is :func:`torch_ademamix.functional.ademamix`'s. Every option can be set per parameter group.
    Parameters may be float32, bfloat16, float16 or float64, their gradients any of these.

    State, per parameter, under torch's own names: `step` (float32, no dimensions, on the parameter's device),
    `exp_avg` (m1), `exp_avg_slow` (m2) and `exp_avg_sq` (ν), of the parameter's shape; float32, or float64 for
    float64 parameters. With `optim_bits=8` they hold codes, and `exp_avg_absmax` and so on the float32 scales,
    one per block of 256 elements (:mod:`torch_ademamix.blockwise`). State is made when a parameter's first
    gradient arrives, or by :meth:`init_state`.

    Args:
        params: tensors, named tensors, or groups (dicts), as in torch.optim.
        lr: the learning rate. A float that changes recompiles a compiled step each time; a tensor of one element
            doesn't, and LR schedulers write to it in place.
        betas: β1, β2 and β3, each in [0, 1).
        alpha: the weight α of the slow average.
        t_alpha: steps over which α rises linearly from 0; None for none. Usually the whole run.
        t_beta3: steps over which β3 rises from β1, linearly in the half-life; None for none.
        schedule_start: steps of a parameter before both warm-ups begin, where another optimizer did these steps
            (:func:`torch_ademamix.checkpoint.from_adamw`); α is 0 and β3 is β1 till then.
        eps: added to the denominator.
        weight_decay: decoupled weight decay λ.
        optim_bits: 32, or 8 for quantized state.
        min_8bit_size: tensors of fewer elements keep float32 state.
        is_paged: state may be paged out of GPU memory; without a GPU it is ordinary memory.
        slow_ema_bits: of exp_avg_slow where state is quantized: 16, or 8, at which an average as slow as
            β3 = 0.9999 loses most of its updates.
        stochastic_rounding: of exp_avg_sq where state is quantized; rounding to nearest would make it nearly twice
            as large.
        seed: of the stochastic rounding.
        master_weights: "remainder" keeps what rounding takes away from bfloat16 parameters, whose updates are often
            below half an ulp: the int16 state `master_remainder` (:mod:`torch_ademamix.bfloat16`), which is the
            float32 weight together with the parameter; see :meth:`master_weight`.
        param_rounding: of bfloat16 parameters without master weights: to the "nearest" value, or "stochastic", which
            is right on average and needs no state.
        max_grad_norm: clips the gradients of all groups together to this norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does, but leaves them as they are; see :attr:`grad_norm`. None
            for no clipping. It is the optimizer's own, not a group's, and no part of a state dict.
        maximize: ascend instead of descend.
        capturable: keep lr as a tensor on the parameters' device, so that a captured CUDA graph reads it anew
            at each replay.

    Raises:
        ValueError: an option is out of its range, or a parameter has another dtype.
        TypeError: a parameter isn't a tensor.

    Attributes:
        grad_norm: a float32 tensor without dimensions: the norm of all gradients at the last step, before clipping;
            None without `max_grad_norm`. The next step writes to the same tensor.

    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = AdEMAMix(model.parameters(), lr=1e-3, t_alpha=1000, t_beta3=1000)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.bias]["step"].item()
    1.0
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()

    # Those of the arguments that are the optimizer's, not a group's.
    _OWN_OPTIONS = ("max_grad_norm",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: Literal[8, 32] = 32,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        *,
        schedule_start: int = 0,
        slow_ema_bits: Literal[8, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            schedule_start=schedule_start,
            eps=eps,
            weight_decay=weight_decay,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            slow_ema_bits=slow_ema_bits,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            master_weights=master_weights,
            param_rounding=param_rounding,
            maximize=maximize,
            capturable=capturable,
        )
        _check_options(defaults, first=True)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._check_max_grad_norm()
        super().__init__(params, defaults)
        self._init_grad_norm()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; refuses options out of range before the optimizer changes."""
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group}, first=True)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_params(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["capturable"]:
            make_lr_tensor(group)

    def init_state(self) -> None:
        """Makes the state of every parameter that requires a gradient now, not at its first step.

        Compiled and captured steps want it: state that is made while they are traced costs them a recompilation.
        """
        self._init_grad_norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state[p]:
                    self._init_param_state(p, group)

    def _init_param_state(self, p: Tensor, group: dict[str, Any]) -> None:
        state = new_state(p, group)
        mark_static(state)
        self.state[p].update(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returns; else None.

        Raises:
            RuntimeError: a gradient is sparse or of a dtype that isn't supported; nothing has been written then.
            ValueError: an option of a group has been set out of its range; nothing has been written either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def master_weight(self, p: Tensor) -> Tensor:
        """The float32 weight of a parameter with `master_weights="remainder"`; of others the parameter itself.

        >>> p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = AdEMAMix([p], lr=1e-5, weight_decay=0, master_weights="remainder")
        >>> p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> p.tolist(), round(optimizer.master_weight(p)[0].item(), 6)
        ([1.0, 1.0], 0.99999)
        """
        remainder = self.state[p].get(MASTER_REMAINDER)
        if remainder is None:
            return p.detach()
        weight = bfloat16.join(sharding.local(p.detach()), sharding.local(remainder))
        return sharding.sharded({MASTER_REMAINDER: weight}, p)[MASTER_REMAINDER]

    def _init_grad_norm(self) -> None:
        if self.max_grad_norm is not None and self.grad_norm is None:
            self.grad_norm = torch.zeros((), device=self.param_groups[0]["params"][0].device)
            torch._dynamo.mark_static_address(self.grad_norm, guard=True)

    def _check_max_grad_norm(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm!r}, but must be positive or None")

    def _update(self) -> None:
        # Before the first state is made or parameter changed: a group refused later may not find others stepped.
        for i, group in enumerate(self.param_groups):
            _check_options(group)
            if group["param_rounding"] == "stochastic":
                _check_params(group)
            _check_grads(group["params"], f"gradients of param_groups[{i}]")
        self._check_max_grad_norm()
        grad_scale = self._grad_scale()
        calls, first_stream = [], 0
        for group in self.param_groups:
            calls += self._calls(group, first_stream, grad_scale)
            first_stream += len(group["params"])
        for op, lists, options in calls:
            op(*lists, **options)

    def _grad_scale(self) -> Tensor | None:
        """What the gradients are divided by: GradScaler's scale, and more where their norm is to be clipped."""
        scale: Tensor | None = getattr(self, "grad_scale", None)  # set around step() by GradScaler
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return scale
        self._init_grad_norm()
        norm = total_norm(grads)
        if scale is not None:
            norm = norm / scale.to(norm.device).reshape(())
        self.grad_norm.copy_(norm)  # type: ignore[union-attr]
        excess = clip_scale(norm, self.max_grad_norm)
        return excess if scale is None else excess * scale.to(norm.device).reshape(())

    def _update_param(self, p: Tensor, group: dict[str, Any], stream: int) -> None:
        """Updates one parameter, whose number among all is `stream`, as :meth:`_update` would without clipping."""
        _check_options(group)
        _check_grads([p], "gradients")
        for op, lists, options in self._calls(group, stream, None, [p]):
            op(*lists, **options)

    def _calls(
        self,
        group: dict[str, Any],
        first_stream: int,
        grad_scale: Tensor | None,
        params: Sequence[Tensor] | None = None,
    ) -> list[Call]:
        """The op calls that update those of `params`, or of the whole group, that have a gradient."""
        plain: Lists = ([], [], [], [], [], [], [], [])
        blockwise: Lists = ([], [], [], [], [], [], [], [], [], [], [])
        ps, grads, m1s, m2s, nus, steps, remainders, streams = plain
        for stream, p in enumerate(group["params"] if params is None else params, first_stream):
            grad = p.grad
            if grad is None:
                continue
            state = self.state[p]
            if not state:
                self._init_param_state(p, group)
            if sharding.is_dtensor(p):
                stream += sharding.first_group(p) << 32
                p, grad, state = sharding.local_parts(p, grad, state)
            if "exp_avg_absmax" in state:
                items = (p, grad, *[state[name] for name in QUANTIZED_STATE], state.get(MASTER_REMAINDER), stream)
                for target, item in zip(blockwise, items, strict=True):
                    target.append(item)
            else:
                ps.append(p)
                grads.append(grad)
                m1s.append(state["exp_avg"])
                m2s.append(state["exp_avg_slow"])
                nus.append(state["exp_avg_sq"])
                steps.append(state["step"])
                remainders.append(state.get(MASTER_REMAINDER))
                streams.append(stream)
        options = self._options(group, grad_scale)
        stochastic = group["param_rounding"] == "stochastic"
        *lists, remainders, streams = plain
        calls: list[Call] = [
            (ops.ademamix_step_, batch, {**options, **rounding})
            for batch, rounding in functional.plain_batches(lists, remainders, streams, stochastic)
        ]
        options = {**options, "stochastic_rounding": group["stochastic_rounding"]}
        *lists, remainders, streams = blockwise
        calls += [
            (ops.ademamix_blockwise_step_, batch, {**options, **rounding})
            for batch, rounding in functional.blockwise_batches(lists, remainders, streams, stochastic)
        ]
        return calls

    def _options(self, group: dict[str, Any], grad_scale: Tensor | None) -> dict[str, Any]:
        beta1, beta2, beta3 = group["betas"]
        return dict(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            beta3=beta3,
            alpha=group["alpha"],
            t_alpha=group["t_alpha"],
            t_beta3=group["t_beta3"],
            schedule_start=group["schedule_start"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            seed=group["seed"],
            places=(),
            grad_scale=grad_scale,
            found_inf=getattr(self, "found_inf", None),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but state keeps its dtype, and is checked before anything changes.

        How state is stored (`optim_bits`, `slow_ema_bits`, `min_8bit_size`, `is_paged`, `master_weights`) is this
        optimizer's own affair: state that was saved in another format is converted. Only the remainders of master
        weights can't be: without `master_weights="remainder"` they are refused.

        Raises:
            ValueError: a state is of another shape or dtype than its parameter calls for, or an option is out of
                range; the optimizer is as it was then.
        """

        # torch casts state to the parameter's dtype. Called after any hook of the user's, this one hides the
        # checked state from that; __setstate__ brings it out again.
        def check_and_hide(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = [
                {**saved, **{name: group[name] for name in STORAGE_OPTIONS}}
                for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            ]
            return {"state": self._checked_state(state_dict), "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(check_and_hide)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[Any, Any]:
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return state_dict["state"]  # type: ignore[no-any-return]  # for torch to refuse
        for saved, group in zip(groups, self.param_groups, strict=True):
            _check_options({**group, **saved})
        ids = (i for g in groups for i in g["params"])
        owners = ((p, g, saved) for g, saved in zip(self.param_groups, groups, strict=True) for p in g["params"])
        states = dict(state_dict["state"])
        for i, (p, group, saved) in zip(ids, owners, strict=True):
            if i in states:
                where = f"state_dict['state'][{i!r}]"
                loaded = _Loaded(loaded_state(p, states[i], group, where))
                check_precision(states[i], saved, where)
                states[i] = loaded
        return states

    def __getstate__(self) -> dict[str, Any]:  # for copy and pickle
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("max_grad_norm", None)
        self.__dict__.setdefault("grad_norm", None)
        super().__setstate__(state)
        for name, argument in inspect.signature(AdEMAMix).parameters.items():
            if name == "params" or name in self._OWN_OPTIONS:
                continue
            default = self.defaults.setdefault(name, argument.default)  # where a pickle is older than the option
            for group in self.param_groups:
                group.setdefault(name, default)
        for group in self.param_groups:
            if group["capturable"]:
                make_lr_tensor(group)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, saved in self.state.items():
            if isinstance(saved, _Loaded):
                self.state[p] = saved.state
            elif p in groups and paging.is_paged(p, groups[p]):  # a copied or unpickled tensor is an ordinary one
                self.state[p] = paging.placed(saved, p, groups[p])
            else:
                continue
            mark_static(self.state[p])


def _fixing(**fixed: Any) -> Callable[[type[AdEMAMix]], type[AdEMAMix]]:
    """A class decorator: the arguments are AdEMAMix's but for these, which have fixed values."""
    arguments = inspect.signature(AdEMAMix.__init__).parameters.values()
    signature = inspect.Signature([a for a in arguments if a.name not in fixed])

    def decorate(cls: type[AdEMAMix]) -> type[AdEMAMix]:
        def __init__(*args: Any, **kwargs: Any) -> None:
            AdEMAMix.__init__(**signature.bind(*args, **kwargs).arguments, **fixed)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate


@_fixing(optim_bits=32)
class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with float32 state."""


@_fixing(optim_bits=8)
class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with quantized state."""


@_fixing(is_paged=True)
class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged state."""


@_fixing(optim_bits=32, is_paged=True)
class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged float32 state."""


@_fixing(optim_bits=8, is_paged=True)
class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged quantized state."""


class _Loaded:
    """State on its way past torch's cast, which looks into dicts, sequences and tensors only."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state


def _check_options(options: dict[str, Any], first: bool = False) -> None:
    """Refuses options out of their range; `first` is where they come from the user."""

    def require(name: str, allowed: str, ok: Callable[[Any], bool]) -> None:
        try:
            error: type[Exception] | None = None if ok(options[name]) else ValueError
        except (TypeError, RuntimeError):  # the latter of a tensor that isn't one number
            error = TypeError
        if error is not None:
            raise error(f"{name} is {options[name]!r}, but must be {allowed}")

    if isinstance(options["lr"], Tensor):
        lr_dtypes = (torch.float32, torch.float64)
        allowed = "a number, or a float32 or float64 tensor of one element"
        require("lr", allowed, lambda lr: lr.numel() == 1 and lr.dtype in lr_dtypes)
    else:
        # A schedule that ends at 0 may pass it by rounding, so a step takes any number.
        require("lr", "at least 0" if first else "a number", lambda lr: lr >= 0 if first else not math.isnan(lr))
    for name in ("alpha", "eps", "weight_decay", "min_8bit_size"):
        require(name, "at least 0", lambda value: value >= 0)
    require("betas", "three numbers in [0, 1)", lambda betas: len(betas) == 3 and all(0 <= b < 1 for b in betas))
    for name in ("t_alpha", "t_beta3"):
        require(name, "positive or None", lambda steps: steps is None or steps > 0)
    require("schedule_start", "an int of at least 0", lambda start: isinstance(start, int) and 0 <= start < 2**63)
    require("seed", "an int of 64 bits", lambda seed: isinstance(seed, int) and -(2**63) <= seed < 2**63)
    for name in ("maximize", "stochastic_rounding", "capturable", "is_paged"):
        require(name, "True or False", lambda flag: flag in (True, False))
    require("optim_bits", "8 or 32", lambda bits: bits in (8, 32))
    require("slow_ema_bits", "8 or 16", lambda bits: bits in (8, 16))
    require("master_weights", "'remainder' or None", lambda kind: kind in ("remainder", None))
    roundings = ("nearest",) if options["master_weights"] else ("nearest", "stochastic")
    require("param_rounding", " or ".join(map(repr, roundings)), lambda rounding: rounding in roundings)


def _check_grads(params: Iterable[Tensor], name: str) -> None:
    for i, p in enumerate(params):
        if p.grad is not None and (problem := floating_problem(name, i, p.grad)):
            raise RuntimeError(problem)


def _check_params(group: dict[str, Any]) -> None:
    for i, p in enumerate(group["params"]):
        if problem := floating_problem("params", i, p) or in_place_problem("params", i, p):
            raise ValueError(problem)
        if p.dtype == torch.float16 and (group["master_weights"] or group["param_rounding"] == "stochastic"):
            option = "master_weights" if group["master_weights"] else "param_rounding"
            raise ValueError(
                f"{option} is {group[option]!r}, which is for bfloat16 parameters, but params[{i}] has dtype {p.dtype}"
            )


def make_lr_tensor(group: dict[str, Any]) -> None:
    """Turns a group's lr into a tensor on its parameters' device: a compiled or captured step reads it anew."""
    if not group["params"]:
        return
    device = group["params"][0].device
    if isinstance(group["lr"], Tensor) and group["lr"].device == device:
        return
    dtype = torch.float32 if device.type == "mps" else torch.float64  # as exact as a float, where there is one
    # Of a float64 CPU tensor without dimensions, Dynamo would track the value, and trace everything twice.
    group["lr"] = torch.as_tensor(group["lr"], dtype=dtype).reshape(1).to(device)

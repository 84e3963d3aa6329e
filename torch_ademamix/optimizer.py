"""The AdEMAMix optimizer (arXiv 2409.03137)."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from torch_ademamix import tracing
from torch_ademamix.clipping import check_max_norm, clipping_grad_scale
from torch_ademamix.numerics import bfloat16
from torch_ademamix.numerics.moments import formats_of
from torch_ademamix.ops.schemas import SCALER
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import (
    STATE_FORMAT,
    allocate_state,
    check_exp_avg,
    has_state,
    params_needing_state,
    read_ema,
    separate,
    write_ema,
)
from torch_ademamix.state.arenas import MASTER_REMAINDER, OptimizerState, ParamState, PlanCache, check_memory
from torch_ademamix.state.loading import STATE_DICT, converted_state_dict, real_or_fake, write_state
from torch_ademamix.state.options import (
    ADAMW_OPTIONS,
    GroupOptions,
    HyperparameterTables,
    check_adamw_options,
    check_grads,
    check_options,
    check_params,
    error_context,
    is_trained,
    own_lr_tensors,
    param_name,
)
from torch_ademamix.state.plain_options import plain, plain_options
from torch_ademamix.state.plan import Plan, Work

MIN_8BIT_SIZE = 4096  # bitsandbytes' default: smaller tensors save too little
_NO_GROUP_OPTIONS = ("params", "max_grad_norm", *ADAMW_OPTIONS)


class AdEMAMix(Optimizer):
    r"""AdamW with a second, slow EMA of the gradient (arXiv 2409.03137), as one op call per step.

    The update is :func:`torch_ademamix.functional.ademamix`'s. :func:`torch_ademamix.recommended` returns `betas`,
    `alpha`, `t_alpha` and `t_beta3` for a run of a given length; the defaults here are bitsandbytes'.

    Parameters may be float32, bfloat16, float16 or float64, their gradients any of these; or complex64 or complex128,
    with complex gradients: they are updated as pairs of reals, as torch.optim does, and have 32-bit state only.

    State, per parameter, under torch's own names: `step` (float32, no dimensions, on the parameter's device),
    `exp_avg` (m1), `exp_avg_slow` (m2) and `exp_avg_sq` (ν), of the parameter's shape; float32, float64 for float64
    parameters, or of a complex parameter's dtype. With `optim_bits=8` they hold codes, and `exp_avg_absmax` and so on
    the float32 scales, one per block of 256 elements (:mod:`torch_ademamix.blockwise`). The first step creates
    the state of all parameters that require a gradient, or :meth:`init_state` does.

    Args:
        params (iterable): tensors, named tensors, or groups (dicts), as in torch.optim.
        lr (float or Tensor, 1e-3): the learning rate. LR schedulers write to a tensor of one element in place, so a
            second group gets a copy of its own.
        betas (three floats, (0.9, 0.999, 0.9999)): β1, β2 and β3, each in [0, 1).
        alpha (float, 5.0): the weight α of the slow EMA. A value in (0, 0.001] without `kappa` raises, since AdamW has
            eps at this position; it may be written to `param_groups`.
        t_alpha (int or None, None): steps over which α rises linearly from 0; None for none. Usually the whole run.
        t_beta3 (int or None, None): steps over which β3 rises from β1, linearly in the half-life; None for none.
        eps (float, 1e-8): added to the denominator.
        weight_decay (float, 1e-2): decoupled weight decay λ.
        optim_bits (32 or 8, 32): 8 for quantized state.
        min_8bit_size (int, 4096): tensors of fewer elements keep float32 state.
        is_paged (bool, False): state may be paged out of GPU memory; without a GPU it is ordinary memory.
        schedule_start (int, 0): steps of a parameter before both warm-ups begin, if another optimizer did these steps
            (:func:`torch_ademamix.checkpoint.from_adamw`); until then α is 0 and β3 is β1.
        delta (float or None, None): δ of β3(t) = 1 − δ/(δ + t), the slow EMA in logarithmic time (arXiv 2602.05298),
            instead of betas[2] and `t_beta3`. It remembers about t/δ steps, so the length of the run need not be known.
        log_time_beta2 (bool, False): β2(t) = 1 − δ/(δ + t) too, instead of betas[1], and no bias correction of
            exp_avg_sq.
        kappa (float or None, None): κ of α(t) = alpha + (1 + t)^(1 − κ), instead of `t_alpha`; in (0, 1].
        t_weight_decay (float or None, None): T in steps of weight decay in logarithmic time, weight_decay/(1 + t/T).
            None for a constant one.
        slow_ema_bits (16, 12 or 8, 16): of exp_avg_slow if state is quantized. 12 puts exp_avg into the other 4 bits
            of the same int16 words, or exp_avg_sq if β1 is 0. At 8, an EMA as slow as β3 = 0.9999 loses most of its
            updates. See :meth:`ema` for the values.
        stochastic_rounding (bool, True): of exp_avg_sq if state is quantized, and of exp_avg in 4 bits; rounding to
            nearest would make the former nearly twice as large.
        seed (int, 0): of the stochastic rounding.
        master_weights ("remainder", "remainder8" or None, None): "remainder" keeps what rounding takes away from
            bfloat16 parameters, whose updates are often below half an ulp: the int16 state `master_remainder`
            (:mod:`torch_ademamix.bfloat16`), which is the float32 weight together with the parameter; see
            :meth:`master_weight`. "remainder8" keeps 24 bits of the weight with an int8, stochastically rounded: 1 B
            per parameter instead of 2.
        param_rounding ("nearest" or "stochastic", "nearest"): of bfloat16 parameters without master weights.
            "stochastic" is right on average and needs no state.
        max_grad_norm (float or None, None): clips the gradients of all groups together to this norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does, but leaves them as they are; see :attr:`grad_norm`. A state
            dict doesn't include it.
        maximize (bool, False): ascend instead of descend.
        capturable (bool, False): keep lr as a tensor on the parameters' device, so that a captured CUDA graph reads it
            at each replay.
        foreach, fused: ignored, and not kept in groups. There is one implementation, which is both.
        amsgrad, differentiable: AdamW's, for configurations that set them to False. AdEMAMix has neither.

    Options may be changed in `param_groups` at any time (`max_grad_norm` as the optimizer's attribute). A change
    recompiles a compiled ``optimizer.step``, or the training step of `compile_train_step` (that of `capture_train_step`
    is re-captured):

    =========  ==================  =========================  =========================================================
    per group  recompiles step     recompiles training step   arguments
    =========  ==================  =========================  =========================================================
    yes        no                  no                         `lr` as a tensor
    yes        yes                 no                         `lr` as a float, `betas`, `alpha`, `t_alpha`, `t_beta3`,
                                                              `eps`, `weight_decay`, `schedule_start`, `delta`,
                                                              `log_time_beta2`, `kappa`, `t_weight_decay`
    yes        yes                 yes                        `maximize`, `seed`, `stochastic_rounding`,
                                                              `param_rounding`
    yes        no                  no                         `optim_bits`, `min_8bit_size`, `is_paged`,
                                                              `slow_ema_bits`, `master_weights`: a change takes effect
                                                              when state is next created or loaded; `capturable`: when
                                                              a state dict is loaded
    no         yes                 yes                        `max_grad_norm`
    =========  ==================  =========================  =========================================================

    Raises:
        ValueError: an option is out of its range, or a parameter has another dtype, or one that an option isn't for.
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

    state: OptimizerState

    @_disable_dynamo
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
        delta: float | None = None,
        log_time_beta2: bool = False,
        kappa: float | None = None,
        t_weight_decay: float | None = None,
        slow_ema_bits: Literal[8, 12, 16] = 16,
        stochastic_rounding: bool = True,
        seed: int = 0,
        master_weights: Literal["remainder", "remainder8"] | None = None,
        param_rounding: Literal["nearest", "stochastic"] = "nearest",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_adamw_options({"amsgrad": amsgrad, "differentiable": differentiable})
        defaults = dict(
            lr=lr,
            betas=betas,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            schedule_start=schedule_start,
            delta=delta,
            log_time_beta2=log_time_beta2,
            kappa=kappa,
            t_weight_decay=t_weight_decay,
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
            state_format=STATE_FORMAT,
        )
        defaults = plain_options(defaults)
        check_options(defaults, first=True)
        self._init_internals()
        self.max_grad_norm = plain(max_grad_norm)
        self.grad_norm: Tensor | None = None
        check_max_norm(self.max_grad_norm)
        super().__init__(params, defaults)
        self._init_grad_norm()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; raises for options that are out of range before the optimizer changes.

        AdamW's options that AdEMAMix doesn't have, such as `fused`, are taken out of the group.
        """
        if isinstance(param_group, dict):
            param_group.update(plain_options(param_group))
            with error_context(f"param_groups[{len(self.param_groups)}]"):
                check_adamw_options(param_group)
                check_options({**self.defaults, **param_group}, first=True)
            for name in ADAMW_OPTIONS:
                param_group.pop(name, None)
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._plan_cache.clear()
            check_params(self.param_groups[-1], before)
            own_lr_tensors(self.param_groups)
        except BaseException:
            del self.param_groups[before:]
            raise

    def init_state(self, *, include_frozen: bool = False) -> None:
        """Makes the state of every parameter that requires a gradient now, not at the first step.

        Where parameters are on a GPU, it also compiles and loads what a step needs whose gradients have the parameters'
        dtypes: a CUDA graph may be captured afterwards.

        Args:
            include_frozen: also of parameters that require no gradient now, such as float32 copies of a model's
                weights to which a framework assigns `grad` itself.

        >>> main = torch.zeros(2)  # a float32 copy of a bfloat16 weight
        >>> optimizer = AdEMAMix([main])
        >>> optimizer.init_state(include_frozen=True)
        >>> optimizer.state[main]["exp_avg_slow"]
        tensor([0., 0.])
        """
        self._allocate_state(include_frozen)
        self._make_plan()
        self._plan_cache.plan.load_kernels()

    def _allocate_state(self, include_frozen: bool = False) -> None:
        self._init_grad_norm()
        allocate_state(self.state, params_needing_state(self.state, self.param_groups, include_frozen))

    def _init_internals(self) -> None:
        self._plan_cache = PlanCache()
        self._options = GroupOptions()
        self._hyperparameters: dict[str, Tensor] | None = None  # by device, for full training steps as one graph
        self._name = tracing.register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, OptimizerState):  # to reset an optimizer, people assign a new dict
            value = OptimizerState(self._plan_cache, value)
        if name in ("state", "param_groups"):
            self._plan_cache.clear()
        super().__setattr__(name, value)

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
        """The float32 weight of a parameter with `master_weights`; of others the parameter itself.

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

    def ema(self, p: Tensor, name: str) -> Tensor:
        """The values of one of a parameter's EMAs, in whichever format it is stored.

        Args:
            p: a parameter that has state.
            name: "exp_avg", "exp_avg_slow" or "exp_avg_sq".

        Returns:
            A new tensor of the parameter's shape, and a DTensor if the parameter is one. It is float32, or float64
            where the state of a float64 parameter isn't quantized, or of a complex parameter's dtype.

        Raises:
            ValueError: the parameter has no state, or the state has no such EMA.

        >>> p = torch.nn.Parameter(torch.ones(300))
        >>> optimizer = AdEMAMix([p], betas=(0, 0.999, 0.9999), optim_bits=8, min_8bit_size=0, slow_ema_bits=12)
        >>> optimizer.init_state()
        >>> list(optimizer.state[p])
        ['step', 'exp_avg_slow_and_exp_avg_sq', 'exp_avg_slow_absmax', 'exp_avg_sq_absmax']
        >>> optimizer.set_ema(p, "exp_avg_slow", torch.full((300,), 0.5))
        >>> optimizer.ema(p, "exp_avg_slow")[0].item(), optimizer.ema(p, "exp_avg_sq").any().item()
        (0.5, False)
        """
        values = read_ema(self._state_with(p, name), name)
        return sharding.sharded({name: values}, p)[name]

    @torch.no_grad()
    def set_ema(self, p: Tensor, name: str, values: Tensor) -> None:
        """Overwrites one of a parameter's EMAs; quantized state takes the nearest values. See :meth:`ema`.

        Args:
            values: of the parameter's shape, in any floating dtype; a DTensor placed as the parameter if that is one.

        Raises:
            ValueError: as :meth:`ema`, or the values have another shape.
        """
        state = self._state_with(p, name)
        if values.shape != p.shape or sharding.is_dtensor(values) != sharding.is_dtensor(p):
            kind = "DTensor" if sharding.is_dtensor(p) else "plain tensor"
            raise ValueError(
                f"values is a {type(values).__name__} of shape {list(values.shape)}, but must be a {kind} of "
                f"{list(p.shape)}"
            )
        write_ema(sharding.local_entries(state), name, sharding.local(values))

    def _state_with(self, p: Tensor, name: str) -> ParamState:
        state = self.state.get(p)
        if not has_state(state):
            raise ValueError("p has no state yet; call init_state() or step() first")
        if name not in formats_of(state):
            raise ValueError(f"name is {name!r}, but must be one of {', '.join(formats_of(state))}")
        return state

    def _init_grad_norm(self) -> None:
        if self.max_grad_norm is None:
            return
        params = (p for group in self.param_groups for p in group["params"])
        device = next((p.device for p in params if is_trained(p)), torch.get_default_device())
        if self.grad_norm is None or self.grad_norm.device != device:
            self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
            torch._dynamo.mark_static_address(self.grad_norm, guard=True)

    def _prepare(self) -> None:
        """Checks the options, makes state that is missing, and a new plan if the last one isn't valid any more."""
        self._options.update(self.param_groups)
        if self.max_grad_norm is not None:
            check_max_norm(self.max_grad_norm)
        plan = self._plan_cache.plan
        if plan is not None and plan.is_valid(self.param_groups) and not any(map(is_trained, plan.stateless)):
            if plan.lacks_exp_avg and any(self.param_groups[k]["betas"][0] > 0 for k in plan.lacks_exp_avg):
                check_exp_avg(self.state, self.param_groups)
            return
        check_exp_avg(self.state, self.param_groups)
        for k, group in enumerate(self.param_groups):  # a step that raises makes no state either
            check_grads(group, k)
        self._allocate_state()
        self._make_plan()

    @torch.no_grad()
    def _make_plan(self) -> None:
        self._options.update(self.param_groups)
        self._plan_cache.plan = Plan(self.param_groups, self._options, self.state)

    def _update(self) -> None:
        """Updates the parameters that have gradients; raises before the first is changed."""
        is_traced = torch.compiler.is_compiling()
        tracing.begin_step(self._name) if is_traced else self._prepare()
        self._run(self._plan_cache.plan.work())
        if is_traced:
            tracing.end_step(self._name)

    @contextmanager
    def _reading(self, tables: HyperparameterTables) -> Iterator[None]:
        """Steps read the options' numbers from these tables, which are brought up to date now."""
        self._prepare()
        self._hyperparameters = tables.write(self._options.rows, self._plan_cache.plan.devices)
        try:
            yield
        finally:
            self._hyperparameters = None

    def _update_param(self, p: Tensor) -> None:
        """Updates one parameter as :meth:`_update` would without clipping; :meth:`_prepare` has been called."""
        if self._plan_cache.plan is None:
            self._prepare()
        self._run(self._plan_cache.plan.work(only=p))

    def _run(self, work: Sequence[Work]) -> None:
        # GradScaler sets these attributes around step().
        scaler = {name: getattr(self, name, None) for name in SCALER}
        if self.max_grad_norm is not None:
            scaler["grad_scale"] = self._clipping_scale(
                [g for _, _, grads in work for g in grads], scaler["grad_scale"]
            )
        plan = self._plan_cache.plan
        plan.run(plan.calls(work, self._hyperparameters, scaler))

    def _clipping_scale(self, grads: list[Tensor], grad_scale: Tensor | None) -> Tensor | None:
        """What the gradients are divided by: GradScaler's scale, and more if their norm is above `max_grad_norm`."""
        if not grads:
            return grad_scale
        if self.grad_norm is None:
            self._init_grad_norm()
        return clipping_grad_scale(grads, grad_scale, self.max_grad_norm, self.grad_norm)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. The tensors share the memory of the state.

        They keep their values if another state dict is loaded: as long as somebody has one of them, or a view, loading
        allocates new memory instead of writing to this.
        """
        handle = self.register_state_dict_post_hook(_handed_out, prepend=True)  # hooks may return other structures
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but state keeps its dtype, and is checked before anything changes.

        The optimizer's own `optim_bits`, `slow_ema_bits`, `min_8bit_size`, `is_paged` and `master_weights` decide how
        state is stored. State that was saved in another format is converted. Remainders of master weights are never
        dropped: loading them without `master_weights` raises. From 16 bits to 8 they are rounded to nearest, with a
        warning.

        Raises:
            ValueError: a state is of another shape or dtype than its parameter calls for, or an option is out of
                range; the optimizer is as it was then.
            TypeError: it isn't a state dict at all.
            RuntimeError: the storage of a state tensor has been resized.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}, but must be {STATE_DICT}")
        self._check_memory()
        planned = self._plan_cache.plan is not None
        handle = self.register_load_state_dict_pre_hook(  # called after any hook of the user's
            lambda _, given: converted_state_dict(given, self.param_groups, self.state)
        )
        try:
            with real_or_fake(state_dict, self.param_groups) as loaded:
                super().load_state_dict(dict(loaded))  # ends in __setstate__, which writes the state
                if planned:  # without a plan, compiled steps would recompile
                    self._make_plan()
        finally:
            handle.remove()

    def separate_state(self) -> None:
        """Gives each state tensor a storage of its own, now and for all state that is created later.

        Frameworks that free state for a while by resizing the storage of each tensor need this: in arenas, tensors
        share a storage. A step then takes the time that separate tensors take, and a compiled step recompiles.

        Raises:
            RuntimeError: the storage of a state tensor has been resized already.

        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdEMAMix(model.parameters())
        >>> optimizer.separate_state()
        >>> optimizer.init_state()
        >>> optimizer.state[model.weight]["exp_avg"].untyped_storage().nbytes()
        32
        """
        self._check_memory()
        planned = self._plan_cache.plan is not None
        separate(self.state)
        if planned:
            self._make_plan()

    def _check_memory(self) -> None:
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p in self.state:
                    check_memory(self.state[p], param_name(group, number, i))

    def __getstate__(self) -> dict[str, Any]:  # for copy and pickle
        own = {"max_grad_norm": self.max_grad_norm, "separate": self._plan_cache.separate, "parts": self.state.slices()}
        return {**super().__getstate__(), "state": self.state.plain(), **own}

    @_disable_dynamo
    def __setstate__(self, state: dict[str, Any]) -> None:
        before: OptimizerState | None = self.__dict__.get("state")
        if "_plan_cache" not in self.__dict__:
            self._init_internals()
        self.__dict__.setdefault("max_grad_norm", None)
        self.__dict__.setdefault("grad_norm", None)
        state = dict(state)
        self._plan_cache.separate = state.pop("separate", self._plan_cache.separate)
        shared = state.pop("parts", None)
        super().__setstate__(state)
        arguments = inspect.signature(AdEMAMix).parameters.items()
        options = {name: argument.default for name, argument in arguments if name not in _NO_GROUP_OPTIONS}
        for name, default in options.items():  # a pickle may be older than an option
            for group in (self.defaults, *self.param_groups):
                group.setdefault(name, self.defaults.get(name, default))
        own_lr_tensors(self.param_groups)
        self._plan_cache.clear()
        entries = self.__dict__["state"]
        if isinstance(shared, list):  # the tensors are those of another process
            self.state = OptimizerState(self._plan_cache, entries)
            self.state.assign(shared)
            return
        self.state = OptimizerState(self._plan_cache, {}) if before is None else before
        write_state(self.state, entries, self.param_groups)


def _handed_out(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    items = state_dict["state"].items()
    state = {key: value.handed_out() if isinstance(value, ParamState) else value for key, value in items}
    groups = list(map(plain_options, state_dict["param_groups"]))
    return {**state_dict, "state": state, "param_groups": groups}

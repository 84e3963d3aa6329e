"""AdEMAMix in Megatron-Core: one call before Megatron makes its optimizer, and `--optimizer adam` is AdEMAMix.

Megatron is imported by the call only. docs/trainers.md has what works with it, and with which checkpoints.
"""

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torch_ademamix.checkpoint.apertus import MOMENT_NAMES, group_to_apertus
from torch_ademamix.megatron.fused_adam import FusedAdamInterface, make_class
from torch_ademamix.numerics.moments import MOMENTS
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.variants import AdEMAMix8bit  # noqa: F401  for the example

Checkpoint = Literal["ademamix", "adamw", "apertus"]

# Where megatron-core 0.16 has Adam's entries of a checkpoint written out, how often, and what takes their place.
_WRITTEN_OUT = {
    "get_parameter_state_dp_zero": ('("param", "exp_avg", "exp_avg_sq")', 2),
    "load_parameter_state_from_dp_zero": ('("param", "exp_avg", "exp_avg_sq")', 1),
    "split_state_dict_if_needed": ("['param', 'exp_avg', 'exp_avg_sq']", 1),
}
_ENTRIES = '(("param",) + self.optimizer_state_keys)'

_SUPPORTED = "0.16.x from PyPI or 0.20.0, Megatron-LM's main of August 2026 (d98e8a64)"


def use_ademamix(
    cls: type[AdEMAMix] = AdEMAMix,
    *,
    beta3: float = 0.9999,
    load_from: Checkpoint = "ademamix",
    save_for: Literal["ademamix", "apertus"] = "ademamix",
    **options: Any,
) -> None:
    """Makes the Megatron of this process use AdEMAMix where it would use Adam (`--optimizer adam`).

    Call it before Megatron makes its optimizer, in each process. Megatron's configuration gives the learning rate,
    weight decay, β1, β2 and eps (`adam_beta1`, `adam_beta2`, `adam_eps`). It works with DistributedOptimizer, whose
    state is sharded over the data-parallel ranks, and without it. In Megatron-LM's main it also registers 'ademamix'
    with the emerging optimizers, for ``OptimizerConfig(optimizer="ademamix")``.

    A checkpoint has the moments as float32 values, and one step per group, as Transformer Engine's FusedAdam has it.
    So the number of data-parallel ranks may change, and so may `cls` between 32 and 8 bits. With equal settings a
    resumed run repeats the unbroken one bit for bit.

    Args:
        cls: `AdEMAMix` or one of its variants, such as `AdEMAMix8bit`.
        beta3: the decay of the slow EMA.
        load_from: whose checkpoints are loaded with DistributedOptimizer: AdEMAMix's own; "adamw" for those of Adam
            and AdamW, after which exp_avg_slow begins at zero and both warm-ups at the switch; or "apertus" for those
            of the fork of Megatron-LM that trained Apertus.
        save_for: who is to load the checkpoints that DistributedOptimizer saves.
        options: of `cls`, such as `alpha`, `t_alpha` and `t_beta3` (in steps), or `seed`.

    Raises:
        ImportError: Megatron-Core isn't installed.
        RuntimeError: its version is none of those supported.
        TypeError: `cls` has no such option, or gets it from Megatron.
        ValueError: `load_from` or `save_for` is unknown, or an option is out of range.
        NotImplementedError: later, when Megatron makes the optimizer, if its configuration has `optimizer_cpu_offload`,
            `use_precision_aware_optimizer`, `optimizer_cuda_graph` or Megatron-FSDP, or a sharded emerging optimizer.

    Example, in a copy of Megatron-LM's ``pretrain_gpt.py`` before ``pretrain(...)``::

        use_ademamix(AdEMAMix8bit, alpha=8, t_alpha=100_000, t_beta3=100_000)
    """
    if load_from not in get_args(Checkpoint):
        raise ValueError(f"load_from is {load_from!r}, but must be one of {', '.join(get_args(Checkpoint))}")
    if save_for not in ("ademamix", "apertus"):
        raise ValueError(f"save_for is {save_for!r}, but must be ademamix or apertus")
    if given := {"params", "lr", "betas", "eps", "weight_decay"} & options.keys():
        raise TypeError(f"{', '.join(sorted(given))} come from Megatron's configuration; set them there")
    made = make_class(cls, beta3, options)
    made([torch.zeros(1)])  # raises for bad options now
    _install(made, load_from, save_for)


_originals: dict[tuple[str, str], Any] = {}  # what calls have replaced, by module and name


def _replace(module: Any, name: str, value: Any) -> None:
    _originals.setdefault((module.__name__, name), getattr(module, name))
    setattr(module, name, value)


def _original(module: Any, name: str) -> Any:
    return _originals.get((module.__name__, name), getattr(module, name))


def _install(made: type[FusedAdamInterface], load_from: Checkpoint, save_for: str) -> None:
    core = importlib.import_module("megatron.core")
    version = str(core.__version__)
    if not version.startswith(("0.16.", "0.20.0")):
        raise RuntimeError(f"megatron-core is {version}, but torch_ademamix.megatron supports {_SUPPORTED}")
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    base = _original(optimizer, "DistributedOptimizer")
    is_016 = version.startswith("0.16.")
    overrides = _with_keys_replaced(distributed, base) if is_016 else {}
    if not is_016 and not hasattr(base, "optimizer_state_keys"):
        raise RuntimeError(f"this megatron-core calls itself {version}, but isn't {_SUPPORTED}")

    _replace(optimizer, "DistributedOptimizer", _distributed_optimizer(base, overrides, load_from, save_for))
    _replace(optimizer, "Adam", made)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    _replace(distributed, "Adam", made)
    # DistributedOptimizer takes the step from the groups, as FusedAdam's, not from each parameter's state.
    _replace(distributed, "HAVE_APEX_OR_TE", True)
    build = _original(optimizer, "_get_megatron_optimizer_based_on_param_groups")
    own = load_from == save_for == "ademamix"
    _replace(optimizer, "_get_megatron_optimizer_based_on_param_groups", _checking(build, own))
    if not is_016:
        emerging = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
        emerging._EMERGING_OPTIMIZERS["ademamix"] = emerging.EmergingOptimizerEntry(
            optimizer_cls=made, init_state_fn=_init_state, config_to_kwargs=_kwargs, default_param_overrides={}
        )


def _init_state(optimizer: FusedAdamInterface, config: Any = None) -> None:
    optimizer.init_state(include_frozen=True)


def _kwargs(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
    """What the registry of emerging optimizers constructs AdEMAMix with.

    Raises:
        NotImplementedError: Megatron would keep state whole on every rank, or share out whole parameters.
    """
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    for name in ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer"):
        if getattr(config, name, False) or getattr(ddp_config, name, False):
            raise NotImplementedError(
                f"{name} is on, but the emerging optimizer 'ademamix' doesn't shard its state: use optimizer='adam', "
                "which is AdEMAMix too, and does"
            )
    return dict(
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )


def _checking(build: Callable[..., Any], own: bool) -> Callable[..., Any]:
    """Megatron's function that creates an optimizer, which raises for what AdEMAMix can't do; `own`: no conversion."""

    def checked_build(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        if config.optimizer == "adam":
            _check_config(config, model_chunks, own)
        made = build(config, model_chunks, *args, **kwargs)
        inner, *_ = made if isinstance(made, tuple) else (getattr(made, "optimizer", None),)
        if not isinstance(inner, FusedAdamInterface):
            return made
        if isinstance(made, tuple):
            return inner, _init_state
        made.init_state_fn = _init_state
        return made

    return checked_build


def _check_config(config: Any, model_chunks: Any, own: bool) -> None:
    if config.optimizer_cpu_offload:
        raise NotImplementedError(
            "optimizer_cpu_offload is on, but AdEMAMix doesn't work in Megatron's HybridDeviceOptimizer: its other "
            "half would be AdamW, and it casts 8-bit state to float32 when it loads; AdEMAMix8bit needs less memory"
        )
    if getattr(model_chunks[0].ddp_config, "use_megatron_fsdp", False):
        raise NotImplementedError(
            "use_megatron_fsdp is on, but AdEMAMix hasn't been run with Megatron-FSDP: use DistributedOptimizer "
            "(use_distributed_optimizer), or FSDP2 without Megatron"
        )
    if not own and not config.use_distributed_optimizer:
        raise ValueError("load_from and save_for need use_distributed_optimizer, which is off")


def _with_keys_replaced(module: Any, base: Any) -> dict[str, Any]:
    """Methods of megatron-core 0.16's DistributedOptimizer that take the entries from `optimizer_state_keys`."""
    methods: dict[str, Any] = {}
    for name, (written_out, count) in _WRITTEN_OUT.items():
        source = textwrap.dedent(inspect.getsource(getattr(base, name)))
        if source.count(written_out) != count:
            raise RuntimeError(
                f"DistributedOptimizer.{name} of the installed megatron-core isn't that of 0.16.1; "
                f"torch_ademamix.megatron supports {_SUPPORTED}"
            )
        exec(compile(source.replace(written_out, _ENTRIES), f"<{name}>", "exec"), vars(module), methods)
    return methods


def _distributed_optimizer(base: Any, overrides: Mapping[str, Any], load_from: Checkpoint, save_for: str) -> Any:
    """A subclass of Megatron's DistributedOptimizer whose checkpoints have AdEMAMix's moments."""

    if overrides:
        base = type(base.__name__, (base,), dict(overrides))

    class DistributedOptimizer(base):  # type: ignore[misc]
        _is_loading = False

        def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(optimizer, *args, **kwargs)
            if self._is_ademamix:  # with state there, Megatron makes none of Adam's
                self.optimizer.portable = False
                _init_state(self.optimizer)

        @property
        def _is_ademamix(self) -> bool:
            return isinstance(self.optimizer, FusedAdamInterface)

        @property
        def _names(self) -> dict[str, str]:
            """The moments in the checkpoint at hand, and what they are called there."""
            kind = load_from if self._is_loading else save_for
            names = MOMENT_NAMES if kind == "apertus" else dict(zip(MOMENTS, MOMENTS, strict=True))
            # At β1 = 0 exp_avg is the gradient.
            left_out = {
                "exp_avg": all(group["betas"][0] == 0 for group in self.optimizer.param_groups),
                "exp_avg_slow": kind == "adamw",
            }
            return {ours: theirs for ours, theirs in names.items() if not left_out.get(ours)}

        @property
        def optimizer_state_keys(self) -> tuple[str, ...]:
            if self._is_ademamix:
                return tuple(self._names.values())
            return getattr(super(), "optimizer_state_keys", ("exp_avg", "exp_avg_sq"))

        @contextmanager
        def _loading(self, is_loading: bool = True) -> Iterator[None]:
            before, self._is_loading = self._is_loading, is_loading
            try:
                yield
            finally:
                self._is_loading = before

        def _main_param(self, model_param: Tensor) -> Tensor:
            group, i = self.model_param_group_index_map[model_param]
            return self.optimizer.param_groups[group]["params"][i]  # type: ignore[no-any-return]

        def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> Any:
            if not self._is_ademamix:
                return super()._get_main_param_and_optimizer_states(model_param)
            p = self._main_param(model_param)
            moments = self.optimizer.moments(p)
            return {"param": p, **{theirs: moments[ours] for ours, theirs in self._names.items()}}

        @torch.no_grad()
        def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: Any) -> None:
            if not self._is_ademamix:
                super()._set_main_param_and_optimizer_states(model_param, tensors)
                return
            p = self._main_param(model_param)
            p.copy_(tensors["param"])
            self.optimizer.set_moments(p, {ours: tensors[theirs] for ours, theirs in self._names.items()})

        def state_dict(self) -> Any:
            state_dict = super().state_dict()
            if self._is_ademamix and save_for == "apertus" and not self._is_loading:
                groups = state_dict["optimizer"]["param_groups"]
                state_dict["optimizer"]["param_groups"] = [group_to_apertus(group, "the group") for group in groups]
            return state_dict

        def load_state_dict(self, state_dict: Any) -> None:
            with self._loading():
                super().load_state_dict(state_dict)

        def load_parameter_state(self, *args: Any, **kwargs: Any) -> None:
            with self._loading():
                super().load_parameter_state(*args, **kwargs)

        def load_parameter_state_from_dp_zero(self, *args: Any, **kwargs: Any) -> None:
            with self._loading():
                super().load_parameter_state_from_dp_zero(*args, **kwargs)

        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(base.sharded_state_dict).bind(self, *args, **kwargs)
            with self._loading(bool(bound.arguments.get("is_loading"))):
                return super().sharded_state_dict(*args, **kwargs)

    return DistributedOptimizer

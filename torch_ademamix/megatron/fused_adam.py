"""AdEMAMix as Megatron-Core expects an optimizer: with the interface of Transformer Engine's FusedAdam.

Its state dicts have float32 moments of the parameters' shapes and the step as an int per group, however state is
stored: Megatron gives each tensor of state a place in a distributed checkpoint by its parameter's shape, and saves one
step for all parameters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_ademamix.checkpoint.apertus import group_from_apertus
from torch_ademamix.numerics.moments import MOMENTS, Formats, formats_of
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.state.arenas import MASTER_REMAINDER, NAMES
from torch_ademamix.state.saved import convert_saved

StateDict = dict[str, Any]

STEP = "step"  # the entry of a group


class FusedAdamInterface(AdEMAMix):
    """What the classes of :func:`make_class`, which Megatron gets, have besides AdEMAMix's own."""

    # Whether state dicts have float32 moments. DistributedOptimizer takes only the groups of a state dict, and asks
    # for the moments of one parameter after another, so that they aren't all in memory at once.
    portable = True

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter, float32 and of its shape; unquantized ones are the optimizer's own tensors."""
        return self._stored(p, self.state[p], dict.fromkeys(formats_of(self.state[p])))

    @torch.no_grad()
    def set_moments(self, p: Tensor, values: Mapping[str, Tensor]) -> None:
        """Writes moments to a parameter's state; those that aren't given become zero."""
        state, formats = self.state[p], formats_of(self.state[p])
        given = {name: values[name].float() if name in values else torch.zeros_like(p) for name in formats}
        given = {name: value.to(p.device).reshape(p.shape) for name, value in given.items()}
        for name, value in self._stored(p, {**given, "step": state["step"]}, formats).items():
            state[name].copy_(value)

    def _stored(self, p: Tensor, state: Mapping[str, Tensor], formats: Formats) -> dict[str, Tensor]:
        """The moments of a state in other formats, with the scales of quantized ones."""
        own = {name: value for name, value in state.items() if name in NAMES and name != MASTER_REMAINDER}
        converted = convert_saved(p, own, formats, {"master_weights": None}, "the state")
        return {name: value for name, value in converted.items() if name != "step"}

    def common_step(self) -> int:
        """The step of all parameters.

        Raises:
            ValueError: they have done different numbers of steps, which Megatron's checkpoints can't express.
        """
        tensors = [state["step"] for state in self.state.values() if "step" in state]
        steps = sorted({int(step) for step in torch.stack(tensors).tolist()}) if tensors else [self._steps]
        if len(steps) > 1:
            raise ValueError(
                f"parameters have done {', '.join(map(str, steps))} steps, but Megatron's checkpoints have one step "
                "for all parameters: give every parameter a gradient at each step, zeros if need be"
            )
        return steps[0]

    _steps = 0  # of an optimizer without parameters, as a rank may have one

    def _update(self) -> None:
        super()._update()
        self._steps += 1

    def state_dict(self) -> StateDict:
        state_dict = super().state_dict()
        step = self.common_step()
        groups = [{**group, STEP: step} for group in state_dict["param_groups"]]
        if not self.portable:
            return {**state_dict, "param_groups": groups}
        params = {
            i: p
            for saved, own in zip(groups, self.param_groups, strict=True)
            for i, p in zip(saved["params"], own["params"], strict=True)
        }
        state = {i: self.moments(params[i]) for i in state_dict["state"]}
        return {**state_dict, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Also loads what FusedAdam's and the Apertus fork's ``state_dict()`` return."""
        if len(state_dict["param_groups"]) != len(self.param_groups):
            return super().load_state_dict(state_dict)  # which raises
        groups, state = [], dict(state_dict["state"])
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved = dict(saved)
            step = saved.pop(STEP, None)
            if len(saved["betas"]) == 2:
                saved = _group_from_adam(saved, own, step)
            elif "alpha_warmup" in saved:
                saved = group_from_apertus(saved, "the checkpoint's group")
            groups.append(saved)
            for i in saved["params"] if step is not None else ():
                if i in state:
                    state[i] = {**_completed(state[i]), STEP: torch.tensor(float(step))}
            self._steps = self._steps if step is None else int(step)
        return super().load_state_dict({**state_dict, "state": state, "param_groups": groups})

    def _init_group(self, group: Mapping[str, Any], skip_non_grad_params: bool = True) -> None:
        """As the classes of Emerging-Optimizers make the state of a group; here it is that of all groups."""
        self.init_state(include_frozen=not skip_non_grad_params)

    def initialize_state(self, p: Tensor, store_param_remainders: bool = False) -> None:
        """As FusedAdam's: makes state, of all parameters."""
        if store_param_remainders:
            raise NotImplementedError(PRECISION_AWARE)
        self.init_state(include_frozen=True)

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """As FusedAdam's: a moment as float32 values, however it is stored."""
        if name not in MOMENTS:
            raise NotImplementedError(PRECISION_AWARE)
        return self.moments(p)[name]

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        """As FusedAdam's: stores float32 values of a moment in the optimizer's format."""
        if name not in MOMENTS:
            raise NotImplementedError(PRECISION_AWARE)
        self.set_moments(p, {**self.moments(p), name: value})


PRECISION_AWARE = (
    "AdEMAMix doesn't keep Megatron's float32 weights (master_param) and reads no decoupled_grad: leave "
    "use_precision_aware_optimizer off; AdEMAMix8bit stores state in 8 bits without it"
)


def _completed(saved: Mapping[str, Any]) -> StateDict:
    """A parameter's state under our names, with zeros for the exp_avg_slow that FusedAdam doesn't have."""
    state = dict(saved)
    if "exp_avg_fast" in state:
        state["exp_avg"] = state.pop("exp_avg_fast")
    if "exp_avg_sq" in state and "exp_avg_slow" not in state:
        state["exp_avg_slow"] = torch.zeros_like(state["exp_avg_sq"])
    return state


def _group_from_adam(saved: Mapping[str, Any], own: Mapping[str, Any], step: Any) -> StateDict:
    """A group of FusedAdam's or AdamW's: both warm-ups begin after its steps, as with `from_adamw`."""
    known = {name: value for name, value in saved.items() if name in own}
    return {**own, **known, "betas": (*saved["betas"], own["betas"][2]), "schedule_start": int(step or 0)}


def make_class(cls: type[AdEMAMix], beta3: float, options: Mapping[str, Any]) -> type[FusedAdamInterface]:
    """A class that Megatron constructs as FusedAdam, which is an AdEMAMix of these options."""

    class MegatronAdEMAMix(FusedAdamInterface, cls):  # type: ignore[valid-type, misc]
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            weight_decay: float = 0.0,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            adam_w_mode: bool = True,
            **unsupported: Any,
        ) -> None:
            if not adam_w_mode:
                raise ValueError("decoupled_weight_decay is False, but must be True: AdEMAMix has no L2 penalty")
            unsupported.pop("bias_correction", None)
            if unsupported.pop("capturable", False):
                raise NotImplementedError(CUDA_GRAPH)
            if unsupported:
                raise NotImplementedError(f"Megatron asks for {', '.join(unsupported)}: {PRECISION_AWARE}")
            cls.__init__(self, params, lr=lr, betas=(*betas, beta3), eps=eps, weight_decay=weight_decay, **options)

    MegatronAdEMAMix.__name__ = MegatronAdEMAMix.__qualname__ = cls.__name__
    return MegatronAdEMAMix


CUDA_GRAPH = (
    "AdEMAMix hasn't been run in Megatron's CUDA graph of the optimizer: leave optimizer_cuda_graph off; "
    "torch_ademamix.capture_train_step captures a training step without Megatron"
)

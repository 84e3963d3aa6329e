"""The custom ops: their schemas, the libraries that serve them, fakes and the in-place rule.

By dispatch key, an op has: native kernels (CPU, and CUDA where there is a GPU); the reference for any other
device, and for every device of a build without native parts; a fake, for tracing; and, above them all, the
in-place rule.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_ademamix import reference
from torch_ademamix.check import Checker

_OPTIONS = (
    "float beta1, float beta2, float beta3, float alpha, float? t_alpha, float? t_beta3, float eps, "
    "float weight_decay, bool maximize, Tensor? grad_scale=None, Tensor? found_inf=None"
)
_STEP_LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_slows, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps"
)

_library = torch.library.Library("torch_ademamix", "DEF")


def _load_native() -> ModuleType | None:
    """Loads the kernels for this processor's instruction set, as torch itself chooses it."""
    try:
        native = import_module("torch_ademamix._native")
    except ImportError:
        warnings.warn(
            "torch_ademamix was built without its native kernels and runs on the reference ones, which are "
            "several times slower; reinstall it where a C++ compiler is at hand "
            "(`python -m torch_ademamix` shows the build)",
            stacklevel=2,
        )
        return None
    torch.ops.load_library(Path(__file__).parent / f"_cpu_{cpu_capability(native)}.so")
    return native


def cpu_capability(native: ModuleType) -> str:
    """The instruction set of the CPU kernels in use: "avx512", "avx2" or "default"."""
    wanted = torch.backends.cpu.get_cpu_capability().lower().split("_")[0]
    return wanted if wanted in native.cpu_capabilities.split() else "default"


def _define(
    schema: str, fake: Callable[..., None], kernel: Callable[..., None], mutated: Sequence[int]
) -> Callable[..., None]:
    """Registers an in-place op; `mutated` are the positions of the lists that it changes.

    Returns the op as eager code calls it: its in-place rule, without the way through the dispatcher's
    Python fallback, which would cost more than the rule itself.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(")[0]
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.torch_ademamix, packet), overload or "default")

    # A raw op leaves the version counters of what it changes as they were, and a backward after it would
    # silently use the new values where torch's own optimizers make it raise.
    def in_place_rule(keyset: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op(*args, **kwargs)
        for i in mutated:
            torch.autograd.graph.increment_version(args[i])

    torch.library.register_fake(op, fake, lib=_library)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, in_place_rule, "ADInplaceOrView", with_keyset=True)

    def call(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            op(*args, **kwargs)
        else:
            in_place_rule(None, *args, **kwargs)

    return call


def check_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_slows: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor | float,
    *,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    t_alpha: float | None,
    t_beta3: float | None,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    check = Checker("ademamix_step_", params)
    check.grads(grads)
    check.state("exp_avgs", exp_avgs)
    check.state("exp_avg_slows", exp_avg_slows)
    check.state("exp_avg_sqs", exp_avg_sqs)
    check.steps(steps)
    check.scalars(lr, grad_scale, found_inf)
    check.hyperparameters(
        beta1=beta1, beta2=beta2, beta3=beta3, t_alpha=t_alpha, t_beta3=t_beta3, eps=eps
    )


def _reference_step(*args: Any, **kwargs: Any) -> None:
    check_step(*args, **kwargs)
    reference.ademamix_step_(*args, **{"grad_scale": None, "found_inf": None, **kwargs})


_step_float_lr, _step_tensor_lr = (
    _define(
        f"ademamix_step_{overload}({_STEP_LISTS}, {lr} lr, *, {_OPTIONS}) -> ()",
        fake=check_step,
        kernel=_reference_step,
        mutated=(0, 2, 3, 4, 5),
    )
    for overload, lr in (("", "float"), (".tensor_lr", "Tensor"))
)
native = _load_native()


def ademamix_step_(*args: Any, **kwargs: Any) -> None:
    """The 32-bit step on lists of one dtype and device; see :func:`torch_ademamix.functional.ademamix`.

    Dispatches to `torch.ops.torch_ademamix.ademamix_step_`, by the type of `lr` (the seventh argument).
    """
    (_step_tensor_lr if isinstance(args[6], Tensor) else _step_float_lr)(*args, **kwargs)

"""The optimizer's variants, by bitsandbytes' names, which fix how state is stored."""

import inspect
from collections.abc import Callable
from typing import Any

from torch_ademamix.optimizer import AdEMAMix


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

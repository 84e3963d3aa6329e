"""State in a few flat tensors ("arenas"), of which the tensors in `optimizer.state` are views.

A step's cost outside its kernels goes by the number of tensors that it touches: with arenas that is two per parameter,
itself and its gradient, and a handful besides. An arena has one flat tensor per kind of state, for parameters that
have one device and one set of formats, and one for their steps. Nothing keeps it but the state that lies there: once
other tensors have taken the place of all of it, as when state is moved to the CPU, its memory is free.

`optimizer.state` and its entries are dicts that hear when something in them is replaced. A parameter of which a tensor
has been replaced leaves its arena, and is updated in the tensors that are there.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix import ops, sharding
from torch_ademamix.blockwise import BLOCK_SIZE, block_count
from torch_ademamix.places import absmax_part, code_part, state_part

SCALES = "_absmax"  # ends the names of scales, of which there is one per block

MOMENTS = ("exp_avg", "exp_avg_slow", "exp_avg_sq")

# The entries of a parameter's quantized state, in the order of ademamix_blockwise_step_'s lists.
QUANTIZED_STATE = (*(entry for name in MOMENTS for entry in (name, f"{name}{SCALES}")), "step")

# The entry of a bfloat16 parameter with master weights (torch_ademamix/bfloat16.py).
MASTER_REMAINDER = "master_remainder"

NAMES = (*QUANTIZED_STATE, MASTER_REMAINDER)  # all that the optimizer keeps


class Storage(NamedTuple):
    """How the state of a parameter is stored: what parameters have in common that share an arena."""

    group: int  # the group's number
    device: torch.device
    paged: bool
    entries: tuple[tuple[str, torch.dtype], ...]  # names and dtypes, but for the step


class Arena(NamedTuple):
    """The flat tensors of parameters of one kind of storage, by the names in state."""

    storage: Storage
    flats: dict[str, Tensor]


class Part(NamedTuple):
    """One parameter's part of an arena."""

    arena: Arena
    first: int  # the part's first element, a multiple of BLOCK_SIZE
    number: int  # of its step
    views: dict[str, Tensor]  # by the names in state; of a DTensor parameter what this process has

    def is_of(self, p: Tensor) -> bool:
        """Whether it still is as `allocate` makes it for a parameter: in that shape and order, and in the arena."""
        flats = self.arena.flats
        for name, view in self.views.items():
            expected = flats[name][self.number] if name == "step" else _view(name, flats, p, self.first)
            if (view.shape, view.stride()) != (expected.shape, expected.stride()):
                return False
            if view.numel() > 0 and not isinstance(view, FakeTensor) and view.data_ptr() != expected.data_ptr():
                return False
        return True


def allocate(params: Sequence[Tensor], storage: Storage) -> list[Part]:
    """Zeros for parameters of one kind of storage, in an arena of their own."""
    local = [sharding.local(p.detach()) for p in params]
    firsts, end = [], 0
    for p in local:
        firsts.append(end)
        end += block_count(p.numel()) * BLOCK_SIZE
    flats = {"step": torch.zeros(len(params), dtype=torch.float32, device=storage.device)}
    for name, dtype in storage.entries:  # code 0 means 0 in every format
        flats[name] = _zeros(end // BLOCK_SIZE if name.endswith(SCALES) else end, dtype, storage)
    for flat in flats.values():
        torch._dynamo.mark_static_address(flat)  # so that CUDA graphs of compiled steps may write to it
    arena, parts = Arena(storage, flats), []
    for number, (p, part, first) in enumerate(zip(params, local, firsts, strict=True)):
        views = {name: _view(name, flats, part, first) for name, _ in storage.entries}
        if sharding.is_dtensor(p):
            views = {name: _apart(view) for name, view in views.items()}
        parts.append(Part(arena, first, number, {"step": flats["step"][number], **views}))
    return parts


def _view(name: str, flats: Mapping[str, Tensor], p: Tensor, first: int) -> Tensor:
    if name.endswith(SCALES):
        return absmax_part(flats[name], p, first).view(sharding.scales_shape(p) or ())
    return (code_part if name + SCALES in flats else state_part)(flats[name], p, first)


def _apart(view: Tensor) -> Tensor:
    """The same memory as a storage of its own, which keeps the whole.

    A DTensor takes over its part's offset in a storage, and is then taken for one that has memory itself by
    `torch.save` and deepcopy.
    """
    begin = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[begin : begin + view.nbytes]
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(storage, 0, view.shape, view.stride())


def _zeros(numel: int, dtype: torch.dtype, storage: Storage) -> Tensor:
    if storage.paged:
        return ops.paged_empty(torch.empty(0, device=storage.device), numel, dtype).zero_()
    return torch.zeros(numel, dtype=dtype, device=storage.device)


class Layout:
    """What an optimizer's step knows of where its state lies, until it hears that this has changed."""

    def __init__(self) -> None:
        self.plan: Any = None  # a torch_ademamix.plan.Plan

    def forget(self) -> None:
        self.plan = None


class ParamState(dict[str, Any]):
    """An entry of `optimizer.state`: the state of one parameter, and whatever else others keep there."""

    def __init__(self, layout: Layout, entries: Mapping[str, Any] = {}) -> None:
        super().__init__(entries)
        self.layout = layout
        self.part: Part | None = None
        self._known = self._own()

    def place(self, part: Part, entries: Mapping[str, Tensor]) -> None:
        """Takes a part of an arena for state, and `entries` of it: the views, or DTensors of them."""
        super().update(entries)
        self.part, self._known = part, self._own()
        self.layout.forget()

    def leave(self) -> None:
        """Gives the part of the arena up, whose place other memory has taken behind the same tensors."""
        super().update({name: value.data for name, value in self._known.items()})  # tensors that are no views
        self.part, self._known = None, self._own()

    def _own(self) -> dict[str, Any]:
        return {name: self[name] for name in NAMES if name in self}

    def _hear(self) -> None:
        if any(self.get(name) is not self._known.get(name) for name in NAMES):
            self.part, self._known = None, self._own()
            self.layout.forget()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are plain
        return dict, (dict(self),)


def _heard(cls: type[dict[Any, Any]], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self._hear()
        return result

    call.__name__ = name
    return call


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(ParamState, _name, _heard(dict, _name))


class OptimizerState(defaultdict[Any, Any]):
    """`optimizer.state`: by parameter its :class:`ParamState`. Keys that aren't tensors are others'."""

    def __init__(self, layout: Layout, entries: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.layout = layout
        self.update(entries)

    def __missing__(self, key: Any) -> Any:
        self[key] = {}
        return self[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, Tensor) and isinstance(value, Mapping):
            if not isinstance(value, ParamState):
                value = ParamState(self.layout, value)
            value.layout = self.layout
        super().__setitem__(key, value)
        self._hear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "OptimizerState":  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def _hear(self) -> None:
        self.layout.forget()

    def plain(self) -> defaultdict[Any, Any]:
        """The same in dicts that hear nothing, as torch's functions and pickles expect them."""
        values = ((key, dict(value) if isinstance(value, ParamState) else value) for key, value in self.items())
        return defaultdict(dict, values)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, self.plain())


for _name in ("__delitem__", "clear", "pop", "popitem"):
    setattr(OptimizerState, _name, _heard(defaultdict, _name))

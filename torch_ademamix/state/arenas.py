"""State in a few flat tensors ("arenas"), of which the tensors in `optimizer.state` are views.

A step's cost outside its kernels goes by the number of tensors that it touches: with arenas that is two per parameter,
itself and its gradient, and a handful besides. An arena has one flat tensor per kind of state, for parameters that
have one device and one set of formats, and one for their steps. Nothing keeps it but the state that lies there: once
other tensors have taken the place of all of it, as when state is moved to the CPU, its memory is free. After
`separate_state()` each parameter has an arena of its own, so no two state tensors share a storage.

`optimizer.state` and its entries are dicts that notice when a tensor in them is replaced. Such a parameter leaves its
arena, and is updated in the tensors that are there. Comparing all tensors at each step would not do for compiled steps,
which run no Python of ours: they are guarded by the plan, which a replacement clears.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix import ops
from torch_ademamix.numerics.blockwise import BLOCK_SIZE, block_count
from torch_ademamix.numerics.moments import MOMENTS, SCALES, WORDS
from torch_ademamix.numerics.pairs import as_real
from torch_ademamix.ops.offsets import absmax_view, code_view, state_view
from torch_ademamix.state import sharding

# The entry of a bfloat16 parameter with master weights (torch_ademamix/numerics/bfloat16.py).
MASTER_REMAINDER = "master_remainder"

# All that the optimizer keeps; what of it a parameter has, moments.py tells.
NAMES = ("step", *MOMENTS, *WORDS.values(), *(f"{name}{SCALES}" for name in MOMENTS), MASTER_REMAINDER)


class StorageSpec(NamedTuple):
    """How the state of a parameter is stored: what parameters have in common that share an arena."""

    device: torch.device
    paged: bool
    entries: tuple[tuple[str, torch.dtype], ...]  # names and dtypes, but for the step


class Arena:
    """The flat tensors of parameters of one kind of storage, by the names in state."""

    def __init__(self, storage: StorageSpec, flats: dict[str, Tensor]) -> None:
        self.storage, self.flats = storage, flats
        self._own: dict[str, list[ref[Tensor]]] = {name: [] for name in flats}
        for flat in flats.values():
            torch._dynamo.mark_static_address(flat)  # so that CUDA graphs of compiled steps may write to it

    def add(self, state: Mapping[str, Tensor]) -> None:
        """Counts the tensors of a parameter's state as the optimizer's own."""
        for name in self.flats:
            self._own[name].append(ref(sharding.local(state[name])))

    def is_held(self, loaded: Container[int]) -> bool:
        """Whether its memory has other users than state, such as a state dict that somebody has kept.

        Args:
            loaded: identities of tensors that are about to be loaded, which mustn't be overwritten before.
        """
        for name, flat in self.flats.items():
            own = [t for t in (reference() for reference in self._own[name]) if t is not None and id(t) not in loaded]
            tensors = {id(t): t for t in (flat, *own, *(t._base for t in own)) if t is not None}.values()
            users = Counter(t.untyped_storage()._cdata for t in tensors)
            # Local tensors of DTensors have storages of their own, each of which uses the whole.
            users[flat.untyped_storage()._cdata] += len(users) - 1
            if any(_use_count(t) > users[t.untyped_storage()._cdata] for t in tensors):
                return True
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return Arena, (self.storage, self.flats)


def _use_count(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()  # one more user
    return torch._C._storage_Use_Count(storage._cdata) - 1


class Slice(NamedTuple):
    """One parameter's slice of an arena."""

    arena: Arena
    first: int  # the slice's first element, a multiple of BLOCK_SIZE
    step: int  # the index of its step

    def views(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter (of a DTensor, its local tensor) that is stored there, by the names in state."""
        flats, real = self.arena.flats, as_real(p)
        scales_shape = sharding.scales_shape(real) or ()
        moments = {}
        for name, _ in self.arena.storage.entries:
            if name.endswith(SCALES):
                moments[name] = absmax_view(flats[name], real, self.first).view(scales_shape)
            else:
                is_code = name + SCALES in flats or name in WORDS.values()
                moments[name] = (code_view if is_code else state_view)(flats[name], real, self.first)
        if p.is_complex():
            moments = {name: torch.view_as_complex(view) for name, view in moments.items()}
        return {"step": flats["step"][self.step], **moments}

    def is_of(self, p: Tensor, state: Mapping[str, Tensor]) -> bool:
        """Whether state still is as `allocate` makes it for a parameter: of that shape and order, and in the arena."""
        own = sharding.local_entries(state)
        for name, expected in self.views(sharding.local(p.detach())).items():
            tensor = own[name]
            if (tensor.shape, tensor.stride()) != (expected.shape, expected.stride()):
                return False
            if tensor.numel() > 0 and not isinstance(tensor, FakeTensor) and tensor.data_ptr() != expected.data_ptr():
                return False
        return True


def allocate(params: Sequence[Tensor], storage: StorageSpec) -> list[tuple[Slice, dict[str, Tensor]]]:
    """Zeros for parameters of one kind of storage, in an arena of their own: for each its slice, and state there."""
    local = [sharding.local(p.detach()) for p in params]
    numels = [as_real(p).numel() for p in local]
    firsts, end = [], 0
    for numel in numels:
        firsts.append(end)
        end += block_count(numel) * BLOCK_SIZE
    if len(params) == 1:  # no more than what its state needs, which then has its storages for itself
        end = numels[0]
    flats = {"step": torch.zeros(len(params), dtype=torch.float32, device=storage.device)}
    for name, dtype in storage.entries:  # code 0 means 0 in every format
        # Real also where state is complex: the ops take it so.
        flats[name] = _zeros(block_count(end) if name.endswith(SCALES) else end, dtype.to_real(), storage)
    arena, result = Arena(storage, flats), []
    for step, (p, local_p, first) in enumerate(zip(params, local, firsts, strict=True)):
        slice = Slice(arena, first, step)
        views = slice.views(local_p)
        if sharding.is_dtensor(p) and len(params) > 1:
            views = {name: view if name == "step" else _apart(view) for name, view in views.items()}
        result.append((slice, sharding.sharded(views, p)))
    return result


def _apart(view: Tensor) -> Tensor:
    """A view with its own storage object (offset 0) that keeps the arena's memory alive.

    A DTensor takes over the storage offset of its local tensor. With another offset than 0, `torch.save` and deepcopy
    would take it for a tensor with memory of its own.
    """
    begin = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[begin : begin + view.nbytes]
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(storage, 0, view.shape, view.stride())


def _zeros(numel: int, dtype: torch.dtype, storage: StorageSpec) -> Tensor:
    if storage.paged:
        return ops.paged_empty(torch.empty(0, device=storage.device), numel, dtype).zero_()
    return torch.zeros(numel, dtype=dtype, device=storage.device)


def lost_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage was resized, and is too small for the tensor now."""
    if tensor.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def check_memory(state: Mapping[str, Any], param: str) -> None:
    """Checks that no storage of state was resized; `param` is its parameter's name.

    Raises:
        RuntimeError: a storage is smaller than its tensor.
    """
    for name, tensor in sharding.local_entries(state).items():
        if name in NAMES and isinstance(tensor, Tensor) and lost_memory(tensor):
            raise RuntimeError(
                f"the storage of {name} of {param} has been resized and no longer has room for it; resize it back and "
                "restore its values first. State tensors share storages; to free and restore them one by one, call "
                "optimizer.separate_state() before"
            )


class PlanCache:
    """The plan of an optimizer's steps, until its state or groups are replaced."""

    def __init__(self) -> None:
        self.plan: Any = None  # a torch_ademamix.state.plan.Plan
        self.separate = False  # each parameter gets an arena of its own

    def clear(self) -> None:
        self.plan = None


class ParamState(dict[str, Any]):
    """An entry of `optimizer.state`: the state of one parameter, and whatever else others keep there."""

    def __init__(self, plan_cache: PlanCache, entries: Mapping[str, Any] = {}) -> None:
        super().__init__(entries)
        self.plan_cache = plan_cache
        self.slice: Slice | None = None
        self._known = self._own()

    def assign(self, slice: Slice, entries: Mapping[str, Tensor]) -> None:
        """Takes a slice of an arena for state, and `entries` of it: the views, or DTensors of them."""
        for name in self._own().keys() - entries.keys():  # state was stored otherwise
            super().pop(name)
        super().update(entries)
        self.slice, self._known = slice, self._own()
        slice.arena.add(entries)
        self.plan_cache.clear()

    def leave(self) -> None:
        """Gives the slice up, after its tensors have got other memory."""
        for name, value in self._known.items():
            if not sharding.is_dtensor(value):
                super().__setitem__(name, value.data)  # which is no view, so that the arena may be freed
        self.slice, self._known = None, self._own()

    def handed_out(self) -> dict[str, Any]:
        """The same with other tensors on the same memory, by which to tell later whether somebody has kept them."""
        own = {name: value.detach() for name, value in self._known.items() if isinstance(value, Tensor)}
        return {**self, **own}

    def _own(self) -> dict[str, Any]:
        return {name: self[name] for name in NAMES if name in self}

    def _notice(self) -> None:
        if any(self.get(name) is not self._known.get(name) for name in NAMES):
            self.slice, self._known = None, self._own()
            self.plan_cache.clear()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles are plain
        return dict, (dict(self),)


def _noticing(cls: type[dict[Any, Any]], name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self._notice()
        return result

    call.__name__ = name
    return call


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(ParamState, _name, _noticing(dict, _name))


class OptimizerState(defaultdict[Any, Any]):
    """`optimizer.state`: by parameter its :class:`ParamState`. Keys that aren't tensors are others'."""

    def __init__(self, plan_cache: PlanCache, entries: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.plan_cache = plan_cache
        self.update(entries)

    def __missing__(self, key: Any) -> Any:
        self[key] = {}
        return self[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, Tensor) and isinstance(value, Mapping):
            if not isinstance(value, ParamState):
                value = ParamState(self.plan_cache, value)
            value.plan_cache = self.plan_cache
        super().__setitem__(key, value)
        self._notice()

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

    def _notice(self) -> None:
        self.plan_cache.clear()

    def plain(self) -> defaultdict[Any, Any]:
        """The same in ordinary dicts, as torch's functions and pickles expect them."""
        values = ((key, dict(value) if isinstance(value, ParamState) else value) for key, value in self.items())
        return defaultdict(dict, values)

    def slices(self) -> "SentSlices":
        return SentSlices([value.slice if isinstance(value, ParamState) else None for value in self.values()])

    def assign(self, slices: Sequence[Slice | None]) -> None:
        """Takes the slices of arenas that another process has shared, in which the tensors that are there lie."""
        for value, slice in zip(list(self.values()), slices, strict=True):
            if slice is not None:
                value.assign(slice, {name: value[name] for name in slice.arena.flats})

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, self.plain())


for _name in ("__delitem__", "clear", "pop", "popitem"):
    setattr(OptimizerState, _name, _noticing(defaultdict, _name))


class SentSlices:
    """The slices of arenas that an optimizer's state has, for another process.

    torch's multiprocessing shares the memory of tensors that it sends, so its pickler keeps these: the other process
    then updates the same arenas. All other pickles and copies have None in their place.
    """

    def __init__(self, slices: list[Slice | None]) -> None:
        self.slices = slices

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


ForkingPickler.register(SentSlices, lambda sent: (list, (sent.slices,)))

"""Which op calls a step makes: parameters in batches that one call can update, found once and kept while they hold."""

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from torch_ademamix import sharding
from torch_ademamix.arenas import (
    MASTER_REMAINDER,
    MOMENTS,
    QUANTIZED_STATE,
    ParamState,
    Part,
)

STATE = (*MOMENTS, "step")

Lists = tuple[Sequence[Any], ...]  # of an op call


class Batch:
    """Parameters of one group, with state of one kind and, in arenas or each by itself, one kind of memory."""

    def __init__(self, group: int, quantized: bool, sharded: bool) -> None:
        self.group = group  # its number
        self.quantized = quantized
        self.sharded = sharded  # the parameters are DTensors
        self.params: list[Tensor] = []
        self.streams: list[int] = []
        # The op's arguments. State that is replaced is heard of, so nothing here has to keep it.
        self.state: list[list[ref[Tensor]]] = [[] for _ in self.names]
        self.remainders: list[ref[Tensor]] = []
        self.places: list[int] = []
        self._arenas: dict[int, int] = {}  # by identity, their numbers in the lists

    @property
    def names(self) -> tuple[str, ...]:
        return QUANTIZED_STATE if self.quantized else STATE

    def add(self, p: Tensor, stream: int, state: Mapping[str, Tensor], part: Part | None) -> None:
        self.params.append(p)
        self.streams.append(stream)
        if part is None:
            self._append({name: ref(value) for name, value in state.items()})
        else:
            arena = part.arena
            if id(arena) not in self._arenas:
                self._arenas[id(arena)] = len(self._arenas)
                self._append(arena.flats)
            self.places += (self._arenas[id(arena)], part.first, part.number)

    def _append(self, tensors: "Mapping[str, ref[Tensor]]") -> None:
        for target, name in zip(self.state, self.names, strict=True):
            target.append(tensors[name])
        if MASTER_REMAINDER in tensors:
            self.remainders.append(tensors[MASTER_REMAINDER])

    def addresses(self) -> list[Any]:
        """Where the state lies, for a graph that has this for good."""
        tensors = [tensor() for refs in (*self.state, self.remainders) for tensor in refs]
        return [*((t.dtype, t.data_ptr()) for t in tensors if t is not None), *self.places]

    def calls(self, chosen: Sequence[int], grads: Sequence[Tensor], random: bool) -> list[tuple[Lists, dict[str, Any]]]:
        """The lists of an op call for each dtype of the gradients, and the arguments that go with these lists.

        Args:
            chosen: which of the parameters have a gradient.
            grads: these gradients.
            random: whether the op draws random bits.
        """
        dtypes = list(dict.fromkeys(grad.dtype for grad in grads))
        if len(dtypes) > 1:
            return [
                call
                for dtype in dtypes
                for call in self.calls(
                    [i for i, grad in zip(chosen, grads, strict=True) if grad.dtype == dtype],
                    [grad for grad in grads if grad.dtype == dtype],
                    random,
                )
            ]
        if not chosen:
            return []
        whole = len(chosen) == len(self.params)
        params = self.params if whole else [self.params[i] for i in chosen]
        if self.sharded:
            grads = [sharding.local_grad(p, grad) for p, grad in zip(params, grads, strict=True)]
            params = [sharding.local_param(p) for p in params]
        state, remainders = self.state, self.remainders
        if not (whole or self.places):
            state = [[refs[i] for i in chosen] for refs in state]
            remainders = [remainders[i] for i in chosen] if remainders else []
        lists = (params, grads, *([tensor() for tensor in refs] for refs in state))
        places = self.places if whole else [k for i in chosen for k in self.places[3 * i : 3 * i + 3]]
        more = {
            "remainders": [tensor() for tensor in remainders],
            "streams": [] if not random else self.streams if whole else [self.streams[i] for i in chosen],
            "places": places,
        }
        return [(lists, more)]


class Plan:
    """The batches of a whole optimizer, and by what to tell that they still hold."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Any]) -> None:
        # The optimizer's own dicts. (Dynamo guards a traced step by every option where that reads `param_groups`.)
        self.groups = list(groups)
        self.params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self.stateless: list[Tensor] = []
        batches: dict[Any, Batch] = {}
        views: list[Tensor] = []
        stream = 0
        for number, params in enumerate(self.params):
            for p in params:
                state = states.get(p)
                if has_state(state):
                    part = _part(p, state)
                    if part is not None:
                        views += part.views.values()
                    _add(batches, number, p, stream, state, part)
                else:
                    self.stateless.append(p)
                stream += 1
        self.batches = list(batches.values())
        self.places = {id(p): (batch, i) for batch in self.batches for i, p in enumerate(batch.params)}
        self._views, self._pointers = views, list(map(Tensor.data_ptr, views))
        planned = [p for batch in self.batches for p in batch.params]
        self._planned, self._dtypes, self._strides = planned, _dtypes(planned), list(map(Tensor.stride, planned))

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups have the same parameters of the same form, and no memory was exchanged behind a tensor.

        That state tensors were replaced by others is heard of elsewhere.
        """
        return (
            _same(groups, self.groups)
            and all(_same(group["params"], params) for group, params in zip(groups, self.params, strict=True))
            and _dtypes(self._planned) == self._dtypes
            and list(map(Tensor.stride, self._planned)) == self._strides
            and list(map(Tensor.data_ptr, self._views)) == self._pointers
        )


def has_state(state: Mapping[str, Any] | None) -> bool:
    """Whether an entry of `optimizer.state` has more than others' entries."""
    return state is not None and "exp_avg" in state


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [t.dtype for t in tensors]


def _part(p: Tensor, state: ParamState) -> Part | None:
    """The part of an arena that a parameter's state still is."""
    part = state.part
    if part is not None and not part.is_of(sharding.local(p.detach())):
        state.leave()
        return None
    return part


def _add(batches: dict[Any, Batch], group: int, p: Tensor, stream: int, state: ParamState, part: Part | None) -> None:
    quantized = "exp_avg_absmax" in state
    local = {name: value if name == "step" else sharding.local(value) for name, value in state.items()}
    names = QUANTIZED_STATE if quantized else STATE
    if lost := [name for name in names if name not in local]:
        raise RuntimeError(f"the state of parameter {stream} of the optimizer has no {', '.join(lost)}")
    own = {name: local[name] for name in (*names, MASTER_REMAINDER) if name in local}
    sharded = sharding.is_dtensor(p)
    if sharded:
        stream += sharding.first_group(p) << 32
    dtypes = tuple((name, value.dtype) for name, value in own.items())
    key = (group, p.dtype, p.device, dtypes, sharded, part is None)
    batch = batches.setdefault(key, Batch(group, quantized, sharded))
    batch.add(p, stream, own, part)

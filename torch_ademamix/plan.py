"""Which op calls a step makes: parameters in batches that one call can update, found once and kept while they hold."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix import ops, sharding, tracing
from torch_ademamix.arenas import MASTER_REMAINDER, NAMES, ParamState, Part, check_memory
from torch_ademamix.check import are_floating
from torch_ademamix.options import Options, check_grads, hyperparameters, param_name
from torch_ademamix.places import PLACE_NUMBERS
from torch_ademamix.state import Formats, entries, formats_of, has_state, op_entries

Lists = tuple[Sequence[Any], ...]  # of an op call
Call = tuple[Callable[..., None], Sequence[Tensor], Lists, Options]  # an op, whose parameters, its lists and options


class Batch:
    """Parameters of one group, with state of one kind and, in arenas or each by itself, one kind of memory."""

    def __init__(self, group: int, formats: Formats, sharded: bool) -> None:
        self.group = group  # its number
        self.quantized = any(formats.values())
        self.has_exp_avg = "exp_avg" in formats
        self.sharded = sharded  # the parameters are DTensors
        self.params: list[Tensor] = []
        self.streams: list[int] = []
        # The op's arguments. State that is replaced is heard of, so nothing here has to keep it.
        self.names = op_entries(formats)
        self.state: list[list[ref[Tensor]]] = [[] for _ in self.names]
        self.remainders: list[ref[Tensor]] = []
        self.places: list[int] = []
        self._arenas: dict[int, int] = {}  # by identity, their numbers in the lists

    def add(self, p: Tensor, stream: int, state: Mapping[str, Tensor], part: Part | None) -> None:
        self.params.append(p)
        self.streams.append(stream)
        if part is None:
            self._append(state)
        else:
            arena = part.arena
            if id(arena) not in self._arenas:
                self._arenas[id(arena)] = len(self._arenas)
                self._append(arena.flats)
            self.places += (self._arenas[id(arena)], part.first, part.number)

    def _append(self, tensors: Mapping[str, Tensor]) -> None:
        for target, name in zip(self.state, self.names, strict=True):
            if name is None:
                continue
            target.append(ref(tensors[name]))
        if MASTER_REMAINDER in tensors:
            self.remainders.append(ref(tensors[MASTER_REMAINDER]))

    def settle(self) -> None:
        """To be called when the last parameter has been added."""
        self._numbers = json.dumps([self.streams, self.places])

    def numbers(self) -> tuple[Sequence[int], Sequence[int]]:
        """The streams and places of all parameters."""
        if torch.compiler.is_compiling():  # Dynamo would guard each number of a list
            streams, places = tracing.decoded(self._numbers)
            return streams, places
        return self.streams, self.places

    def addresses(self) -> list[Any]:
        """Where the state lies, for a graph that has this for good."""
        tensors = [tensor() for refs in (*self.state, self.remainders) for tensor in refs]
        return [*((t.dtype, t.data_ptr()) for t in tensors if t is not None), *self.places]

    def placed(self, chosen: Sequence[int], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the chosen parameters, placed as these."""
        if not self.sharded:
            return grads
        return [sharding.placed_grad(self.params[i], grad) for i, grad in zip(chosen, grads, strict=True)]

    def lists(
        self, chosen: Sequence[int], grads: Sequence[Tensor], random: bool
    ) -> list[tuple[Sequence[Tensor], Lists, Options]]:
        """For each dtype of the gradients parameters, the lists of an op call, and the arguments that go with these.

        Args:
            chosen: which of the parameters have a gradient.
            grads: these gradients, placed as their parameters.
            random: whether the op draws random bits.
        """
        dtypes = list(dict.fromkeys(grad.dtype for grad in grads))
        if len(dtypes) > 1:
            return [
                lists
                for dtype in dtypes
                for lists in self.lists(
                    [i for i, grad in zip(chosen, grads, strict=True) if grad.dtype == dtype],
                    [grad for grad in grads if grad.dtype == dtype],
                    random,
                )
            ]
        if not chosen:
            return []
        whole = len(chosen) == len(self.params)
        params = local = self.params if whole else [self.params[i] for i in chosen]
        if self.sharded:
            grads = [sharding.local_grad(grad) for grad in grads]
            local = [sharding.local_param(p) for p in params]
        state, remainders = self.state, self.remainders
        streams, places = self.numbers()
        if not (whole or places):
            *state, remainders = ([refs[i] for i in chosen] if refs else [] for refs in (*state, remainders))
        lists = (local, grads, *([tensor() for tensor in refs] for refs in state))
        more = {
            "remainders": [tensor() for tensor in remainders],
            "streams": [] if not random else streams if whole else [streams[i] for i in chosen],
            "places": places if whole else [k for i in chosen for k in _place(places, i)],
        }
        return [(params, lists, more)]


def _place(places: Sequence[int], i: int) -> Sequence[int]:
    return places[PLACE_NUMBERS * i : PLACE_NUMBERS * (i + 1)]


Work = tuple[Batch, Sequence[int], Sequence[Tensor]]  # a batch, which of its parameters have gradients, and these


class Plan:
    """The batches of a whole optimizer, by what to tell that they still hold, and the op calls that update them."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Any]) -> None:
        # The optimizer's own dicts. (Dynamo guards a traced step by every option where that reads `param_groups`.)
        self.groups = list(groups)
        self.params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self.stateless: list[Tensor] = []
        batches: dict[Any, Batch] = {}
        views: list[Tensor] = []
        storages: dict[int, Tensor] = {}  # by identity, flat tensors, and state that isn't in arenas
        self._dtensors: list[Any] = []
        stream = 0
        for number, params in enumerate(self.params):
            for i, p in enumerate(params):
                state = states.get(p)
                if has_state(state):
                    name = param_name(groups[number], number, i)
                    _check_state(state, name)
                    check_memory(state, name)
                    part = _part(p, state)
                    own = [state[name] for name in NAMES if name in state]
                    self._dtensors += filter(sharding.is_dtensor, own)
                    local = list(map(sharding.local, own))
                    if part is not None:
                        views += local
                    storages |= {id(t): t for t in (local if part is None else part.arena.flats.values())}
                    _add(batches, number, p, stream, state, part)
                else:
                    self.stateless.append(p)
                stream += 1
        self.batches = list(batches.values())
        for batch in self.batches:
            batch.settle()
        self.lacks_exp_avg = {batch.group for batch in self.batches if not batch.has_exp_avg}  # groups' numbers
        self.places = {id(p): (batch, i) for batch in self.batches for i, p in enumerate(batch.params)}
        self._views = [view for view in views if not isinstance(view, FakeTensor)]  # which have no addresses
        self._pointers = list(map(Tensor.data_ptr, self._views))
        self._locals = sharding.locals_of(self._dtensors)
        self._storages = list(storages.values())
        self._sizes = _sizes(self._storages)
        planned = [p for batch in self.batches for p in batch.params]
        self._planned, self._dtypes, self._strides = planned, _dtypes(planned), list(map(Tensor.stride, planned))

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups have the same parameters of the same form, and no memory was exchanged or resized.

        That state tensors were replaced by others is heard of elsewhere.
        """
        return (
            _same(groups, self.groups)
            and all(_same(group["params"], params) for group, params in zip(groups, self.params, strict=True))
            and _dtypes(self._planned) == self._dtypes
            and list(map(Tensor.stride, self._planned)) == self._strides
            and list(map(Tensor.data_ptr, self._views)) == self._pointers
            and _same(sharding.locals_of(self._dtensors), self._locals)
            and _sizes(self._storages) == self._sizes
        )

    def work(self) -> list[Work]:
        """The parameters that have a gradient."""
        for group, params in zip(self.groups, self.params, strict=True):
            if torch.compiler.is_compiling() and any(p is not q for p, q in zip(group["params"], params, strict=True)):
                raise AssertionError  # never: this is what a traced step is guarded by
        work: list[Work] = []
        for batch in self.batches:
            grads = [p.grad for p in batch.params]
            chosen = [i for i, grad in enumerate(grads) if grad is not None]
            work.append((batch, chosen, [grad for grad in grads if grad is not None]))
        return work

    def check(self, work: Sequence[Work]) -> None:
        """Refuses gradients that no op call can take."""
        for batch, _, grads in work:
            if batch.sharded or not are_floating(grads):
                check_grads(self.groups[batch.group], batch.group)

    def placed(self, work: Sequence[Work]) -> Sequence[Work]:
        """The same with gradients that are placed as their parameters: communicated once, for norm and update."""
        return [(batch, chosen, batch.placed(chosen, grads)) for batch, chosen, grads in work]

    def calls(
        self,
        batch: Batch,
        chosen: Sequence[int],
        grads: Sequence[Tensor],
        tensors: Sequence[Tensor] | None,
        scaler: Mapping[str, Tensor | None],
    ) -> list[Call]:
        """The op calls that update the chosen parameters of a batch.

        Args:
            tensors: what the op reads its hyperparameters from, for each group; None for the groups' numbers.
            scaler: `grad_scale` and `found_inf`.
        """
        group = self.groups[batch.group]
        stochastic = group["param_rounding"] == "stochastic" and batch.params[0].dtype == torch.bfloat16
        options: Options = dict(
            **(hyperparameters(group) if tensors is None else {"hyperparameters": tensors[batch.group]}),
            maximize=group["maximize"],
            stochastic_param_rounding=stochastic,
            seed=int(group["seed"]),
            **scaler,
        )
        op = ops.ademamix_step_
        if batch.quantized:
            op = ops.ademamix_blockwise_step_
            options["stochastic_rounding"] = group["stochastic_rounding"]
        random = batch.quantized or stochastic
        return [(op, params, lists, {**options, **more}) for params, lists, more in batch.lists(chosen, grads, random)]

    def load_kernels(self, grad_dtype: torch.dtype | None = None, device_type: str = "cuda") -> None:
        """On GPUs, for gradients of one dtype (None: the parameters'): what a first call compiles and loads, now.

        Long and short lists have kernels of their own, and a step has a short one where few gradients are present.
        """
        scaler = dict.fromkeys(ops.SCALER)
        for batch in self.batches:
            if batch.params[0].device.type == device_type:
                for count in (len(batch.params), 1):
                    grads = [p.detach().to(grad_dtype or p.dtype) for p in batch.params[:count]]
                    for op, _, lists, options in self.calls(batch, range(count), grads, None, scaler):
                        op(*lists, **options, dry_run=True)

    def run(self, calls: Sequence[Call]) -> None:
        """Makes op calls; refuses before the first of them has written anything."""
        if torch.compiler.is_compiling():  # traced calls are checked when they are traced
            for op, _, lists, options in calls:
                op(*lists, **options)
            return
        try:
            for op, _, lists, options in calls[1:]:  # the first checks itself
                op(*lists, **options, dry_run=True)
            for op, _, lists, options in calls:
                op(*lists, **options)
        except RuntimeError:
            if refusal := self._refusal(calls):
                raise RuntimeError(refusal) from None
            raise

    def _refusal(self, calls: Sequence[Call]) -> str | None:
        """Which parameter the ops refuse, and why: an op's own text counts the tensors of a call."""
        for op, params, lists, options in calls:
            for i, p in enumerate(params):
                try:
                    _try_one(op, i, lists, options)
                except RuntimeError as error:
                    text = re.sub(r"(\w)s\[0\]", r"\1", str(error))  # "grads[0]" of one parameter is its "grad"
                    return None if text == str(error) else f"{self._name(p)}: {text}"
        return None

    def _name(self, p: Tensor) -> str:
        places = ((number, i) for number, params in enumerate(self.params) for i, q in enumerate(params) if q is p)
        number, i = next(places)
        return param_name(self.groups[number], number, i)


def _try_one(op: Callable[..., None], i: int, lists: Lists, options: Mapping[str, Any]) -> None:
    """A dry run of an op call with one of its parameters."""
    params, grads, *state = lists
    one = slice(i, i + 1)
    more = {"streams": options["streams"][one]}
    if options["places"]:
        more["places"] = _place(options["places"], i)
    else:
        state = [tensors[one] for tensors in state]
        more["remainders"] = options["remainders"][one]
    op(params[one], grads[one], *state, **{**options, **more}, dry_run=True)


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [t.dtype for t in tensors]


def _sizes(tensors: Iterable[Tensor]) -> list[int]:
    """Of their storages, in bytes."""
    return list(map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))


def _part(p: Tensor, state: ParamState) -> Part | None:
    """The part of an arena that a parameter's state still is."""
    part = state.part
    if part is not None and not part.is_of(p, state):
        state.leave()
        return None
    return part


def _check_state(state: Mapping[str, Any], param: str) -> None:
    """Refuses state that was put together by hand, before the ops look at what is in it."""
    names = ("step", *entries(formats_of(state)))
    if lost := [name for name in names if name not in state]:
        raise RuntimeError(f"the state of {param} has no {', '.join(lost)}")
    for name in (*names, MASTER_REMAINDER):
        if name in state and not isinstance(state[name], Tensor):
            raise RuntimeError(f"the {name} of {param} is a {type(state[name]).__name__}, but must be a tensor")


def _add(batches: dict[Any, Batch], group: int, p: Tensor, stream: int, state: ParamState, part: Part | None) -> None:
    formats = formats_of(state)
    names = (name for name in ("step", *entries(formats), MASTER_REMAINDER) if name in state)
    own = {name: state[name] if name == "step" else sharding.local(state[name]) for name in names}
    if sharded := sharding.is_dtensor(p):
        stream += sharding.first_group(p) << 32
    dtypes = tuple((name, value.dtype) for name, value in own.items())
    key = (group, p.dtype, p.device, dtypes, sharded, part is None)
    batch = batches.setdefault(key, Batch(group, formats, sharded))
    batch.add(p, stream, own, part)

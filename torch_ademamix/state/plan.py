"""Which op calls a step makes: parameters in batches that one call can update, found once and kept while they hold."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix import ops, tracing
from torch_ademamix.numerics.bfloat16 import draws
from torch_ademamix.numerics.moments import Formats, entries, formats_of, op_entries
from torch_ademamix.numerics.reference_step import HYPERPARAMETERS, Hyperparameters, hyperparameters
from torch_ademamix.ops.check import are_floating, grad_dtypes
from torch_ademamix.ops.offsets import PLACE_NUMBERS
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import has_state
from torch_ademamix.state.arenas import MASTER_REMAINDER, NAMES, ParamState, Part, check_memory
from torch_ademamix.state.options import (
    CONSTANT_OPTIONS,
    GroupOptions,
    Options,
    check_grads,
    constant_options,
    param_name,
)
from torch_ademamix.state.watch import watch

Lists = tuple[Sequence[Any], ...]  # of an op call
Call = tuple[Callable[..., None], Sequence[Tensor], Lists, Options]  # an op, whose parameters, its lists and options


_PARAMS_OF = itemgetter("params")


class Batch:
    """Parameters that one op call can update: of groups that differ in hyperparameters only, with state of one kind.

    State lies in arenas, or of each parameter by itself.
    """

    def __init__(self, constants: tuple[Any, ...], device: str, formats: Formats, sharded: bool) -> None:
        self.constants = constants  # the groups' CONSTANT_OPTIONS
        self.device = device
        self.quantized = any(formats.values())
        self.has_exp_avg = "exp_avg" in formats
        self.sharded = sharded  # the parameters are DTensors
        self.params: list[Tensor] = []
        self.groups: list[int] = []  # each parameter's
        self.streams: list[int] = []
        # The op's arguments. State that is replaced is heard of, so nothing here has to keep it.
        self.names = (*op_entries(formats), MASTER_REMAINDER)
        self.state: list[list[ref[Tensor]]] = [[] for _ in self.names]  # empty where parameters don't have it
        self.places: list[int] = []
        self.hyperparameters: tuple[list[Hyperparameters], Options] | None = None  # of all, for these rows of groups
        self._arenas: dict[int, int] = {}  # by identity, their numbers in the lists

    def add(self, p: Tensor, group: int, stream: int, state: Mapping[str, Tensor], part: Part | None) -> None:
        self.params.append(p)
        self.groups.append(group)
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
            if name is not None and name in tensors:
                target.append(ref(tensors[name]))

    def settle(self) -> None:
        """To be called when the last parameter has been added."""
        self._numbers = json.dumps([self.groups, self.streams, self.places])

    def numbers(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """The groups, streams and places of all parameters."""
        if torch.compiler.is_compiling():  # Dynamo would guard each number of a list
            groups, streams, places = tracing.decoded(self._numbers)
            return groups, streams, places
        return self.groups, self.streams, self.places

    def addresses(self) -> list[Any]:
        """Where the state lies, for a graph that has this for good."""
        tensors = [tensor() for refs in self.state for tensor in refs]
        return [*((t.dtype, t.data_ptr()) for t in tensors if t is not None), *self.places]

    def placed(self, chosen: Sequence[int], grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the chosen parameters, placed as these."""
        if not self.sharded:
            return grads
        return [sharding.placed_grad(self.params[i], grad) for i, grad in zip(chosen, grads, strict=True)]

    def lists(
        self, chosen: Sequence[int], grads: Sequence[Tensor], random: bool
    ) -> tuple[Sequence[Tensor], Sequence[int], Lists, Options]:
        """Parameters and their groups, the lists of an op call, and the arguments that go with these.

        Args:
            chosen: which of the parameters have a gradient.
            grads: these gradients, of one dtype, placed as their parameters.
            random: whether the op draws random bits, whatever the remainders are.
        """
        whole = len(chosen) == len(self.params)
        params = local = self.params if whole else [self.params[i] for i in chosen]
        if self.sharded:
            grads = [sharding.local_grad(grad) for grad in grads]
            local = [sharding.local_param(p) for p in params]
        state = self.state
        groups, streams, places = self.numbers()
        if not (whole or places):
            state = [[refs[i] for i in chosen] if refs else [] for refs in state]
        lists = (local, grads, *([tensor() for tensor in refs] for refs in state))
        more = {
            "streams": [] if not (random or draws(lists[-1])) else streams if whole else [streams[i] for i in chosen],
            "places": places if whole else [k for i in chosen for k in _place(places, i)],
        }
        return params, groups if whole else [groups[i] for i in chosen], lists, more


def _place(places: Sequence[int], i: int) -> Sequence[int]:
    return places[PLACE_NUMBERS * i : PLACE_NUMBERS * (i + 1)]


Work = tuple[Batch, Sequence[int], Sequence[Tensor]]  # a batch, which of its parameters have gradients, and these


class Plan:
    """The batches of a whole optimizer, by what to tell that they still hold, and the op calls that update them."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], options: GroupOptions, states: Mapping[Tensor, Any]
    ) -> None:
        # The optimizer's own dicts. (Dynamo guards a traced step by every option where that reads `param_groups`.)
        self.groups = list(groups)
        self._options, self._constants = options, options.constants
        self.params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._lists = [*map(len, self.params)], [*chain.from_iterable(self.params)]
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
                    _add(batches, options.constants[number], p, number, stream, state, part)
                else:
                    self.stateless.append(p)
                stream += 1
        self.batches = list(batches.values())
        for batch in self.batches:
            batch.settle()
        self.lacks_exp_avg = {number for batch in self.batches if not batch.has_exp_avg for number in batch.groups}
        self.devices = list(dict.fromkeys(batch.params[0].device for batch in self.batches))
        self.places = {id(p): (batch, i) for batch in self.batches for i, p in enumerate(batch.params)}
        self._locals = sharding.locals_of(self._dtensors)
        self._storages = list(storages.values())
        self._sizes = _sizes(self._storages)
        self._unmoved = watch([view for view in views if not isinstance(view, FakeTensor)])  # which have no addresses
        planned = [p for batch in self.batches for p in batch.params]
        self._planned, self._dtypes, self._strides = planned, _dtypes(planned), list(map(Tensor.stride, planned))

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups have the same parameters of the same form, and no memory was exchanged or resized.

        That state tensors were replaced by others is heard of elsewhere.
        """
        return (
            self._options.constants == self._constants
            and _same(groups, self.groups)
            and self._has_params([*map(_PARAMS_OF, groups)])
            and _dtypes(self._planned) == self._dtypes
            and list(map(Tensor.stride, self._planned)) == self._strides
            and self._unmoved()
            and _same(sharding.locals_of(self._dtensors), self._locals)
            and _sizes(self._storages) == self._sizes
        )

    def _has_params(self, lists: Sequence[Sequence[Tensor]]) -> bool:
        lengths, params = self._lists
        return lengths == [*map(len, lists)] and all(map(is_, chain.from_iterable(lists), params))

    def work(self) -> list[Work]:
        """The parameters that have a gradient."""
        if torch.compiler.is_compiling():
            self._guard()
        work: list[Work] = []
        for batch in self.batches:
            grads = [p.grad for p in batch.params]
            chosen = [i for i, grad in enumerate(grads) if grad is not None]
            work.append((batch, chosen, [grad for grad in grads if grad is not None]))
        return work

    def _guard(self) -> None:
        """Reads what a traced step has to be guarded by, beside gradients and hyperparameters; it never raises."""
        for group, params in zip(self.groups, self.params, strict=True):
            if any(p is not q for p, q in zip(group["params"], params, strict=True)):
                raise AssertionError
        for batch in self.batches:
            for number in dict.fromkeys(batch.numbers()[0]):
                if constant_options(self.groups[number]) != batch.constants:
                    raise AssertionError

    def check(self, work: Sequence[Work]) -> None:
        """Refuses gradients that no op call can take."""
        for batch, _, grads in work:
            if batch.sharded or not are_floating(grads, grad_dtypes(batch.params[0])):
                for number in dict.fromkeys(batch.groups):
                    check_grads(self.groups[number], number)

    def placed(self, work: Sequence[Work]) -> Sequence[Work]:
        """The same with gradients that are placed as their parameters: communicated once, for norm and update."""
        return [(batch, chosen, batch.placed(chosen, grads)) for batch, chosen, grads in work]

    def calls(
        self,
        batch: Batch,
        chosen: Sequence[int],
        grads: Sequence[Tensor],
        tables: Mapping[str, Tensor] | None,
        scaler: Mapping[str, Tensor | None],
    ) -> list[Call]:
        """The op calls that update the chosen parameters of a batch: one, but for gradients of several dtypes.

        Args:
            tables: by device, the tensor that the op reads its hyperparameters from; None for the groups' numbers.
            scaler: `grad_scale` and `found_inf`.
        """
        kinds: list[Any] = [grad.dtype for grad in grads]
        if tables is None and self._options.has_both_kinds_of_lr:
            groups, _, _ = batch.numbers()
            is_tensor = {number: isinstance(self.groups[number]["lr"], Tensor) for number in dict.fromkeys(groups)}
            kinds = [(dtype, is_tensor[groups[i]]) for dtype, i in zip(kinds, chosen, strict=True)]
        distinct = list(dict.fromkeys(kinds))
        if len(distinct) <= 1:
            return [self._call(batch, chosen, grads, tables, scaler)] if distinct else []
        calls = []
        for kind in distinct:
            some = [i for i, k in zip(chosen, kinds, strict=True) if k == kind]
            some_grads = [grad for grad, k in zip(grads, kinds, strict=True) if k == kind]
            calls.append(self._call(batch, some, some_grads, tables, scaler))
        return calls

    def _call(
        self,
        batch: Batch,
        chosen: Sequence[int],
        grads: Sequence[Tensor],
        tables: Mapping[str, Tensor] | None,
        scaler: Mapping[str, Tensor | None],
    ) -> Call:
        constants = dict(zip(CONSTANT_OPTIONS, batch.constants, strict=True))
        stochastic = constants["param_rounding"] == "stochastic" and batch.params[0].dtype == torch.bfloat16
        params, groups, lists, more = batch.lists(chosen, grads, random=batch.quantized or stochastic)
        options: Options = dict(
            **self._hyperparameters(batch, groups, None if tables is None else tables[batch.device]),
            maximize=constants["maximize"],
            stochastic_param_rounding=stochastic,
            seed=int(constants["seed"]),
            **more,
            **scaler,
        )
        if batch.quantized:
            options["stochastic_rounding"] = constants["stochastic_rounding"]
        op = ops.ademamix_blockwise_step_ if batch.quantized else ops.ademamix_step_
        return op, params, lists, options

    def _hyperparameters(self, batch: Batch, groups: Sequence[int], table: Tensor | None) -> Options:
        """The hyperparameters of an op call on parameters of these groups; `table` has the rows of all groups."""
        if table is not None:
            return {"hyperparameters": table, "rows": groups if any(groups) else []}
        is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        if is_traced or groups is not batch.groups:
            return self._numbers(groups)
        if batch.hyperparameters is None or batch.hyperparameters[0] is not self._options.rows:
            batch.hyperparameters = self._options.rows, self._in_tensor(batch, self._numbers(groups))
        return batch.hyperparameters[1]

    def _in_tensor(self, batch: Batch, numbers: Options) -> Options:
        """The same numbers, as the op reads them quickest: thousands of them take it as long as the tensors do."""
        if not numbers["rows"] or numbers["lrs"] or batch.device != "cpu" or ops.library is None:
            return numbers
        rows = torch.tensor(numbers["hyperparameters"], dtype=torch.float64).view(-1, len(HYPERPARAMETERS))
        return {"hyperparameters": rows, "rows": numbers["rows"]}

    def _numbers(self, groups: Sequence[int]) -> Options:
        used = list(dict.fromkeys(groups))
        if torch.compiler.is_compiling():  # Dynamo guards what it reads
            rows = [hyperparameters(self.groups[number]) for number in used]
        else:
            rows = [self._options.rows[number] for number in used]
        lrs = [row.lr for row in rows if isinstance(row.lr, Tensor)]
        index = {number: i for i, number in enumerate(used)}
        return {
            "hyperparameters": [x for row in rows for x in (0.0, *row[1:])] if lrs else [*chain.from_iterable(rows)],
            "lrs": lrs,
            "rows": [index[number] for number in groups] if len(used) > 1 else [],
        }

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
        """Makes op calls; raises before the first of them has written anything, and names the parameter."""
        op_calls = [(op, lists, options) for op, _, lists, options in calls]
        if torch.compiler.is_compiling():
            ops.run(op_calls)
            return
        try:
            ops.run(op_calls)
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
    more = {name: options[name][one] for name in ("rows", "streams")}
    if options["places"]:
        more["places"] = _place(options["places"], i)
    else:
        state = [tensors[one] for tensors in state]
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


def _add(
    batches: dict[Any, Batch],
    constants: tuple[Any, ...],
    p: Tensor,
    group: int,
    stream: int,
    state: ParamState,
    part: Part | None,
) -> None:
    formats = formats_of(state)
    names = (name for name in ("step", *entries(formats), MASTER_REMAINDER) if name in state)
    own = {name: state[name] if name == "step" else sharding.local(state[name]) for name in names}
    if sharded := sharding.is_dtensor(p):
        stream += sharding.first_group(p) << 32
    dtypes = tuple((name, value.dtype) for name, value in own.items())
    key = (constants, p.dtype, p.device, dtypes, sharded, part is None)
    batch = batches.setdefault(key, Batch(constants, str(p.device), formats, sharded))
    batch.add(p, group, stream, own, part)

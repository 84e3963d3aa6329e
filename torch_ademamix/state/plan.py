"""The op calls of a step: parameters in buckets that one call can update, found once and kept while they are valid."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor

from torch_ademamix import ops, tracing
from torch_ademamix.numerics.hyperparameters import (
    HYPERPARAMETERS,
    HyperparameterRows,
    Hyperparameters,
    hyperparameters,
)
from torch_ademamix.numerics.moments import entries, formats_of
from torch_ademamix.ops.schemas import SCALER
from torch_ademamix.state import sharding
from torch_ademamix.state.allocation import has_state
from torch_ademamix.state.arenas import MASTER_REMAINDER, NAMES, ParamState, Slice, check_memory
from torch_ademamix.state.bucket import Call, ParamBucket, offsets_of
from torch_ademamix.state.options import GroupOptions, check_grads, constant_options, param_name
from torch_ademamix.state.watch import watch

_PARAMS = itemgetter("params")
_DTYPE = attrgetter("dtype")
_LOCAL_TENSOR = attrgetter("_local_tensor")  # a DTensor's, which frameworks may exchange


class Work(NamedTuple):
    """The parameters of a bucket that a step updates."""

    bucket: ParamBucket
    chosen: Sequence[int]  # their indices
    grads: Sequence[Tensor]


class Plan:
    """The buckets of an optimizer, whether they are still valid, and the op calls that update their parameters."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], options: GroupOptions, states: Mapping[Tensor, Any]
    ) -> None:
        # The optimizer's own dicts. (If a traced step reads `param_groups`, Dynamo guards it by every option there.)
        self.groups = list(groups)
        self._options, self._constants = options, options.constants
        self.params: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._lengths, self._all_params = [*map(len, self.params)], [*chain.from_iterable(self.params)]
        self.stateless: list[Tensor] = []
        buckets: dict[Any, ParamBucket] = {}
        views: list[Tensor] = []
        storages: dict[int, Tensor] = {}  # by identity: flat tensors, and state that isn't in arenas
        self._dtensors: list[Any] = []
        subsequence = 0
        for k, params in enumerate(self.params):
            for i, p in enumerate(params):
                state = states.get(p)
                if has_state(state):
                    name = param_name(groups[k], k, i)
                    _check_state(state, name)
                    check_memory(state, name)
                    arena_slice = _slice(p, state)
                    own = {name: state[name] for name in NAMES if name in state}
                    self._dtensors += filter(sharding.is_dtensor, own.values())
                    local = list(sharding.local_entries(own).values())
                    if arena_slice is not None:
                        views += local
                    storages |= {id(t): t for t in (local if arena_slice is None else arena_slice.arena.flats.values())}
                    _add(buckets, options.constants[k], p, k, subsequence, state, arena_slice)
                else:
                    self.stateless.append(p)
                subsequence += 1
        self.buckets = list(buckets.values())
        for bucket in self.buckets:
            bucket.finish()
        self.lacks_exp_avg = {k for bucket in self.buckets if not bucket.has_exp_avg for k in bucket.groups}
        self.devices = list(dict.fromkeys(bucket.params[0].device for bucket in self.buckets))
        self._index_of = {id(p): (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}
        self._rows: dict[ParamBucket, tuple[Sequence[Hyperparameters], HyperparameterRows]] = {}

        planned = [p for bucket in self.buckets for p in bucket.params]
        self._planned, self._dtypes, self._strides = planned, [*map(_DTYPE, planned)], [*map(Tensor.stride, planned)]
        self._local_tensors = [*map(_LOCAL_TENSOR, self._dtensors)]
        self._storages = [*map(Tensor.untyped_storage, storages.values())]
        self._sizes = [*map(UntypedStorage.nbytes, self._storages)]
        self._watch = watch([view for view in views if not isinstance(view, FakeTensor)])  # which have no addresses

    def is_valid(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups have the same parameters in the same form, and no memory was exchanged or resized.

        If a state tensor is replaced, the plan is dropped at once (:class:`torch_ademamix.state.arenas.PlanCache`).
        """
        lists = [*map(_PARAMS, groups)]
        return (
            self._options.constants == self._constants
            and [*map(len, lists)] == self._lengths
            and all(map(is_, groups, self.groups))
            and all(map(is_, chain.from_iterable(lists), self._all_params))
            and [*map(_DTYPE, self._planned)] == self._dtypes
            and [*map(Tensor.stride, self._planned)] == self._strides
            and self._watch.unmoved()
            and all(map(is_, map(_LOCAL_TENSOR, self._dtensors), self._local_tensors))
            and [*map(UntypedStorage.nbytes, self._storages)] == self._sizes
        )

    def work(self, only: Tensor | None = None) -> list[Work]:
        """The parameters that have a gradient, or only one of them; gradients of DTensors get their placement.

        Raises:
            RuntimeError: no op call can take a gradient.
        """
        work: list[Work] = []
        if only is not None:
            bucket, i = self._index_of[id(only)]
            work.append(Work(bucket, [i], [only.grad]))  # type: ignore[list-item]
        else:
            if torch.compiler.is_compiling():
                self._guard()
            for bucket in self.buckets:
                grads = _grads(bucket)
                chosen = [i for i, grad in enumerate(grads) if grad is not None]
                work.append(Work(bucket, chosen, [grad for grad in grads if grad is not None]))
        for bucket, _, some in work:
            kinds = {(grad.layout, grad.dtype) for grad in some}
            if bucket.sharded or not kinds <= {(torch.strided, dtype) for dtype in bucket.grad_dtypes}:
                for k in dict.fromkeys(bucket.groups):
                    check_grads(self.groups[k], k)
        for n, (bucket, indices, some) in enumerate(work):
            if bucket.sharded:
                params = [bucket.params[i] for i in indices]
                work[n] = Work(bucket, indices, list(map(sharding.redistributed_grad, params, some)))
        return work

    def _guard(self) -> None:
        """Reads what guards a traced step besides gradients and hyperparameters; never raises.

        Dynamo evaluates these comparisons while it traces, and installs guards on the parameter lists and options.
        """
        for group, params in zip(self.groups, self.params, strict=True):
            if any(p is not q for p, q in zip(group["params"], params, strict=True)):
                raise AssertionError
        for bucket in self.buckets:
            for k in dict.fromkeys(bucket.integers()[0]):
                if constant_options(self.groups[k]) != bucket.constants:
                    raise AssertionError

    def calls(
        self, work: Sequence[Work], tables: Mapping[str, Tensor] | None, scaler: Mapping[str, Tensor | None]
    ) -> list[Call]:
        """The op calls of a step: one for each bucket, or more if its gradients have several dtypes.

        Args:
            tables: by device, the tensor with the groups' hyperparameters that the ops read; None for numbers.
            scaler: `grad_scale` and `found_inf`.
        """
        calls = []
        for bucket, chosen, grads in work:
            groups, _, _ = bucket.integers()
            if len(chosen) < len(groups):
                groups = [groups[i] for i in chosen]
            kinds: list[Any] = [grad.dtype for grad in grads]
            if tables is None and self._options.has_both_kinds_of_lr:
                is_tensor = {k: isinstance(self.groups[k]["lr"], Tensor) for k in dict.fromkeys(groups)}
                kinds = [(dtype, is_tensor[k]) for dtype, k in zip(kinds, groups, strict=True)]
            distinct = list(dict.fromkeys(kinds))
            for kind in distinct:
                some, some_grads, some_groups = chosen, grads, groups
                if len(distinct) > 1:
                    some = [i for i, k in zip(chosen, kinds, strict=True) if k == kind]
                    some_grads = [grad for grad, k in zip(grads, kinds, strict=True) if k == kind]
                    some_groups = [group for group, k in zip(groups, kinds, strict=True) if k == kind]
                if tables is None:
                    rows = self._hyperparameters(bucket, some_groups)
                else:
                    rows = HyperparameterRows(tables[bucket.device], some_groups if any(some_groups) else [])
                calls.append(bucket.call(some, some_grads, rows, scaler))
        return calls

    def _hyperparameters(self, bucket: ParamBucket, groups: Sequence[int]) -> HyperparameterRows:
        """The hyperparameters of a bucket's parameters that are in these groups."""
        if torch.compiler.is_compiling():  # Dynamo guards what it reads
            used = list(dict.fromkeys(groups))
            return _rows([hyperparameters(self.groups[k]) for k in used], used, groups)
        is_cached = groups is bucket.groups and not torch._C._len_torch_dispatch_stack()
        if is_cached and bucket in self._rows and self._rows[bucket][0] is self._options.rows:
            return self._rows[bucket][1]
        used = list(dict.fromkeys(groups))
        rows = _rows([self._options.rows[k] for k in used], used, groups)
        if is_cached:
            rows = _in_tensor(rows, bucket.device)
            self._rows[bucket] = self._options.rows, rows
        return rows

    def load_kernels(self, grad_dtype: torch.dtype | None = None, device_type: str = "cuda") -> None:
        """On GPUs, compiles and loads what a first call would, for gradients of one dtype (None: the parameters').

        Long and short lists have kernels of their own, and a step has a short one if few gradients are present.
        """
        scaler = dict.fromkeys(SCALER)
        for bucket in self.buckets:
            if bucket.params[0].device.type == device_type:
                for count in (len(bucket.params), 1):
                    grads = [p.detach().to(grad_dtype or p.dtype) for p in bucket.params[:count]]
                    for op, _, lists, options in self.calls([Work(bucket, range(count), grads)], None, scaler):
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
            if reason := self._reason(calls):
                raise RuntimeError(reason) from None
            raise

    def _reason(self, calls: Sequence[Call]) -> str | None:
        """Which parameter an op rejects, and why: an op's own message counts the tensors of a call."""
        for op, params, lists, options in calls:
            for i, p in enumerate(params):
                try:
                    _try_one(op, i, lists, options)
                except RuntimeError as error:
                    text = re.sub(r"(\w)s\[0\]", r"\1", str(error))  # "grads[0]" of one parameter is its "grad"
                    return None if text == str(error) else f"{self._name(p)}: {text}"
        return None

    def _name(self, p: Tensor) -> str:
        indices = ((k, i) for k, params in enumerate(self.params) for i, q in enumerate(params) if q is p)
        k, i = next(indices)
        return param_name(self.groups[k], k, i)


def _grads(bucket: ParamBucket) -> list[Tensor | None]:
    """The gradients of a bucket's parameters, in their order."""
    params, grads = bucket.params, None
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime

        comptime(tracing.read_grads)  # assigns to `grads`
    return [p.grad for p in params] if grads is None else grads


def _rows(rows: list[Hyperparameters], used: Sequence[int], groups: Sequence[int]) -> HyperparameterRows:
    """The rows of the groups in use, for parameters of these groups."""
    index = {k: n for n, k in enumerate(used)}
    return HyperparameterRows(rows, [index[k] for k in groups] if len(used) > 1 else [])


def _in_tensor(given: HyperparameterRows, device: str) -> HyperparameterRows:
    """The same in the form that the native CPU op reads quickest: it takes thousands of numbers as long as tensors."""
    rows = given.rows
    if len(rows) == 1 or device != "cpu" or ops.library is None or any(isinstance(row[0], Tensor) for row in rows):
        return given
    return given._replace(rows=torch.tensor(rows, dtype=torch.float64).view(-1, len(HYPERPARAMETERS)))


def _try_one(op: Callable[..., None], i: int, lists: Sequence[Sequence[Tensor]], options: Mapping[str, Any]) -> None:
    """A dry run of an op call with one of its parameters."""
    params, grads, *state = lists
    one = slice(i, i + 1)
    rows, of_params = options["hyperparameters"]
    more: dict[str, Any] = {"hyperparameters": HyperparameterRows(rows, of_params[one])}
    more["subsequences"] = options["subsequences"][one]
    if options["offsets"]:
        more["offsets"] = offsets_of(options["offsets"], i)
    else:
        state = [tensors[one] for tensors in state]
    op(params[one], grads[one], *state, **{**options, **more}, dry_run=True)


def _slice(p: Tensor, state: ParamState) -> Slice | None:
    """The slice of an arena that a parameter's state still is."""
    if state.slice is not None and not state.slice.is_of(p, state):
        state.leave()
    return state.slice


def _check_state(state: Mapping[str, Any], param: str) -> None:
    """Checks state that was put together by hand, before the ops look at what is in it."""
    names = ("step", *entries(formats_of(state)))
    if lost := [name for name in names if name not in state]:
        raise RuntimeError(f"the state of {param} has no {', '.join(lost)}")
    for name in (*names, MASTER_REMAINDER):
        if name in state and not isinstance(state[name], Tensor):
            raise RuntimeError(f"the {name} of {param} is a {type(state[name]).__name__}, but must be a tensor")


def _add(
    buckets: dict[Any, ParamBucket],
    constants: tuple[Any, ...],
    p: Tensor,
    group: int,
    subsequence: int,
    state: ParamState,
    arena_slice: Slice | None,
) -> None:
    formats = formats_of(state)
    names = (name for name in ("step", *entries(formats), MASTER_REMAINDER) if name in state)
    own = {name: state[name] if name == "step" else sharding.local(state[name]) for name in names}
    if sharded := sharding.is_dtensor(p):
        subsequence += sharding.first_group(p) << 32
    dtypes = tuple((name, value.dtype) for name, value in own.items())
    key = (constants, p.dtype, p.device, dtypes, sharded, arena_slice is None)
    if key not in buckets:
        buckets[key] = ParamBucket(constants, p, formats)
    buckets[key].add(p, group, subsequence, own, arena_slice)

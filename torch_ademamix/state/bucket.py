"""The parameters of one op call, and the call."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from torch_ademamix import ops, tracing
from torch_ademamix.numerics.bfloat16 import draws
from torch_ademamix.numerics.hyperparameters import HyperparameterRows
from torch_ademamix.numerics.moments import Formats, op_entries
from torch_ademamix.ops.check import grad_dtypes
from torch_ademamix.ops.offsets import OFFSETS_PER_PARAM
from torch_ademamix.state import sharding
from torch_ademamix.state.arenas import MASTER_REMAINDER, Slice
from torch_ademamix.state.options import CONSTANT_OPTIONS


class Call(NamedTuple):
    """An op call: the op, its lists of tensors and its keyword arguments."""

    op: Callable[..., None]
    params: Sequence[Tensor]  # the optimizer's, for messages; the lists have the local tensors of DTensors
    lists: tuple[Sequence[Any], ...]
    options: dict[str, Any]


class ParamBucket:
    """Parameters that one op call can update: their groups differ in hyperparameters only, their state is of one kind.

    Args:
        constants: the groups' CONSTANT_OPTIONS.
        p: the first of the parameters.
        formats: those of the moments.
    """

    def __init__(self, constants: tuple[Any, ...], p: Tensor, formats: Formats) -> None:
        self.constants = constants
        self.device = str(p.device)
        self.grad_dtypes = grad_dtypes(p)
        self.quantized = any(formats.values())
        self.has_exp_avg = "exp_avg" in formats
        self.has_random_remainders = False
        self.sharded = sharding.is_dtensor(p)
        self.params: list[Tensor] = []
        self.groups: list[int] = []  # each parameter's
        self.subsequences: list[int] = []  # each parameter's, of random bits
        # The state in the order of the op's lists, which are empty for what these parameters don't have. A tensor that
        # is replaced invalidates the plan, so nothing here keeps it alive.
        self.names = (*op_entries(formats), MASTER_REMAINDER)
        self.state: list[list[ref[Tensor]]] = [[] for _ in self.names]
        self.offsets: list[int] = []  # empty if each parameter has state tensors of its own
        self._arenas: dict[int, int] = {}  # by identity, their indices in the lists

    def add(
        self, p: Tensor, group: int, subsequence: int, state: Mapping[str, Tensor], arena_slice: Slice | None
    ) -> None:
        self.params.append(p)
        self.groups.append(group)
        self.subsequences.append(subsequence)
        if arena_slice is None:
            self._append(state)
            return
        arena = arena_slice.arena
        if id(arena) not in self._arenas:
            self._arenas[id(arena)] = len(self._arenas)
            self._append(arena.flats)
        self.offsets += (self._arenas[id(arena)], arena_slice.first, arena_slice.step)

    def _append(self, tensors: Mapping[str, Tensor]) -> None:
        for target, name in zip(self.state, self.names, strict=True):
            if name is not None and name in tensors:
                target.append(ref(tensors[name]))

    def finish(self) -> None:
        """Call it after the last parameter has been added."""
        remainders = [remainder for reference in self.state[-1] if (remainder := reference()) is not None]
        self.has_random_remainders = draws(remainders)
        self._integers = json.dumps([self.groups, self.subsequences, self.offsets])

    def integers(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """The groups, RNG subsequences and offsets of all parameters."""
        if torch.compiler.is_compiling():  # Dynamo would guard each number of a list, and guards one string of all
            groups, subsequences, offsets = tracing.decoded(self._integers)
            return groups, subsequences, offsets
        return self.groups, self.subsequences, self.offsets

    def addresses(self) -> list[Any]:
        """Where the state lies: a captured graph has this for good."""
        tensors = [tensor() for refs in self.state for tensor in refs]
        return [*((t.dtype, t.data_ptr()) for t in tensors if t is not None), *self.offsets]

    def call(
        self,
        chosen: Sequence[int],
        grads: Sequence[Tensor],
        hyperparameters: HyperparameterRows,
        scaler: Mapping[str, Tensor | None],
    ) -> Call:
        """The op call that updates some of the parameters.

        Args:
            chosen: the indices of those that have a gradient.
            grads: these gradients, of one dtype, placed as their parameters.
            hyperparameters: theirs.
            scaler: `grad_scale` and `found_inf`.
        """
        whole = len(chosen) == len(self.params)
        _, subsequences, offsets = self.integers()
        params = local = self.params
        state = self.state
        if not whole:
            params = local = [self.params[i] for i in chosen]
            subsequences = [subsequences[i] for i in chosen]
            if offsets:
                offsets = [offset for i in chosen for offset in offsets_of(offsets, i)]
            else:
                state = [[refs[i] for i in chosen] if refs else [] for refs in state]
        if self.sharded:
            grads = [sharding.local_grad(grad) for grad in grads]
            local = [sharding.local_param(p) for p in params]
        lists = (local, grads, *([tensor() for tensor in refs] for refs in state))
        constants = dict(zip(CONSTANT_OPTIONS, self.constants, strict=True))
        stochastic = constants["param_rounding"] == "stochastic" and local[0].dtype == torch.bfloat16
        options = {
            "hyperparameters": hyperparameters,
            "maximize": constants["maximize"],
            "stochastic_param_rounding": stochastic,
            "seed": int(constants["seed"]),
            "subsequences": subsequences if self.quantized or stochastic or self.has_random_remainders else [],
            "offsets": offsets,
            **scaler,
        }
        if not self.quantized:
            return Call(ops.ademamix_step_, params, lists, options)
        options["stochastic_rounding"] = constants["stochastic_rounding"]
        return Call(ops.ademamix_blockwise_step_, params, lists, options)


def offsets_of(offsets: Sequence[int], i: int) -> Sequence[int]:
    return offsets[OFFSETS_PER_PARAM * i : OFFSETS_PER_PARAM * (i + 1)]

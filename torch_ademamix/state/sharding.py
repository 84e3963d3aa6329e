"""Parameters that are spread over processes: DTensors, as `fully_shard` and `parallelize_module` make them.

Each process updates its own shards, by the same op calls as ever; only a gradient that is placed otherwise than its
parameter is communicated. State tensors are DTensors placed as their parameter, but for `step`, which every process
has whole: so torch's distributed checkpoints save, load and reshard them as they do AdamW's.

A quantized parameter's scales have the shape [rows, blocks per row] where no block crosses a row, with a row all that
follows dimension 0. A shard of whole rows then has its own scales, and codes and scales can be resharded for
another number of processes exactly. Where a shard would cut a block, the parameter's state is unquantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from torch_ademamix.numerics.blockwise import BLOCK_SIZE, RANDOM_GROUP, block_count

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, without importing what makes these where nothing else has."""
    if type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(value: Any) -> Any:
    """This process's part of a DTensor, sharing its memory; any other value itself."""
    return value.to_local() if is_dtensor(value) else value


def local_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's entries of state, with the local tensors of DTensors."""
    return {name: local(value) for name, value in entries.items()}


def local_param(p: Tensor) -> Tensor:
    """This process's part of a parameter, for an op call to update."""
    # The op counts a new version of what it changes, which is the part.
    torch.autograd.graph.increment_version(p)
    return local(p)  # type: ignore[no-any-return]


def redistributed_grad(p: Tensor, grad: Tensor) -> Tensor:
    """A parameter's gradient, placed as the parameter: it is communicated if it was placed otherwise."""
    assert is_dtensor(p)
    assert is_dtensor(grad)
    return grad if grad.placements == p.placements else grad.redistribute(p.device_mesh, p.placements)


def local_grad(grad: Tensor) -> Tensor:
    """This process's part of a gradient that is placed as its parameter."""
    grad = local(grad)
    return grad.wait() if hasattr(grad, "wait") else grad  # for what is still being communicated


def greatest(number: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """The greatest of a number that each process has, over the processes that share any of these tensors."""
    if meshes := dict.fromkeys(tensor.device_mesh for tensor in tensors if is_dtensor(tensor)):
        from torch.distributed.tensor import DTensor, Partial

        for mesh in meshes:
            number = DTensor.from_local(number, mesh, [Partial("max")] * mesh.ndim).full_tensor()
    return number


def rows(tensor: Tensor) -> tuple[int, object]:
    """Into how many shards a tensor's first dimension is divided, and what is equal where that is done alike."""
    if not is_dtensor(tensor):
        return 1, None
    mesh = tensor.device_mesh
    shards = {i: placement for i, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == 0}
    return math.prod(map(mesh.size, shards)), (mesh, shards) if shards else None


def split_rows(tensor: Tensor, n: int) -> Sequence[Tensor]:
    """Equal parts along the first dimension; of a DTensor, each process splits the rows that it has."""
    if not is_dtensor(tensor):
        return tensor.tensor_split(n)
    from torch.distributed.tensor import DTensor

    shape = torch.Size((tensor.shape[0] // n, *tensor.shape[1:]))
    return [
        DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=shape, stride=tensor.stride())
        for part in tensor.to_local().tensor_split(n)
    ]


def scales_shape(p: Tensor) -> tuple[int, ...] | None:
    """The shape of the scales of a quantized parameter; None where a shard would cut a block."""
    row = math.prod(p.shape[1:])
    by_rows = (p.shape[0], row // BLOCK_SIZE) if p.dim() > 1 and row % BLOCK_SIZE == 0 else None
    if is_dtensor(p):
        shards = [  # torch has two classes of them, with nothing else in common
            (getattr(placement, "dim", 0), p.device_mesh.size(i))
            for i, placement in enumerate(p.placements)
            if not placement.is_replicate()
        ]
        in_rows = math.prod(size for dim, size in shards if dim > 0)  # parts of a row
        if shards and by_rows is None:
            return None
        if in_rows > 1 and (p.dim() > 2 or row % (BLOCK_SIZE * in_rows) != 0):
            return None
    return by_rows or (block_count(p.numel()),)


PART_GROUPS = 1 << 24  # more than a process's part of a parameter has
MAX_GROUPS = 1 << 31  # what the upper half of a subsequence, an int64 above 0, can count


def first_group(p: DTensor) -> int:
    """The number, in the whole parameter, of the first group of this process's part: its random bits go by it.

    So runs of any number of processes draw the same bits, where parts begin with a group. Parts that aren't whole
    rows have no such place: they get numbers that are far apart.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, coordinate = p.device_mesh, p.device_mesh.get_coordinate()
    if coordinate is None:  # this process has no part
        return 0
    shards = [  # the dimension, how often it is split, which part this is, and whether other splits come first
        (getattr(placement, "dim", 0), mesh.size(i), coordinate[i], isinstance(placement, _StridedShard))
        for i, placement in enumerate(p.placements)
        if not placement.is_replicate()
    ]
    if any(dim > 0 for dim, *_ in shards):
        part = 0
        for _, size, index, _ in shards:
            part = part * size + index
        return part * PART_GROUPS % MAX_GROUPS
    first, rows = 0, p.shape[0] if p.dim() > 0 else 1
    in_order = [shard for shard in shards if not shard[3]] + [shard for shard in reversed(shards) if shard[3]]
    for _, size, index, _ in in_order:
        most = -(-rows // size)
        begin = min(index * most, rows)
        first, rows = first + begin, min(most, rows - begin)
    return first * math.prod(p.shape[1:]) // RANDOM_GROUP % MAX_GROUPS


def whole(p: Tensor) -> Tensor:
    """A regular tensor with a DTensor parameter's global shape, dtype and device, without memory."""
    return torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)


def sharded(state: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """A parameter's state as DTensors if the parameter is one, of this process's parts."""
    if not is_dtensor(p):
        return dict(state)
    from torch.distributed.tensor import DTensor

    result = {}
    for name, part in state.items():
        if name != "step":
            shape = _state_shape(name, p)
            stride = torch.empty(shape, device="meta").stride() if part.is_contiguous() else p.stride()
            part = DTensor.from_local(part, p.device_mesh, p.placements, shape=shape, stride=stride)
        result[name] = part
    return result


def shard(state: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """A DTensor parameter's whole state, which every process has, as DTensors placed as the parameter."""
    from torch.distributed.tensor import distribute_tensor

    assert is_dtensor(p)
    return {
        name: value if name == "step" else distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        for name, value in state.items()
    }


def localize(
    p: Tensor, saved: Mapping[str, Any], where: str
) -> tuple[Tensor, Mapping[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """Reduces the saved state of a DTensor parameter to regular tensors.

    Returns:
        a regular tensor in place of the parameter, the entries of its state, and a function that turns such entries
        into DTensors. All are of the local shard, or of the full tensor if the state was saved whole.
    """
    if any(is_dtensor(value) for value in saved.values()):
        return local(p), local_shards(saved, p, where), lambda state: sharded(state, p)
    if is_dtensor(p):
        return whole(p), saved, lambda state: shard({name: value.to(p.device) for name, value in state.items()}, p)
    return p, saved, lambda state: state


def local_shards(saved: Mapping[str, Any], p: Tensor, where: str) -> dict[str, Any]:
    """This process's parts of a parameter's saved state, of which some entries are DTensors.

    Raises:
        ValueError: an entry has another shape, mesh or placement than the parameter calls for; `where` begins the
            text.
    """
    if not is_dtensor(p):
        names = [name for name, value in saved.items() if is_dtensor(value)]
        raise ValueError(f"{where} has DTensors ({', '.join(names)}), but its parameter is a plain tensor")
    expected = f"{_placement(p)}"
    result = {}
    for name, value in saved.items():
        if name != "step" and isinstance(value, Tensor):
            shape = _state_shape(name, p)
            if value.shape != shape:
                raise ValueError(f"{where}[{name!r}] has shape {list(value.shape)}, but must have {list(shape)}")
            actual = _placement(value) if is_dtensor(value) else "a plain tensor"
            if actual != expected:
                raise ValueError(f"{where}[{name!r}] is {actual}, but its parameter is {expected}")
        result[name] = local(value)
    return result


def _placement(tensor: DTensor) -> str:
    return f"a DTensor placed {tuple(tensor.placements)} on {tensor.device_mesh}"


def _state_shape(name: str, p: Tensor) -> torch.Size:
    """The whole shape of an entry of a parameter's state."""
    if name.endswith("_absmax") and (shape := scales_shape(p)) is not None:
        return torch.Size(shape)
    return p.shape

"""How much memory an optimizer's state and its step take."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux's


def state_bytes(state: object) -> int:
    """Those of all tensors in it, shared ones counted once."""
    storages = {(t.data_ptr(), t.nbytes): t.nbytes for t in tensors(state)}
    return sum(storages.values())


def tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if hasattr(tree, "__tensor_flatten__"):  # torchao's state
            names, _ = tree.__tensor_flatten__()
            yield from tensors([getattr(tree, name) for name in names])
        else:
            yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)


def peak_bytes(step: Callable[[], object]) -> int | None:
    """The most that the process held during a call beyond what it held before; None where the system doesn't say."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else an allocation may come from what an earlier call has freed
        gc.collect()
        CLEAR_REFS.write_text("5")  # the peak is counted from here
        before = _kilobytes("VmRSS")
        step()
        return max(_kilobytes("VmHWM") - before, 0) * 1024
    except (OSError, AttributeError, KeyError):
        return None


def _kilobytes(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0])

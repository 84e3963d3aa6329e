"""The CUDA library: where it finds its sources, its compiler and its cache, and why it may not be in use.

The kernels are compiled for the GPU at hand when they are first used, by the NVRTC that every CUDA build of torch
brings, in about half a second each, and kept in :func:`cache_folder`.
"""

import ctypes
import os
import sysconfig
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_LIBRARY = _PACKAGE / "_cuda.so"
_SOURCES = (_PACKAGE / "device", _PACKAGE.parent / "ops")  # of an installed package, and of a checkout

CACHE_VARIABLE = "TORCH_ADEMAMIX_CACHE"

_loaded: ctypes.CDLL | None = None


def cache_folder() -> Path:
    """The folder of compiled kernels: what ``TORCH_ADEMAMIX_CACHE`` names, else one in the user's cache folder.

    It may be deleted at any time. Where it can't be written to, each process compiles its kernels anew.

    >>> cache_folder().name
    'torch_ademamix'
    """
    named = os.environ.get(CACHE_VARIABLE)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(user) / "torch_ademamix"


def find_nvrtc() -> str | None:
    """The file of the NVRTC that came with torch, or the name by which the loader finds one; None if neither does."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    packages = (Path(torch.__file__).parents[1], Path(sysconfig.get_path("purelib")))
    for folder in packages:
        for file in sorted(folder.glob(f"nvidia/*/lib/{name}")):
            return str(file)
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    return name


def sources() -> Path:
    """The folder of the kernels' sources."""
    return next(folder for folder in _SOURCES if (folder / "value.h").is_file())


def load() -> str | None:
    """Loads the library, which starts no CUDA; if it can't serve, returns why, as a part of a sentence."""
    global _loaded
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not _LIBRARY.is_file():
        return "torch_ademamix was built without its native kernels"
    nvrtc = find_nvrtc()
    if nvrtc is None:
        return f"there is no NVRTC of CUDA {torch.version.cuda}, which compiles the kernels"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the CUDA library can't be loaded ({error})"
    _loaded = ctypes.CDLL(str(_LIBRARY))
    _loaded.ademamix_set_up(*(os.fsencode(path) for path in (sources(), cache_folder(), nvrtc)))
    return None


def managed_memory() -> tuple[int, int, int]:
    """Tensors in managed memory, their bytes, and the bytes asked to be on a GPU in advance; zeros without CUDA."""
    values = (ctypes.c_int64 * 3)()
    if _loaded is not None:
        _loaded.ademamix_managed_memory(values)
    return (values[0], values[1], values[2])


def lacks_managed_memory(device: torch.device) -> bool:
    """Whether that is a GPU that the library serves, without managed memory; starts CUDA."""
    if _loaded is None or device.type != "cuda" or not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(_loaded.ademamix_has_managed_memory(index) == 0)

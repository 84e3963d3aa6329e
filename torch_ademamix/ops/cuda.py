"""The CUDA library: where it finds its compiler and its compiled kernels, and why it may not be in use.

The kernels are compiled for the GPU at hand when they are first used, by the NVRTC that every CUDA build of torch
brings, in about half a second each, and kept in :func:`cache_folder`.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parents[1] / "_cuda.so"

# Environment variables.
ENABLED_VARIABLE = "TORCH_ADEMAMIX_CUDA"
CACHE_VARIABLE = "TORCH_ADEMAMIX_CACHE"
PRECOMPILED_VARIABLE = "TORCH_ADEMAMIX_PRECOMPILED"

_loaded: ctypes.CDLL | None = None
_without: str | None = "it hasn't been loaded"


def cache_folder() -> Path:
    """The folder of compiled kernels: what ``TORCH_ADEMAMIX_CACHE`` names, else one in the user's cache folder.

    A user without a home has one in the folder for temporary files. The folder may be deleted at any time. If it can't
    be written to, each process compiles its kernels again.

    >>> cache_folder().name
    'torch_ademamix'
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if user := os.environ.get("XDG_CACHE_HOME"):
        return Path(user) / "torch_ademamix"
    try:
        return Path.home() / ".cache/torch_ademamix"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return Path(os.environ.get("TMPDIR") or "/tmp") / f"torch_ademamix-{os.getuid()}"


def find_nvrtc() -> str | None:
    """The file of the NVRTC that came with torch, or the name by which the loader finds one; None if neither does."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    torch_folder = Path(torch.__file__).parent
    folders = [torch_folder.parent, *map(Path, sys.path)]  # of packages
    for folder in folders:
        for file in sorted(folder.glob(f"nvidia/*/lib/{name}")):
            return str(file)
    for file in (torch_folder / "lib" / name, Path(sys.prefix) / "lib" / name):  # of torch's own wheels, and conda's
        if file.is_file():
            return str(file)
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    return name


def load() -> str | None:
    """Loads the library, which starts no CUDA; if it can't serve, returns why, as a part of a sentence."""
    global _without
    _without = _load()
    return _without


def library() -> ctypes.CDLL:
    """The library that is loaded; raises RuntimeError if there is none."""
    if _loaded is None:
        raise RuntimeError(f"there are no CUDA kernels: {_without}")
    return _loaded


def _load() -> str | None:
    global _loaded
    if os.environ.get(ENABLED_VARIABLE) == "0":
        return f"{ENABLED_VARIABLE} is 0"
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
    set_up(_loaded, cache_folder(), nvrtc)
    return None


def set_up(library: ctypes.CDLL, cache: str | Path, nvrtc: str | Path) -> None:
    """Tells the library where compiled kernels are kept and where NVRTC is."""
    precompiled = os.environ.get(PRECOMPILED_VARIABLE, "")
    library.ademamix_set_up(*map(os.fsencode, (cache, precompiled, nvrtc)))


def set_cache(folder: Path) -> None:
    """Keeps what is compiled from now on in that folder, and looks for it nowhere else."""
    library().ademamix_set_cache(os.fsencode(folder))


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

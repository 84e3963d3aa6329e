"""The CUDA ops on the stand-in for libcuda and NVRTC, as ops of the CPU; ``CUDA_ON_HOST`` is the folder of both."""

import ctypes
import os
from pathlib import Path

import torch

import torch_ademamix  # noqa: F401
from torch_ademamix.ops import cuda

FOLDER = Path(os.environ["CUDA_ON_HOST"])
DRIVER = FOLDER / "libcuda.so.1"

OPS = (
    "_ademamix_step_",
    "_ademamix_blockwise_step_",
    "quantize_blockwise",
    "dequantize_blockwise",
    "paged_empty",
    "page_out",
)

driver = ctypes.CDLL(str(DRIVER), mode=ctypes.RTLD_GLOBAL)  # for torch's functions; libcuda is found by its name
driver.take_log.restype = ctypes.c_char_p
driver.set_free_bytes.argtypes = [ctypes.c_size_t]
driver.set_current_stream.argtypes = [ctypes.c_void_p]

library = torch.library.Library("cuda_on_host", "DEF")
for name in OPS:
    packet = getattr(torch.ops.torch_ademamix, name)
    for overload in packet.overloads():
        library.define(str(getattr(packet, overload)._schema).removeprefix("torch_ademamix::"))
torch.ops.load_library(FOLDER / "cuda_ops.so")
host = ctypes.CDLL(str(FOLDER / "cuda_ops.so"))


def set_up(cache: Path, nvrtc: Path = DRIVER) -> None:
    cuda.set_up(host, cache, nvrtc)


set_up(FOLDER / "cache")


def take_log(*wanted: str) -> list[str]:
    """What was called since the last look, of these words or of all but those of loading."""
    words = driver.take_log().decode().split()
    if wanted:
        return [word for word in words if word in wanted]
    return [word for word in words if word != "load" and not word.startswith("compile")]


def managed_memory() -> list[int]:
    """Tensors, bytes, and prefetched bytes."""
    values = (ctypes.c_int64 * 3)()
    host.ademamix_managed_memory(values)
    return list(values)

"""Compiles kernels as the CUDA library does, by its functions.

LIBRARY NVRTC FOLDER CAPABILITY, and names on stdin. The code of each comes into a folder of its own, which has its
number. Exits with 1, and the compiler's log, if one doesn't compile.
"""

import ctypes
import sys

import torch  # noqa: F401  the library is linked to it

from torch_ademamix.ops import cuda

_, file, nvrtc, folder, capability = sys.argv
library = ctypes.CDLL(file)
library.ademamix_compile.restype = ctypes.c_char_p
for i, name in enumerate(sys.stdin.read().splitlines()):
    cuda.set_up(library, f"{folder}/{i}", nvrtc)
    error = library.ademamix_compile(name.encode(), int(capability))
    if error is not None:
        sys.exit(error.decode())

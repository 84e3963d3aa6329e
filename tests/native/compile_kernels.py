"""Compiles kernels as the CUDA library does, by its functions.

LIBRARY SOURCES NVRTC FOLDER CAPABILITY, and headers and names on stdin. The code of each comes into a folder of its
own, which has its number. Exits with 1, and the compiler's log, if one doesn't compile.
"""

import ctypes
import os
import sys

import torch  # noqa: F401  the library is linked to it

_, file, sources, nvrtc, folder, capability = sys.argv
library = ctypes.CDLL(file)
library.ademamix_compile.restype = ctypes.c_char_p
for i, line in enumerate(sys.stdin.read().splitlines()):
    library.ademamix_set_up(*map(os.fsencode, (sources, f"{folder}/{i}", nvrtc)))
    header, name = line.split(" ", maxsplit=1)
    error = library.ademamix_compile(header.encode(), name.encode(), int(capability))
    if error is not None:
        sys.exit(error.decode())

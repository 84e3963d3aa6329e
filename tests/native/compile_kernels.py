"""Compiles kernels as the CUDA library does: LIBRARY NVRTC FOLDER CAPABILITY, and headers and names on stdin.

The code of each comes into a folder of its own, which has its number. Exits with 1, and the compiler's log, if one
doesn't compile.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch  # noqa: F401  the library is linked to it

SOURCES = Path(__file__).parents[2] / "ops"

library = ctypes.CDLL(sys.argv[1])
library.ademamix_compile.restype = ctypes.c_char_p
for i, line in enumerate(sys.stdin.read().splitlines()):
    library.ademamix_set_up(*(os.fsencode(path) for path in (SOURCES, f"{sys.argv[3]}/{i}", sys.argv[2])))
    header, name = line.split(" ", maxsplit=1)
    error = library.ademamix_compile(header.encode(), name.encode(), int(sys.argv[4]))
    if error is not None:
        sys.exit(error.decode())

"""The CPU ops by themselves, with drawn arguments, under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.helpers.fuzzing import SEED
from tests.numerics.test_numerics import capabilities_here

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent

FLAGS = ["-std=c++17", "-O1", "-g1", "-Werror", f"-I{TORCH}/include"]  # after setup.py's, which they overrule
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
LIBRARIES = [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]

SECONDS = 30 if SEED else 10


def extension(capability):
    """What setup.py would build the kernels from, and with which flags."""
    pytest.importorskip("setuptools")
    from distutils.core import run_setup

    where = os.getcwd()
    try:
        os.chdir(ROOT)
        extensions = run_setup("setup.py", stop_after="init").ext_modules
    finally:
        os.chdir(where)
    return next(e for e in extensions if e.name.endswith(f"._cpu_{capability}"))


@pytest.mark.nightly
@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
@pytest.mark.parametrize("capability", capabilities_here() if SEED else capabilities_here()[-1:])
def test_sanitizers_find_nothing(capability, tmp_path):
    kernels = extension(capability)
    flags = [*kernels.extra_compile_args, *FLAGS, *SANITIZERS]
    # The ops themselves are part of the program's own file.
    sources = ["tests/native/fuzz_ops.cpp", *(s for s in kernels.sources if s.endswith("_kernel.cpp"))]

    def compiled(source):
        target = tmp_path / f"{Path(source).stem}.o"
        subprocess.run(["g++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    program = tmp_path / "fuzz_ops"
    subprocess.run(["g++", *SANITIZERS, *objects, *LIBRARIES, "-o", program], check=True)
    # Torch's own libraries keep memory to the end.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0:handle_abort=1"}
    result = subprocess.run([program, str(SEED), str(SECONDS)], env=environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-5000:]

"""The CUDA kernels without a GPU: their sources, built by g++, under its address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NATIVE = Path(__file__).parent / "native"
TORCH = Path(torch.__file__).parent

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing"]  # vector accesses, which CUDA allows
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DUSE_CUDA"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_on_host(tmp_path: Path) -> None:
    library = tmp_path / "cuda_on_host.so"
    torch_flags = [f"-I{TORCH}/include", f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-Bsymbolic"]
    sources = ["-I", str(NATIVE), str(NATIVE / "cuda_on_host.cpp")]
    subprocess.run(["g++", *FLAGS, *sources, *torch_flags, "-o", str(library)], check=True)

    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "CUDA_ON_HOST": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    pytest_command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*pytest_command, str(NATIVE / "cuda_on_host_cases.py")],
        env=environment,
        cwd=NATIVE.parent.parent,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]

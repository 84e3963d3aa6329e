"""The CUDA ops without a GPU: built by g++, under its address and undefined-behaviour sanitizers.

The kernels' sources are a part of a stand-in for libcuda and NVRTC, which the host code opens as it would the real
ones.
"""

import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import torch_ademamix

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "tests/native"
TORCH = Path(torch.__file__).parent

FLAGS = ["-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing"]  # vector accesses, which CUDA allows
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# A third of the time to compile: what the address sanitizer sees as well, and its checks as calls.
FLAGS += ["-fno-sanitize=vptr,object-size,null,pointer-overflow", "--param=asan-instrumentation-with-call-threshold=0"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{TORCH}/include", "-DADEMAMIX_FETCH_BYTES=1000"]
FLAGS += ["-DADEMAMIX_ARGUMENT_BYTES=4096", "-DADEMAMIX_BLOCKWISE_WAVES=1"]


def build(folder: Path) -> None:
    """cuda_ops.so, and libcuda.so.1 with the kernels."""
    device_source = folder / "device_source.cpp"
    runpy.run_path(str(ROOT / "ops/embed_sources.py"))["embed"](device_source)
    sources = [
        ("-std=c++17", NATIVE / "cuda_driver.cpp"),
        *(("-std=c++20", "-include", NATIVE / "cuda_ops.h", path) for path in sorted(ROOT.glob("ops/cuda/*.cpp"))),
        (device_source,),
    ]

    def compiled(words: tuple) -> Path:
        target = folder / f"{words[-1].stem}.o"
        subprocess.run(["g++", *FLAGS, "-c", *words, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        driver, *ops = pool.map(compiled, sources)
    link = ["g++", "-shared", "-fsanitize=address,undefined"]
    subprocess.run([*link, driver, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"], check=True)
    libraries = [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-Bsymbolic"]
    subprocess.run([*link, *ops, *libraries, "-o", folder / "cuda_ops.so"], check=True)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
@pytest.mark.slow
def test_on_host(tmp_path: Path) -> None:
    build(tmp_path)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "CUDA_ON_HOST": str(tmp_path),
        "PYTHONPATH": str(NATIVE),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    pytest_command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*pytest_command, *map(str, sorted(NATIVE.glob("*_cases.py")))],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_random_bits_never_lift_a_block_s_largest_code_to_0(tmp_path: Path) -> None:
    program = tmp_path / "largest_codes"
    subprocess.run(["g++", "-std=c++17", f"-I{TORCH}/include", NATIVE / "largest_codes.cpp", "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_kernels_are_compiled_from_sources_in_the_library() -> None:
    """Whatever lies on disk by then: the library fills the kernels' arguments by the layouts it was built with."""
    source = runpy.run_path(str(ROOT / "ops/embed_sources.py"))["device_source"]()
    assert source.encode() in (Path(torch_ademamix.__file__).parent / "_cuda.so").read_bytes()

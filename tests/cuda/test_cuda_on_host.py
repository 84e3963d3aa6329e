"""The CUDA ops without a GPU: built by g++, also under its address and undefined-behaviour sanitizers.

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

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests/native"
TORCH = Path(torch.__file__).parent

FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{TORCH}/include", "-DADEMAMIX_FETCH_BYTES=1000"]
FLAGS += ["-fno-strict-aliasing"]  # vector accesses, which CUDA allows
FLAGS += ["-DADEMAMIX_ARGUMENT_BYTES=4096", "-DADEMAMIX_BLOCKWISE_WAVES=1"]
PLAIN = ["-O0", "-w"]  # a fifth of the time to compile
SANITIZERS = ["-fsanitize=address,undefined"]
SANITIZED = [*SANITIZERS, "-fno-sanitize-recover=all", "-O1", "-g1", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
# A third of the time to compile: what the address sanitizer sees as well, and its checks as calls.
SANITIZED += ["-fno-sanitize=vptr,object-size,null,pointer-overflow"]
SANITIZED += ["--param=asan-instrumentation-with-call-threshold=0"]


def build(folder: Path, sanitized: bool) -> None:
    """cuda_ops.so, and libcuda.so.1 with the kernels."""
    device_source = folder / "device_source.cpp"
    runpy.run_path(str(ROOT / "ops/embed_sources.py"))["embed"](device_source)
    header = folder / "cuda_ops.h"  # precompiled: torch's headers are most of what there is to compile
    header.write_text(f'#include "{NATIVE / "cuda_ops.h"}"\n')
    flags = [*FLAGS, *(SANITIZED if sanitized else PLAIN)]

    def compiled(words: tuple) -> Path:
        target = folder / f"{words[-1].name}.o"
        subprocess.run(["g++", *flags, "-c", *words, "-o", target], check=True)
        return target

    subprocess.run(["g++", *flags, "-std=c++20", "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    sources = [
        ("-std=c++17", NATIVE / "cuda_driver.cpp"),
        *(("-std=c++20", "-include", header, path) for path in sorted(ROOT.glob("ops/cuda/*.cpp"))),
        (device_source,),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        driver, *ops = pool.map(compiled, sources)
    link = ["g++", "-shared", *(SANITIZERS if sanitized else [])]
    subprocess.run([*link, driver, "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"], check=True)
    libraries = [f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-Bsymbolic"]
    subprocess.run([*link, *ops, *libraries, "-o", folder / "cuda_ops.so"], check=True)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA has streams of its own: no stand-in's")
@pytest.mark.slow
@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_on_host(tmp_path: Path, sanitized: bool) -> None:
    """Without the sanitizers, the cases that aren't left to the night."""
    build(tmp_path, sanitized)
    environment = os.environ | {"CUDA_ON_HOST": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pytest_command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider"]
    if sanitized:
        environment |= sanitizers_environment()
    else:
        pytest_command += ["-m", "not nightly"]
    result = subprocess.run(
        [*pytest_command, *map(str, sorted(NATIVE.glob("*_cases.py")))],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def sanitizers_environment() -> dict[str, str]:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


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

"""Builds the native libraries; everything else about the package stands in pyproject.toml.

One library of CPU kernels per instruction set, of which torch_ademamix.ops loads the one that torch itself would
choose, so that a wheel serves every machine; one of CUDA kernels, where nvcc and a CUDA build of torch are there; and
a pybind11 module that tells how they were built. They speak LibTorch's stable ABI, so one build serves later versions
of torch.

TORCH_ADEMAMIX_NATIVE=0 leaves the CPU's parts out; the package then runs on its reference kernels.
TORCH_ADEMAMIX_CUDA=0 leaves the CUDA library out; =1 demands it, also beside a torch without CUDA.
TORCH_CUDA_ARCH_LIST names the GPUs to build for, as for torch itself: "8.0;9.0+PTX".
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, include_paths, library_paths
except ImportError as error:
    sys.exit(
        f"torch-ademamix builds against the torch that it will run with ({error}): install torch, ninja and "
        "pybind11 first, then build with `pip install --no-build-isolation .`"
    )

PACKAGE = "torch_ademamix"

# Per library the flags that torch compiles its own kernels of that instruction set with.
CPU_CAPABILITIES = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
            "-DCPU_CAPABILITY_AVX512",
        ],
    }

# No contraction: where a product is added, the source says whether it is rounded in between (ops/value.h).
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # the compiler's own intrinsics headers
CXX_FLAGS += ["-Wno-psabi"]  # a note that gcc's calling convention was another one before 4.6


def cpu_libraries():
    sources = sorted(str(path) for path in Path("ops/cpu").glob("*.cpp"))
    depends = ["setup.py", *sorted(str(path) for path in Path("ops").rglob("*.h"))]
    for capability, flags in CPU_CAPABILITIES.items():
        yield CppExtension(
            f"{PACKAGE}._cpu_{capability}",
            sources,
            depends=depends,
            extra_compile_args=[*CXX_FLAGS, *flags, f"-DCPU_CAPABILITY={capability.upper()}"],
            py_limited_api=True,  # no symbol of Python's: these are libraries, not modules
        )


def python_module():
    return Pybind11Extension(
        f"{PACKAGE}._native",
        ["ops/python_module.cpp"],
        depends=["setup.py"],
        cxx_std=17,
        define_macros=[
            ("BUILT_WITH_TORCH", f'"{torch.__version__}"'),
            ("CPU_CAPABILITIES", f'"{" ".join(CPU_CAPABILITIES)}"'),
        ],
    )


class BuildNative(BuildExtension):
    def build_extension(self, extension):
        if isinstance(extension, CudaLibrary):
            return extension.build(self.get_ext_fullpath(extension.name), self.build_temp, self.force)
        # The libraries share their sources: each gets a folder of objects of its own.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        super().build_extension(extension)
        self.build_temp = shared

    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)
        return name if fullname.endswith("_native") else f"{name.split('.')[0]}.so"


CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"  # from Turing to Blackwell, later ones through PTX

NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xptxas=-v", "-DUSE_CUDA"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]


class CudaLibrary(Extension):
    """Built by plain nvcc commands: torch's own extension class demands a torch with CUDA."""

    def __init__(self):
        self.kernels = sorted(str(path) for path in Path("ops/cuda").glob("*.cu"))
        headers = [str(path) for path in Path("ops").rglob("*") if path.suffix in (".h", ".cuh")]
        super().__init__(f"{PACKAGE}._cuda", [], depends=sorted(headers))

    def build(self, target, folder, force):
        target = Path(target)
        sources = [*self.kernels, *self.depends, __file__]
        if not force and target.exists() and all(os.path.getmtime(s) < target.stat().st_mtime for s in sources):
            return
        folder = Path(folder, self.name)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cpus, architectures = os.cpu_count() or 1, architecture_flags()
        flags = [*NVCC_FLAGS, *architectures, f"--threads={cpus}"]
        flags += [f"-I{path}" for path in include_paths()]

        def compile(kernel):
            compiled = str(folder / f"{Path(kernel).stem}.o")
            self.run([nvcc(), *flags, "-c", kernel, "-o", compiled])
            return compiled

        with ThreadPoolExecutor(max(1, cpus // len(architectures))) as pool:  # each for its architectures at once
            objects = list(pool.map(compile, self.kernels))
        # torch_cuda isn't beside a torch without CUDA, where the library can be built but not loaded.
        libraries = ["torch", "torch_cpu", *(["torch_cuda"] if torch.version.cuda else []), "c10"]
        torch_libraries = [*(f"-L{path}" for path in library_paths()), *(f"-l{name}" for name in libraries)]
        link = ["-shared", "-cudart=shared", "-Xlinker=--no-as-needed"]
        self.run([nvcc(), *link, *objects, *torch_libraries, "-o", str(target)])

    @staticmethod
    def run(command):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(" ".join(command), result.stdout, sep="\n", flush=True)  # in one piece: others print beside it
        result.check_returncode()


def nvcc():
    home = Path(CUDA_HOME or "", "bin/nvcc")
    return str(home) if home.is_file() else shutil.which("nvcc")


def architecture_flags():
    known = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = []
    for name in re.split("[; ]+", asked or CUDA_ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            sys.exit(f"torch-ademamix: TORCH_CUDA_ARCH_LIST has {name!r}; it must be like '8.0;9.0+PTX'")
        number = match[1] + match[2]
        if not asked and f"compute_{number}" not in known:  # an older toolkit
            continue
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def cuda_libraries():
    wanted = os.environ.get("TORCH_ADEMAMIX_CUDA", "1" if torch.version.cuda else "0")
    if wanted == "0":
        return []
    problem = cuda_problem()
    if problem and "TORCH_ADEMAMIX_CUDA" in os.environ:
        sys.exit(f"torch-ademamix: TORCH_ADEMAMIX_CUDA=1, but {problem}")
    if problem:
        print(f"torch-ademamix: {problem}, building without CUDA kernels")
    return [] if problem else [CudaLibrary()]


def cuda_problem():
    if nvcc() is None:
        return "there is no nvcc on PATH or in CUDA_HOME"
    version = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    toolkit = re.search(r"release (\d+)", version)[1]
    if torch.version.cuda and torch.version.cuda.split(".")[0] != toolkit:
        return f"torch is built with CUDA {torch.version.cuda}, and nvcc is of CUDA {toolkit}"
    return None


def native_extensions():
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.environ.get("TORCH_ADEMAMIX_NATIVE") == "0":
        print("torch-ademamix: TORCH_ADEMAMIX_NATIVE=0, building without native kernels")
        return []
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        print(f"torch-ademamix: no C++ compiler ({compiler}) found, building without native kernels")
        return []
    return [*cpu_libraries(), python_module()]


setup(ext_modules=[*native_extensions(), *cuda_libraries()], cmdclass={"build_ext": BuildNative})

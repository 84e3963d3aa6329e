"""Builds the native libraries; everything else about the package stands in pyproject.toml.

One library of CPU kernels per instruction set, of which torch_ademamix.ops loads the one that torch itself would
choose, so that a wheel serves every machine; the host side of the CUDA kernels, which NVRTC compiles when they are
first used; and a pybind11 module that tells how they were built. They speak LibTorch's stable ABI, so one build serves
later versions of torch.

TORCH_ADEMAMIX_NATIVE=0 leaves them out; the package then runs on its reference kernels.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import setup

try:
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"torch-ademamix builds against the torch that it will run with ({error}): install torch, ninja and "
        "pybind11 first, then build with `pip install --no-build-isolation .`"
    )

PACKAGE = "torch_ademamix"

# No contraction: where a product is added, the source says whether it is rounded in between (ops/value.h).
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-uninitialized"]  # the compiler's own intrinsics headers


@cache
def compiler_macros():
    """The names of the macros that the C++ compiler defines: which one it is, and for what it compiles."""
    lines = compiler_output("-dM", "-E", "-x", "c++", os.devnull).splitlines()
    return {line.split()[1] for line in lines}


def compiler_output(*arguments):
    command = [*shlex.split(os.environ.get("CXX", "c++")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cpu_capabilities():
    """Per library of CPU kernels, the flags that torch compiles its own kernels of that instruction set with."""
    capabilities = {"default": []}
    if "__x86_64__" in compiler_macros():
        capabilities["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
        capabilities["avx512"] = [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
            "-DCPU_CAPABILITY_AVX512",
        ]
    return {name: [*flags, f"-DCPU_CAPABILITY={name.upper()}"] for name, flags in capabilities.items()}


def compile_flags():
    flags = [*CXX_FLAGS, *old_system_flags("ops/glibc.h", "ops/libstdcxx.h")]
    if "__clang__" not in compiler_macros():
        # Of the intrinsics headers again, and a note that gcc's calling convention was another one before 4.6.
        flags += ["-Wno-maybe-uninitialized", "-Wno-psabi"]
    return flags


def old_system_flags(*headers):
    is_linux = "__linux__" in compiler_macros()
    return [flag for header in headers for flag in ("-include", str(Path(header).resolve())) if is_linux]


def link_flags():
    # A compiler that links C++'s library statically would have the loader mix it with torch's, down to crashes.
    return ["-Wl,--exclude-libs,libstdc++.a"] if "__linux__" in compiler_macros() else []


def module_link_flags():
    """Links C++'s library into the module, if there is a static one: that of manylinux_2_28 is too old for pybind11.

    No exception leaves the module, so that it makes no difference that torch has another copy of that library.
    """
    static = compiler_output("-print-file-name=libstdc++.a").strip()
    if "__linux__" not in compiler_macros() or not Path(static).is_absolute():
        return []
    return ["-static-libstdc++", "-Wl,--gc-sections", *link_flags()]


def libraries():
    for capability, flags in cpu_capabilities().items():
        yield library(f"_cpu_{capability}", "ops/cpu", flags)
    yield library("_cuda", "ops/cuda", [], embedded_sources())


def embedded_sources():
    """The kernels' sources, which the CUDA library brings along, as a source of that library."""
    target = Path("build/device_source.cpp")
    runpy.run_path("ops/embed_sources.py")["embed"](target)
    return [str(target)]


def library(name, folder, flags, generated=()):
    return CppExtension(
        f"{PACKAGE}.{name}",
        [*sorted(str(path) for path in Path(folder).glob("*.cpp")), *generated],
        depends=["setup.py", *sorted(str(path) for path in Path("ops").rglob("*.h"))],
        extra_compile_args=[*compile_flags(), *flags],
        extra_link_args=link_flags(),
        py_limited_api=True,  # no symbol of Python's: these are libraries, not modules
    )


def python_module():
    return Pybind11Extension(
        f"{PACKAGE}._native",
        ["ops/python_module.cpp"],
        depends=["setup.py"],
        cxx_std=17,
        extra_compile_args=old_system_flags("ops/glibc.h"),
        extra_link_args=module_link_flags(),
        define_macros=[
            ("BUILT_WITH_TORCH", f'"{torch.__version__}"'),
            ("CPU_CAPABILITIES", f'"{" ".join(cpu_capabilities())}"'),
        ],
    )


class BuildNative(BuildExtension):
    def build_extension(self, extension):
        # The libraries share their sources: each gets a folder of objects of its own.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        super().build_extension(extension)
        self.build_temp = shared

    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)
        return name if fullname.endswith("_native") else f"{name.split('.')[0]}.so"


def native_extensions():
    compiler = os.environ.get("CXX", "c++").split()[0]
    if os.environ.get("TORCH_ADEMAMIX_NATIVE") == "0":
        print("torch-ademamix: TORCH_ADEMAMIX_NATIVE=0, building without native kernels")
        return []
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        print(f"torch-ademamix: no C++ compiler ({compiler}) found, building without native kernels")
        return []
    return [*libraries(), python_module()]


if __name__ == "__main__":  # tools/aarch64.py wants the libraries alone
    setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative})

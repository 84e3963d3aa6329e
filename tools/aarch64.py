"""Checks the native libraries on ARM without an ARM machine: `python -m tools.aarch64`, in three minutes.

A cross compiler compiles all sources, warnings being errors. tests/native/kernel_bits.cpp, linked to the CPU kernels
alone, then runs under qemu-user and, compiled for this machine, as it is: all hashes of results must be the same. And
the 8-bit step's instructions per parameter are counted.

Needs Debian's packages g++-aarch64-linux-gnu and qemu-user-static (or qemu-user).
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import origin
from tools import support

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/aarch64"
BITS = Path("tests/native/kernel_bits.cpp")
CROSS = "aarch64-linux-gnu-"
SYSROOT = "/usr/aarch64-linux-gnu"  # of Debian's cross compiler
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
PROCESSOR = "neoverse-n1"  # Graviton2's: NEON and no SVE

BLOCK_SIZE = 256  # elements, as in ops/blockwise.h
VECTOR = 4  # floats
PRODUCTS = BLOCK_SIZE // 8 * 7 * 2 // 2  # of Philox for a block: groups of 8 elements, 7 rounds, 2 words; 2 at a time
MOST_INSTRUCTIONS = 30  # per parameter


def libraries(compiler: str) -> list[Any]:
    """The native libraries as setup.py would build them with that compiler."""
    os.environ["CXX"] = compiler
    return list(runpy.run_path("setup.py")["libraries"]())


def compile_command(compiler: str, library: Any, source: str | Path, target: Path) -> list[str]:
    includes = [f"-I{folder}" for folder in (*library.include_dirs, ROOT)]
    flags = [*library.extra_compile_args, "-std=c++20", "-fPIC", "-Werror"]
    if not Path(source).stem.endswith("kernel") and Path(source) != BITS:
        flags.append("-O0")  # nothing of it is run
    return [*shlex.split(compiler), *flags, *includes, "-c", str(source), "-o", str(target)]


def compile_all(compiler: str, library: Any, sources: Sequence[str | Path], pool: ThreadPoolExecutor) -> list[Path]:
    """Compiles sources with a library's flags; returns the objects, in their order."""
    folder = BUILD / Path(shlex.split(compiler)[-1]).name / library.name
    folder.mkdir(parents=True)
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    commands = [compile_command(compiler, library, *pair) for pair in zip(sources, objects, strict=True)]
    list(pool.map(run, commands))
    return objects


def hashes(compiler: str, objects: Sequence[Path], emulator: Sequence[str] = ()) -> list[str]:
    """What kernel_bits prints, linked of these objects."""
    program = objects[0].parent / "kernel_bits"
    run([*shlex.split(compiler), *map(str, objects), "-o", str(program)])
    return run([*emulator, str(program)]).splitlines()


def instructions_per_param(kernel: Path) -> float:
    """Of the 8-bit step with 16-bit exp_avg_slow and stochastic rounding: whole blocks of finite elements."""
    listing = run([f"{CROSS}objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(kernel)])
    name = r"step_whole_block<[\w:]*SignedSqrt, [\w:]*Linear, [\w:]*FourthRoot>"
    (function,) = re.findall(rf"^\w+ <.*{name}.*>:\n((?:.+\n)+)", listing, re.MULTILINE)
    addresses, texts = zip(*re.findall(r"^ +(\w+):\t(.*)", function, re.MULTILINE), strict=True)
    loops = [texts[first:last] for first, last in innermost_loops(addresses, texts)]

    def longest(operation: str, without: str = "-") -> Sequence[str]:
        return max((loop for loop in loops if count(loop, operation) and not count(loop, without)), key=len)

    def count(loop: Sequence[str], operation: str) -> int:
        return sum(text.startswith(operation) for text in loop)

    moments, random = longest("fsqrt", without="fdiv"), longest("umull")
    params = longest("fdiv")  # the other one rounds to nearest
    once = len(texts) - sum(map(len, loops))
    per_block = once + PRODUCTS * len(random) / count(random, "umull")
    per_block += BLOCK_SIZE / VECTOR * (len(params) / count(params, "fdiv") + len(moments) / count(moments, "fsqrt"))
    return per_block / BLOCK_SIZE


def innermost_loops(addresses: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The indices between which a branch goes back, and no other does."""
    index = {address: i for i, address in enumerate(addresses)}
    loops = []
    for i, text in enumerate(texts):
        branch = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?([0-9a-f]+) <", text)
        if branch and index.get(branch[1], len(texts)) <= i:
            loops.append((index[branch[1]], i + 1))
    for first, last in loops:
        inside = [loop for loop in loops if first <= loop[0] and loop[1] <= last]
        if inside == [(first, last)]:
            yield first, last


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.aarch64", description=__doc__)
    parser.add_argument("--record", action="store_true", help="the outcome, for the support matrix")
    args = parser.parse_args()
    begin = time.monotonic()
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    compiler, own_compiler = f"{CROSS}g++", os.environ.get("CXX", "c++")
    if emulator is None or shutil.which(compiler) is None:
        sys.exit("aarch64: apt-get install g++-aarch64-linux-gnu qemu-user-static")

    os.chdir(ROOT)
    shutil.rmtree(BUILD, ignore_errors=True)
    capability = torch.backends.cpu.get_cpu_capability().lower().split("_")[0]
    own = {library.name: library for library in libraries(own_compiler)}
    own_library = own.get(f"torch_ademamix._cpu_{capability}", own["torch_ademamix._cpu_default"])
    kernels = sorted(map(str, Path("ops/cpu").glob("*_kernel.cpp")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cpu, *others = libraries(compiler)
        objects = dict(zip([*cpu.sources, BITS], compile_all(compiler, cpu, [*cpu.sources, BITS], pool), strict=True))
        for library in others:
            compile_all(compiler, library, library.sources, pool)
        own_objects = compile_all(own_compiler, own_library, [*kernels, BITS], pool)
    print(f"compiled {sum(len(library.sources) for library in (cpu, *others))} sources for aarch64", flush=True)

    on_arm = hashes(
        compiler, [objects[source] for source in (*kernels, BITS)], [emulator, "-cpu", PROCESSOR, "-L", SYSROOT]
    )
    here = hashes(own_compiler, own_objects)
    differences = [f"  {mine} here, {theirs}" for mine, theirs in zip(here, on_arm, strict=True) if mine != theirs]
    print(f"{len(here) - len(differences)} of {len(here)} results equal those of {own_library.name}", flush=True)
    print(*differences, sep="\n", end="\n" if differences else "")

    count = instructions_per_param(objects["ops/cpu/blockwise_kernel.cpp"])
    print(f"8-bit step: {count:.1f} instructions per parameter, of at most {MOST_INSTRUCTIONS}")
    print(f"{time.monotonic() - begin:.0f} s")
    if args.record:
        print(
            support.record_kernels(
                "aarch64", len(here) - len(differences), len(differences), origin.commit()
            ).relative_to(ROOT)
        )
    return 1 if differences or not here or count > MOST_INSTRUCTIONS else 0


if __name__ == "__main__":
    sys.exit(main())

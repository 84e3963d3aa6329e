"""The CUDA library, compiled for every architecture: what the compiler says of it, and what it made of the loops."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import expecttest
import pytest
import sass

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")

# Issue slots that an H200 has per parameter, while its memory moves the 14.1 bytes of one: 33e12 lane instructions
# and 4.3e12 bytes per second give 109.
INSTRUCTIONS_PER_PARAMETER = {"NEAREST": 72, "REMAINDER": 85, "STOCHASTIC": 85}
INSTRUCTIONS_OF_8_BIT_SLOW_EMA = 5  # more

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH"),
]
needs_cuobjdump = pytest.mark.skipif(sass.find_cuobjdump() is None, reason="there is no cuobjdump (pip install triton)")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what nvcc and its assembler said."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "TORCH_ADEMAMIX_CUDA": "1", "TORCH_ADEMAMIX_NATIVE": "0"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/objects"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return folder / "torch_ademamix/_cuda.so", result.stdout


def reports(log: str) -> Iterator[tuple[str, str, str]]:
    """Per architecture and kernel: its demangled name, and ptxas' report."""
    parts = re.split(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)[1:]
    names = "\n".join(parts[::3])
    demangled = subprocess.run(["c++filt"], input=names, check=True, capture_output=True, text=True).stdout
    yield from zip(demangled.splitlines(), parts[1::3], parts[2::3], strict=True)


def test_compiles_without_warnings(build: tuple[Path, str]) -> None:
    library, log = build
    assert library.is_file()
    assert [line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)] == []
    assert sorted({architecture for _, architecture, _ in reports(log)}) == sorted(ARCHITECTURES)


def test_nothing_spills(build: tuple[Path, str]) -> None:
    for name, architecture, report in reports(build[1]):
        memory = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", report)
        assert memory
        assert all(amount == "0" for amount, _ in memory), f"{name} on {architecture}: {memory}"


def test_registers(build: tuple[Path, str]) -> None:
    """The most that a kernel of a kind takes; more than so many, and fewer threads fit on a multiprocessor."""
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    if "release 13.0" not in version:
        pytest.skip("recorded with nvcc 13.0")
    most: dict[str, dict[str, int]] = {}
    for name, architecture, report in reports(build[1]):
        kind = " ".join(re.search(r"(\w+)_kernel<(?:c10::|ademamix::\w+)?(\w*)", name).groups()).strip()
        if rounding := re.search(r"ParamRounding\)([12])", name):
            kind += (" remainder", " stochastic")[int(rounding[1]) - 1]
        used = int(re.search(r"Used (\d+) registers", report)[1])
        row = most.setdefault(kind, dict.fromkeys(ARCHITECTURES, 0))
        row[architecture] = max(row[architecture], used)
    lines = [f"{'':34}" + "".join(f"{a:>8}" for a in ARCHITECTURES)]
    lines += [f"{kind:34}" + "".join(f"{row[a]:8}" for a in ARCHITECTURES) for kind, row in sorted(most.items())]
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
                                     sm_75   sm_80   sm_90  sm_100  sm_120
blockwise_step BFloat16                 95      94      95      93      95
blockwise_step BFloat16 remainder       95      95      95      96      96
blockwise_step BFloat16 stochastic     103     113     115     127     119
blockwise_step Half                     95      94      95      93      95
blockwise_step double                  134     132     132     138     142
blockwise_step float                    95      95      95      96      95
dequantize                              24      24      24      26      24
prologue double                         42      40      42      46      40
prologue float                          44      40      42      42      40
quantize                                31      32      32      30      33
step BFloat16                           62      70      70      70      70
step BFloat16 remainder                 78      78      78      78      78
step BFloat16 stochastic                80      80      80      74      76
step Half                               68      70      70      70      70
step double                            104     101     102      96      98
step float                              74      74      72      64      64""",
    )


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_accesses(build: tuple[Path, str], architecture: str) -> None:
    """16 bytes at a time: unquantized, five tensors are read and four written; of codes some are 8 bytes."""
    for kernel in sass.kernels(build[0], architecture, lambda name: "step_kernel" in name):
        loads = len(kernel.positions(r"LDG\.E\.128\.SYS|LDG\.E\.128 "))
        stores = len(kernel.positions(r"STG\.E\.128"))
        blockwise = "blockwise" in kernel.name
        assert loads >= (2 if blockwise else 4), kernel.name
        assert stores >= (1 if blockwise else 3), kernel.name
        assert kernel.positions(r"\bLDL|\bSTL") == [], kernel.name


@needs_cuobjdump
def test_instructions_of_the_blockwise_step(build: tuple[Path, str]) -> None:
    """Of bfloat16 parameters and gradients: fewer than the memory leaves time for."""
    bf16 = "blockwise_step_kernelIN3c108BFloat16ES2_"
    counts = {
        kernel.name: kernel.loop_length(r"LDG\.E\.128 ", r"STG\.E\.128", r"STG\.E\.64") / 8
        for kernel in sass.kernels(build[0], "sm_90", lambda name: bf16 in name)
    }
    print(*counts.items(), sep="\n")
    assert len(counts) == 12
    for name, count in counts.items():
        rounding = list(INSTRUCTIONS_PER_PARAMETER)[int(re.search(r"ParamRoundingE(\d)", name)[1])]
        slow_in_8_bits = "10SignedSqrt" in name
        assert count <= INSTRUCTIONS_PER_PARAMETER[rounding] + slow_in_8_bits * INSTRUCTIONS_OF_8_BIT_SLOW_EMA, name


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_shared_memory(build: tuple[Path, str], architecture: str) -> None:
    """Nor a reduction by way of it: warps only shuffle."""
    for kernel in sass.kernels(build[0], architecture, lambda name: "blockwise" in name or "quantize" in name):
        assert kernel.positions(r"\bLDS|\bSTS|\bATOMS") == [], kernel.name

"""The CUDA kernels, compiled by NVRTC for every architecture, and what it made of their loops; without a GPU."""

import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import expecttest
import pytest

from tests.helpers import sass
from tests.helpers.kernels import NVRTC, compile_kernels, is_typical, kernels
from torch_ademamix import ops

ARCHITECTURES = (75, 80, 86, 90, 100, 120)
ARCHITECTURES_BY_NVRTC = {12: (75, 90), 13: ARCHITECTURES}
ALL = os.environ.get("ALL_VARIANTS") == "1"
RECORDED = 13  # the NVRTC whose registers are written down

# Issue slots that an H200 has per parameter, while its memory moves the 14.1 bytes of one: 33e12 lane instructions
# and 4.3e12 bytes per second give 109.
INSTRUCTIONS_PER_PARAMETER = {"NEAREST": 72, "REMAINDER": 81, "REMAINDER8": 91, "STOCHASTIC": 80}
MORE_INSTRUCTIONS = {"Linear": 0, "SignedSqrt": 4, "Linear12": 5}  # by exp_avg_slow's format
MOST_WITH_12_BITS = 85

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ops.native is None, reason="built without native kernels"),
    pytest.mark.skipif(
        not all(file.is_file() for file in NVRTC.values()), reason="there is no NVRTC (`make test` fetches it)"
    ),
]
needs_cuobjdump = pytest.mark.skipif(sass.find_cuobjdump() is None, reason="there is no cuobjdump (pip install triton)")

Kernels = dict[str, Path]  # the code of each kernel, by its name
Compiled = Callable[..., Kernels]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Kernels by the version of NVRTC and the GPU's: every variant, or those that stand for all; each compiled once."""
    folder = tmp_path_factory.mktemp("cuda")

    @cache
    def compile_some(nvrtc: int, capability: int, typical: bool) -> Kernels:
        wanted = [name for name in kernels() if is_typical(name) == typical]
        files = compile_kernels(wanted, NVRTC[nvrtc], capability, folder / f"{nvrtc}-{capability}-{typical}")
        for file in files:
            file.write_bytes(file.read_bytes().partition(b"\n")[2])  # the code alone
        return dict(zip(wanted, files, strict=True))

    def compile_all(nvrtc: int, capability: int, every_variant: bool = ALL) -> Kernels:
        others = compile_some(nvrtc, capability, False) if every_variant else {}
        return {**compile_some(nvrtc, capability, True), **others}

    return compile_all


@cache
def resources(code: Path) -> dict[str, int]:
    """What a kernel takes: REG, STACK, SHARED, LOCAL."""
    command = [str(sass.find_cuobjdump()), "--dump-resource-usage", str(code)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def check_resources(codes: Kernels) -> None:
    """Nothing spills, and warps only shuffle: there is no shared memory."""
    for name, code in codes.items():
        used = resources(code)
        assert (used["STACK"], used["LOCAL"], used["SHARED"]) == (0, 0, 0), f"{name}: {used}"


@needs_cuobjdump
def test_kernels_compile(compiled: Compiled) -> None:
    check_resources(compiled(RECORDED, 90))


@pytest.mark.nightly
@needs_cuobjdump
@pytest.mark.parametrize("nvrtc", NVRTC)
def test_kernels_compile_for_every_architecture(
    compiled: Compiled, nvrtc: int, record_property: Callable[[str, str], None]
) -> None:
    for capability in ARCHITECTURES_BY_NVRTC[nvrtc]:
        check_resources(compiled(nvrtc, capability))
    architectures = ", ".join(f"sm_{capability}" for capability in ARCHITECTURES_BY_NVRTC[nvrtc])
    record_property("compiled", f"{nvrtc}, {architectures}")  # for the support matrix


@pytest.mark.nightly
@needs_cuobjdump
def test_every_variant_compiles(compiled: Compiled) -> None:
    check_resources(compiled(RECORDED, 90, every_variant=True))


@pytest.mark.nightly
@needs_cuobjdump
def test_registers(compiled: Compiled) -> None:
    """The most that a kernel of a kind takes; more than so many, and fewer threads fit on a multiprocessor."""
    most: dict[str, dict[int, int]] = {}
    for architecture in ARCHITECTURES:
        for name, code in compiled(RECORDED, architecture).items():
            if not is_typical(name):
                continue
            kind, types = re.match(r"(\w+)_kernel<(.*)>", name).groups()
            if kind.endswith("step"):
                kind += " " + types.split(", ")[0]
                rounding = re.search(r"ParamRounding::(\w+)", types)[1]
                kind += "" if rounding == "NEAREST" else f" {rounding.lower()}"
            elif kind == "prologue":
                kind += " " + types.split(", ")[0]
            row = most.setdefault(kind, dict.fromkeys(ARCHITECTURES, 0))
            row[architecture] = max(row[architecture], resources(code)["REG"])
    lines = [f"{'':34}" + "".join(f"{f'sm_{a}':>8}" for a in ARCHITECTURES)]
    lines += [f"{kind:34}" + "".join(f"{row[a]:8}" for a in ARCHITECTURES) for kind, row in sorted(most.items())]
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
                                     sm_75   sm_80   sm_86   sm_90  sm_100  sm_120
blockwise_step bfloat16                116      72      72      70      72      72
blockwise_step bfloat16 remainder      117      86      87      80      87      80
blockwise_step bfloat16 remainder8     124      93      95      92      99     111
blockwise_step bfloat16 stochastic     120      91      91      91     102     102
blockwise_step double                  128     126     126     126     136     136
blockwise_step float                   118      83      85      80      87      79
blockwise_step half                    115      72      72      70      72      72
dequantize                              26      24      24      24      24      26
prologue double                         64      62      63      60      62      62
prologue float                          64      62      63      60      64      62
quantize                                31      32      32      32      32      34
step bfloat16                           50      52      52      48      48      54
step bfloat16 remainder                 59      56      56      56      58      58
step bfloat16 remainder8                62      56      56      56      60      60
step bfloat16 stochastic                64      54      54      54      58      58
step double                             72      76      76      76      76      74
step float                              60      55      55      55      56      56
step half                               50      52      52      48      48      54""",
    )


@pytest.mark.first_case
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES if ALL else (90, 75, 120))
def test_wide_accesses(compiled: Compiled, architecture: int) -> None:
    """16 bytes at a time: unquantized, five tensors are read and four written; of codes some are 8 bytes."""
    for name, code in compiled(RECORDED, architecture).items():
        if "step_kernel" not in name or not is_typical(name):
            continue
        (kernel,) = sass.kernels(code, name)
        loads = len(kernel.positions(r"LDG\.E\.128\.SYS|LDG\.E\.128 "))
        stores = len(kernel.positions(r"STG\.E\.128"))
        blockwise = "blockwise" in kernel.name
        assert loads >= (2 if blockwise else 4), kernel.name
        assert stores >= (1 if blockwise else 3), kernel.name
        assert kernel.positions(r"\bLDL|\bSTL") == [], kernel.name


def loop_length(name: str, code: Path) -> int:
    """Where state is in words alone, nothing is stored in 8 bytes."""
    stores = [r"STG\.E\.128", *([] if "FourthRoot4" in name else [r"STG\.E\.64"])]
    return next(sass.kernels(code, name)).loop_length(r"LDG\.E\.128 ", *stores)


@pytest.mark.nightly
@needs_cuobjdump
def test_instructions_of_the_blockwise_step(compiled: Compiled) -> None:
    """Of bfloat16 parameters and gradients: fewer than the memory leaves time for."""
    counts = {
        name: loop_length(name, code) / 8
        for name, code in compiled(RECORDED, 90, every_variant=True).items()
        if name.startswith("blockwise_step_kernel<bfloat16, bfloat16")
    }
    print(*counts.items(), sep="\n")
    assert len(counts) == 30
    for name, count in counts.items():
        if "NoCodes" in name:  # without exp_avg
            with_exp_avg = name.replace("NoCodes", "SignedSqrt4" if "Linear12" in name else "SignedSqrt")
            assert count < counts[with_exp_avg.replace("FourthRoot4", "FourthRoot")], name
        rounding = re.search(r"ParamRounding::(\w+)", name)[1]
        slow = name.split(", ")[3]
        assert count <= INSTRUCTIONS_PER_PARAMETER[rounding] + MORE_INSTRUCTIONS[slow], name
        assert count <= MOST_WITH_12_BITS or slow != "Linear12" or rounding == "REMAINDER8", name

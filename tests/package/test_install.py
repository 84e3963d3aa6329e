"""The package as pip installs it: in an environment of its own, used from outside the sources."""

import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from tools import wheel as tool
from torch_ademamix import ops

SHARED = Path(torch.__file__).parents[1]  # torch and pytest, for the new environments

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ops", "torch_ademamix")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__")

# Of the tests that `make wheel-check` runs against the installed package, those that take seconds.
QUICK_TESTS = ("test_blockwise", "test_errors", "test_main", "test_optimizer")

# Imports the package, trains one step, and tells where it came from and what it said.
USE = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch_ademamix
    from torch_ademamix import ops
    p = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch_ademamix.AdEMAMix([p], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        p.grad = torch.ones(1000)
        optimizer.step()
print(json.dumps({
    "file": torch_ademamix.__file__,
    "native": ops.native is not None,
    "said": [str(w.message) for w in said],
    "p": p[0].item(),
}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a fresh clone has."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (tool.ROOT / name).is_dir():
            shutil.copytree(tool.ROOT / name, folder / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(tool.ROOT / name, folder)
    return folder


def use(python: Path, folder: Path) -> dict:
    """What USE says of the package that is installed for that Python."""
    used = json.loads(tool.run(python, "-c", USE, env=tool.environment(python), cwd=folder).splitlines()[-1])
    assert Path(used["file"]).is_relative_to(python.parents[1].resolve())
    assert used["p"] < 1
    return used


def symbols_of_any_version(library: bytes) -> set[str]:
    """What a library needs without saying of which version: auditwheel can't tell who has it."""
    from elftools.elf.elffile import ELFFile  # which auditwheel brings

    file = ELFFile(BytesIO(library))
    symbols = file.get_section_by_name(".dynsym")
    versions = file.get_section_by_name(".gnu.version")
    return {
        symbol.name
        for i, symbol in enumerate(symbols.iter_symbols())
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
        if isinstance(versions.get_symbol(i)["ndx"], str)
    }


def clean_environment(**changes: str) -> dict[str, str]:
    dropped = ("PYTHONPATH", "TORCH_ADEMAMIX_NATIVE")
    return {k: v for k, v in os.environ.items() if k not in dropped} | changes


@pytest.mark.nightly
@pytest.mark.skipif(ops.native is None, reason="built without native kernels")
def test_wheel(tmp_path):
    pytest.importorskip("auditwheel", reason="needs auditwheel, which is for Linux")
    for folder in (tool.ROOT / "build").glob("lib*"):  # modules that are no longer there would be packed
        shutil.rmtree(folder)
    unaudited = tool.build(tool.ROOT, tmp_path / "unaudited", clean_environment())  # where `make build` left objects
    wheel = tool.audit(unaudited, tmp_path / "audited")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag = re.fullmatch(rf"torch_ademamix-[\d.]+-{version}-{version}-manylinux_2_(\d+)_[\w.]+\.whl", wheel.name)
    assert tag is not None
    assert int(tag[1]) <= 28  # that of Enterprise Linux 8

    names = zipfile.ZipFile(wheel).namelist()
    libraries = {name for name in names if ".so" in name}
    assert {f"torch_ademamix/_cpu_{capability}.so" for capability in ops.native.cpu_capabilities.split()} < libraries
    assert [name for name in libraries if not name.startswith("torch_ademamix/")] == []  # nothing is bundled
    assert "torch_ademamix/_cuda.so" in libraries
    with zipfile.ZipFile(wheel) as archive:
        for library in libraries:
            needed = symbols_of_any_version(archive.read(library))
            assert {name for name in needed if not name.startswith(("aoti_torch_", "torch_", "Py", "_Py"))} == set()
    assert "torch_ademamix/py.typed" in names
    modules = {str(path.relative_to(tool.ROOT)) for path in (tool.ROOT / "torch_ademamix").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert not [name for name in names if name.endswith((".h", ".cuh"))]  # they are in _cuda.so
    assert not [name for name in names if name.startswith(("ops/", "tests/", "benchmarks/", "tools/"))]

    python = tool.install(wheel, tmp_path / "environment", SHARED)
    used = use(python, tmp_path)
    assert used["native"]
    assert used["said"] == []
    tool.copy_tests(tmp_path / "copy")
    assert tool.run_tests(python, tmp_path / "copy", tool.find_tests(tmp_path / "copy", QUICK_TESTS))


def test_source_distribution_has_what_a_build_needs(tmp_path):
    with tarfile.open(tool.source_distribution(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [name for name in SOURCES if (tool.ROOT / name).is_file()]
    for folder in ("ops", "torch_ademamix"):
        needed += [str(path.relative_to(tool.ROOT)) for path in (tool.ROOT / folder).rglob("*") if path.is_file()]
    missing = {name for name in needed if not name.endswith((".so", ".pyc"))} - names
    assert not missing
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("reason", [pytest.param("switched off", marks=pytest.mark.nightly), "no compiler"])
def test_without_native_kernels(checkout, tmp_path, reason):
    if reason == "no compiler":
        (tmp_path / "empty").mkdir()
        env = clean_environment(PATH=str(tmp_path / "empty"))
        env.pop("CXX", None)
    else:
        env = clean_environment(TORCH_ADEMAMIX_NATIVE="0")
    wheel = tool.build(checkout, tmp_path / "wheel", env)
    assert wheel.name.endswith("-py3-none-any.whl")
    used = use(tool.install(wheel, tmp_path / "environment", SHARED), tmp_path)
    assert not used["native"]
    (text,) = used["said"]
    assert "built without its native kernels" in text

"""The package as pip installs it: in an environment of its own, used from outside the sources."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from torch_ademamix import ops

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ops", "torch_ademamix")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__")

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


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path, env: dict[str, str]) -> Path:
    """The wheel that a fresh checkout gives."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=NOT_SOURCES)
        else:
            shutil.copy(ROOT / name, checkout)
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    run(*wheel, "--wheel-dir", folder, checkout, env=env, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def use_wheel(wheel: Path, folder: Path, env: dict[str, str]) -> dict:
    """Installs the wheel into a new environment that shares torch with this one, and uses it."""
    environment = folder / "environment"
    builder = venv.EnvBuilder()
    builder.create(environment)
    python = Path(builder.ensure_directories(environment).env_exe)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site_packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, env=env, cwd=folder)
    used = json.loads(run(python, "-c", USE, env=env, cwd=folder).splitlines()[-1])
    assert Path(used["file"]).is_relative_to(environment.resolve())
    assert used["p"] < 1
    return used


def clean_environment(**changes: str) -> dict[str, str]:
    dropped = ("PYTHONPATH", "TORCH_ADEMAMIX_NATIVE", "TORCH_ADEMAMIX_CUDA")
    return {k: v for k, v in os.environ.items() if k not in dropped} | changes


@pytest.mark.skipif(ops.native is None, reason="built without native kernels")
def test_wheel(tmp_path):
    env = clean_environment()
    wheel = build_wheel(tmp_path, env)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"torch_ademamix/_cpu_{capability}.so" for capability in ops.native.cpu_capabilities.split()} <= names
    assert "torch_ademamix/py.typed" in names
    assert not [name for name in names if name.startswith(("ops/", "tests/", "benchmarks/"))]
    used = use_wheel(wheel, tmp_path, env)
    assert used["native"]
    assert used["said"] == []


@pytest.mark.parametrize("reason", ["switched off", "no compiler"])
def test_without_native_kernels(tmp_path, reason):
    if reason == "no compiler":
        (tmp_path / "empty").mkdir()
        env = clean_environment(PATH=str(tmp_path / "empty"))
        for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
            env.pop(name, None)
    else:
        env = clean_environment(TORCH_ADEMAMIX_NATIVE="0", TORCH_ADEMAMIX_CUDA="0")
    wheel = build_wheel(tmp_path, env)
    assert wheel.name.endswith("-py3-none-any.whl")
    used = use_wheel(wheel, tmp_path, env)
    assert not used["native"]
    (text,) = used["said"]
    assert "built without its native kernels" in text

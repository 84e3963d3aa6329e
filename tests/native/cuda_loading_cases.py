"""How kernels come to be loaded: compiled once, kept on disk, and what happens where something of that fails."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from config import HYPERPARAMETERS, make_lists
from host import SOURCES, driver, set_up, take_log

CASE = [((40,), *["contiguous"] * 3)]

# Takes a step in a process of its own: what it logs of the loading, and what it says.
STEP = """
import json, sys
from pathlib import Path
import torch
from config import HYPERPARAMETERS, make_lists
from host import driver, set_up, take_log
cache, sources, failing, capability = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
set_up(cache, sources)
driver.set_attribute(75, capability // 10)
driver.set_attribute(76, capability % 10)
if failing:
    driver.fail_next(failing.encode(), 2)
lists = make_lists([((40,), *["contiguous"] * 3)])
error = ""
try:
    torch.ops.cuda_on_host.ademamix_step_(*lists, 1e-2, **HYPERPARAMETERS)
except RuntimeError as e:
    error = str(e)
log = driver.take_log().decode().split()
assert driver.pushed_contexts() == 0
torch.ops.cuda_on_host.ademamix_step_(*lists, 1e-2, **HYPERPARAMETERS)
print(json.dumps([log, driver.take_log().decode().split(), error]))
"""


def command(cache: Path, failing: str = "", capability: int = 90, sources: Path = SOURCES) -> list[str]:
    paths = [str(SOURCES.parent / "tests"), str(Path(__file__).parent), str(SOURCES.parent)]
    code = f"import sys; sys.path[:0] = {paths}\n{STEP}"
    return [sys.executable, "-c", code, str(cache), str(sources), failing, str(capability)]


def step(cache: Path, **options: Any) -> tuple[list[str], list[str], str, str]:
    """The logs of two steps, the error of the first, and what came on stderr."""
    done = subprocess.run(command(cache, **options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (*json.loads(done.stdout.splitlines()[-1]), done.stderr)


COMPILED = ["compile-sm_90", "load", "launch"] * 2  # the prologue and the step
CACHED = ["load", "launch"] * 2
LOADED = ["launch"] * 2


def test_compiled_once_and_kept(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    first, second, _, said = step(cache)
    assert (first, second) == (COMPILED, LOADED)
    assert said.count("compiling CUDA kernels for sm_90") == 1
    assert str(cache) in said
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["prologue_kernel", "step_kernel"]
    first, second, _, said = step(cache)
    assert (first, second) == (CACHED, LOADED)
    assert "compiling" not in said


def test_a_later_gpu_gets_the_latest_known_code(tmp_path: Path) -> None:
    assert step(tmp_path, capability=121)[0] == ["compile-compute_90", "load", "launch"] * 2
    assert step(tmp_path, capability=90)[0] == COMPILED  # another GPU's code isn't taken


def test_a_gpu_that_nvrtc_no_longer_knows(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no code for GPUs of compute capability 7.0"):
        step(tmp_path, capability=70)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "another"])
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: str) -> None:
    step(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, data in whole.items():
        damaged = {"empty": b"", "cut": data[:-1], "changed": data[:-1] + b"~", "another": b"\0" * 999}[damage]
        path.write_bytes(damaged)
    assert step(tmp_path)[0] == COMPILED
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    first, second, _, _ = step(file / "cache")
    assert (first, second) == (COMPILED, LOADED)


def test_many_processes_at_once(tmp_path: Path) -> None:
    processes = [subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len(list(tmp_path.iterdir())) == 2  # nothing unfinished is left
    assert step(tmp_path)[0] == CACHED


def test_sources_are_part_of_the_key(tmp_path: Path) -> None:
    """A changed comment is enough."""
    sources, cache = tmp_path / "ops", tmp_path / "cache"
    shutil.copytree(SOURCES, sources)
    assert step(cache, sources=sources)[0] == COMPILED
    assert step(cache, sources=sources)[0] == CACHED
    with open(sources / "value.h", "a") as file:
        file.write("// more\n")
    assert step(cache, sources=sources)[0] == COMPILED


def test_the_compilers_log_is_in_the_error(tmp_path: Path) -> None:
    error = step(tmp_path, failing="nvrtcCompileProgram")[2]
    assert "NVRTC could not compile prologue_kernel<float, 16> for sm_90" in error
    assert "error: as the test wants it" in error


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("cuDeviceGet", "device"),
        ("cuDevicePrimaryCtxRetain", "context"),
        ("cuDeviceGetAttribute", "device attribute"),
        ("cuCtxPushCurrent_v2", "context"),
        ("cuModuleLoadData", "loading a kernel"),
        ("cuModuleGetFunction", "finding a kernel"),
        ("cuOccupancyMaxActiveBlocksPerMultiprocessor", "occupancy"),
        ("cuLaunchKernel", "kernel launch"),
    ],
)
def test_a_failing_call_is_an_error_and_the_next_step_succeeds(tmp_path: Path, function: str, what: str) -> None:
    _, second, error, _ = step(tmp_path, failing=function)
    assert f"torch_ademamix: {what}: CUDA error: out of memory (CUDA_ERROR_OUT_OF_MEMORY)" in error
    assert second.count("launch") == 2


@pytest.fixture
def capturing() -> Iterator[None]:
    driver.set_capturing(True)
    yield
    driver.set_capturing(False)


@pytest.mark.usefixtures("capturing")
def test_nothing_is_loaded_during_a_capture(tmp_path: Path) -> None:
    set_up(tmp_path)
    lists = make_lists(CASE, torch.float64, torch.float16)
    before = lists.clone()
    take_log()
    with pytest.raises(RuntimeError, match=r"isn't loaded, which a graph's capture doesn't allow.*init_state"):
        torch.ops.cuda_on_host.ademamix_step_(*lists, 1e-2, **HYPERPARAMETERS)
    assert "load" not in take_log("load")
    assert torch.equal(lists.steps[0], before.steps[0])


def test_launches_go_to_torchs_stream() -> None:
    driver.set_current_stream(0x77)
    lists = make_lists(CASE)
    torch.ops.cuda_on_host.ademamix_step_(*lists, 1e-2, **HYPERPARAMETERS)  # the stand-in refuses another stream
    driver.set_current_stream(0)
    assert driver.pushed_contexts() == 0

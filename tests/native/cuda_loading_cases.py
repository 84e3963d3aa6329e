"""How kernels come to be loaded: compiled once, kept on disk, and what happens where something of that fails."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from config import StepLists, make_lists, step_call
from host import SOURCES, driver, set_up, take_log

# A process for each case, since kernels are loaded once in each; forked from one that has torch.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["host"])


def make_call(*dtypes: torch.dtype) -> tuple[StepLists, Callable[[], None]]:
    lists = make_lists([((40,), *["contiguous"] * 3)], *dtypes)
    op, args, kwargs = step_call(torch.ops.cuda_on_host._ademamix_step_, lists)
    return lists, lambda: op(*args, **kwargs)


def take_steps(results: Any, cache: Path, failing: str, capability: int, sources: Path) -> None:
    """In a process of its own."""
    set_up(cache, sources)
    driver.set_attribute(75, capability // 10)
    driver.set_attribute(76, capability % 10)
    if failing:
        driver.fail_next(failing.encode(), 2)
    _, take_step = make_call()
    logs, errors = [], []
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        for _ in range(2):
            try:
                take_step()
            except RuntimeError as error:
                errors.append(str(error))
            logs.append(driver.take_log().decode().split())
            assert driver.pushed_contexts() == 0
        said.seek(0)
        results.put((*logs, errors, said.read().decode()))


def start(cache: Path, failing: str = "", capability: int = 90, sources: Path = SOURCES) -> Any:
    results = PROCESSES.Queue()
    PROCESSES.Process(target=take_steps, args=(results, cache, failing, capability, sources)).start()
    return results


def step(*args: Any, **kwargs: Any) -> tuple[list[str], list[str], list[str], str]:
    """The logs of two steps, their errors, and what came on stderr."""
    return start(*args, **kwargs).get(timeout=120)  # type: ignore[no-any-return]


LOADED = ["launch"] * 2  # the prologue and the step
COMPILED = ["compile-sm_90", "load"] * 2 + LOADED  # a kernel that can't be had is known before the first is launched
CACHED = ["load"] * 2 + LOADED


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
    assert step(tmp_path, capability=121)[0] == ["compile-compute_90", "load"] * 2 + LOADED
    assert step(tmp_path, capability=90)[0] == COMPILED  # another GPU's code isn't taken


def test_a_gpu_that_nvrtc_no_longer_knows(tmp_path: Path) -> None:
    _, _, errors, _ = step(tmp_path, capability=70)
    assert "no code for GPUs of compute capability 7.0" in errors[1]


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
    for results in [start(tmp_path) for _ in range(3)]:
        assert results.get(timeout=120)[1] == LOADED
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
    (error,) = step(tmp_path, failing="nvrtcCompileProgram")[2]
    kernel = "step_kernel<float, float, true, ParamRounding::NEAREST, SHORT_LIST>"
    assert f"NVRTC could not compile {kernel} for sm_90" in error
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
    _, second, (error,), _ = step(tmp_path, failing=function)
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
    lists, take_step = make_call(torch.float64, torch.float16)
    before = lists.clone()
    take_log()
    with pytest.raises(RuntimeError, match=r"isn't loaded, which a graph's capture doesn't allow.*init_state"):
        take_step()
    assert "load" not in take_log("load")
    assert torch.equal(lists.steps[0], before.steps[0])


def test_launches_go_to_torchs_stream() -> None:
    driver.set_current_stream(0x77)
    make_call()[1]()  # the stand-in refuses another stream
    driver.set_current_stream(0)
    assert driver.pushed_contexts() == 0

"""How kernels come to be loaded: compiled once, kept on disk, and what happens where something of that fails."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.config import StepLists, make_lists, step_call
from tests.native.host import DRIVER, FOLDER, driver, host, set_up, take_log
from torch_ademamix import AdEMAMix, ops, precompile
from torch_ademamix.ops import cuda
from torch_ademamix.ops.cuda import PRECOMPILED_VARIABLE

# A process for each case, since kernels are loaded once in each; forked from one that has torch.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.native.host"])


def make_call(*dtypes: torch.dtype) -> tuple[StepLists, Callable[[], None]]:
    lists = make_lists([((40,), *["contiguous"] * 3)], *dtypes)
    op, args, kwargs = step_call(torch.ops.cuda_on_host._ademamix_step_, lists)
    return lists, lambda: op(*args, **kwargs)


def take_steps(
    results: Any,
    cache: Path,
    failing: str = "",
    capability: int = 90,
    nvrtc: Path = DRIVER,
    compile_ms: int = 0,
    dies_compiling: bool = False,
    **environment: str,
) -> None:
    """In a process of its own."""
    os.environ.update(environment)
    set_up(cache, nvrtc)
    driver.set_compile_ms(compile_ms)
    driver.set_dies_compiling(dies_compiling)
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


def start(cache: Path, **kwargs: Any) -> Any:
    results = PROCESSES.Queue()
    results.process = PROCESSES.Process(target=take_steps, args=(results, cache), kwargs=kwargs)
    results.process.start()
    return results


def step(cache: Path, **kwargs: Any) -> tuple[list[str], list[str], list[str], str]:
    """The logs of two steps, their errors, and what came on stderr."""
    return start(cache, **kwargs).get(timeout=120)  # type: ignore[no-any-return]


def compiled_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


LOADED = ["launch"] * 2  # the prologue and the step
COMPILED = ["compile-sm_90", "load"] * 2 + LOADED  # a kernel that can't be had is known before the first is launched
CACHED = ["load"] * 2 + LOADED


def test_compiled_once_and_kept(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    first, second, _, said = step(cache)
    assert (first, second) == (COMPILED, LOADED)
    assert said.count("compiling CUDA kernels for sm_90") == 1
    assert str(cache) in said
    assert [path.name.split("-")[0] for path in compiled_in(cache)] == ["prologue_kernel", "step_kernel"]
    assert {path.stat().st_mode & 0o777 for path in (cache.parent, cache)} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}
    first, second, _, said = step(cache)
    assert (first, second) == (CACHED, LOADED)
    assert "compiling" not in said


def test_a_later_gpu_gets_the_latest_known_code(tmp_path: Path) -> None:
    assert step(tmp_path, capability=121)[0] == ["compile-compute_90", "load"] * 2 + LOADED
    assert step(tmp_path, capability=90)[0] == COMPILED  # another GPU's code isn't taken


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        (61, "the CUDA kernels don't run on GPUs of compute capability 6.1, only from 7.0 on"),
        (70, "the NVRTC of this CUDA can't compile for GPUs of compute capability 7.0"),
    ],
)
def test_gpus_that_nothing_can_be_compiled_for(tmp_path: Path, capability: int, text: str) -> None:
    _, _, errors, _ = step(tmp_path, capability=capability)
    assert text in errors[1]
    assert "TORCH_ADEMAMIX_CUDA=0" in errors[1]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "another"])
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: str) -> None:
    step(tmp_path)
    whole = {path: path.read_bytes() for path in compiled_in(tmp_path)}
    for path, data in whole.items():
        damaged = {"empty": b"", "cut": data[:-1], "changed": data[:-1] + b"~", "another": b"\0" * 999}[damage]
        path.write_bytes(damaged)
    assert step(tmp_path)[0] == COMPILED
    assert {path: path.read_bytes() for path in compiled_in(tmp_path)} == whole


def linked(path: Path) -> None:
    target = path.with_suffix(".moved")
    path.rename(target)
    path.symlink_to(target)


UNTRUSTED: dict[str, Callable[[Path], None]] = {
    "a link": linked,
    "of the group": lambda path: path.chmod(0o620),
    "of all": lambda path: path.chmod(0o602),
}
if os.geteuid() == 0:
    UNTRUSTED["another user's"] = lambda path: os.chown(path, 12345, 12345)


@pytest.mark.parametrize("way", UNTRUSTED)
def test_files_that_others_can_write_are_not_used(tmp_path: Path, way: str) -> None:
    step(tmp_path)
    for path in compiled_in(tmp_path):
        UNTRUSTED[way](path)
    first, _, _, said = step(tmp_path)
    assert first == COMPILED
    assert said.count("isn't used: it is a link, belongs to another user, or may be written to by others") == 1
    assert step(tmp_path)[0] == CACHED  # they were replaced


def test_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "kernel.bin.77-ab.unfinished", tmp_path / "kernel.bin.78-cd.unfinished"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    step(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_code_that_the_driver_refuses_is_compiled_again(tmp_path: Path) -> None:
    step(tmp_path)
    first, second, errors, _ = step(tmp_path, failing="cuModuleLoadData")
    assert first == ["compile-sm_90", "load", "load", *LOADED]
    assert (second, errors) == (LOADED, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_precompiled_kernels_of_another_user(tmp_path: Path) -> None:
    """The folder is named on purpose: its owner is trusted, and nobody else. Nothing is written to it."""
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    step(shared)
    for path in (shared, *compiled_in(shared)):
        os.chown(path, 12345, 12345)
    before = sorted(shared.iterdir())
    assert step(cache, **{PRECOMPILED_VARIABLE: str(shared)})[0] == CACHED
    os.chown(compiled_in(shared)[0], 54321, 54321)
    first, _, _, said = step(cache, **{PRECOMPILED_VARIABLE: str(shared)})
    assert (first.count("compile-sm_90"), said.count("isn't used")) == (1, 1)
    assert sorted(shared.iterdir()) == before


def test_what_is_compiled_can_be_shown_and_kept(tmp_path: Path) -> None:
    cache, dump = tmp_path / "cache", tmp_path / "dump"
    said = step(cache, TORCH_ADEMAMIX_VERBOSE="1", TORCH_ADEMAMIX_DUMP=str(dump))[3]
    kernel = "step_kernel<float, float, true, ParamRounding::NEAREST, SHORT_LIST>"
    assert f"torch_ademamix: {kernel} for sm_90: compiled in 0.0" in said
    source, code = (next(dump.glob(f"step_kernel*.{suffix}")) for suffix in ("cu", "cubin"))
    assert source.read_text().startswith(f"// {kernel}\n")
    assert "cuda/step_kernel.cuh" in source.read_text()
    assert code.read_text() == kernel.replace(" ", "_")
    assert f"{kernel} for sm_90: from {cache}" in step(cache, TORCH_ADEMAMIX_VERBOSE="1")[3]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    first, second, _, _ = step(file / "cache")
    assert (first, second) == (COMPILED, LOADED)


@pytest.mark.nightly
def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each kernel is compiled once, though some processes are killed at that, and one of the others tells of it."""
    killed = [start(tmp_path, compile_ms=300, dies_compiling=True) for _ in range(4)]
    wait([results.process.sentinel for results in killed], timeout=120)  # for the first to die
    others = [start(tmp_path, compile_ms=100) for _ in range(60)]
    ended = [results.get(timeout=120) for results in others]
    assert all(second == LOADED for _, second, _, _ in ended)
    assert sum(first.count("compile-sm_90") for first, _, _, _ in ended) == 2
    assert sum(said.count("compiling") for _, _, _, said in ended) == 1
    for results in killed:
        results.process.join()
    assert -signal.SIGKILL in {results.process.exitcode for results in killed}
    assert len(compiled_in(tmp_path)) == 2
    assert len(list(tmp_path.iterdir())) == 3  # and the lock
    assert step(tmp_path)[0] == CACHED


def test_kernels_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_on_host(op: Any) -> Any:
        packet = getattr(torch.ops.cuda_on_host, op._schema.name.split("::")[1])
        return getattr(packet, op._overloadname)

    monkeypatch.setattr(cuda, "_loaded", host)
    monkeypatch.setattr(precompile, "cuda_kernel", kernel_on_host)
    folder = tmp_path / "shared"
    try:
        precompile.precompile([75, 90], folder, [torch.float32], optim_bits=8)
    finally:
        set_up(FOLDER / "cache")
    names = [path.name.split("-")[:2] for path in compiled_in(folder)]
    kernels = ("blockwise_step_kernel", "prologue_kernel", "step_kernel")
    assert names == [[kernel, f"sm_{gpu}"] for kernel in kernels for gpu in (75, 90) for _ in ("short", "long")]
    assert {path.stat().st_mode & 0o777 for path in compiled_in(folder)} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert step(tmp_path / "cache", **{PRECOMPILED_VARIABLE: str(folder)})[0] == CACHED


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_tells_of_a_folder_without_locks(tmp_path: Path, rank: str) -> None:
    (tmp_path / "lock").mkdir()
    assert step(tmp_path, LOCAL_RANK=rank)[3].count("compiling") == (rank == "0")


def test_the_build_of_nvrtc_is_part_of_the_key(tmp_path: Path) -> None:
    """Not only its version, which has no patch number."""
    cache, another = tmp_path / "cache", tmp_path / "libnvrtc.so.13"
    shutil.copy(DRIVER, another)
    with open(another, "ab") as file:
        file.write(b"longer")
    for nvrtc, files in ((DRIVER, 2), (another, 4), (DRIVER, 4)):
        step(cache, nvrtc=nvrtc)
        assert len(compiled_in(cache)) == files


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


@pytest.mark.usefixtures("capturing")
def test_a_captured_step_may_have_fewer_gradients_than_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    packet = torch.ops.cuda_on_host._ademamix_step_
    overloads = [packet.default, packet.tensor_hyperparameters]
    monkeypatch.setattr(ops, "ademamix_step_", ops._python_op(overloads, "The op on the stand-in."))
    params = [torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(20)]
    optimizer = AdEMAMix(params)
    driver.set_capturing(False)
    optimizer.init_state()
    optimizer._plan_cache.plan.load_kernels(device_type="cpu")
    driver.set_capturing(True)
    for p in params[3:6]:
        p.grad = torch.ones_like(p)
    take_log()
    optimizer.step()
    assert "load" not in take_log("load")


def test_launches_go_to_torchs_stream() -> None:
    driver.set_current_stream(0x77)
    make_call()[1]()  # the stand-in refuses another stream
    driver.set_current_stream(0)
    assert driver.pushed_contexts() == 0

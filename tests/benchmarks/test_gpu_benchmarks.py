"""The benchmarks for a GPU do what they say, with a CPU in its place: tiny shapes, and clocks for CUDA's events."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import competitors, timing
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu_training import __main__ as gpu_training
from benchmarks.gpu_training import steps as training_steps
from benchmarks.shared import gpt2

TINY = gpt2.Size(vocabulary=50, context=8, width=16, layers=1, heads=2)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.time - self.time) * 1e3


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass


def gpu_events(step: timing.Step) -> list[Any]:
    """As if a step took two kernels, one of which is the package's."""
    step()
    took = SimpleNamespace(elapsed_us=lambda: 3.0)
    return [SimpleNamespace(name=name, time_range=took) for name in ("void ademamix::step_kernel<float>()", "gemm")]


@pytest.fixture(autouse=True)
def _cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("matplotlib")
    for name, fake in {
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: nullcontext(),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 2 * 10**9,
        "max_memory_reserved": lambda: 3 * 10**9,
        "device_count": lambda: 1,
        "is_available": lambda: False,  # which a torch with CUDA may ask device_count, if Accelerate told it to
        "get_device_name": lambda device=0: "a GPU",
        "get_device_capability": lambda device=0: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    monkeypatch.setattr(timing, "gpu_events", gpu_events)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "OVERWRITTEN_BYTES", 100)
    monkeypatch.setattr(timing, "COPIED_NUMEL", 100)
    monkeypatch.setattr(gpu, "CASES", {case: [(300,), (70, 80)] for case in gpu.CASES})
    monkeypatch.setattr(gpu_training, "Size", lambda: TINY)
    monkeypatch.setattr(training_steps, "LR", 1e-2)
    monkeypatch.setattr(training_steps, "capture_train_step", captured_by_nobody)
    yield
    torch._dynamo.reset()


def captured_by_nobody(model: Any, optimizer: Any, loss_fn: Any, sample: Any) -> training_steps.TrainStep:
    return training_steps.eager_step(model, optimizer, loss_fn, training_steps.Spans())


# ------------------------------------------------------------------------------------------------ gpu


def test_model_has_the_parameters_of_gpt2() -> None:
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in gpt2.GPT2(gpt2.Size()).parameters()]
    assert len(shapes) == len(gpt2.SHAPES) == 148
    assert sorted(map(sorted, shapes)) == sorted(map(sorted, gpt2.SHAPES))  # some are transposed


@pytest.mark.nightly
@pytest.mark.slow
def test_speed(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        name: competitor
        for name, competitor in gpu.COMPETITORS.items()
        if "bitsandbytes" not in name and "torchao" not in name
    }
    monkeypatch.setattr(gpu, "COMPETITORS", own)
    cases = [gpu_report.GPT2_124M, competitors.PAGED]
    assert gpu.main(["--steps", "2", "--out", str(tmp_path), "--cases", *cases]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.svg"]
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    measured = {(result["case"], result["competitor"]) for result in results}
    assert measured == {(case, name) for case in cases for name in own if case in own[name].cases}
    assert "## Targets" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ gpu_training


@pytest.mark.nightly
@pytest.mark.slow
def test_training(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and captured steps have the losses of eager ones; so small a model misses what it should learn."""

    def absent(params: Any) -> Any:
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(gpu_training.OPTIMIZERS, training_steps.BITSANDBYTES, absent)
    assert gpu_training.main(["--steps", "3", "--batch", "2", "--out", str(tmp_path)]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.md", "training.svg"]
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    losses = {(row["optimizer"], row["mode"]): row["losses"] for row in rows}
    assert len(losses) == len(gpu_training.CASES) - 2  # without the peer's
    assert all(values == losses[optimizer, "eager"] for (optimizer, _), values in losses.items())
    assert "AdEMAMix8bit, compiled" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ gpu_check


def test_check_writes_few_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {}

    def passes(self: gpu_check.Check, name: str, command: list[str], limit: float, log: str = "", **env: str) -> Any:
        commands[name] = command
        (self.logs / f"{log or name}.log").write_text("done\n")
        if name == "benchmarks":
            gpu.main([*command[3:], "--steps", "2", "--cases", competitors.PAGED, "--competitors", "AdamW"])
        self.stages.append(gpu_check.Stage(name, "passed", limit, "done"))
        return self.stages[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(gpu_check.Check, "run", passes)
    assert gpu_check.main([str(tmp_path)]) == 0
    assert list(commands) == ["build", "tests", "memcheck", "racecheck", "benchmarks"]
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.parts) <= 2 for path in files)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "# CUDA check: a GPU" in text
    assert "## Targets" in text
    assert "fp32 AdamW, fused" in text


def test_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.short_run()
    assert "short run done" in capsys.readouterr().out


def test_machine_without_a_gpu(tmp_path: Any) -> None:
    assert gpu_check.main([str(tmp_path / "results")]) == 1
    assert not (tmp_path / "results").exists()

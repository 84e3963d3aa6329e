"""The benchmarks for a GPU do what they say, with a CPU in its place: tiny shapes, and clocks for CUDA's events."""

import json
import math
import re
import shutil
import sys
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
from benchmarks.gpu_training import report as training_report
from benchmarks.gpu_training import steps as training_steps
from benchmarks.shared import gpt2
from torch_ademamix import AdEMAMix

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


def test_targets_are_of_what_is_measured() -> None:
    class Everything(dict[Any, Any]):
        def __missing__(self, run: tuple[str, str]) -> Any:
            case, name = run
            assert case in gpu.COMPETITORS[name].cases
            return SimpleNamespace(share_of_copy=1.0, microseconds=1.0, microseconds_in_a_row=1.0)

    assert [r.value(Everything()) for r in gpu_report.TARGETS] == [1.0] * len(gpu_report.TARGETS)
    names = {case.name for case in gpu_training.CASES}
    assert {r.case for r in training_report.TARGETS} <= names
    assert len(names) == len(gpu_training.CASES)


@pytest.mark.nightly
@pytest.mark.slow
def test_speed(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: Any) -> timing.Step:
        raise RuntimeError("no kernel image\nis there")

    def absent(params: Any) -> timing.Step:
        raise ImportError("No module named 'peer'")

    peers = {
        "absent peer": competitors.Competitor(absent, torch.float32, 1),
        "failing peer": competitors.Competitor(fails, torch.float32, 1),
    }
    own = {
        name: competitor
        for name, competitor in gpu.COMPETITORS.items()
        if "bitsandbytes" not in name and "torchao" not in name
    }
    monkeypatch.setattr(gpu, "COMPETITORS", own | peers)
    cases = [gpu_report.GPT2_124M, competitors.PAGED]
    assert gpu.main(["--steps", "2", "--out", str(tmp_path), "--cases", *cases]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.svg"]

    numbers = json.loads((tmp_path / "speed.json").read_text())
    measured = {(result["case"], result["competitor"]): result for result in numbers["results"]}
    assert measured.keys() == {(case, name) for case in cases for name in own if case in own[name].cases}
    one = measured[competitors.PAGED, "fp32 AdEMAMix, eager"]
    assert one["launches"] == 2
    assert one["gigabytes_per_second"] == pytest.approx(5900 * 36 / one["microseconds"] / 1e3)
    assert [competitors.PAGED, "failing peer", "failed: RuntimeError: no kernel image"] in numbers["left out"]
    assert "absent peer (not installed: No module named 'peer')" in (tmp_path / "speed.md").read_text()
    verdicts = {(case, text): verdict for case, text, *_, verdict in numbers["targets"]}
    assert verdicts[gpu_report.GPT2_124M, "time of fp32 AdEMAMix, over fused AdamW's"] in ("holds", "MISSED")
    assert verdicts[gpu_report.LARGE, "share of the copy, fp32 AdEMAMix"] == "not measured"
    assert "## Targets" in capsys.readouterr().out


def test_failure_of_our_own_is_told_in_the_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: Any) -> timing.Step:
        raise RuntimeError("misaligned address")

    own = {
        "ours": competitors.own(fails, torch.float32, 1),
        "another": competitors.own(competitors.ours(AdEMAMix), torch.float32, 36),
    }
    monkeypatch.setattr(gpu, "COMPETITORS", own)
    assert gpu.main(["--steps", "2", "--out", str(tmp_path), "--cases", competitors.PAGED]) == 1
    numbers = json.loads((tmp_path / "speed.json").read_text())
    assert [result["competitor"] for result in numbers["results"]] == ["another"]


def test_bitsandbytes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    assert "can't make a step here" in str(competitors._bitsandbytes_problem("no_such_device"))
    monkeypatch.setattr(competitors, "_bitsandbytes_problem", lambda device, paged: None)
    params = [torch.nn.Parameter(torch.randn(300))]
    params[0].grad = torch.randn(300)
    step = competitors.bitsandbytes_paged_out(params)
    step()
    assert isinstance(step, timing.Prepared)
    step.before()  # such small state isn't paged


# ------------------------------------------------------------------------------------------------ gpu_training


@pytest.mark.nightly
@pytest.mark.slow
def test_training(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(params: Any) -> Any:
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(gpu_training.OPTIMIZERS, training_steps.BITSANDBYTES, absent)
    assert (
        gpu_training.main(["--steps", "3", "--batch", "2", "--out", str(tmp_path)]) == 1
    )  # too small to learn so much
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.md", "training.svg"]

    numbers = json.loads((tmp_path / "training.json").read_text())
    rows = {(row["optimizer"], row["mode"]): row for row in numbers["rows"]}
    assert len(rows) == len(gpu_training.CASES) - 2
    assert set(numbers["left out"].values()) == {"not installed: No module named 'peer'"}
    for (optimizer, mode), row in rows.items():
        assert len(row["losses"]) == gpu_training.COMPARED_STEPS
        assert row["seconds"] > row["optimizer_seconds"] >= 0
        assert row["losses"] == rows[optimizer, "eager"]["losses"]
        if mode in ("compiled", "captured"):
            assert row["optimizer_seconds"] == pytest.approx(3e-6 / gpu_training.PROFILED_STEPS)
    ours = rows["AdEMAMix8bit", "eager"]["losses"]
    assert ours[0] - ours[-1] > 0.02
    still = rows[training_steps.NO_OPTIMIZER, "eager"]["losses"]
    assert still[0] == ours[0]
    assert still[0] == still[gpu_training.BATCHES]
    assert {v[-1] for v in numbers["targets"][:-1]} == {"holds"}
    assert numbers["targets"][-1][-1] == "MISSED"
    assert "AdEMAMix8bit, compiled" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.slow
def test_training_names_what_it_had_no_time_for(tmp_path: Any) -> None:
    assert gpu_training.main(["--minutes", "0", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "training.md").read_text()
    assert "left out: AdEMAMix8bit, eager (not reached within 0 minutes)" in text
    assert text.count("not measured") == len(training_report.TARGETS)


def test_losses_that_differ_are_a_miss() -> None:
    def row(*losses: float) -> Any:
        return SimpleNamespace(losses=list(losses))

    rows = {"AdEMAMix, eager": row(3.0, 2.0), "AdEMAMix, compiled": row(3.0, 2.1)}
    assert training_report.difference(rows, "AdEMAMix", "compiled") == pytest.approx(0.1)
    rows["AdEMAMix, compiled"] = row(math.nan, 2.0)
    assert math.isnan(training_report.difference(rows, "AdEMAMix", "compiled"))
    target = next(r for r in training_report.TARGETS if r.case == "AdEMAMix, compiled")
    assert target.verdict(rows)[-1] == "MISSED"


# ------------------------------------------------------------------------------------------------ gpu_check


def test_stages(tmp_path: Any) -> None:
    check = gpu_check.Check(tmp_path, 60)
    python = [sys.executable, "-c"]
    check.run("one", [*python, "import os; print('built for', os.environ['FOR'])"], 30, "both", FOR="9.0")
    check.run("two", [*python, "print('1 | 2 failed'); raise SystemExit(3)"], 30, "both")
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1); import time; time.sleep(60)'])"
    check.run("three", [*python, sleeper], 2)
    check.skip("four", "no such tool")
    assert [stage.outcome for stage in check.stages] == ["passed", "failed", "out of time", "absent"]
    assert [stage.summary for stage in check.stages[:2]] == ["built for 9.0", "1 | 2 failed"]
    assert sorted(path.name for path in check.logs.iterdir()) == ["both.log", "three.log"]
    assert re.search(r"\| two \| failed \| \d+ \| 1 / 2 failed \|", gpu_check.summarize(tmp_path, check))
    assert check.limit(100, leave=10) < 50
    assert check.limit(100, leave=70) == 1


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

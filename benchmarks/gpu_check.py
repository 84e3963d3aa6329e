"""One command that proves and measures the CUDA part on a machine with a GPU: `python -m benchmarks.gpu_check FOLDER`.

It builds the libraries, runs the tests that need one, then compute-sanitizer over a short run
(where that works), then the benchmarks, within a limit of time. The folder gets the summary, `gpu_check.md`, which is
also printed last, and what `benchmarks.gpu` writes; each stage's output is in its folder `logs`. It uses the Python
that runs it, and no network.
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.gpu import report, timing
from benchmarks.shared import writing

TESTS_AT_ONCE = 8


@dataclass
class Stage:
    name: str
    outcome: str  # "passed", "failed", "out of time" or "absent"
    seconds: float
    summary: str


class Check:
    def __init__(self, folder: Path, seconds: float) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        for old in self.logs.glob("*.log"):
            old.unlink()
        self.deadline = time.monotonic() + seconds
        self.stages: list[Stage] = []

    def limit(self, at_most: float, leave: float = 0) -> float:
        """Seconds for a stage that takes at most so many, and leaves others to those after it."""
        return max(min(at_most, self.deadline - time.monotonic() - leave), 1)

    def run(self, name: str, command: list[str], limit: float, log: str = "", **environment: str) -> Stage:
        """Runs a stage; those of one log follow one another in it."""
        print(f"== {name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        file = self.logs / f"{log or name}.log"
        with file.open("a") as output:
            before = output.tell()
            process = subprocess.Popen(
                command,
                cwd=writing.ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{writing.ROOT}:{os.environ.get('PYTHONPATH', '')}",
                    "PYTHONUNBUFFERED": "1",
                    **environment,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                outcome = "passed" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "out of time"
            finally:
                with suppress(ProcessLookupError):  # what it has started would disturb the next stage
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = [line for line in file.read_bytes()[before:].decode(errors="replace").splitlines() if line.strip()]
        stage = Stage(name, outcome, time.monotonic() - begin, lines[-1].strip("= ") if lines else "")
        if outcome != "passed":
            print("\n".join(lines[-40:]), flush=True)
        self.stages.append(stage)
        return stage

    def skip(self, name: str, why: str) -> None:
        self.stages.append(Stage(name, "absent", 0, why))


def short_run() -> None:
    """A few steps of every kind, for the sanitizers: ragged, misaligned and strided tensors among others."""
    from torch_ademamix import AdEMAMix, ops

    states = [
        {"optim_bits": 32},
        {"optim_bits": 8},
        {"optim_bits": 8, "slow_ema_bits": 8, "stochastic_rounding": False},
    ]
    roundings = [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": "remainder"}),
        (torch.bfloat16, {"master_weights": "remainder8"}),
        (torch.bfloat16, {"param_rounding": "stochastic"}),
    ]
    for state, (dtype, rounding) in itertools.product(states, roundings):
        flat = torch.randn(40_000, device=timing.DEVICE).to(dtype)
        misaligned, empty, ragged = flat[1:5000], flat[5000:5000], flat[6000:16385].clone()
        transposed = flat[20_000:28_192].view(64, 128).t()
        params = [torch.nn.Parameter(p) for p in (misaligned, empty, ragged, transposed)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = AdEMAMix(params, min_8bit_size=256, **state, **rounding)
        for _ in range(2):
            optimizer.step()
    for format in ops.FORMATS:
        ops.dequantize_blockwise(*ops.quantize_blockwise(torch.randn(1000, device=timing.DEVICE), format), format)
    torch.cuda.synchronize()
    print("short run done")


def pytest_options() -> list[str]:
    """Of plugins, where they are installed."""
    options = []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(TESTS_AT_ONCE)]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=100", "--timeout-method=thread"]  # a signal doesn't end a wait for the GPU
    return options


def summarize(folder: Path, check: Check) -> str:
    machine = report.machine()
    lines = [f"# CUDA check: {', '.join(machine['gpus'])}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    cells = ([s.name, s.outcome, f"{s.seconds:.0f}", s.summary[:120].replace("|", "/")] for s in check.stages)
    lines += ["", writing.markdown_table(("stage", "outcome", "seconds", ""), cells), ""]
    speed = folder / "speed.md"
    if speed.exists():
        lines.append(f"#{speed.read_text()}")  # one heading below
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=writing.ROOT / "out/gpu_check", help="for the results")
    parser.add_argument("--minutes", type=float, default=8, help="in which all is done (8)")
    parser.add_argument("--short-run", action="store_true", help="only what the sanitizers watch")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here")
        return 1
    if args.short_run:
        short_run()
        return 0

    folder = args.folder.resolve()
    check, python = Check(folder, 60 * args.minutes - 10), sys.executable
    for old in ("gpu_check.md", "speed.json", "speed.md", "speed.svg"):
        (folder / old).unlink(missing_ok=True)
    built = check.run("build", [python, "setup.py", "build_ext", "--inplace"], check.limit(240))
    if built.outcome == "passed":
        tests = [python, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", *pytest_options()]
        check.run("tests", [*tests, "tests/cuda/test_cuda.py"], check.limit(240, leave=150))
        for tool in ("memcheck", "racecheck"):
            sanitize(check, tool)
        limit = check.limit(240)
        minutes = max(limit - 40, 0) / 60  # the last one that is begun wants to end, too
        benchmark = [python, "-m", "benchmarks.gpu", "--out", str(folder), "--minutes", f"{minutes:.2f}"]
        check.run("benchmarks", benchmark, limit)

    text = summarize(folder, check)
    writing.write(folder / "gpu_check.md", text)
    print(text)
    failed = [stage.name for stage in check.stages if stage.outcome == "failed"]
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'passed'}; results in {folder}")
    return 1 if failed else 0


def sanitize(check: Check, tool: str) -> None:
    places = [os.environ.get("PATH", ""), *([f"{CUDA_HOME}/bin"] if CUDA_HOME else [])]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if sanitizer is None:
        check.skip(tool, "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        return
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=ademamix"]
    command += ["--launch-timeout", "0"]  # until CUDA is first called: importing torch may take long
    command += [sys.executable, "-m", "benchmarks.gpu_check", "--short-run"]
    # Without torch's cache of memory each tensor is an allocation, beyond whose end accesses are seen.
    check.run(tool, command, check.limit(60, leave=120), "sanitizer", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


if __name__ == "__main__":
    sys.exit(main())

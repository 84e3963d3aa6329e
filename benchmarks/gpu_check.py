"""One command that proves and measures the CUDA part on a machine with a GPU: `python -m benchmarks.gpu_check FOLDER`.

It builds the libraries for the GPU at hand, runs the tests that need one, then compute-sanitizer over a short run
(where that works), then the benchmarks, within a limit of time; writes `gpu_check.json` and `gpu_check.md` to the
folder, each stage's output beside them, and prints a summary last. It uses the Python that runs it, and no network.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 470  # of the eight minutes that it may take


@dataclass
class Stage:
    name: str
    outcome: str  # "passed", "failed", "out of time" or "absent"
    seconds: float
    summary: str


class Check:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + TOTAL_SECONDS
        self.stages: list[Stage] = []

    def run(self, name: str, command: list[str], *, at_most: float, leave: float = 0, **environment: str) -> Stage:
        """Runs a stage for at most so long, and `leave` seconds for those after it."""
        limit = min(at_most, self.deadline - time.monotonic() - leave)
        print(f"== {name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            try:
                result = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=max(limit, 1),
                )
                outcome = "passed" if result.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "out of time"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
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

    for bits in (32, 8):
        for dtype in (torch.float32, torch.bfloat16):
            flat = torch.randn(40_000, device="cuda").to(dtype)
            params = [
                torch.nn.Parameter(p)
                for p in (flat[1:5000], flat[5000:5000], flat[6000:16385].clone(), flat[:8192].view(64, 128).t())
            ]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = AdEMAMix(params, optim_bits=bits, min_8bit_size=256)
            for _ in range(2):
                optimizer.step()
    for format in ops.FORMATS:
        ops.dequantize_blockwise(*ops.quantize_blockwise(torch.randn(1000, device="cuda"), format), format)
    torch.cuda.synchronize()
    print("short run done")


def machine() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    release = re.search(r"release ([\d.]+)", output("nvcc", "--version"))
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "toolkit": release[1] if release else "unknown",
        "commit": output("git", "describe", "--always", "--dirty"),
    }


def report(host: dict[str, Any], check: Check) -> str:
    lines = [f"# CUDA check: {', '.join(host['gpus'])}", ""]
    lines += [f"- {name}: {value}" for name, value in host.items()]
    lines += ["", "| stage | outcome | seconds | |", "|---|---|---:|---|"]
    lines += [f"| {s.name} | {s.outcome} | {s.seconds:.0f} | {s.summary[:120]} |" for s in check.stages]
    benchmark = check.folder / "benchmarks.log"
    if benchmark.exists():
        lines += ["", *(line for line in benchmark.read_text().splitlines() if line.startswith(("|", "left out")))]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "out/gpu_check", help="for the results")
    parser.add_argument("--short-run", action="store_true", help="only what the sanitizers watch")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here")
        return 1
    if args.short_run:
        short_run()
        return 0

    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    check, host, python = Check(folder), machine(), sys.executable
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    built = check.run(
        "build",
        [python, "setup.py", "build_ext", "--inplace", "--force"],
        at_most=200,
        TORCH_ADEMAMIX_CUDA="1",
        TORCH_CUDA_ARCH_LIST=";".join(f"{major}.{minor}" for major, minor in sorted(capabilities)),
    )
    if built.outcome == "passed":
        check.run(
            "tests",
            [python, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"],
            at_most=240,
            leave=120,
        )
        sanitizer = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                check.skip(tool, "compute-sanitizer is not on PATH")
                continue
            watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=ademamix"]
            check.run(tool, [*watch, python, "-m", "benchmarks.gpu_check", "--short-run"], at_most=60, leave=90)
        check.run(
            "benchmarks", [python, "-m", "benchmarks.gpu", "--json", str(folder / "benchmarks.json")], at_most=200
        )

    numbers = folder / "benchmarks.json"
    (folder / "gpu_check.json").write_text(
        json.dumps(
            {
                "machine": host,
                "stages": [asdict(stage) for stage in check.stages],
                "benchmarks": json.loads(numbers.read_text()) if numbers.exists() else None,
            },
            indent=1,
        )
    )
    text = report(host, check)
    (folder / "gpu_check.md").write_text(text)
    print(text)
    failed = [stage.name for stage in check.stages if stage.outcome in ("failed", "out of time")]
    print(f"gpu_check: {'failed: ' + ', '.join(failed) if failed else 'passed'}; results in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The support matrix in docs/install.md: `python -m tools.support` writes it, from the records of what has run.

`make wheel-check ARGS=--record`, `make test-torch` and `make aarch64-check ARGS=--record` leave their records in
benchmarks/results/support, one file for each kind of run, torch, Python and processor; a later run replaces the file.
The GPU is the one of benchmarks/results/gpu.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/results/support"
GPU_RESULTS = ROOT / "benchmarks/results/gpu/speed.json"
PAGE = ROOT / "docs/install.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

HEADS = ("torch", "CUDA", "Python", "OS", "processor", "status", "what ran")

# What users may have: a value that is in no other row gets one of its own.
VALUES = {
    "Python": ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t"),
    "processor": ("x86_64", "aarch64"),
    "OS": ("Linux", "macOS", "Windows"),
    "CUDA": ("12", "13", "ROCm"),
}
KINDS = {"suite": "all tests", "wheel": "the wheel's tests"}

DESCRIBE = """
import json, os, platform, sys, sysconfig, torch
python = f"{sys.version_info.major}.{sys.version_info.minor}"
libc = os.confstr("CS_GNU_LIBC_VERSION") if sys.platform == "linux" else ""
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "python": python + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""),
    "os": f"{platform.system()}, {libc}" if libc else platform.system(),
    "processor": platform.machine(),
}))
"""


@dataclass(frozen=True)
class Record:
    """What ran where, and how it ended; `compiled` is what the tests compiled without running it."""

    kind: str
    torch: str
    cuda: str | None
    gpu: str | None
    python: str
    os: str
    processor: str
    passed: int
    failed: int
    skipped: int
    compiled: tuple[str, ...]
    commit: str
    date: str

    def write(self) -> Path:
        RECORDS.mkdir(parents=True, exist_ok=True)
        path = RECORDS / f"{self.kind}-torch-{self.torch}-python-{self.python}-{self.processor}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def record(
    kind: str, python: str | Path, reports: Sequence[Path], commit: str, environment: dict[str, str] | None = None
) -> Path:
    """Writes the record of a run of pytest by that Python, from its JUnit reports."""
    described = subprocess.check_output([python, "-c", DESCRIBE], text=True, env=environment)
    suites = [suite for report in reports for suite in ElementTree.parse(report).getroot().iter("testsuite")]
    failed, skipped, all = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("failures", "errors"), ("skipped",), ("tests",))
    )
    properties = [item for suite in suites for item in suite.iter("property")]
    compiled = tuple({item.get("value", ""): None for item in properties if item.get("name") == "compiled"})
    counts: dict[str, Any] = {"passed": all - failed - skipped, "failed": failed, "skipped": skipped}
    made = Record(kind, **json.loads(described), **counts, compiled=compiled, commit=commit, date=now())
    return made.write()


def record_kernels(processor: str, equal: int, different: int, commit: str) -> Path:
    """Writes the record of the CPU kernels' results on another processor, emulated, by this process's torch."""
    described = json.loads(subprocess.check_output([sys.executable, "-c", DESCRIBE], text=True))
    described |= {"os": "Linux", "processor": processor}
    counts: dict[str, Any] = {"passed": equal, "failed": different, "skipped": 0}
    return Record("kernels", **described, **counts, compiled=(), commit=commit, date=now()).write()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_records() -> list[Record]:
    contents = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return [Record(**{**content, "compiled": tuple(content["compiled"])}) for content in contents]


def table() -> str:
    rows = [*tested(read_records()), *on_gpus(), *compiled(read_records())]
    rows += untested(rows)
    lines = [f"| {' | '.join(row)} |" for row in (HEADS, ("---",) * len(HEADS), *rows)]
    return "\n".join(lines)


def tested(records: Sequence[Record]) -> Iterator[Sequence[str]]:
    """A row for each configuration in which tests ran, the newest torch first."""

    def configuration(record: Record) -> Sequence[str]:
        cuda = f"{record.cuda}, {record.gpu or 'no GPU'}" if record.cuda else "none"
        return (record.torch.partition("+")[0], cuda, record.python, record.os, record.processor)

    def order(record: Record) -> tuple[list[int], list[str]]:
        torch, *others = configuration(record)
        return [-int(number) for number in torch.split(".")], others

    ran = sorted((record for record in records if record.kind in KINDS), key=order)
    for row, group in groupby(ran, key=configuration):
        here = list(group)
        status = "fails" if any(record.failed for record in here) else "tested"
        yield (*row, status, "; ".join(map(outcome, here)))


def outcome(record: Record) -> str:
    failed = f", {record.failed:,} failed" if record.failed else ""
    return f"{KINDS[record.kind]}: {record.passed:,} passed{failed} ({record.commit[:7]})"


def on_gpus() -> Iterator[Sequence[str]]:
    """The machine on which the GPU benchmarks ran."""
    machine = json.loads(GPU_RESULTS.read_text())["machine"]
    torch, python = machine["torch"].partition("+")[0], ".".join(machine["python"].split(".")[:2])
    row = (torch, f"{machine['CUDA']}, {', '.join(machine['gpus'])}", python, "Linux", "x86_64")
    yield (*row, "tested", f"`benchmarks.gpu` ({machine['commit'][:7]})")


def compiled(records: Sequence[Record]) -> Iterator[Sequence[str]]:
    """What was compiled, but not run as it would be by its users."""
    for text in sorted({text for record in records if record.kind in KINDS for text in record.compiled}):
        yield ("any", text, "any", "Linux", "any", "compiles", "the CUDA kernels, by that NVRTC")
    for record in records:
        if record.kind == "kernels":
            row = ("any", "any", "any", "Linux", record.processor)
            results = f"{record.passed} of {record.passed + record.failed} results equal x86_64's ({record.commit[:7]})"
            yield (*row, "compiles", f"the CPU kernels, in qemu-user: {results}")


def untested(rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    for head, values in VALUES.items():
        column = HEADS.index(head)
        for value in values:
            if not any(
                row[column].startswith(value) and row[column][len(value) :][:1] in ("", ".", ",") for row in rows
            ):
                cells = [value if name == head else "any" for name in HEADS[:-2]]
                yield (*cells, "untested", "")


def read_table() -> str:
    """What stands between the marks in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def write_table() -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"support: {PAGE.name} needs the lines {BEGIN} and {END}, between which the table is written")
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.support", description=__doc__)
    parser.add_argument("--record", nargs=3, metavar=("KIND", "PYTHON", "REPORT"), help="of pytest's --junitxml")
    args = parser.parse_args()
    if args.record:
        from benchmarks.shared import origin  # which needs torch

        kind, python, report = args.record
        print(record(kind, python, [Path(report)], origin.commit()).relative_to(ROOT))
    else:
        write_table()


if __name__ == "__main__":
    main()

"""The support matrix in docs/limitations.md: `python -m tools.support` writes it, from the records of what has run.

`make wheel-check ARGS=--record`, `make test-torch` and `make aarch64-check ARGS=--record` leave their records in
benchmarks/results/support, one file for each kind of run, torch, Python and processor, and write the table again; a
later run replaces the file. The GPU is the one of benchmarks/results/gpu.
"""

import argparse
import json
import re
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
PAGE = ROOT / "docs/limitations.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

AXES = ("torch", "CUDA", "GPU", "Python", "OS", "processor")
STATUSES = ("tested", "compiles", "untested")

# What users may have: a value that nothing ran with is untested.
VALUES = {
    "CUDA": ("12", "13"),
    "GPU": ("several GPUs with NCCL", "ROCm", "XPU"),
    "Python": ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t"),
    "OS": ("Linux", "macOS", "Windows"),
    "processor": ("x86_64", "aarch64"),
}
KINDS = {"suite": "all tests", "fast": "the tests of `make test-fast`", "wheel": "the wheel's tests"}

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
    return put(Record(kind, **json.loads(described), **counts, compiled=compiled, commit=commit, date=now()))


def record_kernels(processor: str, equal: int, different: int, commit: str) -> Path:
    """Writes the record of the CPU kernels' results on another processor, emulated, by this process's torch."""
    described = json.loads(subprocess.check_output([sys.executable, "-c", DESCRIBE], text=True))
    described |= {"os": "Linux", "processor": processor}
    counts: dict[str, Any] = {"passed": equal, "failed": different, "skipped": 0}
    return put(Record("kernels", **described, **counts, compiled=(), commit=commit, date=now()))


def put(record: Record) -> Path:
    """Writes the record and the table with it."""
    path = record.write()
    write_table()
    return path


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_records() -> list[Record]:
    contents = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return [Record(**{**content, "compiled": tuple(content["compiled"])}) for content in contents]


@dataclass(frozen=True)
class Row:
    """A configuration, by AXES, and how what ran in it ended; a value that did not matter is empty."""

    values: tuple[str, ...]
    status: str
    ran: str


def table() -> str:
    """By axis, and then by configuration."""
    records = read_records()
    ran = [*tested(records), *on_gpus()]
    rows = [*ran, *compiled(records)]
    by_axis = [(axis, *(", ".join(values) for values in statuses(axis, rows))) for axis in AXES]
    runs = [(*row.values, row.status, row.ran) for row in rows]
    return f"{markdown(('', *STATUSES), by_axis)}\n\n{markdown((*AXES, 'status', 'what ran'), runs)}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows))


def statuses(axis: str, rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    """An axis's values, each in the first of STATUSES that it has."""
    column, gpu = AXES.index(axis), AXES.index("GPU")
    found: dict[str, str] = {}
    for row in rows:
        # Without a GPU, CUDA was only loaded.
        status = "compiles" if axis == "CUDA" and row.status == "tested" and not row.values[gpu] else row.status
        for value in row.values[column].partition(", glibc")[0].split(", "):
            if value and status in STATUSES:
                found[value] = min(found.get(value, status), status, key=STATUSES.index)
    for value in VALUES.get(axis, ()):
        if not any(have == value or have.startswith((f"{value}.", f"{value},")) for have in found):
            found[value] = "untested"
    for status in STATUSES:
        yield sorted((value for value in found if found[value] == status), key=natural)


def natural(value: str) -> list[tuple[int, str]]:
    """Orders 3.9 before 3.10, and macOS before Windows."""
    return [(int(digits or 0), text.lower()) for digits, text in re.findall(r"(\d+)|(\D+)", value)]


def tested(records: Sequence[Record]) -> Iterator[Row]:
    """A row for each configuration in which tests ran, the newest torch first."""

    def configuration(record: Record) -> tuple[str, ...]:
        torch = record.torch.partition("+")[0]
        return (torch, record.cuda or "", record.gpu or "", record.python, record.os, record.processor)

    def order(record: Record) -> tuple[list[int], tuple[str, ...]]:
        torch, *others = configuration(record)
        return [-int(number) for number in torch.split(".")], tuple(others)

    ran = sorted((record for record in records if record.kind in KINDS), key=order)
    for values, group in groupby(ran, key=configuration):
        here = list(group)
        status = "fails" if any(record.failed for record in here) else "tested"
        yield Row(values, status, "; ".join(map(outcome, here)))


def outcome(record: Record) -> str:
    failed = f", {record.failed:,} failed" if record.failed else ""
    return f"{KINDS[record.kind]}: {record.passed:,} passed{failed} ({record.commit[:7]})"


def on_gpus() -> Iterator[Row]:
    """The machine on which the GPU benchmarks ran."""
    machine = json.loads(GPU_RESULTS.read_text())["machine"]
    torch, python = machine["torch"].partition("+")[0], ".".join(machine["python"].split(".")[:2])
    values = (torch, machine["CUDA"], ", ".join(machine["gpus"]), python, "Linux", "x86_64")
    yield Row(values, "tested", f"`benchmarks.gpu` ({machine['commit'][:7]})")


def compiled(records: Sequence[Record]) -> Iterator[Row]:
    """What was compiled, but not run as its users would run it."""
    for text in sorted({text for record in records if record.kind in KINDS for text in record.compiled}, key=natural):
        nvrtc, _, architectures = text.partition(", ")
        yield Row(("", nvrtc, architectures, "", "Linux", ""), "compiles", "the CUDA kernels, by NVRTC")
    for record in records:
        if record.kind == "kernels":
            results = f"{record.passed} of {record.passed + record.failed} results equal x86_64's ({record.commit[:7]})"
            values = ("", "", "", "", "Linux", record.processor)
            yield Row(values, "compiles", f"the CPU kernels, in qemu-user: {results}")


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

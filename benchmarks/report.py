"""What every report says about where its figures come from, and how it is written."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS, OTHERS = "#08519c", "#9e9e9e"  # bars


@dataclass(frozen=True)
class Requirement:
    """A bound on a figure that a report computes from what was measured."""

    text: str
    case: str
    value: Callable[[Any], float]  # raises KeyError where something for it hasn't been measured
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        return f"at least {self.at_least}" if self.at_most is None else f"at most {self.at_most}"

    def holds(self, value: float) -> bool:
        if self.at_most is None:
            return self.at_least is not None and value >= self.at_least
        return value <= self.at_most

    def verdict(self, measured: Any) -> tuple[str, str, str, str]:
        """The text, the value, the bound and whether it holds."""
        try:
            value = self.value(measured)
        except KeyError:
            return self.text, "", self.bound, "not measured"
        return self.text, f"{value:.3g}", self.bound, "holds" if self.holds(value) else "MISSED"


def summary(verdicts: Iterable[Sequence[str]]) -> str:
    """How many of what is required hold."""
    found = [verdict[-1] for verdict in verdicts]
    counts = (f"{found.count(word)} {text}" for word, text in (("MISSED", "missed"), ("not measured", "not measured")))
    return f"{found.count('holds')} of {len(found)} requirements hold, {', '.join(counts)}"


def commit() -> str:
    """The commit of this tree, with a "+" where tracked files other than results differ from it."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        diff = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(diff, cwd=ROOT, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + "+" * changed


def versions(*packages: str) -> dict[str, str]:
    """Those of Python and torch, and of the packages that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].split(":")[1].strip()
    return platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(path: Path, text: str) -> None:
    """All or nothing: an interrupted run leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, all others to the right."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure that is written to `path`, byte for byte the same for the same data."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": path.name, "font.size": 9}):
        made = Figure(figsize=(width, height), layout="constrained")
        yield made
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 130}))

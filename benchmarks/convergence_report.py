"""The tables and plots of `benchmarks.convergence`."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import report

if TYPE_CHECKING:
    from benchmarks.convergence import Plan, Runs


def write(out: Path, plan: "Plan", runs: "Runs") -> None:
    heads = ["optimizer", "lr", "β3", "α", "seed", "final validation loss"]
    rows = [
        [str(record["config"][name]) for name in ("optimizer", "lr", "beta3", "alpha", "seed")] + [f"{record['final']}"]
        for record in runs.records.values()
    ]
    report.write(out / "README.md", report.markdown_table(heads, rows) + "\n")

"""How a report is written: files, tables, plots."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
TABLE_BEGIN, TABLE_END = "<!-- table: begin -->", "<!-- table: end -->"  # in a page, around what a command computes
OURS, OTHERS = "#08519c", "#9e9e9e"  # bars


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


def write_table(document: Path, table: str) -> None:
    """Puts the table between the marks in a document."""
    before, _, rest = document.read_text().partition(TABLE_BEGIN)
    after = rest.partition(TABLE_END)[2]
    document.write_text(f"{before}{TABLE_BEGIN}\n{table}\n{TABLE_END}{after}")


def read_table(document: Path) -> str:
    """What stands between the marks."""
    return document.read_text().partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip()


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

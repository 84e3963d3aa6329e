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


def marks(name: str) -> tuple[str, str]:
    """What surrounds a table that a command writes into a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _around_table(document: Path, name: str) -> tuple[str, str, str]:
    """A page before, between and after the marks, which stay with the outer parts."""
    begin, end = marks(name)
    before, found, rest = document.read_text().partition(begin)
    table, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} has no {begin} and {end} to write a table between")
    return before + begin, table, end + after


def write_table(document: Path, name: str, table: str) -> None:
    """Puts a table between its marks in a page."""
    before, _, after = _around_table(document, name)
    document.write_text(f"{before}\n{table}\n{after}")


def read_table(document: Path, name: str) -> str:
    """The table between the marks of a page."""
    return _around_table(document, name)[1].strip()


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

"""Tables in the documentation that a command computes."""

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
TABLE_BEGIN, TABLE_END = "<!-- table: begin -->", "<!-- table: end -->"


def write_table(document: Path, table: str) -> None:
    """Puts the table between the marks in a document."""
    before, _, rest = document.read_text().partition(TABLE_BEGIN)
    after = rest.partition(TABLE_END)[2]
    document.write_text(f"{before}{TABLE_BEGIN}\n{table}\n{TABLE_END}{after}")


def read_table(document: Path) -> str:
    """What stands between the marks."""
    return document.read_text().partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].strip()

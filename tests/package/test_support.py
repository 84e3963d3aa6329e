"""The support matrix in docs/limitations.md."""

import json
import sys

import pytest

from tools import support

DESCRIBED = ("torch", "cuda", "gpu", "python", "os", "processor")
RECORD = dict(
    kind="suite",
    torch="2.15.0+cu132",
    cuda="13.2",
    gpu=None,
    python="3.11",
    os="Linux, glibc 2.36",
    processor="x86_64",
    passed=3000,
    failed=0,
    skipped=12,
    compiled=("12, sm_75, sm_90",),
    commit="0123456789abcdef",
    date="2026-11-30T12:00:00+00:00",
)
REPORT = """
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">
<testcase name="test_a"><properties><property name="compiled" value="13, sm_90"/></properties></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def records(monkeypatch, tmp_path):
    monkeypatch.setattr(support, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(support, "PAGE", tmp_path / "page.md")
    support.PAGE.write_text(f"{support.BEGIN}{support.END}")
    return support.RECORDS


def test_page_has_the_table_of_the_records():
    assert support.read_table() == support.table()  # else, `make support`


def tables(*records: support.Record) -> list[list[list[str]]]:
    """The cells of the table by axis and of the one by configuration, without their heads."""
    for record in records:
        record.write()
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in support.table().split("\n\n")
    ]


def test_rows(records):
    first = support.Record(**RECORD)
    wheel = support.Record(**RECORD | dict(kind="wheel", passed=700, compiled=()))
    older = support.Record(**RECORD | dict(torch="2.9.1", cuda=None, python="3.9", passed=1, failed=2))
    kernels = support.Record(**RECORD | dict(kind="kernels", processor="aarch64", os="Linux", passed=128))
    by_axis, runs = tables(older, wheel, first, kernels)
    ran = "all tests: 3,000 passed (0123456); the wheel's tests: 700 passed (0123456)"
    assert runs[0] == ["2.15.0", "13.2", "", "3.11", "Linux, glibc 2.36", "x86_64", "tested", ran]
    assert runs[1][:2] == ["2.9.1", ""]
    assert runs[1][-2:] == ["fails", "all tests: 1 passed, 2 failed (0123456)"]
    gpu, compiled, emulated = runs[2:]
    assert gpu[-2] == "tested"
    assert compiled[1:3] == ["12", "sm_75, sm_90"]
    assert [row[-2] for row in (compiled, emulated)] == ["compiles", "compiles"]
    axes = {axis: cells for axis, *cells in by_axis}
    assert axes["torch"] == [f"{gpu[0]}, 2.15.0", "", ""]
    assert axes["CUDA"] == [gpu[1], "12, 13.2", ""]
    assert axes["Python"] == [f"3.11, {gpu[3]}", "", "3.10, 3.13, 3.14, 3.14t"]
    assert axes["OS"][2] == "macOS, Windows"
    assert axes["processor"] == ["x86_64", "aarch64", ""]


def test_later_run_replaces_a_record(records):
    tables(support.Record(**RECORD | dict(failed=1)))
    assert tables(support.Record(**RECORD))[1][0][-2] == "tested"
    assert len(list(records.iterdir())) == 1


def test_record_of_a_run_of_pytest(records, monkeypatch, tmp_path):
    monkeypatch.setattr(support, "DESCRIBE", f"print('''{json.dumps({name: RECORD[name] for name in DESCRIBED})}''')")
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    support.record("wheel", sys.executable, [report, report], RECORD["commit"])
    (made,) = support.read_records()
    assert (made.passed, made.failed, made.skipped) == (8, 6, 6)
    assert made.compiled == ("13, sm_90",)
    assert made.torch == RECORD["torch"]
    assert support.read_table() == support.table()


def test_only_the_table_is_replaced(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    monkeypatch.setattr(support, "PAGE", page)
    page.write_text(f"before\n{support.BEGIN}\nold\n{support.END}\nafter\n")
    support.write_table()
    assert page.read_text() == f"before\n{support.BEGIN}\n{support.table()}\n{support.END}\nafter\n"
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="needs the lines"):
        support.write_table()
    assert page.read_text() == "no marks\n"

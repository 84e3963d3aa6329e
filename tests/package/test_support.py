"""The support matrix in docs/install.md."""

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
    return support.RECORDS


def rows(*records: support.Record) -> list[list[str]]:
    for record in records:
        record.write()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in support.table().splitlines()[2:]]


def test_rows(records):
    first = support.Record(**RECORD)
    wheel = support.Record(**RECORD | dict(kind="wheel", passed=700, compiled=()))
    older = support.Record(**RECORD | dict(torch="2.9.1", cuda=None, passed=1, failed=2))
    kernels = support.Record(**RECORD | dict(kind="kernels", processor="aarch64", os="Linux", passed=128))
    table = rows(older, wheel, first, kernels)
    ran = "all tests: 3,000 passed (0123456); the wheel's tests: 700 passed (0123456)"
    assert table[0] == ["2.15.0", "13.2, no GPU", "3.11", "Linux, glibc 2.36", "x86_64", "tested", ran]
    assert table[1][:2] == ["2.9.1", "none"]
    assert table[1][-2:] == ["fails", "all tests: 1 passed, 2 failed (0123456)"]
    by_status = {status: [row for row in table if row[-2] == status] for status in ("compiles", "untested")}
    assert [row[1:5] for row in by_status["compiles"]] == [
        ["12, sm_75, sm_90", "any", "Linux", "any"],
        ["any", "any", "Linux", "aarch64"],
    ]
    untested = {cell for row in by_status["untested"] for cell in row[:-2]} - {"any"}
    assert {"3.10", "3.14", "3.14t", "macOS", "Windows", "ROCm"} <= untested
    assert not {"3.11", "x86_64", "aarch64", "Linux", "12", "13"} & untested


def test_later_run_replaces_a_record(records):
    rows(support.Record(**RECORD | dict(failed=1)))
    assert rows(support.Record(**RECORD))[0][-2] == "tested"
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

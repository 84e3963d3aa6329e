"""The documentation: it builds without a warning, what it refers to exists, and every Python block in it runs.

The blocks of a page run one after another, with the names of those before. A block of text right after one is what that
prints. A block that begins with one of the comments in NEEDS is compiled only, by Python's own compiler.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torch_ademamix
from benchmarks import memory
from benchmarks.shared.writing import read_table

pytest.importorskip("myst_parser", reason="comes with the extra `docs`")
markdown_it = pytest.importorskip("markdown_it")

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
ELSEWHERE = (README, DOCS / "distributed.md")  # whose code has tests of its own
OPTIONAL = ("accelerate", "lightning", "transformers")  # of the extra `integrations`
LONG = ("compile", "models")  # pages whose code compiles for half a minute
NEEDS = ("# needs a GPU\n", "# needs several processes\n")


def tokens(page: Path) -> Iterator[markdown_it.token.Token]:
    for token in markdown_it.MarkdownIt().enable("table").parse(page.read_text()):
        yield token
        yield from token.children or ()


def run_code(page: Path) -> dict[str, object]:
    """Runs the page's Python blocks; errors tell the page's own lines."""
    module = ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module  # where Dynamo looks for what a function finds in its globals
    names = vars(module)
    fences = [token for token in tokens(page) if token.type == "fence"]
    for fence, following in pairwise([*fences, None]):
        if fence.info != "python":
            continue
        code = compile("\n" * (fence.map[0] + 1) + fence.content, page, "exec")
        if fence.content.startswith(NEEDS):
            continue
        with redirect_stdout(StringIO()) as printed:
            exec(code, names)
        if following is not None and following.info == "text" and following.map[0] == fence.map[1] + 1:
            assert printed.getvalue() == following.content
    return names


def has_code(page: Path) -> bool:
    return any(token.info == "python" for token in tokens(page) if token.type == "fence")


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _afresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.nightly] if page.stem in LONG else [])
        for page in PAGES
        if page not in ELSEWHERE and has_code(page)
    ],
    ids=by_name,
)
def test_code(page):
    try:
        run_code(page)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(str(error))


def test_code_of_the_readme():
    optimizer = run_code(README)["optimizer"]
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}  # one eager, one compiled


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_names(page):
    """What a page names is there: targets of make, modules to run, files of sources, files of tests."""
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tests = {path.stem for folder in ("tests", "compile_tests") for path in (ROOT / folder).rglob("test_*.py")}
    for token in tokens(page):
        if token.type not in ("code_inline", "fence"):
            continue
        for target in re.findall(r"^make ([a-z0-9-]+)", token.content, re.MULTILINE):
            assert target in targets
        for module in re.findall(r"python -m ([\w.]+)", token.content):
            assert importlib.util.find_spec(module), module
        for path in re.findall(r"\b\w+/[\w/]+\.(?:py|h|cpp|cu|cuh)\b", token.content):
            assert (ROOT / path).exists() or (ROOT / "torch_ademamix" / path).exists(), path
        if re.fullmatch(r"test_\w+", token.content):
            assert token.content in tests


@pytest.mark.nightly
@pytest.mark.slow
def test_build(tmp_path):
    """Without a warning: links in the pages and the README, references in docstrings, pages that no menu has."""
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "html"]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "html" / "genindex.html").read_text()
    documented = {name.rpartition(".")[2] for name in re.findall(r'#(?:module-)?(torch_ademamix[\w.]*)"', index)}
    assert set(torch_ademamix.__all__) <= documented


def test_memory_table():
    assert read_table(memory.DOCUMENT, "memory") == memory.table()


def test_a_newcomer_can_finish_it():
    """A limit on pages and words: what is added has to take the place of something."""
    assert len(PAGES) - 1 <= 15
    assert sum(len(page.read_text().split()) for page in PAGES) <= 12_000

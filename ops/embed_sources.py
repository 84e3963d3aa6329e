"""Writes the kernels' sources as one C++ string: `python ops/embed_sources.py TARGET`.

The library then compiles, whatever lies on disk beside it, the sources that it was built with, by whose layouts it
fills the kernels' arguments.
"""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

INCLUDE = re.compile(r'#include (?:"(?P<own>.+)"|<.+>)\n')


def device_source() -> str:
    """All device code in one text, each file once; NVRTC has no standard headers, so std.cuh comes first."""
    done: set[Path] = set()

    def whole(path: Path) -> str:
        if path in done:
            return ""
        done.add(path)
        parts = []
        for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
            include = INCLUDE.fullmatch(line)
            if include is None:
                parts.append("\n" if line == "#pragma once\n" else line)
            else:
                included = include["own"] and whole((path.parent / include["own"]).resolve())
                parts.append(f"{included}{line_mark(path, number + 1)}" if included else "\n")
        return line_mark(path, 1) + "".join(parts)

    return "".join(whole(path) for path in [FOLDER / "cuda/std.cuh", *sorted(FOLDER.glob("cuda/*_kernel.cuh"))])


def line_mark(path: Path, number: int) -> str:
    """Whence the lines after it are, for the compiler's messages."""
    return f'#line {number} "{path.relative_to(FOLDER)}"\n'


def embed(target: Path) -> None:
    """Leaves the file alone where it is as it should be, for the sake of build tools."""
    text = f'namespace ademamix {{\nextern const char DEVICE_SOURCE[] = R"source({device_source()})source";\n}}\n'
    if not target.is_file() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    embed(Path(sys.argv[1]))

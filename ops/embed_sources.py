"""Writes the kernels' sources as one C++ string: `python ops/embed_sources.py TARGET`.

So the library compiles the sources that it was built with, whose layouts it uses for the kernels' arguments, and not
what happens to be on disk.
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
    """Tells the compiler which file and line the next line is, for its messages."""
    return f'#line {number} "{path.relative_to(FOLDER)}"\n'


def embed(target: Path) -> None:
    """Writes the file, unless it is up to date: build tools go by its time."""
    text = f'namespace ademamix {{\nextern const char DEVICE_SOURCE[] = R"source({device_source()})source";\n}}\n'
    if not target.is_file() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    embed(Path(sys.argv[1]))

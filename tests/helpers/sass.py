"""Reads the machine code of CUDA kernels, as cuobjdump prints it, and counts the instructions of a loop."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path


def find_cuobjdump() -> str | None:
    """The one that `make test` takes out of the triton package, one on PATH, or that of an installed triton."""
    places = [Path(sys.executable).parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))


class Kernel:
    """One kernel's instructions, by their order."""

    def __init__(self, name: str, listing: str) -> None:
        self.name = name
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", listing)
        self._index = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.instructions = [text.strip() for _, text in found]

    def _next(self, i: int) -> Iterator[int]:
        text = self.instructions[i]
        operation = re.sub(r"^@!?U?P\w+\s+", "", text)
        conditional = text.startswith("@") or re.match(r"BRA(\.\w+)*\s+!?U?P\d", operation) is not None
        if operation.startswith("CALL"):  # of the slow part of a division or a root
            return
        if operation.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)", operation)
            if target and int(target[1], 16) in self._index:
                yield self._index[int(target[1], 16)]
        if conditional or not operation.startswith(("BRA", "EXIT", "RET")):
            yield from range(i + 1, min(i + 2, len(self.instructions)))

    def _distance(self, start: int, end: int) -> int:
        distances = {start: 0}
        queue = deque([start])
        while queue:
            i = queue.popleft()
            for j in self._next(i):
                if j == end:
                    return distances[i] + 1
                if j not in distances:
                    distances[j] = distances[i] + 1
                    queue.append(j)
        raise ValueError(f"{self.name}: no way from instruction {start} to {end}")

    def positions(self, pattern: str) -> list[int]:
        return [i for i, text in enumerate(self.instructions) if re.search(pattern, text)]

    def loop_length(self, *patterns: str) -> int:
        """Instructions on the shortest way around the loop that passes the last match of each pattern.

        A branch that is seldom taken, to a ragged tail, say, or to the slow part of a reciprocal, isn't on it.
        """
        stations = [self.positions(pattern)[-1] for pattern in patterns]
        return sum(self._distance(a, b) for a, b in zip(stations, [*stations[1:], stations[0]], strict=True))


def kernels(code: Path, name: str) -> Iterator[Kernel]:
    """The kernels in compiled code, to be known by that name."""
    text = subprocess.run([str(find_cuobjdump()), "--dump-sass", str(code)], check=True, capture_output=True, text=True)
    for listing in re.split(r"\n\s*Function : ", text.stdout)[1:]:
        yield Kernel(name, listing)

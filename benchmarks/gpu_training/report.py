"""The table and the plot of `benchmarks.gpu_training`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_training.steps import CASES, EAGER, OURS
from benchmarks.shared import target, writing
from benchmarks.shared.target import Target

COMPARED_STEPS = 20  # whose losses are compared; the others are timed
# Kernels round bfloat16 in other places, and attention's backward pass adds in no fixed order. A step that trains
# otherwise shows: the loss falls by several tenths at each of the first steps.
TOLERANCE = 0.05  # nats


@dataclass(frozen=True)
class Row:
    optimizer: str
    mode: str
    seconds: float  # per step
    quartiles: tuple[float, float]
    optimizer_seconds: float | None  # None where the profiler saw none of the package's kernels
    peak_bytes: int
    reserved_bytes: int
    state_bytes: int
    first_step_seconds: float
    losses: list[float]  # of the first steps
    steps: int  # that were timed


Rows = Mapping[str, Row]  # by the name of the case


def difference(rows: Rows, optimizer: str, mode: str) -> float:
    """The largest of a loss from the eager run's."""
    pairs = zip(rows[f"{optimizer}, {mode}"].losses, rows[f"{optimizer}, {EAGER}"].losses, strict=True)
    return max((abs(a - b) for a, b in pairs), key=lambda d: (d != d, d))  # NaN is the largest


TARGETS = (
    *(
        Target(
            f"difference of a loss from the eager run's, the largest of {COMPARED_STEPS} steps (nats)",
            case.name,
            lambda rows, case=case: difference(rows, case.optimizer, case.mode),
            "a graph trains what the eager loop trains, but sums in another order",
            at_most=TOLERANCE,
        )
        for case in CASES
        if case.optimizer in OURS and case.mode != EAGER
    ),
    Target(
        f"fall of the loss over these {COMPARED_STEPS} steps (nats)",
        f"AdEMAMix8bit, {EAGER}",
        lambda rows: (lambda losses: losses[0] - losses[-1])(rows[f"AdEMAMix8bit, {EAGER}"].losses),
        "what is timed is training",
        at_least=1.0,
    ),
)

HEADS = (
    *("", "ms/step", "quartiles", "optimizer, ms", "of the step", "peak, GB", "reserved, GB", "state, GB"),
    *("first step, s", "loss 1", f"loss {COMPARED_STEPS}"),
)


def cells(row: Row) -> list[str]:
    part = row.optimizer_seconds
    return [
        f"{row.optimizer}, {row.mode}",
        f"{row.seconds * 1e3:.2f}",
        " to ".join(f"{seconds * 1e3:.2f}" for seconds in row.quartiles),
        "" if part is None else f"{part * 1e3:.3f}",
        "" if part is None else f"{part / row.seconds:.1%}",
        *(f"{size / 1e9:.2f}" for size in (row.peak_bytes, row.reserved_bytes, row.state_bytes)),
        f"{row.first_step_seconds:.1f}",
        f"{row.losses[0]:.3f}",
        f"{row.losses[-1]:.3f}",
    ]


@dataclass
class Run:
    """What has been measured, and where it is written."""

    folder: Path
    setting: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # why

    @property
    def verdicts(self) -> list[tuple[str, ...]]:
        return [(r.case, *r.verdict(self.rows)) for r in TARGETS]

    def write(self) -> None:
        numbers = {
            "setting": self.setting,
            "rows": [asdict(row) for row in self.rows.values()],
            "left out": self.left_out,
            "targets": self.verdicts,
        }
        writing.write(self.folder / "training.json", json.dumps(numbers, indent=1) + "\n")
        writing.write(self.folder / "training.md", self.markdown())

    def markdown(self) -> str:
        parts = [
            "# Training on a GPU",
            "Written by `python -m benchmarks.gpu_training`, which also says how each figure is taken.",
            "\n".join(f"- {name}: {value}" for name, value in self.setting.items()),
            "![Time of a step, and memory](training.svg)",
            writing.markdown_table(HEADS, [cells(row) for row in self.rows.values()]),
        ]
        if self.left_out:
            parts.append("\n".join(f"- left out: {name} ({reason})" for name, reason in self.left_out.items()))
        parts += ["## Targets", writing.markdown_table(target.HEADS, self.verdicts), target.reasons(TARGETS)]
        return "\n\n".join(parts) + "\n"

    def plot(self) -> None:
        """Left: the time of a step and the optimizer's part of it. Right: the peak of memory."""
        names = list(self.rows)
        with writing.figure(self.folder / "training.svg", 11, 1.2 + 0.3 * len(names)) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            for y, row in enumerate(self.rows.values()):
                colour = writing.OURS if row.optimizer in OURS else writing.OTHERS
                left.barh(y, row.seconds * 1e3, color=colour, alpha=0.45)
                left.barh(y, (row.optimizer_seconds or 0) * 1e3, color=colour)
                left.text(row.seconds * 1e3, y, f" {row.seconds * 1e3:.1f}", va="center")
                right.barh(y, row.peak_bytes / 1e9, color=colour, alpha=0.45)
                right.barh(y, row.state_bytes / 1e9, color=colour)
                right.text(row.peak_bytes / 1e9, y, f" {row.peak_bytes / 1e9:.1f}", va="center")
            left.set_yticks(range(len(names)), names)
            left.invert_yaxis()
            left.set_xlabel("ms per step (dark: the optimizer's part)")
            right.set_xlabel("GB at the peak (dark: state; paged, it isn't in the peak)")
            for axes in (left, right):
                axes.margins(x=0.12)
                axes.spines[["top", "right"]].set_visible(False)

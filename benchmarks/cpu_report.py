"""The tables, the JSON and the plot of `benchmarks.cpu`."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import report
from benchmarks.peers import ADAMW

if TYPE_CHECKING:
    from benchmarks.cpu import Result

PLOTTED = {"float32": ("large", "GPT-2", "small"), "bfloat16": ("large, bf16", "GPT-2, bf16", "small, bf16")}
OURS, OTHERS = "#08519c", "#9e9e9e"


@dataclass(frozen=True)
class Row:
    """One competitor in one case; what doesn't apply is None."""

    name: str
    seconds: float  # per step: the median of the rounds
    quartiles: tuple[float, float]
    rounds: int
    parameters_per_second: float | None
    bytes_per_second: float
    bandwidth_share: float | None  # of the in-place multiply's, in the same rounds
    time_over_adamw: float
    state_bytes_per_parameter: float | None
    peak_bytes_per_parameter: float | None
    first_call_seconds: float


def rows(result: "Result") -> list[Row]:
    from benchmarks.cpu import IN_PLACE

    found: dict[str, Row] = {}
    for times in result.times:
        for name in times.rounds:
            if name in found:  # a reference of an earlier group
                continue
            seconds = times.median(name)
            speed = result.traffic(name) / seconds
            share = None
            if IN_PLACE in times.rounds:
                share = result.traffic(name) / result.traffic(IN_PLACE) / times.ratio(name, IN_PLACE)
            reference = name == IN_PLACE
            peak = result.peak_bytes.get(name)
            found[name] = Row(
                name=name,
                seconds=seconds,
                quartiles=times.quartiles(name),
                rounds=len(times.rounds[name]),
                parameters_per_second=None if reference else result.numel / seconds,
                bytes_per_second=speed,
                bandwidth_share=share,
                time_over_adamw=times.ratio(name, ADAMW),
                state_bytes_per_parameter=None if reference else result.state_bytes[name] / result.numel,
                peak_bytes_per_parameter=None if peak is None else peak / result.numel,
                first_call_seconds=times.first[name],
            )
    return list(found.values())


HEADS = (
    *("", "ms/step", "quartiles", "params/s", "GB/s", "of in-place", "time / AdamW", "state B/param", "peak B/param"),
    *("first call, s", "rounds"),
)


def cells(row: Row) -> list[str]:
    def optional(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"

    return [
        row.name,
        milliseconds(row.seconds),
        " to ".join(milliseconds(seconds) for seconds in row.quartiles),
        optional(row.parameters_per_second, ".2e"),
        f"{row.bytes_per_second / 1e9:.3g}",
        optional(row.bandwidth_share, ".0%"),
        f"{row.time_over_adamw:.2f}",
        optional(row.state_bytes_per_parameter, ".2f"),
        optional(row.peak_bytes_per_parameter, ".2f"),
        f"{row.first_call_seconds:.1f}",
        str(row.rounds),
    ]


def heading(result: "Result") -> str:
    dtype = str(result.case.dtype).removeprefix("torch.")
    before, after = result.load_average
    return f"{result.case.title}, {dtype}: {result.numel:,} parameters (load average {before:.1f} to {after:.1f})"


def lines(result: "Result") -> Iterable[str]:
    """For the terminal."""
    yield f"\n{heading(result)}"
    table = [list(HEADS), *map(cells, rows(result))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        )
    for name, reason in result.absent.items():
        yield f"absent: {name} ({reason})"


def machine() -> dict[str, object]:
    return {
        "processor": report.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **report.versions("bitsandbytes", "torchao"),
        "commit": report.commit(),
        "date": report.now(),
    }


def write(
    folder: Path, host: Mapping[str, object], results: Mapping[str, "Result"], verdicts: Sequence[Sequence[str]]
) -> None:
    document = {
        "machine": host,
        "cases": {
            name: {
                "title": result.case.title,
                "dtype": str(result.case.dtype),
                "tensors": len(result.case.shapes),
                "parameters": result.numel,
                "load average": result.load_average,
                "rows": [asdict(row) for row in rows(result)],
                "absent": result.absent,
                "seconds by group and round": [times.rounds for times in result.times],
            }
            for name, result in results.items()
        },
        "required": verdicts,
    }
    report.write(folder / "cpu.json", json.dumps(document, indent=1) + "\n")
    report.write(folder / "README.md", markdown(host, results, verdicts))
    plot(folder / "speed.svg", results)


def markdown(host: Mapping[str, object], results: Mapping[str, "Result"], verdicts: Sequence[Sequence[str]]) -> str:
    parts = [
        "# Speed on the CPU",
        "Written by `python -m benchmarks.cpu`, which also says how each figure is taken.",
        "\n".join(f"- {name}: {value}" for name, value in host.items()),
        "![Parameters per second](speed.svg)",
    ]
    for result in results.values():
        parts += [f"## {heading(result)}", report.markdown_table(HEADS, map(cells, rows(result)))]
        if result.absent:
            parts.append("\n".join(f"- absent: {name} ({reason})" for name, reason in result.absent.items()))
    parts += ["## Required", report.markdown_table(("case", "what", "value", "bound", ""), verdicts)]
    return "\n\n".join(parts) + "\n"


def plot(path: Path, results: Mapping[str, "Result"]) -> None:
    """Parameters per second: a panel for each case, a row for each dtype of the parameters."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [[case for case in cases if case in results] for cases in PLOTTED.values()]
    panels = [cases for cases in panels if cases]
    if not panels:
        return
    names = list(dict.fromkeys(row.name for cases in panels for case in cases for row in rows(results[case])))
    names = [name for name in names if any(name in results[case].state_bytes for cases in panels for case in cases)]
    with rc_context({"svg.hashsalt": path.name, "font.size": 9}):
        figure = Figure(figsize=(13, 3.8 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), max(map(len, panels)), sharex=True, sharey=True, squeeze=False)
        for axes_row, cases in zip(grid, panels, strict=True):
            for axes, case in zip(axes_row, cases, strict=False):
                result = results[case]
                speeds = {row.name: row.parameters_per_second for row in rows(result)}
                for y, name in enumerate(names):
                    speed = speeds.get(name)
                    if speed is None:
                        axes.text(1.2e6, y, "not measured", va="center", color=OTHERS)
                        continue
                    axes.barh(y, speed, color=OURS if name.startswith("AdEMAMix") else OTHERS)
                    axes.text(speed * 1.1, y, f"{speed / 1e6:,.0f}", va="center")
                axes.set_xscale("log")
                axes.set_xlim(1e6, 2e10)
                dtype = str(result.case.dtype).removeprefix("torch.")
                axes.set_title(f"{result.case.title}, {dtype}")
                axes.spines[["top", "right"]].set_visible(False)
            axes_row[0].set_yticks(range(len(names)), names)
            axes_row[0].invert_yaxis()
        for axes in grid[-1]:
            axes.set_xlabel("parameters per second (bars: millions)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})

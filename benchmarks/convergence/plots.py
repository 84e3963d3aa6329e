"""The plots of `benchmarks.convergence`."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.convergence import rosenbrock
from benchmarks.convergence.plan import ADAMW, ADANA, ADANA_12, NO_MOMENTUM, PERTURBED, SCHEMES, base_of
from benchmarks.convergence.report import Record, Report, Setting
from benchmarks.drift import FLOAT32, TWELVE_BITS
from benchmarks.shared.writing import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    ADAMW: "#252525",
    FLOAT32: "#08519c",
    "8-bit": "#d94801",
    TWELVE_BITS: "#c51b8a",
    "8-bit, slow_ema_bits=8": "#31a354",
    NO_MOMENTUM: "#756bb1",
    ADANA: "#006d2c",
    ADANA_12: "#74c476",
    PERTURBED: "#9ecae1",
}
LINES = ("#252525", "#08519c", "#6baed6", "#a63603", "#fd8d3c", "#31a354", "#c51b8a", "#756bb1", "#8c510a", "#006d2c")


def curves_of(records: Mapping[int, Record]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the validation losses of all seeds (seeds, steps)."""
    curves = [record["curve"] for record in records.values() if record["final"] is not None]
    steps = np.array([point["step"] for point in curves[0]]) if curves else np.array([])
    return steps, np.array([[point["validation"] for point in curve] for curve in curves])


def label_of(setting: Setting) -> str:
    """Of an optimizer with 32-bit state."""
    if setting.beta3 is None:
        return setting.optimizer
    beta1 = ", β1 = 0" if base_of(setting.optimizer) == NO_MOMENTUM else ""
    return f"AdEMAMix{beta1}, β3 = {setting.beta3:g}, α = {setting.alpha:g}"


def losses(path: Path, found: Report) -> None:
    """Left: all optimizers with 32-bit state; then, for each β3, quantized state against 32-bit."""
    beta3s = sorted({s.beta3 for s in found.comparison if s.beta3 is not None})
    if not beta3s:
        return
    with figure(path, 4.6 * (1 + len(beta3s)), 4.2) as made:
        left, *others = made.subplots(1, 1 + len(beta3s))
        lowest = []
        for setting in found.settings:
            if SCHEMES[setting.optimizer].base is not None:
                continue
            steps, values = curves_of(found.comparison[setting])
            if not len(values):
                continue
            style = "-" if setting.beta3 is None else ("-", "--", ":")[beta3s.index(setting.beta3) % 3]
            label = f"{label_of(setting)}, lr = {setting.lr:g}"
            _band(left, steps, values, label, COLOURS[setting.optimizer], style)
            lowest.append(values.min())
        if lowest:
            left.set_ylim(min(lowest) - 0.05, min(lowest) + 1)
        left.set(title="32-bit state", ylabel="validation loss (nats per byte)")
        for axes, beta3 in zip(others, beta3s, strict=True):
            _differences(axes, found, beta3)
        for axes in (left, *others):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            _legend(axes)


def longer(path: Path, found: Report) -> None:
    """The long runs, without their beginning."""
    if not found.long:
        return
    with figure(path, 6.5, 4.2) as made:
        axes = made.subplots()
        lowest = []
        for setting in found.long_settings:
            steps, values = curves_of(found.long[setting])
            if len(values):
                _band(axes, steps, values, f"{setting.name}, lr = {setting.lr:g}", COLOURS[setting.optimizer])
                lowest.append(values.min())
        if lowest:
            axes.set_ylim(min(lowest) - 0.02, min(lowest) + 0.4)
        axes.set(xlabel="step", ylabel="validation loss (nats per byte)")
        axes.grid(alpha=0.3)
        _legend(axes)


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _band(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str, colour: str, style: str = "-") -> None:
    """The mean over the seeds, and from the least to the greatest."""
    axes.plot(steps, values.mean(0), style, color=colour, label=label)
    axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _differences(axes: "Axes", found: Report, beta3: float) -> None:
    settings = [s for s in found.settings if s.beta3 == beta3 and base_of(s.optimizer) == FLOAT32]
    base = next((s for s in settings if s.optimizer == FLOAT32), None)
    if base is None:
        return
    for setting in settings:
        seeds = sorted(found.comparison[setting].keys() & found.comparison[base].keys())
        pairs = [(found.comparison[setting][seed]["curve"], found.comparison[base][seed]["curve"]) for seed in seeds]
        pairs = [(mine, theirs) for mine, theirs in pairs if len(mine) == len(theirs)]
        if setting == base or not pairs:
            continue
        steps = np.array([point["step"] for point in pairs[0][0]])
        values = np.array(
            [[m["validation"] - t["validation"] for m, t in zip(mine, theirs, strict=True)] for mine, theirs in pairs]
        )
        _band(axes, steps, values, setting.optimizer, COLOURS[setting.optimizer])
    axes.axhline(0, color=COLOURS[FLOAT32], linewidth=1)
    axes.set(title=f"minus 32-bit's of the same seed, β3 = {beta3:g}", ylabel="difference of validation loss")


def search(path: Path, found: Report) -> None:
    """Final validation loss by learning rate."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for setting, record in sorted(found.search.items(), key=lambda item: (item[0].beta3 or 0, item[0].alpha or 0)):
        if record["final"] is not None and not SCHEMES[setting.optimizer].varied:
            lines[label_of(setting)].append((setting.lr, record["final"]))
    with figure(path, 6.5, 4.2) as made:
        axes = made.subplots()
        for (label, points), colour in zip(lines.items(), LINES, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=label, markersize=3)
        axes.set_xscale("log")
        axes.set(xlabel="peak learning rate", ylabel="final validation loss (nats per byte)")
        axes.grid(alpha=0.3, which="both")
        _legend(axes)


def walks(path: Path, of_all: Mapping[str, list[rosenbrock.Walk]]) -> None:
    """Distance to the minimum: at one learning rate for all, and where each arrives first."""
    with figure(path, 9.2, 4) as made:
        left, right = made.subplots(1, 2, sharey=True)
        for (name, of_one), colour in zip(of_all.items(), LINES, strict=False):
            best = rosenbrock.first_to_arrive(of_one)
            for axes, walk in ((left, rosenbrock.at_shared_lr(of_one)), (right, best)):
                if walk is not None:
                    axes.plot(walk.distances, color=colour, label=f"{name}, lr = {walk.lr:g}", linewidth=1)
        left.set(title="one learning rate", ylabel="distance to the minimum")
        right.set(title="each at the learning rate at which it arrives first")
        left.set_yscale("log")
        left.set_ylim(1e-3, 10)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            _legend(axes)

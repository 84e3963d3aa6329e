"""The tables and the JSON of `benchmarks.convergence`."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any

from benchmarks.convergence import rosenbrock
from benchmarks.convergence.plan import ADAMW, ADANA, LONG, SCHEMES, Plan, base_of
from benchmarks.shared.writing import markdown_table

ORDER = list(SCHEMES)
Record = Mapping[str, Any]
Walks = Mapping[str, list[rosenbrock.Walk]]


@dataclass(frozen=True)
class Setting:
    """What a run is but for its seed."""

    optimizer: str
    lr: float
    beta3: float | None
    alpha: float | None

    @property
    def name(self) -> str:
        return self.optimizer if self.beta3 is None else f"AdEMAMix, {self.optimizer}"


def final(record: Record) -> float:
    return math.inf if record["final"] is None else record["final"]


class Report:
    """The runs of a plan, by setting and seed."""

    def __init__(self, plan: Plan, records: Iterable[Record]) -> None:
        self.plan = plan
        self.records = list(records)
        self.search: dict[Setting, Record] = {}
        self.comparison: dict[Setting, dict[int, Record]] = defaultdict(dict)
        self.long: dict[Setting, dict[int, Record]] = defaultdict(dict)
        for record in self.records:
            config = record["config"]
            setting = Setting(*(config[name] for name in ("optimizer", "lr", "beta3", "alpha")))
            if config["steps"] == plan.long_steps:
                self.long[setting][config["seed"]] = record
            elif config["steps"] == plan.steps and config["seed"] == plan.search_seed:
                self.search[setting] = record
            elif config["steps"] == plan.steps and config["seed"] in plan.seeds:
                self.comparison[setting][config["seed"]] = record

    @property
    def settings(self) -> list[Setting]:
        """Of the comparison: AdamW and ADANA, then by β3."""
        return sorted(self.comparison, key=order)

    @property
    def long_settings(self) -> list[Setting]:
        """Of the long runs: each optimizer's best one, which it has run with the most seeds."""
        best = []
        for name in LONG:
            found = [s for s in self.long if s.optimizer == name]
            if found:
                best.append(min(found, key=lambda s: (-len(self.long[s]), min(map(final, self.long[s].values())))))
        return best

    def search_table(self) -> str:
        return lines_by_lr({s: final(r) for s, r in self.search.items() if not SCHEMES[s.optimizer].varied})

    def varied_table(self) -> str:
        """ADANA with other δ and κ, next to its own at that learning rate."""
        lrs = {s.lr for s in self.search if SCHEMES[s.optimizer].varied}
        of_adana = [s for s in self.search if base_of(s.optimizer) == ADANA and s.lr in lrs]
        rows = [[s.name, f"{s.lr:g}", f"{final(self.search[s]):.4f}"] for s in sorted(of_adana, key=order)]
        return markdown_table(["", "lr", "loss"], rows)

    def long_table(self) -> str:
        rows = []
        for setting in self.long_settings:
            losses = [final(record) for _, record in sorted(self.long[setting].items())]
            each = " ".join(f"{loss:.4f}" for loss in losses)
            differences = with_spread(minus(self.long, setting, ADAMW, None))
            rows.append([setting.name, f"{setting.lr:g}", f"{mean(losses):.4f}", each, differences])
        return markdown_table(["", "lr", "mean", "each seed", "minus AdamW"], rows)

    def long_search_table(self) -> str:
        first = self.plan.long_seeds[0]
        return lines_by_lr({s: final(records[first]) for s, records in self.long.items() if first in records})

    def comparison_table(self) -> str:
        heads = ["", "β3", "α", "lr", "seeds", "mean", "spread", "each seed", "minus AdamW", "minus 32-bit state"]
        rows = []
        for setting in self.settings:
            losses = [final(record) for _, record in sorted(self.comparison[setting].items())]
            mixture = ["" if value is None else f"{value:g}" for value in (setting.beta3, setting.alpha)]
            rows.append(
                [
                    *(setting.name, *mixture, f"{setting.lr:g}", str(len(losses))),
                    *(f"{mean(losses):.4f}", spread(losses), " ".join(f"{loss:.4f}" for loss in losses)),
                    with_spread(minus(self.comparison, setting, ADAMW, None)),
                    with_spread(minus(self.comparison, setting, base_of(setting.optimizer), setting.beta3)),
                ]
            )
        return markdown_table(heads, rows)

    def as_json(self, walks: Walks) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "search": [{**asdict(s), "final": record["final"]} for s, record in self.search.items()],
            "comparison": [
                {**asdict(s), "final": {seed: r["final"] for seed, r in sorted(self.comparison[s].items())}}
                for s in self.settings
            ],
            "longer": [
                {**asdict(s), "final": {seed: r["final"] for seed, r in sorted(records.items())}}
                for s, records in self.long.items()
            ],
            "rosenbrock": rosenbrock.summary(walks),
            **self.origin(),
        }

    def origin(self) -> dict[str, list[str]]:
        """Where the runs come from: each different value once."""

        def values(name: str) -> list[str]:
            found = {json.dumps(record[name], sort_keys=True).strip('"') for record in self.records}
            return sorted(found)

        return {name: values(name) for name in ("commit", "processor", "versions", "text")}


def order(setting: Setting) -> tuple[float, int]:
    return setting.beta3 or 0, ORDER.index(setting.optimizer)


def minus(
    runs: Mapping[Setting, Mapping[int, Record]], setting: Setting, optimizer: str, beta3: float | None
) -> list[float]:
    """Differences to another optimizer's final losses, with the same seeds: its setting that has most of them."""
    others = [s for s in runs if (s.optimizer, s.beta3) == (optimizer, beta3)]
    if not others or setting in others:
        return []
    mine, theirs = runs[setting], runs[max(others, key=lambda s: len(runs[s]))]
    return [final(mine[seed]) - final(theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def lines_by_lr(losses: Mapping[Setting, float]) -> str:
    """A table of losses: a line has the settings that differ in the learning rate only."""
    lrs = sorted({setting.lr for setting in losses})
    lines: dict[Setting, dict[float, float]] = defaultdict(dict)
    for setting, loss in losses.items():
        lines[replace(setting, lr=0.0)][setting.lr] = loss
    rows = []
    for setting in sorted(lines, key=lambda s: (s.beta3 or 0, s.alpha or 0, ORDER.index(s.optimizer))):
        line = lines[setting]
        best = min(line.values())
        cells = [
            "" if lr not in line else f"**{line[lr]:.4f}**" if line[lr] == best else f"{line[lr]:.4f}" for lr in lrs
        ]
        mixture = ["" if value is None else f"{value:g}" for value in (setting.beta3, setting.alpha)]
        rows.append([setting.name, *mixture, *cells])
    return markdown_table(["", "β3", "α", *(f"{lr:g}" for lr in lrs)], rows)


def spread(values: list[float]) -> str:
    return f"{stdev(values):.4f}" if len(values) > 1 else ""


def with_spread(differences: list[float]) -> str:
    if not differences:
        return ""
    return f"{mean(differences):+.4f}" + (f" ± {stdev(differences):.4f}" if len(differences) > 1 else "")


def markdown(found: Report, walks: Walks) -> str:
    plan, record = found.plan, found.records[0]
    quantized = max(r["quantized"] for r in found.records)
    minutes = sum(r["seconds"] for r in found.records) / 60
    parts = [
        "# Convergence",
        "Written by `python -m benchmarks.convergence`, which also says what is searched and compared; "
        "docs/results.md says what it shows.",
        f"A byte-level GPT of {record['parameters']:,} parameters, {plan.steps:,} steps; losses in nats per byte over "
        f"{plan.final_windows:,} windows of held-out files. With 8-bit state {quantized:,} of the parameters have "
        f"quantized state. {len(found.records)} runs, {minutes:.0f} minutes.",
        "\n".join(f"- {name}: {'; '.join(values)}" for name, values in found.origin().items()),
        "## Comparison",
        f"Seeds {', '.join(map(str, plan.seeds))}. The spread is the standard deviation over the seeds; differences "
        f"are between runs of the same seed. Perturbed: the initial "
        "weights differ by a millionth, so what differs at the end is chance.",
        found.comparison_table() if found.comparison else "Not yet run.",
        "![Validation loss](loss.svg)",
        "## Search",
        f"Final validation loss by learning rate, seed {plan.search_seed}.",
        found.search_table(),
        "![Final loss by learning rate](search.svg)",
        f"ADANA with another δ (instead of 8) or κ (0.85), seed {plan.search_seed}, without a search of its own:",
        found.varied_table(),
        "## Longer runs",
        f"{plan.long_steps:,} steps, seeds {', '.join(map(str, plan.long_seeds))}; AdEMAMix's warm-ups last as long.",
        found.long_table() if found.long else "Not yet run.",
        *(("![Validation loss of the longer runs](long.svg)",) if found.long else ()),
        f"Final validation loss by learning rate, seed {plan.long_seeds[0]}:",
        found.long_search_table(),
        "## Rosenbrock",
        f"{plan.rosenbrock_steps:,} steps from {rosenbrock.START}; arrived: the step from which on the distance to the "
        f"minimum stays below {rosenbrock.NEAR:g}.",
        rosenbrock_table(walks),
        "![Distance to the minimum](rosenbrock.svg)",
    ]
    return "\n\n".join(parts) + "\n"


def rosenbrock_table(walks: Walks) -> str:
    def cell(value: float | None, form: str) -> str:
        return "never" if value is None else f"{value:{form}}"

    shared = f"at lr {rosenbrock.SHARED_LR:g}"
    heads = [
        "",
        f"distance {shared}",
        f"path length {shared}",
        "best lr",
        "arrived at the best lr",
        "path length there",
    ]
    rows = [
        [
            name,
            cell(summary["distance"], ".2g"),
            cell(summary["length"], ".1f"),
            cell(summary["best lr"], "g"),
            cell(summary["best arrival"], ",.0f"),
            cell(summary["best length"], ".1f"),
        ]
        for name, summary in rosenbrock.summary(walks).items()
    ]
    return markdown_table(heads, rows)

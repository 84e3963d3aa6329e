"""The tables and the JSON of `benchmarks.convergence`."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.convergence import rosenbrock
from benchmarks.convergence.plan import ADAMW, PERTURBED, Plan
from benchmarks.drift import FLOAT32, SCHEMES
from benchmarks.shared.writing import markdown_table

ORDER = [ADAMW, FLOAT32, PERTURBED, *(name for name in SCHEMES if name != FLOAT32)]
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
        return self.optimizer if self.optimizer == ADAMW else f"AdEMAMix, {self.optimizer}"


def final(record: Record) -> float:
    return math.inf if record["final"] is None else record["final"]


class Report:
    """The runs of a plan, by setting and seed."""

    def __init__(self, plan: Plan, records: Iterable[Record]) -> None:
        self.plan = plan
        self.records = [record for record in records if record["config"]["steps"] == plan.steps]
        self.search: dict[Setting, Record] = {}
        self.comparison: dict[Setting, dict[int, Record]] = defaultdict(dict)
        for record in self.records:
            config = record["config"]
            setting = Setting(*(config[name] for name in ("optimizer", "lr", "beta3", "alpha")))
            if config["seed"] == plan.search_seed:
                self.search[setting] = record
            elif config["seed"] in plan.seeds:
                self.comparison[setting][config["seed"]] = record

    @property
    def settings(self) -> list[Setting]:
        """Of the comparison: AdamW, then by β3."""
        return sorted(self.comparison, key=lambda s: (s.beta3 or 0, ORDER.index(s.optimizer)))

    def minus(self, setting: Setting, optimizer: str, beta3: float | None) -> list[float]:
        """Differences to another optimizer's final losses, with the same seeds."""
        others = next((s for s in self.comparison if (s.optimizer, s.beta3) == (optimizer, beta3)), None)
        if others is None or others == setting:
            return []
        mine, theirs = self.comparison[setting], self.comparison[others]
        return [final(mine[seed]) - final(theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]

    def search_table(self) -> str:
        lrs = sorted({setting.lr for setting in self.search})
        lines: dict[tuple[str, float | None, float | None], dict[float, float]] = defaultdict(dict)
        for setting, record in self.search.items():
            lines[setting.name, setting.beta3, setting.alpha][setting.lr] = final(record)
        rows = []
        for (name, beta3, alpha), losses in sorted(lines.items(), key=lambda item: (item[0][1] or 0, item[0][2] or 0)):
            best = min(losses.values())
            cells = [
                "" if lr not in losses else f"**{losses[lr]:.4f}**" if losses[lr] == best else f"{losses[lr]:.4f}"
                for lr in lrs
            ]
            rows.append([name, *("" if value is None else f"{value:g}" for value in (beta3, alpha)), *cells])
        return markdown_table(["", "β3", "α", *(f"{lr:g}" for lr in lrs)], rows)

    def comparison_table(self) -> str:
        heads = ["", "β3", "α", "lr", "seeds", "mean", "spread", "each seed", "minus AdamW", "minus 32-bit"]
        rows = []
        for setting in self.settings:
            losses = [final(record) for _, record in sorted(self.comparison[setting].items())]
            mixture = ["" if value is None else f"{value:g}" for value in (setting.beta3, setting.alpha)]
            rows.append(
                [
                    *(setting.name, *mixture, f"{setting.lr:g}", str(len(losses))),
                    *(f"{mean(losses):.4f}", spread(losses), " ".join(f"{loss:.4f}" for loss in losses)),
                    with_spread(self.minus(setting, ADAMW, None)),
                    with_spread(self.minus(setting, FLOAT32, setting.beta3)),
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
            "rosenbrock": rosenbrock.summary(walks),
            **self.origin(),
        }

    def origin(self) -> dict[str, list[str]]:
        """Where the runs come from: each different value once."""

        def values(name: str) -> list[str]:
            found = {json.dumps(record[name], sort_keys=True).strip('"') for record in self.records}
            return sorted(found)

        return {name: values(name) for name in ("commit", "processor", "versions", "text")}


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
        "docs/convergence.md says what it shows.",
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

"""AdEMAMix and ADANA next to AdamW in training, each at its best: `python -m benchmarks.convergence`.

A small byte-level GPT learns the sources of Python's standard library. First a search on one seed: AdamW over learning
rates; AdEMAMix over learning rates at each pair of β3 and α; AdEMAMix with β1 = 0 and ADANA over learning rates. Each
line of learning rates is extended until its best one has a neighbour on either side, and around the best a factor of √2
is tried as well. Then new seeds for all of these, and for quantized state with the same settings; ADANA with other δ
and κ, once each; and runs of four times the steps (plan.py lists them all). The AdEMAMix paper's toy comes last.

Each run is kept in a file of its own as soon as it has ended, and isn't repeated: an interrupted search goes on where
it was. Tables and plots are written at the end, and when the search is interrupted.

`--stages` and `--only` make some of the runs, without tables: processes that share a folder and no optimizer with a
search of its own (the first part of a name, such as ADANA) can run at the same time. Without them, all that is missing
follows.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.convergence import plots, rosenbrock
from benchmarks.convergence.plan import SCHEMES, SHORT, Plan
from benchmarks.convergence.report import Report, markdown
from benchmarks.convergence.search import STAGES, Runs
from benchmarks.shared import writing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of a few runs, to try it; not for figures")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report (benchmarks/results/convergence)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="of the runs, these alone")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, metavar="NAME", help=f"of {'; '.join(SCHEMES)}")
    args = parser.parse_args(arguments)
    plan = SHORT if args.short else Plan()
    out = args.out or (writing.ROOT / "out" / "convergence" if args.short else writing.RESULTS / "convergence")
    torch.set_num_threads(1)  # the model is small; and one thread adds in one order, so that runs repeat bit for bit

    runs = Runs(out / "runs", plan)
    try:
        for stage in args.stages or STAGES:
            for config in STAGES[stage](plan, runs, args.only or SCHEMES):
                runs.record(config)
    finally:
        if runs.records and not (args.stages or args.only):
            write(out, plan, runs, rosenbrock.measure(plan.rosenbrock_steps))
    if not (args.stages or args.only):
        print((out / "README.md").read_text())


def write(out: Path, plan: Plan, runs: Runs, walks: Mapping[str, list[rosenbrock.Walk]]) -> None:
    found = Report(plan, runs.records.values())
    writing.write(out / "convergence.json", json.dumps(found.as_json(walks), indent=1) + "\n")
    writing.write(out / "README.md", markdown(found, walks))
    plots.losses(out / "loss.svg", found)
    plots.search(out / "search.svg", found)
    plots.longer(out / "long.svg", found)
    plots.walks(out / "rosenbrock.svg", walks)


if __name__ == "__main__":
    main()

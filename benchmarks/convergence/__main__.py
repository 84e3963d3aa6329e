"""AdEMAMix beside AdamW in training, each at its best: `python -m benchmarks.convergence`.

A small byte-level GPT learns the sources of Python's standard library. First a search on one seed: AdamW over learning
rates; AdEMAMix over learning rates at each pair of β3 and α. Each line of learning rates is extended until its best one
has a neighbour on either side, and around the best of AdamW and of AdEMAMix a factor of √2 is tried as well. Then new
seeds, for AdamW, and for AdEMAMix with 32-bit and quantized state at each β3. The paper's toy comes last. With
`--smaller`, AdEMAMix with smaller state follows (β1 = 0, slow_ema_bits=12), each at a learning rate of its own;
`--run SCHEME LR BETA3 ALPHA SEED` makes one run alone.

Each run is kept in a file of its own as soon as it has ended, and isn't repeated: an interrupted search goes on where
it was. Tables and plots are written at the end, and when the search is interrupted.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.convergence import plots, rosenbrock
from benchmarks.convergence.plan import SHORT, SMALLER, Config, Plan
from benchmarks.convergence.report import Report, markdown
from benchmarks.convergence.search import Runs, comparison, search, smaller
from benchmarks.shared import writing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few steps of a few runs, to try it; not for figures")
    parser.add_argument("--out", type=Path, help="folder of the runs and the report (benchmarks/results/convergence)")
    parser.add_argument("--smaller", action="store_true", help=f"also {'; '.join(SMALLER)}")
    parser.add_argument(
        "--run", nargs=5, metavar=("SCHEME", "LR", "BETA3", "ALPHA", "SEED"), help="nothing but one run"
    )
    args = parser.parse_args(arguments)
    plan = SHORT if args.short else Plan()
    out = args.out or (writing.ROOT / "out" / "convergence" if args.short else writing.RESULTS / "convergence")
    torch.set_num_threads(1)  # the model is small; and one thread adds in one order, so that runs repeat bit for bit

    runs = Runs(out / "runs", plan)
    if args.run:
        scheme, lr, beta3, alpha, seed = args.run
        config = Config(scheme, float(lr), float(beta3), float(alpha), int(seed), plan.steps)
        print(config.filename, runs.loss(config))
        return
    try:
        found = search(plan, runs)
        for config in comparison(plan, found, runs):
            runs.record(config)
        for config in smaller(plan, found, runs) if args.smaller else ():
            runs.record(config)
    finally:
        if runs.records:
            write(out, plan, runs, rosenbrock.measure(plan.rosenbrock_steps))
    print((out / "README.md").read_text())


def write(out: Path, plan: Plan, runs: Runs, walks: Mapping[str, list[rosenbrock.Walk]]) -> None:
    found = Report(plan, runs.records.values())
    writing.write(out / "convergence.json", json.dumps(found.as_json(walks), indent=1) + "\n")
    writing.write(out / "README.md", markdown(found, walks))
    plots.losses(out / "loss.svg", found)
    plots.search(out / "search.svg", found)
    plots.walks(out / "rosenbrock.svg", walks)


if __name__ == "__main__":
    main()

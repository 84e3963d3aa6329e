"""Times several competitors in turns, since a machine's speed drifts while it is measured."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from tqdm import tqdm


@dataclass(frozen=True)
class Times:
    """Seconds per call, by competitor and round, and those of each one's first call."""

    rounds: Mapping[str, list[float]]
    first: Mapping[str, float]

    def median(self, name: str) -> float:
        return median(self.rounds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """The first and the third."""
        seconds = self.rounds[name]
        first, _, third = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return first, third

    def ratio(self, name: str, other: str) -> float:
        """The time of `name` over that of `other`: the median of the rounds' ratios."""
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return median(a / b for a, b in pairs)


def seconds_per_call(
    step: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Mapping[str, list[float]]:
    """The seconds per call of each step and round; a round calls each so often, in an order of its own."""
    measured: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    generator = random.Random(0)
    gc.collect()
    gc.disable()  # a collection would fall on whoever happens to be timed
    try:
        for _ in tqdm(range(rounds), title, leave=False, disable=None):  # no bar in a file
            generator.shuffle(order)
            for name in order:
                measured[name].append(seconds_per_call(steps[name], calls, clock))
    finally:
        gc.enable()
    return measured

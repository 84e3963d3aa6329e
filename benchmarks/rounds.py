"""Times several competitors in turns, since a machine's speed drifts while it is measured."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

from tqdm import tqdm


@dataclass(frozen=True)
class Times:
    """Seconds per call, by competitor and round, and those of each one's first call."""

    rounds: Mapping[str, list[float]]
    first: Mapping[str, float]

    def median(self, name: str) -> float:
        return median(self.rounds[name])

    def best(self, name: str) -> float:
        return min(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """The time of `name` over that of `other`: the median of the rounds' ratios."""
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return median(a / b for a, b in pairs)


def take_turns(steps: Mapping[str, Callable[[], object]], *, rounds: int, calls: int, title: str) -> Times:
    """Times `calls` calls of each step per round; who is first changes from round to round."""

    def seconds(step: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls

    bar = partial(tqdm, leave=False, disable=None)  # no bar in a file
    first = {name: seconds(step, 1) for name, step in bar(steps.items(), f"{title}: first calls")}
    for step in steps.values():
        seconds(step, calls)
    measured: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    gc.collect()
    gc.disable()  # a collection would fall on whoever happens to be timed
    try:
        for _ in bar(range(rounds), title):
            for name in order:
                measured[name].append(seconds(steps[name], calls))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return Times(measured, first)

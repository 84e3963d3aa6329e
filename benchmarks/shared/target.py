"""Targets for the figures that a benchmark takes: this project's own, each with the reason for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

HEADS = ("case", "what", "value", "bound", "")


@dataclass(frozen=True)
class Target:
    """A bound on a figure that a report computes from what was measured."""

    text: str
    case: str
    value: Callable[[Any], float]  # raises KeyError if something for it hasn't been measured
    why: str  # the reason for the bound
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        return f"at least {self.at_least}" if self.at_most is None else f"at most {self.at_most}"

    def holds(self, value: float) -> bool:
        if self.at_most is None:
            return self.at_least is not None and value >= self.at_least
        return value <= self.at_most

    def verdict(self, measured: Any) -> tuple[str, str, str, str]:
        """The text, the value, the bound and whether it holds."""
        try:
            value = self.value(measured)
        except KeyError:
            return self.text, "", self.bound, "not measured"
        return self.text, f"{value:.3g}", self.bound, "holds" if self.holds(value) else "MISSED"


def reasons(targets: Iterable[Target]) -> str:
    """A list of what the targets are for, to stand below their table."""
    return "\n".join(dict.fromkeys(f"- {target.text}, {target.bound}: {target.why}" for target in targets))


def summary(verdicts: Iterable[Sequence[str]]) -> str:
    """How many targets are met."""
    found = [verdict[-1] for verdict in verdicts]
    counts = (f"{found.count(word)} {text}" for word, text in (("MISSED", "missed"), ("not measured", "not measured")))
    return f"{found.count('holds')} of {len(found)} targets met, {', '.join(counts)}"

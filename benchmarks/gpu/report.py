"""The tables and the plot of `benchmarks.gpu`, and what all reports from a GPU say of the machine."""

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.shared import origin, target, writing
from benchmarks.shared.target import Target

RESULTS = writing.RESULTS / "gpu"
FAILED = "failed"  # the beginning of why a measurement that raised is left out

T = TypeVar("T")


def machine() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "CUDA": torch.version.cuda,
        "processor": origin.processor(),
        **origin.versions("bitsandbytes", "torchao", "triton"),
        "commit": origin.commit(),
        "date": origin.now(),
    }


def attempt(measure: Callable[[], T], begin: float, minutes: float) -> tuple[T | None, str | None]:
    """What `measure` returns; or why there is nothing, in a line for a table.

    Nothing is begun later than `minutes` after `begin`, a time of `time.monotonic`.
    """
    if time.monotonic() > begin + 60 * minutes:
        return None, f"not reached within {minutes:g} minutes"
    try:
        return measure(), None
    except ImportError as error:
        return None, f"not installed: {error}"
    except Exception as error:
        traceback.print_exc()
        text = (str(error).splitlines() or [""])[0]
        return None, f"{FAILED}: {type(error).__name__}: {text[:150]}"


@dataclass(frozen=True)
class Result:
    case: str
    competitor: str
    microseconds: float  # of the GPU, from the step's begin to its end
    microseconds_in_a_row: float  # of a step, when many follow one another
    gigabytes_per_second: float
    share_of_copy: float
    launches: int
    bytes_per_param: float


Results = Mapping[tuple[str, str], Result]  # by case and competitor

LARGE, GPT2_124M, SMALL = "8 x 2^24", "GPT-2 124M", "1000 x 4096"  # cases


def share(case: str, name: str) -> Callable[[Results], float]:
    return lambda results: results[case, name].share_of_copy


def time_over(case: str, name: str, other: str) -> Callable[[Results], float]:
    return lambda results: results[case, name].microseconds / results[case, other].microseconds


def speed_over(case: str, name: str, other: str) -> Callable[[Results], float]:
    """Of steps in a row."""
    return lambda results: results[case, other].microseconds_in_a_row / results[case, name].microseconds_in_a_row


FLOOR = "a step has to move its parameters, gradients and state: it can't be faster than a copy of as many bytes"

TARGETS = (
    *(
        Target(f"share of the copy, {ours}", LARGE, share(LARGE, f"{ours}, eager"), FLOOR, at_least=bound)
        for ours, bound in (("fp32 AdEMAMix", 0.9), ("bf16 AdEMAMix", 0.8), ("bf16 AdEMAMix8bit", 0.9))
    ),
    Target(
        "time of fp32 AdEMAMix, over fused AdamW's",
        GPT2_124M,
        time_over(GPT2_124M, "fp32 AdEMAMix, eager", "fp32 AdamW, fused"),
        "36 bytes of traffic against 28, and 5% more",
        at_most=1.35,
    ),
    Target(
        "time of bf16 AdEMAMix8bit, over fused AdamW's",
        GPT2_124M,
        time_over(GPT2_124M, "bf16 AdEMAMix8bit, eager", "bf16 AdamW, fused"),
        "14.1 bytes of traffic against 14: 8-bit state shouldn't cost time",
        at_most=1.0,
    ),
    *(
        Target(
            f"steps per second of {ours}, {how}, over bitsandbytes'",
            case,
            speed_over(case, f"{ours}, {how}", peer),
            "one launch for all tensors should pay against one call and one wait for each",
            at_least=bound,
        )
        for case, how, bound in ((GPT2_124M, "eager", 5.0), (SMALL, "replayed", 20.0))
        for ours, peer in (
            ("fp32 AdEMAMix", "fp32 bitsandbytes AdEMAMix"),
            ("bf16 AdEMAMix8bit", "bf16 bitsandbytes AdEMAMix8bit"),
        )
    ),
)

HEADS = ("case", "", "us", "us in a row", "GB/s", "of copy", "launches", "bytes/param")


def cells(r: Result) -> list[str]:
    return [
        r.case,
        r.competitor,
        f"{r.microseconds:,.1f}",
        f"{r.microseconds_in_a_row:,.1f}",
        f"{r.gigabytes_per_second:,.0f}",
        f"{r.share_of_copy:.0%}",
        str(r.launches),
        f"{r.bytes_per_param:.1f}",
    ]


@dataclass
class Report:
    """What has been measured, and where it is written."""

    folder: Path
    machine: dict[str, Any]
    copy_bytes_per_second: float
    results: dict[tuple[str, str], Result] = field(default_factory=dict)
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)  # why
    ours_failed: bool = False

    @property
    def verdicts(self) -> list[tuple[str, ...]]:
        return [(r.case, *r.verdict(self.results)) for r in TARGETS]

    def write(self) -> None:
        numbers = {
            "machine": self.machine,
            "copy_bytes_per_second": self.copy_bytes_per_second,
            "results": [asdict(result) for result in self.results.values()],
            "left out": [[*run, why] for run, why in self.left_out.items()],
            "targets": self.verdicts,
        }
        writing.write(self.folder / "speed.json", json.dumps(numbers, indent=1) + "\n")
        writing.write(self.folder / "speed.md", self.markdown())

    def markdown(self) -> str:
        host = {**self.machine, "a copy moves": f"{self.copy_bytes_per_second / 1e9:,.0f} GB/s"}
        parts = [
            "# Speed on a GPU",
            "Written by `python -m benchmarks.gpu`, which also says how each figure is taken.",
            "\n".join(f"- {name}: {value}" for name, value in host.items()),
            "![Share of the copy's bandwidth](speed.svg)",
            writing.markdown_table(HEADS, [cells(result) for _, result in sorted(self.results.items())]),
        ]
        if self.left_out:
            parts.append("\n".join(f"- left out: {', '.join(run)} ({why})" for run, why in self.left_out.items()))
        parts += ["## Targets", writing.markdown_table(target.HEADS, self.verdicts), target.reasons(TARGETS)]
        return "\n\n".join(parts) + "\n"

    def plot(self) -> None:
        """The share of the copy's bandwidth, a panel for each case."""
        cases = list(dict.fromkeys(case for case, _ in self.results))
        if not cases:
            return
        names = sorted({name for _, name in self.results})
        size = 4 + 2.6 * len(cases), 1.2 + 0.3 * len(names)
        with writing.figure(self.folder / "speed.svg", *size) as figure:
            panels = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)[0]
            for axes, case in zip(panels, cases, strict=True):
                for y, name in enumerate(names):
                    result = self.results.get((case, name))
                    if result is None:
                        axes.text(0.02, y, "not measured", va="center", color=writing.OTHERS)
                        continue
                    is_ours = "AdEMAMix" in name and "bitsandbytes" not in name
                    axes.barh(y, result.share_of_copy, color=writing.OURS if is_ours else writing.OTHERS)
                    axes.text(min(result.share_of_copy, 1), y, f" {result.share_of_copy:.0%}", va="center")
                axes.set_title(case)
                axes.set_xlim(0, 1.25)
                axes.set_xlabel("share of the copy's bandwidth")
                axes.spines[["top", "right"]].set_visible(False)
            panels[0].set_yticks(range(len(names)), names)
            panels[0].invert_yaxis()

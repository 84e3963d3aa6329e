"""What all tests have in common: threads, seeds, and which process runs which."""

import os
from collections import Counter, defaultdict
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: as many run as there are cores
os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported: nothing is looked up online

import pytest
import torch

torch.set_num_threads(1)  # tensors this small: more threads would only wait for one another

# Each is run by one process of pytest-xdist.
TOGETHER = (
    "tests/distributed/",  # whose workers are there for all of them
    "tests/cuda/test_cuda_build.py",  # about one library
    "tests/package/test_install.py",  # which build in the same folder
    *(f"tests/trainers/test_{trainer}.py" for trainer in ("accelerate", "hf_trainer", "lightning")),  # slow to import
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests come first, so that no process is left with one at the end."""
    leave_cases_to_the_night(items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def leave_cases_to_the_night(items: list[pytest.Item]) -> None:
    """Marks cases of parametrized tests `nightly`: all but the first, or but a few in which each value occurs."""
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in (item for item in items if not item.get_closest_marker("nightly")):
        for marker in ("first_case", "each_value"):
            if item.get_closest_marker(marker):
                cases[marker, item.nodeid.partition("[")[0]].append(item)
    for (marker, _), of_one_test in cases.items():
        quick = of_one_test[:1] if marker == "first_case" else each_value(of_one_test)
        for item in of_one_test:
            if item not in quick:
                item.add_marker("nightly")


def each_value(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Cases in which each value of each parameter occurs: always the next one with the most that haven't occurred."""
    values = {item: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in cases}
    occurrences: Counter[tuple[str, str]] = Counter()

    def gain(item: pytest.Item) -> tuple[int, int]:
        before = [occurrences[value] for value in values[item]]
        return before.count(0), -sum(before)

    chosen: list[pytest.Item] = []
    while not all(occurrences[value] for value in set().union(*values.values())):
        chosen.append(max(cases, key=gain))
        occurrences.update(values[chosen[-1]])
    return chosen


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        """What stands together first, the largest before the others; the rest one by one."""

        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)

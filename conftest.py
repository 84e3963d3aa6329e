"""What all tests have in common: threads, seeds, and which process runs which."""

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: as many run as there are cores
os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported: nothing is looked up online

import pytest
import torch

torch.set_num_threads(1)  # tensors this small: more threads would only wait for one another

# Each is run by one process of pytest-xdist.
TOGETHER = (
    "tests/distributed/",  # whose workers are there for all of them
    "tests/test_cuda_build.py",  # about one library
    "tests/test_install.py",  # which build in the same folder
    *(f"tests/test_{trainer}.py" for trainer in ("accelerate", "hf_trainer", "lightning")),  # slow to import
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        """What stands together first, the largest before the others; the rest one by one."""

        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)

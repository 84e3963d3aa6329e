"""The workers themselves: failures reach the report, and hung processes end."""

import faulthandler
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.workers import Workers

pytestmark = pytest.mark.distributed


def add_ranks(to: int) -> int:
    total = torch.tensor(dist.get_rank() + to)
    dist.all_reduce(total)
    return int(total)


def threads_of_groups() -> list[int]:
    groups = dist.group.WORLD, dist.new_group([0, 1])
    dist.barrier()  # none leaves while the other still connects
    return [group._get_backend(torch.device("cpu")).options._threads for group in groups]


def fail_on_rank_1() -> None:
    assert dist.get_rank() != 1, "this text"


def wait_for_rank_1() -> None:
    if dist.get_rank() == 1:
        sleep_long()
    dist.barrier()


def crash_on_rank_1() -> None:
    if dist.get_rank() == 1:
        faulthandler._sigsegv()


def sleep_long() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_of_every_rank(workers, world_size):
    assert workers.run(world_size, add_ranks, 10) == [world_size * 10 + sum(range(world_size))] * world_size


def test_collectives_end_on_one_thread(workers):
    """Of two, both write one string at a time: see workers.py."""
    assert workers.run(2, threads_of_groups) == [[1, 1]] * 2


def test_a_failure_is_reported_with_its_traceback(workers):
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*fail_on_rank_1.*this text") as failure:
        workers.run(2, fail_on_rank_1)
    assert "rank 0" not in str(failure.value)
    assert workers.run(2, add_ranks, 0) == [1, 1]


def test_a_hung_process_ends_with_its_stack():
    with Workers(2) as workers:
        workers.run(2, add_ranks, 0)  # imports this file, which may take longer than a second
        with pytest.raises(AssertionError, match=r"(?s)rank 0 has not ended.*barrier.*rank 1 has not.*sleep_long"):
            workers.run(2, wait_for_rank_1, seconds=1)
        assert not workers._processes


def test_a_crash_is_reported_with_its_stack_and_ends_no_later_test():
    with Workers(2) as workers:
        with pytest.raises(AssertionError, match=r"(?s)rank 1:\nended with exit code -11.*crash_on_rank_1"):
            workers.run(2, crash_on_rank_1)
        assert workers.run(2, add_ranks, 0) == [1, 1]

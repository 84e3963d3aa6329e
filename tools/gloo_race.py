"""Shows a race in torch's gloo groups: `python -m tools.gloo_race [--one-thread]`.

The tests avoid it (`tests/helpers/workers.py`). Two processes have eight all-gathers at a time in flight, with torch
alone. The two threads that end them race, and most runs crash within 20,000 rounds (some minutes); with one thread,
none has.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed._functional_collectives import all_gather_tensor
from tqdm import trange

from tests.helpers.workers import end_collectives_on_one_thread

SIZE = 2
IN_FLIGHT = 8


def gather(rank: int, folder: str, rounds: int, one_thread: bool) -> None:
    torch.set_num_threads(1)
    if one_thread:
        end_collectives_on_one_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=SIZE)
    part = torch.ones(8)
    for _ in trange(rounds, disable=rank != 0):
        for whole in [all_gather_tensor(part, 0, dist.group.WORLD) for _ in range(IN_FLIGHT)]:
            whole.sum()  # waits for it
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--one-thread", action="store_true", help="as the tests' processes do")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(gather, (folder, arguments.rounds, arguments.one_thread), nprocs=SIZE)

"""Processes that run a test's functions together, as the ranks of a gloo process group.

They are started once and serve many tests. Importing torch takes seconds: one process does it, of which all are forks.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

INTERFACES = os.environ.get("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
START_SECONDS = 120  # importing torch on a busy machine
IMPORTS = ["torch._dynamo", "torch.distributed.fsdp"]  # of the process that is forked
GRACE_SECONDS = 5  # for the others, once a rank has failed: what waits for it can't go on


class Workers:
    """A pool of processes; `with` or :meth:`stop` ends them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._groups = 0

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
        """What `function(*args)`, of a test file's top level, returns on each rank of a group of that size.

        Raises:
            AssertionError: it failed on a rank, whose traceback is in the text; or it took longer than `seconds`,
                and the stacks of the ranks that were still at it are there.
        """
        self._start()
        self._groups += 1
        rendezvous = f"file://{self._folder.name}/group{self._groups}"
        connections = self._connections[:world_size]
        for rank, connection in enumerate(connections):
            connection.send((rank, world_size, rendezvous, function.__code__.co_filename, function.__name__, args))
        answers = self._receive(connections, seconds)
        problems = [f"rank {rank}:\n{text}" for rank, (ok, text) in answers.items() if not ok]
        missing = [rank for rank in range(world_size) if rank not in answers]
        if missing:
            problems += [f"rank {rank} has not ended; its stack:\n{self._stack(rank)}" for rank in missing]
        if missing or not all(process.is_alive() for process in self._processes):
            self.stop()  # the next test gets new ones
        assert not problems, "\n".join(problems)
        return [answers[rank][1] for rank in range(world_size)]

    @property
    def size_running(self) -> int:
        return len(self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._log(rank)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        started = self._receive(self._connections, START_SECONDS)
        if [ok for ok, _ in started.values()] != [True] * self._size:
            self.stop()
            raise AssertionError(f"of {self._size} workers, these have answered: {started}")

    def _receive(self, connections: list[Connection], seconds: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank, of those that came in time."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(connections):
            pending = [c for rank, c in enumerate(connections) if rank not in answers]
            ready = wait(pending, max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = connections.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join()
                    stack = self._log(rank).read_text()
                    answers[rank] = (False, f"ended with exit code {self._processes[rank].exitcode}\n{stack}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, f"stack{rank}")

    def _stack(self, rank: int) -> str:
        os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self._log(rank).read_text()


def _serve(connection: Connection, log: Path) -> None:
    """A worker's life: it runs what comes, until it is killed."""
    with log.open("w") as file:
        faulthandler.enable(file)  # of a crash
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        end_collectives_on_one_thread()
        torch.set_num_threads(1)
        connection.send((True, None))
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            try:
                answer = (True, _run(*task))
            except BaseException:
                answer = (False, traceback.format_exc())
            connection.send(answer)


def end_collectives_on_one_thread() -> None:
    """Starts gloo's groups with one thread, where torch starts two.

    The two race (seen in torch 2.11 and 2.13): each assigns the name of the collective that it has just ended to the
    one `std::string` of the group's status, without a lock (`ProcessGroupGloo::runLoop`). A name too long to stand in
    the string itself, such as that of DTensor's all-gather, is then now and then freed twice, and the process crashes
    at some later time. `tools/gloo_race.py` shows it.
    """
    make = dist.ProcessGroupGloo.__init__

    def make_with_one_thread(
        self: Any, store: dist.Store, rank: int, size: int, timeout: timedelta, **more: Any
    ) -> None:
        options = dist.ProcessGroupGloo._Options()
        for name, value in more.items():  # since torch 2.15, enable_reconfigure
            setattr(options, name, value)
        options._devices = [dist.ProcessGroupGloo.create_device(interface=name) for name in INTERFACES.split(",")]
        options._threads = 1
        options._timeout = timeout
        make(self, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = make_with_one_thread


def _run(rank: int, world_size: int, rendezvous: str, path: str, name: str, args: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        dist.barrier()  # none fails and leaves while another still connects to it
        return getattr(_module(path), name)(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@cache
def _module(path: str) -> ModuleType:
    """A test file as a module, for processes that pytest doesn't import it in."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for its classes
    spec.loader.exec_module(module)
    return module

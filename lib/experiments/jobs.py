"""Many tasks, of which some need another first: in this process, or in a few processes.

A process that dies costs its task only, and none is left behind. `concurrent.futures` gives up all
tasks when one process is killed, and a process of `Pool` may start no loading workers of its own.
Dask's LocalCluster would do as well, but Dask is an extra, and `--jobs` has to work without it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple


class Ended(NamedTuple):
    """How a task ended."""

    failure: str | None = None  # what went wrong, in a sentence
    is_fit: bool = True  # whether its process may take another task
    is_busy: bool = False  # somebody else is at this task: it is worth another try later


Task = Callable[..., Ended]
Needs = Mapping[int, int]  # index of a task to that of the one that has to end well before it


class Waiting:
    """Whose turn it is: `ready` has the tasks that wait for a process, not for another task."""

    def __init__(self, count: int, needs: Needs) -> None:
        self.needs = needs
        self.ready = deque(index for index in range(count) if index not in needs)

    def ended(self, index: int, failure: str | None) -> Iterator[tuple[int, str | None]]:
        """A task has ended: itself and what is so decided, each with what went wrong."""
        yield index, failure
        for follower in [one for one, needed in self.needs.items() if needed == index]:
            if failure is None:
                self.ready.append(follower)
            else:
                yield from self.ended(follower, f"what it starts from failed: {failure}")


def in_turn(work: Task, tasks: Sequence[tuple], needs: Needs) -> Iterator[tuple[int, str | None]]:
    """`in_processes` in this process, one task after another."""
    waiting = Waiting(len(tasks), needs)
    while waiting.ready:
        index = waiting.ready.popleft()
        yield from waiting.ended(index, work(*tasks[index]).failure)


def in_processes(
    work: Task, tasks: Sequence[tuple], needs: Needs, environments: Sequence[Mapping[str, str]]
) -> Iterator[tuple[int, str | None]]:
    """Calls `work(*task)` for every task, in processes of their own.

    A process that dies (killed, out of memory) is the failure of its task and is replaced. However
    this ends, by Ctrl-C or an error in the caller too, no process is left behind.

    Args:
        work: a function of a module.
        environments: what each process that works at a time finds in its environment.

    Yields:
        the index of a task that ended and what went wrong, in the order in which they end. Where
        the one that a task needs has failed, so has the task.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting = Waiting(len(tasks), needs)
    free = deque(environments)
    idle: list[Connection] = []
    busy: dict[Connection, int] = {}  # to the index of its task
    started: dict[Connection, tuple[BaseProcess, Mapping[str, str]]] = {}
    try:
        while waiting.ready or busy:
            while waiting.ready and (idle or free):
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, work))
                    own = free.popleft()
                    with environment(own):
                        process.start()
                    theirs.close()  # else nobody would hear that it died
                    started[ours] = process, own
                    idle.append(ours)
                connection = idle.pop()
                busy[connection] = waiting.ready.popleft()
                with suppress(ConnectionError):  # it died while idle: heard below
                    connection.send(tasks[busy[connection]])
            for connection in wait(list(busy)):
                index = busy.pop(connection)
                process, own = started[connection]
                try:
                    ended = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    code = process.exitcode
                    ended = Ended(f"its process died (exit code {code})", is_fit=False)
                if ended.is_fit:
                    idle.append(connection)
                else:
                    free.append(own)
                yield from waiting.ended(index, ended.failure)
    finally:
        for connection in busy:
            started[connection][0].terminate()
        for connection in idle:
            connection.close()  # which ends it, in its own time
        for process, _ in started.values():
            process.join()


def shares(jobs: int) -> list[dict[str, str]]:
    """What each of several processes finds in its environment: its part of this machine.

    They share the processor cores. GPUs go round, one to a process, those that CUDA_VISIBLE_DEVICES
    names where it is set.
    """
    import torch  # the command line's help does not wait for it

    # Threads of several processes that spin while they wait for work keep the cores from each
    # other: with GNU OpenMP's default, everything is about seven times slower.
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    share["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")
    share["TQDM_DISABLE"] = "1"  # no bars of their own
    share["LOCAL_WORLD_SIZE"] = str(jobs)  # as torchrun has it: loading workers share the cores
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else map(str, range(count))
    own = [{"CUDA_VISIBLE_DEVICES": gpu.strip()} for gpu in gpus] or [{}]
    return [share | own[job % len(own)] for job in range(jobs)]


def _serve(connection: Connection, work: Task) -> None:
    """A process of `in_processes`: one task after another, until the other side ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_fit = True
    while is_fit:
        try:
            task = connection.recv()
        except EOFError:
            return
        ended = work(*task)
        connection.send(ended)
        is_fit = ended.is_fit


def _end_with_parent() -> None:
    """Ends this process at once when its parent was killed and cannot end it."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def watching(look: Callable[[], None], seconds: float = 2.0) -> Iterator[None]:
    """Calls `look` every few seconds, in a thread of its own, as long as the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            with suppress(OSError, ValueError):  # a file that is being replaced: the next look
                look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold within, for processes that are started there."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)

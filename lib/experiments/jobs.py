"""Many tasks in a few processes: one that dies costs its task only, and none is left behind.

`concurrent.futures` gives up all tasks when one process is killed, and a process of `Pool` may
start no loading workers of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess


def in_processes(
    work: Callable[..., tuple[str | None, bool]], tasks: Sequence[tuple], jobs: int, threads: int
) -> Iterator[tuple[int, str | None]]:
    """Calls `work(*task)` for every task, in at most `jobs` processes at a time.

    A process that dies (killed, out of memory) is the failure of its task and is replaced. However
    this ends, by Ctrl-C or an error in the caller too, no process is left behind.

    Args:
        work: a function of a module. It returns what went wrong, or None, and whether its process
            is fit for another task.
        threads: of PyTorch in each process.

    Yields:
        the index of a task that ended and what went wrong, in the order in which they end.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    # Threads of several processes that spin while they wait for work keep the cores from each
    # other: with GNU OpenMP's default, everything is about seven times slower.
    share = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}  # no bars of their own
    share["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "1000")
    waiting = list(enumerate(tasks))[::-1]
    idle: list[Connection] = []
    busy: dict[Connection, int] = {}  # to the index of its task
    started: dict[Connection, BaseProcess] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, work))
                    with environment(share):
                        process.start()
                    theirs.close()  # else nobody would hear that it died
                    started[ours] = process
                    idle.append(ours)
                connection = idle.pop()
                busy[connection], task = waiting.pop()
                with suppress(ConnectionError):  # it died while idle: heard below
                    connection.send(task)
            for connection in wait(list(busy)):
                index = busy.pop(connection)
                try:
                    failure, is_fit = connection.recv()
                except (EOFError, ConnectionError):
                    started[connection].join()
                    code = started[connection].exitcode
                    failure, is_fit = f"its process died (exit code {code})", False
                if is_fit:
                    idle.append(connection)
                yield index, failure
    finally:
        for connection in busy:
            started[connection].terminate()
        for connection in idle:
            connection.close()  # which ends it, in its own time
        for process in started.values():
            process.join()


def _serve(connection: Connection, work: Callable) -> None:
    """A process of `in_processes`: one task after another, until the other side ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_fit = True
    while is_fit:
        try:
            task = connection.recv()
        except EOFError:
            return
        failure, is_fit = work(*task)
        connection.send((failure, is_fit))


def _end_with_parent() -> None:
    """Ends this process at once when its parent was killed and cannot end it."""
    multiprocessing.parent_process().join()
    os._exit(1)


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

"""Many tasks on the workers of a Dask cluster: one that is killed loses its task to another.

Dask knows which workers there are, carries calls to them and hears when one dies; it starts them
on SSH hosts, SLURM, PBS or Kubernetes. Whose turn it is, is decided here, as in `in_processes`: a
worker is given a task when it is free, so nothing waits on the cluster when this process is gone,
and a worker that dies takes no other task down with it.

Results do not travel: tasks write to the runs folder, which all hosts share, at the same path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lib.config import Config
from lib.experiments.jobs import Ended, Needs, Task, Waiting
from lib.files import ROOT, make_folder, write_text

if TYPE_CHECKING:  # an extra: imported where a cluster is asked for
    from distributed import Client, Future

ANSWER = 10.0  # seconds that a scheduler has to answer
PATIENCE = 1.0  # seconds between looks at who is there
LATER = 5.0  # seconds until a task that somebody else is at is tried again
TRIES = 3  # of a task that a worker could not even take
TOKEN = ".cluster"  # in the runs folder: what every worker must see
START = "--nthreads 1 --memory-limit 0"  # of `dask worker`
NEEDED = ("torch", "timm")  # whose versions must agree


@dataclass
class Slurm:
    """What `sweep --cluster slurm` asks SLURM for: so many jobs, each a worker."""

    workers: int = 4  # jobs at a time, one training each
    partition: str | None = None  # the cluster's default
    account: str | None = None
    time: str = "04:00:00"  # of a job; a training that it cuts short goes on in another
    gres: str = "gpu:1"  # of a job, such as gpu:a100:1; empty for none
    cpus: int = 4  # of a job
    memory: str = "16GB"  # of a job

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus < 1:
            raise ValueError(f"workers is {self.workers} and cpus {self.cpus}; use 1 or more")


class ClusterError(OSError):
    """There is no such cluster, it is gone, or its workers do not see what this process sees."""


def on_cluster(
    work: Task,
    tasks: Sequence[tuple],
    needs: Needs,
    where: str,
    slurm: Slurm,
    config: Config,
    tell: Callable[[int], object],
) -> Iterator[tuple[int, str | None]]:
    """`in_processes` on the workers of a cluster: calls `work(*task)` for every task there.

    A task whose worker dies goes to another worker; Dask gives it up when it has cost too many
    (four, unless its scheduler is configured otherwise), and that is its failure. What somebody
    else is at is tried again later. When this ends early, by Ctrl-C too, workers go on with what
    they are at, but take nothing new; those that were started here (SLURM) are ended.

    Args:
        where: address of a Dask scheduler, or "slurm".
        config: its runs folder and data must be there for workers as they are here.
        tell: is told how many workers there are.

    Raises:
        ClusterError: nobody answers, the cluster is gone, or its workers are not as they must be;
            with the remedy.
    """
    if not tasks:
        return
    _refuse_missing("distributed")
    from distributed import CancelledError, KilledWorker, wait
    from tqdm.auto import tqdm

    waiting = Waiting(len(tasks), needs)
    running: dict[Future, int] = {}  # to the index of its task
    later: list[tuple[float, int]] = []  # when, and the index
    tries: Counter[int] = Counter()
    with _asked_of_workers(config) as asked, _client(where, slurm, config.runs) as client:
        if client.dashboard_link:
            tqdm.write(f"Dask's page: {client.dashboard_link}")
        team = _Team(client, asked, tqdm.write)
        try:
            while waiting.ready or running or later:
                count = team.count()
                tell(count)
                while later and later[0][0] < time.monotonic():
                    waiting.ready.append(later.pop(0)[1])
                while waiting.ready and len(running) < count:
                    index = waiting.ready.popleft()
                    key = f"training-{index}-{uuid.uuid4().hex}"
                    call = client.submit(_on_worker, asked, work, tasks[index], key=key)
                    running[call] = index
                for call in _over(list(running), wait):
                    index, error = running.pop(call), call.exception()
                    if error is None:
                        ended, worker = call.result()
                        call.release()  # else it is done again when its worker ends
                        if not ended.is_fit:
                            with suppress(ValueError):  # no nanny could start it again
                                client.restart_workers([worker], raise_for_error=False)
                        if ended.is_busy:
                            team.fit.discard(worker)  # or it sees no more what it saw
                            later.append((time.monotonic() + LATER, index))
                            continue
                        failure = ended.failure
                    elif isinstance(error, CancelledError):  # the scheduler went, nobody cancels
                        raise error
                    elif isinstance(error, KilledWorker):
                        failure = f"{error.allowed_failures + 1} workers died at it"
                    else:
                        tries[index] += 1
                        if tries[index] < TRIES:
                            later.append((time.monotonic() + LATER, index))
                            continue
                        failure = f"{type(error).__name__}: {error}"
                    yield from waiting.ended(index, failure)
        except (CancelledError, OSError) as error:
            if isinstance(error, ClusterError):
                raise
            raise ClusterError(
                f"the scheduler ({where}) is gone; start it and its workers again: the same "
                "command goes on"
            ) from error


def _refuse_missing(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ClusterError(f"{package} is not installed; pip install -e '.[cluster]'")


def _over(calls: list[Future], wait: Callable) -> list[Future]:
    """Those of some calls that are over, after PATIENCE at the latest."""
    if not calls:
        time.sleep(PATIENCE)
        return []
    try:
        return list(wait(calls, PATIENCE, "FIRST_COMPLETED").done)
    except TimeoutError:
        return []


@contextmanager
def _client(where: str, slurm: Slurm, runs: Path) -> Iterator[Client]:
    """Connected to a scheduler; with "slurm" to one of its own, whose workers are SLURM's jobs."""
    from distributed import Client

    if where == "slurm":
        with _slurm_cluster(slurm, runs) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(where, timeout=ANSWER)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"nobody answers at {where} ({error}); start `dask scheduler` there and name it as "
            "tcp://HOST:8786, or say slurm"
        ) from error
    with client:
        yield client


def _slurm_cluster(slurm: Slurm, runs: Path) -> Any:
    _refuse_missing("dask_jobqueue")
    from dask_jobqueue import SLURMCluster

    if shutil.which("sbatch") is None:
        raise ClusterError("sbatch is not found; say --cluster slurm on a login node of SLURM")
    make_folder(runs / "slurm")
    cluster = SLURMCluster(
        cores=1,
        processes=1,
        memory=slurm.memory,
        job_cpu=slurm.cpus,
        queue=slurm.partition,
        account=slurm.account,
        walltime=slurm.time,
        job_extra_directives=[f"--gres={slurm.gres}"] if slurm.gres else [],
        job_script_prologue=[
            f"export OMP_NUM_THREADS={slurm.cpus}",
            f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH",
        ],
        worker_extra_args=["--memory-limit", "0"],  # SLURM sees to that itself
        log_directory=str(runs / "slurm"),
        python=sys.executable,
    )
    # Dask would print a traceback for a job that is refused, and wait for it for ever.
    asking = {"input": cluster.job_script(), "capture_output": True, "text": True}
    refused = subprocess.run(["sbatch", "--test-only"], check=False, **asking)
    if refused.returncode:
        cluster.close()
        raise ClusterError(f"SLURM takes no such job: {refused.stderr.strip()}; change --slurm.*")
    # A job that ends, by its time limit too, is replaced; `scale` would not do that.
    cluster.adapt(minimum_jobs=slurm.workers, maximum_jobs=slurm.workers)
    return cluster


# ---------------------------------------------------------------------------------------- workers


class _Team:
    """The workers of a cluster that may train."""

    def __init__(self, client: Client, asked: dict, say: Callable[[str], object]) -> None:
        self.client, self.asked, self.say = client, asked, say
        self.fit: set[str] = set()

    def count(self) -> int:
        """How many there are now; who has come since is looked at.

        Raises:
            ClusterError: one of the first is not as it must be. Later ones are sent away instead.
        """
        there = self.client.nthreads()
        came = [worker for worker in there if worker not in self.fit]
        answers = {}
        if came:
            answers = self.client.run(_refusal, self.asked, workers=came, on_error="return")
        are_first = not self.fit
        for worker, answer in answers.items():
            if isinstance(answer, ImportError | AttributeError):
                answer = f"does not have this version of the project ({answer}); install it there"
            if answer is None:
                self.fit.add(worker)
            elif not isinstance(answer, OSError):  # else it died meanwhile
                told = f"the worker {worker} {answer}"
                if are_first:
                    raise ClusterError(told)
                self.say(f"{told}. It is sent away")
                self.client.retire_workers([worker])
        return len(self.fit & there.keys())


@contextmanager
def _asked_of_workers(config: Config) -> Iterator[dict[str, Any]]:
    """What `_refusal` compares; the runs folder is marked, and held, meanwhile."""
    make_folder(config.runs)
    lock = FileLock(config.runs / f"{TOKEN}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ClusterError(
            f"another command sends trainings of {config.runs} to a cluster; wait for it, or "
            "choose another runs folder (RUNS_DIR)"
        ) from error
    try:
        token, data = uuid.uuid4().hex, config.data
        write_text(config.runs / TOKEN, token)
        paths = [data.maps_dir, data.split_file, config.model.weights]
        paths += [data.root] if data.name != "toy" else []
        yield {
            "runs": str(config.runs),
            "token": token,
            "paths": [str(path) for path in paths if path and path.exists()],
            "code": _digest_of_code(),
            "versions": _versions(),
        }
    finally:
        lock.release()


@cache  # of what was imported: who edits a file meanwhile changes what starts later
def _digest_of_code() -> str:
    """Of all Python files of this project, wherever it lies."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "lib").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _versions() -> str:
    """Of what computes; a build for another GPU (2.14.1+cpu) is the same version."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in NEEDED)


def _refusal(asked: dict[str, Any], dask_worker: Any) -> str | None:
    """On a worker: why it must not train, with the remedy; None where it may."""
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT

    os.environ.setdefault("TQDM_DISABLE", "1")  # before it is imported: no bars in the log
    # Dask's nanny starts its worker as a daemon, which may not start loading workers. Those end by
    # themselves when it is killed.
    multiprocessing.current_process()._config["daemon"] = False
    threads, limit = dask_worker.state.nthreads, dask_worker.memory_manager.memory_limit
    runs, here = Path(asked["runs"]), f"(on {socket.gethostname()})"
    if threads != 1:
        return f"{here} would train {threads} at a time; start it with {START}"
    if limit and limit == int(MEMORY_LIMIT / CPU_COUNT) < MEMORY_LIMIT:  # Dask's share of a core
        return f"{here} would be ended at {limit / 1e9:.1f} GB of memory; start it with {START}"
    if _versions() != asked["versions"]:
        return f"{here} has {_versions()}, and here is {asked['versions']}; install the same"
    if _digest_of_code() != asked["code"]:
        return f"{here} has other code in {ROOT}; bring it to the same version and start it again"
    token = runs / TOKEN
    is_marked = token.is_file() and token.read_text(encoding="utf-8") == asked["token"]
    if not is_marked or not os.access(runs, os.W_OK):
        return f"{here} does not share {runs}; mount it there, writable, or set RUNS_DIR to one"
    for path in asked["paths"]:
        if not os.path.exists(path):
            return f"{here} does not see {path}; it must be there at the same path"
    try:
        with FileLock(f"{token}.lock", timeout=0):
            return f"{here} can lock {runs} though it is locked here; mount it with locks that hold"
    except Timeout:
        return None


def _on_worker(asked: dict[str, Any], work: Task, task: tuple) -> tuple[Ended, str]:
    """One task, and the address of the worker that did it."""
    from distributed import get_worker

    worker = get_worker()
    # One that has just come may be given a task before `_Team` has looked at it, and a folder that
    # was there may be gone: then `_Team` looks again.
    refused = _refusal(asked, worker)
    return Ended(is_busy=True) if refused else work(*task), worker.address

"""Tasks on a real Dask cluster: workers are killed, and no task is lost or done twice.

Work that stands in for trainings is in this file, which workers import: PyTorch only where needed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_jobs import gone, is_alive

from lib.config import Sweep
from lib.experiments import cluster
from lib.experiments.cluster import Slurm
from lib.experiments.jobs import Ended

pytest.importorskip("distributed")
HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}


def started(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", f"distributed.cli.dask_{words[0]}", *words[1:]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, "--no-dashboard"], env=ENVIRONMENT, **quiet)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A scheduler and four workers, each with a nanny that starts it again."""
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    given = ("--scheduler-file", str(file), "--host", "127.0.0.1")
    processes = [started("scheduler", *given, "--port", "0")]
    worker = ("worker", "--scheduler-file", str(file), *cluster.START.split(), "--no-dashboard")
    processes += [started(*worker) for _ in range(4)]
    while not file.is_file():
        time.sleep(0.05)
    yield pd.read_json(file, typ="series")["address"]
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        process.wait(timeout=60)


def work(name: str, folder: Path) -> Ended:
    """What is done is a folder, made once, as a result is; names say what else happens."""
    with (folder / "started.txt").open("a") as log:
        log.write(f"{name} {os.getpid()}\n")
    if name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "unmounts":  # as far as the command's mark goes
        (folder / cluster.TOKEN).unlink()
    if name == "fails":
        return Ended("no luck")
    if name == "breaks":
        raise RuntimeError("not caught")
    if name == "loads":  # in a process of its own, which a daemon may not start
        child = multiprocessing.Process(target=os.getpid)
        child.start()
        child.join()
    if name == "spoils":
        return Ended("worse", is_fit=False)
    if name == "taken" and len([line for line in started_by(folder) if line[0] == name]) < 3:
        return Ended("by another", is_busy=True)
    if not (folder / name).is_dir():  # a result that was lost with its worker is asked for again
        time.sleep(0.05)
        (folder / name).mkdir()  # fails where another does the same
    return Ended()


def started_by(folder: Path) -> list[tuple[str, int]]:
    """Task and process of all that was begun."""
    file = folder / "started.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [(name, int(process)) for name, process in map(str.split, lines)]


def on_cluster(where, config, names, needs, folder, slurm=None) -> dict[int, str | None]:
    told = []
    tasks = [(name, folder) for name in names]
    given = (work, tasks, needs, where, slurm or Slurm(), config, told.append)
    ended = list(cluster.on_cluster(*given))
    assert max(told) > 0
    assert sorted(index for index, _ in ended) == list(range(len(names)))  # each once
    return dict(ended)


def kill_some(folder: Path, count: int, over: threading.Event) -> None:
    """Ends workers with -9, at random, in the middle of what they do."""
    killed, lot = set(), random.Random(0)
    while len(killed) < count and not over.wait(lot.uniform(0.1, 0.6)):
        known = [pair for pair in started_by(folder) if is_alive(pair[1])]
        if known and known[-1] not in killed and known[-1][0].isdecimal():
            killed.add(known[-1])
            os.kill(known[-1][1], signal.SIGKILL)


def test_of_200_none_is_lost_and_none_done_twice(address, config, tmp_path, monkeypatch):
    """Workers are killed meanwhile; what fails costs itself, and what starts from it."""
    monkeypatch.setattr(cluster, "LATER", 0.1)
    odd = ["start", "fails", "deadly", "spoils", "taken", "breaks", "loads"]
    names = [*odd, *map(str, range(200))]
    needs = {7: 0, 8: 0, 9: 1, 10: 2, 11: 4}
    over = threading.Event()
    killer = threading.Thread(target=kill_some, args=(tmp_path, 6, over))
    killer.start()
    found = on_cluster(address, config, names, needs, tmp_path)
    over.set()
    killer.join()
    bad = {names[index]: failure for index, failure in found.items() if failure}
    assert bad == {
        "fails": "no luck",
        "deadly": "4 workers died at it",
        "spoils": "worse",
        "breaks": "RuntimeError: not caught",
        "2": "what it starts from failed: no luck",
        "3": "what it starts from failed: 4 workers died at it",
    }
    begun = Counter(name for name, _ in started_by(tmp_path))
    done = {path.name for path in tmp_path.iterdir() if path.is_dir()} - {"runs"}
    assert done == {"start", "taken", "loads", *map(str, range(200))} - {"2", "3"}
    assert begun["deadly"] == 4 and begun["taken"] >= 3 and begun["breaks"] >= 3
    order = [name for name, _ in started_by(tmp_path)]
    assert order.index("start") < min(order.index("0"), order.index("1"))
    processes = {process for _, process in started_by(tmp_path)}
    assert len(processes) >= 4 + 4  # the first ones, and those in the place of dead ones


def test_a_sweep_on_a_cluster_is_the_sweep_of_one_process(address, config, tmp_path):
    from lib.experiments import sweep

    config.hitl = replace(config.hitl, epochs=1)
    config.ft = replace(config.ft, epochs=1)
    axes = Sweep(loss=("kl",), lam=(1.0, 1e39))
    out = tmp_path / "sweep.csv"
    table, failed = sweep.run_sweep(config, axes, out, cluster=address)
    assert [*failed] == ["kl-l1e+39-blocks_last-heads_all-offset_none-train_all-s0"]
    assert list(table["status"]) == ["measured"] * 4 + ["diverged"] * 2
    assert "the loss is not finite" in table["failure"].iloc[-1]
    again = replace(config, runs=tmp_path / "again")
    here, _ = sweep.run_sweep(again, axes, tmp_path / "again.csv")
    pd.testing.assert_frame_equal(
        table.drop(columns="seconds"), here.drop(columns="seconds"), rtol=1e-4
    )
    before = out.read_text()
    sweep.run_sweep(config, axes, out, cluster="tcp://127.0.0.1:1")  # nothing is left to ask for
    assert out.read_text() == before


SCRIPTS = {
    "sbatch": """
if [ "$1" = --test-only ]; then
    grep -q "SBATCH --gres=gpu:1" && exit 0
    echo "invalid gres" >&2; exit 1
fi
script=$(cat "$1")
setsid bash -c "$script" < /dev/null > /dev/null 2>&1 &
echo $! >> JOBS; echo "Submitted batch job $!" """,
    "scancel": """kill -- -"$1" 2> /dev/null; echo "$1" >> CANCELLED""",
}


def test_slurm_starts_workers_replaces_lost_ones_and_is_left_empty(config, tmp_path, monkeypatch):
    """Real dask-jobqueue, and a stand-in for SLURM that runs jobs in the background."""
    pytest.importorskip("dask_jobqueue")
    jobs = tmp_path / "jobs"
    for name, script in SCRIPTS.items():
        script = script.replace("JOBS", str(jobs)).replace("CANCELLED", str(tmp_path / "cancelled"))
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(cluster.ClusterError, match="takes no such job: invalid gres; change --sl"):
        on_cluster("slurm", config, ["a"], {}, tmp_path, Slurm(gres="gpu:9"))
    folder = tmp_path / "done"
    folder.mkdir()
    killed = []

    def lose_a_job() -> None:
        while not started_by(folder):
            time.sleep(0.05)
        killed.extend(jobs.read_text().split()[:1])
        os.killpg(int(killed[0]), signal.SIGKILL)

    killer = threading.Thread(target=lose_a_job)
    killer.start()
    asked = Slurm(workers=2, partition="short", account="birds", time="00:10:00", cpus=1)
    found = on_cluster("slurm", config, list(map(str, range(60))), {}, folder, asked)
    killer.join()
    assert set(found.values()) == {None}
    given = list(map(int, jobs.read_text().split()))
    assert len(given) >= 2 and gone(given) and gone([process for _, process in started_by(folder)])


def test_a_cluster_that_is_gone_is_told(config, tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setenv("TQDM_DISABLE", "1")  # a worker in this process sets it
    monkeypatch.setattr(cluster, "ANSWER", 1.0)
    monkeypatch.setattr(cluster, "LATER", 0.1)
    with pytest.raises(cluster.ClusterError, match="nobody answers at"):
        on_cluster("tcp://127.0.0.1:1", config, ["a"], {}, tmp_path)
    with LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address=None) as local:
        where = local.scheduler_address
        with pytest.raises(cluster.ClusterError, match="would train 2 at a time"):
            on_cluster(where, config, ["a"], {}, tmp_path)
    threads = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(1, **threads, processes=False, protocol="tcp") as local:
        where, tasks = local.scheduler_address, ["unmounts", "a"]
        with pytest.raises(cluster.ClusterError, match=r"does not share .*; mount it there"):
            on_cluster(where, config, tasks, {}, config.runs)
        assert [name for name, _ in started_by(config.runs)] == ["unmounts"]
        threading.Timer(1.0, local.close).start()
        with pytest.raises(cluster.ClusterError, match=r"\(tcp://.*\) is gone; start it and its"):
            on_cluster(where, config, list(map(str, range(1000))), {}, tmp_path)


def test_who_does_not_see_the_same_is_refused(config, tmp_path, monkeypatch):
    class Worker:
        class state:
            nthreads = 1

        class memory_manager:
            memory_limit = None

    monkeypatch.setenv("TQDM_DISABLE", "1")  # a worker sets it
    config.model.weights = tmp_path / "weights.pt"
    config.model.weights.touch()
    with cluster._asked_of_workers(config) as asked:
        assert cluster._refusal(asked, Worker) is None
        for change, says in {
            ("versions", "torch 1.0"): "and here is torch 1.0; install the same",
            ("code", "other"): "has other code in",
            ("token", "other"): "does not share .*; mount it there",
            ("runs", str(tmp_path)): "does not share",
        }.items():
            assert re.search(says, cluster._refusal(asked | dict([change]), Worker))
        config.model.weights.unlink()
        assert "does not see" in cluster._refusal(asked, Worker)
        second = cluster._asked_of_workers(config)
        with pytest.raises(cluster.ClusterError, match="another command sends trainings"), second:
            pass
    asked["paths"] = []
    assert "though it is locked here" in cluster._refusal(asked, Worker)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(cluster.ClusterError, match=r"install -e '\.\[cluster\]'"):
        on_cluster("slurm", config, ["a"], {}, tmp_path)

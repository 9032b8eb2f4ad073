"""Tasks in processes: all are done, a process that dies costs its own task, none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.experiments.jobs import in_processes

HERE = Path(__file__).resolve().parent


def work(word: str, folder: Path) -> tuple[str | None, bool]:
    """Writes who does it; "die", "fail" and "spoil" do not go well, "stay" does not end."""
    (folder / f"{word}-{os.getpid()}").write_text(os.environ["OMP_NUM_THREADS"])
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while word == "stay":
        time.sleep(0.1)
    return (word if word in ("fail", "spoil") else None), word != "spoil"


def written(folder: Path) -> dict[str, int]:
    """Task to the process that did it."""
    found = (path.name.split("-") for path in folder.iterdir())
    return {word: int(process) for word, process in found}


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")  # where nobody reaps orphans they stay as zombies
        return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(processes: list[int], seconds: float = 20.0) -> bool:
    """Whether all have ended within some seconds."""
    end = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_alive, processes))


def test_what_dies_or_fails_costs_its_own_task(tmp_path):
    words = ["a", "die", "b", "fail", "c", "spoil", "d"]
    before = dict(os.environ)
    found = dict(in_processes(work, [(word, tmp_path) for word in words], jobs=2, threads=3))
    assert [found[index] for index in (0, 2, 4, 6)] == [None] * 4
    assert found[1] == "its process died (exit code -9)"
    assert (found[3], found[5]) == ("fail", "spoil")
    assert dict(os.environ) == before
    assert {path.read_text() for path in tmp_path.iterdir()} == {"3"}
    done = written(tmp_path)
    assert 3 <= len(set(done.values())) <= 4  # two at a time, and one for each that was lost
    assert gone(list(done.values()), seconds=0)


def test_an_error_of_the_caller_ends_all_processes(tmp_path):
    with pytest.raises(RuntimeError):
        for _ in in_processes(work, [("a", tmp_path), ("stay", tmp_path)], jobs=2, threads=1):
            while len(written(tmp_path)) < 2:
                time.sleep(0.05)
            raise RuntimeError
    assert gone(list(written(tmp_path).values()), seconds=0)


@pytest.mark.parametrize("blow", ["SIGINT", "SIGKILL"])
def test_processes_end_with_their_parent(blow, tmp_path):
    """Ctrl-C at the parent, and a parent that has no time to say good-bye."""
    code = f"import sys; sys.path[:0] = {[str(HERE.parent), str(HERE)]}\n"
    code += "import signal; from pathlib import Path\n"
    code += "from lib.experiments.jobs import in_processes; import test_jobs\n"
    # A job in the background of a shell is deaf to it, and so are the processes that it starts.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"tasks = [('stay', Path({str(tmp_path)!r}))]\n"
    code += "list(in_processes(test_jobs.work, tasks, jobs=1, threads=1))\n"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not written(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(getattr(signal, blow))
    parent.wait(timeout=60)
    assert gone(list(written(tmp_path).values()))

"""Tasks in processes: all are done, a process that dies costs its own task, none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.experiments.jobs import Ended, in_processes, in_turn

HERE = Path(__file__).resolve().parent


ALONE = [{}]  # the environment of one process at a time


def work(word: str, folder: Path) -> Ended:
    """Writes who does it; "die", "fail" and "spoil" do not go well, "stay" does not end."""
    (folder / f"{word}-{os.getpid()}").write_text(os.environ.get("GPU", ""))
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while word == "stay":
        time.sleep(0.1)
    return Ended(word if word in ("fail", "spoil") else None, word != "spoil")


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


def test_what_dies_or_fails_costs_its_own_task_and_what_needs_it(tmp_path):
    words = ["a", "die", "b", "fail", "c", "spoil", "d", "e", "f", "g"]
    needs = {0: 8, 6: 1, 7: 3, 9: 6}  # a needs f, d what dies, e what fails, g needs d
    before = dict(os.environ)
    tasks, gpus = [(word, tmp_path) for word in words], [{"GPU": "0"}, {"GPU": "1"}]
    ended = list(in_processes(work, tasks, needs, gpus))
    found = dict(ended)
    assert len(found) == len(ended) == len(words)
    assert [found[index] for index in (0, 2, 4, 8)] == [None] * 4
    assert found[1] == "its process died (exit code -9)"
    assert (found[3], found[5]) == ("fail", "spoil")
    assert found[6] == f"what it starts from failed: {found[1]}"
    assert found[7] == "what it starts from failed: fail"
    assert found[9] == f"what it starts from failed: {found[6]}"
    assert [index for index, _ in ended].index(8) < [index for index, _ in ended].index(0)
    assert dict(os.environ) == before
    done = written(tmp_path)
    assert done.keys() == {*"abcf", "die", "fail", "spoil"}
    assert 3 <= len(set(done.values())) <= 4  # two at a time, and one for each that was lost
    seen = {process: set() for process in done.values()}
    for path in tmp_path.iterdir():
        seen[done[path.name.split("-")[0]]].add(path.read_text())
    assert all(len(gpus) == 1 for gpus in seen.values())  # each keeps to its own
    assert set.union(*seen.values()) == {"0", "1"}
    assert gone(list(done.values()), seconds=0)
    here = tmp_path / "here"
    here.mkdir()
    tasks = [(word, here) for word in ("b", "fail", "c", "a")]
    assert list(in_turn(work, tasks, {0: 1, 2: 3})) == [
        (1, "fail"), (0, "what it starts from failed: fail"), (3, None), (2, None),
    ]  # fmt: skip


def test_an_error_of_the_caller_ends_all_processes(tmp_path):
    with pytest.raises(RuntimeError):
        for _ in in_processes(work, [("a", tmp_path), ("stay", tmp_path)], {}, ALONE * 2):
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
    code += "list(in_processes(test_jobs.work, tasks, {}, test_jobs.ALONE))\n"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not written(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(getattr(signal, blow))
    parent.wait(timeout=60)
    assert gone(list(written(tmp_path).values()))

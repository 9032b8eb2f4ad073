"""Two processes (gloo) train as one does: the real launcher, the real command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]

# 41 training images in batches of 16: the last batch, of 9, is uneven; so are 15 to validate on.
TINY = ["--data.toy-train", "41", "--data.toy-val", "15", "--batch-size", "16"]
TINY += ["--data.toy-test", "24", "--log-every", "1"]
TINY += ["--model.weights", "None", "--model.overrides.patch-size", "16"]
TINY += ["--model.overrides.embed-dim", "32", "--model.overrides.depth", "2"]
TINY += ["--model.overrides.num-heads", "2"]


def environment(runs: Path) -> dict[str, str]:
    return {**os.environ, "RUNS_DIR": str(runs), "PRESET": "toy", "OMP_NUM_THREADS": "1"}


def run(*command: str, runs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(runs),
        capture_output=True,
        text=True,
        timeout=300,
    )


# --standalone: a port of its own
LAUNCHED = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One fine-tuned model, and human in the loop on top of it by one process and by two."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("-m", "lib", "train", "ft", *TINY, "--epochs", "1", runs=runs)
    assert done.returncode == 0, done.stderr
    hitl = ("-m", "lib", "train", "hitl", "--init", "ft-s0", *TINY, "--epochs", "7")
    hitl = (*hitl, "--human.blocks", "all", "--ema", "0.9")
    for name, launcher in (("one", ()), ("two", LAUNCHED)):
        done = run(*launcher, *hitl, "--name", name, runs=runs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("validation accuracy") == 1  # said once, not by every process
    return runs / "toy"


def test_same_losses_for_20_steps(runs):
    one, two = (pd.read_csv(runs / name / "steps.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 21
    assert (one - two).abs().max().max() < 1e-4
    assert one["human_loss"].gt(0).all()


def test_same_metrics_on_uneven_batches(runs):
    one, two = (pd.read_csv(runs / name / "history.csv") for name in ("one", "two"))
    assert one["val_top1"].mul(15).round(4).mod(1).eq(0).all()  # of 15 images, none twice
    assert (one - two).abs().max().max() < 1e-4
    assert one["train_top1"].equals(two["train_top1"])


def test_two_processes_that_were_killed_go_on_as_two(runs):
    """Epoch means count every image once, whoever had seen it before."""
    hitl = ("-m", "lib", "train", "hitl", "--init", "ft-s0", *TINY, "--epochs", "7")
    hitl = (*hitl, "--human.blocks", "all", "--ema", "0.9", "--name", "killed")
    hitl = (*hitl, "--checkpoint-minutes", "0", "--resume")
    first = [part for part in hitl if part != "--resume"]
    training = subprocess.Popen(
        [sys.executable, *LAUNCHED, *first],
        cwd=ROOT, env=environment(runs.parent), start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    steps = runs / "killed" / "steps.csv"
    while not steps.is_file() and training.poll() is None:  # written after the first epoch
        time.sleep(0.02)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    assert not (runs / "killed" / "last.safetensors").is_file()
    done = run(*LAUNCHED, *hitl, runs=runs.parent)
    assert done.returncode == 0, done.stderr
    for name in ("steps.csv", "history.csv"):
        two, killed = (pd.read_csv(runs / folder / name) for folder in ("two", "killed"))
        assert (two - killed).abs().max().max() < 1e-4


def test_the_notebook_launcher_trains_with_two_processes(runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from accelerate import notebook_launcher\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from lib.config import RunConfig\n"
        "from lib.training.state import from_json\n"
        "from lib.training.runs import train_run\n"
        f"runs = Path({str(runs)!r})\n"
        "config = from_json(RunConfig, (runs / 'one' / 'config.json').read_text())\n"
        "given = ('three', config, runs)\n"
        f"notebook_launcher(train_run, given, num_processes=2, use_port='{port}')\n"
        "print(train_run('three', config, runs).history['val_top1'].iloc[-1])\n"
    )
    done = run("-c", code, runs=runs.parent)
    assert done.returncode == 0, done.stderr
    one, three = (pd.read_csv(runs / name / "steps.csv") for name in ("one", "three"))
    assert (one - three).abs().max().max() < 1e-4


def test_a_run_that_exists_is_refused_by_every_process(runs):
    hitl = ("-m", "lib", "train", "hitl", "--init", "ft-s0", *TINY, "--name", "one")
    done = run(*LAUNCHED, *hitl, runs=runs.parent)
    assert done.returncode != 0
    assert "exists and is finished; go on with --resume" in done.stderr


def test_one_process_reports_and_an_error_of_it_ends_all(runs, tmp_path):
    """Said and written once; the others do not wait for what will never come."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from lib.__main__ import main\n"
        f"assert main(['evaluate', 'one', '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert main(['evaluate', 'nothing']) == 2\n"
    )
    done = run(*LAUNCHED, str(script), runs=runs.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("figures and tables") == 1
    assert (tmp_path / "out" / "result.txt").is_file()
    assert done.stderr.count("error: no run nothing") == 1
    assert done.stderr.count("error (process 1): the main process stopped: no run nothing") == 1

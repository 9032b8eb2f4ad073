"""A training that is killed at any moment goes on and ends with the same bits."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_files import disk_of

from lib import files
from lib.files import StorageError
from lib.training.runs import dataset_for, fine_tuning, starting_point, train_run
from lib.training.state import STATE, Batches, Training, noise
from lib.training.tokens import CachedTokens

# Children start from a server that has imported the library and run nothing: quick, and safe.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["lib.training.runs"])


def everything_on(runs: Path, **changes: object):
    """Some steps with all that has a state: augmentation, drop path, averaged weights, decay."""
    config = tiny_config(runs)
    config.ft = replace(config.ft, epochs=3, drop_path=0.2, ema=0.9, layer_decay=0.8, log_every=1)
    config.ft = replace(config.ft, checkpoint_minutes=0.0, **changes)
    return fine_tuning(config, 3)


def run_in_child(runs: Path, changes: dict, fsyncs: int | None = None) -> None:
    """Trains; with `fsyncs` the process kills itself inside the writing of that file."""
    torch.set_num_threads(1)
    if fsyncs is not None:
        left = [fsyncs]

        def die(descriptor: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        files.os.fsync = die
    train_run("r", everything_on(runs, **changes), runs)


def result(runs: Path) -> dict[str, bytes]:
    names = ("last.safetensors", "best.safetensors", "history.csv", "steps.csv")
    return {name: (runs / "r" / name).read_bytes() for name in names}


def start(runs: Path, changes: dict, fsyncs: int | None = None) -> multiprocessing.Process:
    child = START.Process(target=run_in_child, args=(runs, changes, fsyncs))
    child.start()
    return child


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """What a training that nobody kills leaves, and its seconds."""
    warm = START.Process(target=print)  # starts the server, which imports the library
    warm.start()
    warm.join()
    runs, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    child = start(runs, {})
    child.join()
    assert child.exitcode == 0
    return result(runs), time.monotonic() - began


@pytest.fixture
def uninterrupted(whole_run) -> dict[str, bytes]:
    return whole_run[0]


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, whole_run):
    uninterrupted, seconds = whole_run
    seed = random.randrange(2**32)
    print(f"random moments from seed {seed}")
    moments, kills = random.Random(seed), 0
    for _ in range(30):
        child = start(tmp_path, {})
        # Each wait may be longer than the one before, so that it ends at all on a busy machine.
        child.join(seconds * moments.uniform(0.2, 0.8) * 1.2**kills)
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
            continue
        assert child.exitcode == 0
        if kills > 0:
            break
        shutil.rmtree(tmp_path / "r")  # the machine is faster by now: once more, with less patience
        seconds /= 2
    assert kills > 0 and result(tmp_path) == uninterrupted
    assert not [p for p in (tmp_path / "r").iterdir() if p.suffix == ".tmp" or p.name == STATE]


def test_loading_workers_change_nothing(tmp_path, uninterrupted):
    child = start(tmp_path, {"workers": 2})
    child.join()
    assert child.exitcode == 0 and result(tmp_path) == uninterrupted


@pytest.mark.parametrize("writing", [3, 8, 14])
def test_killed_while_it_writes_it_ends_with_the_same_bits(tmp_path, uninterrupted, writing):
    child = start(tmp_path, {}, fsyncs=writing)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list((tmp_path / "r").glob("*.tmp")), "it was killed with a file half written"
    child = start(tmp_path, {})
    child.join()
    assert child.exitcode == 0 and result(tmp_path) == uninterrupted


def test_a_full_disk_keeps_the_checkpoint_and_the_training_goes_on_from_it(tmp_path, monkeypatch):
    train_run("whole", everything_on(tmp_path), tmp_path)
    plain = Training.save

    def save_to_a_full_disk(training, folder):
        with disk_of(1000) if training.progress.epoch == 2 else nullcontext():
            plain(training, folder)

    monkeypatch.setattr(Training, "save", save_to_a_full_disk)
    with pytest.raises(StorageError, match=r"state\.pt could not be written .* is intact"):
        train_run("r", everything_on(tmp_path), tmp_path)
    monkeypatch.undo()
    state = torch.load(tmp_path / "r" / STATE, weights_only=True)
    assert state["progress"]["epoch"] == 1 and state["progress"]["step"] == 3
    run = train_run("r", everything_on(tmp_path), tmp_path)
    assert (run.folder / "last.safetensors").read_bytes() == (
        tmp_path / "whole" / "last.safetensors"
    ).read_bytes()


def test_two_precisions_in_one_process(tmp_path):
    """Accelerate keeps the first; a notebook may train in another afterwards."""
    for name, precision in (("a", "bf16"), ("b", "no"), ("c", "bf16")):
        train_run(name, everything_on(tmp_path, mixed_precision=precision), tmp_path)
    a, b, c = (pd.read_csv(tmp_path / name / "steps.csv") for name in "abc")
    assert a.equals(c) and not a.equals(b)
    assert (a["cross_entropy"] - b["cross_entropy"]).abs().max() < 0.1


# ---------------------------------------------------------------------------------------- batches


@given(
    count=st.integers(1, 70),
    batch_size=st.integers(1, 20),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_processes_share_every_batch_of_one(count, batch_size, processes, epoch, seed):
    alone = Batches(count, batch_size, seed)
    alone.go_to(epoch, 0)
    whole = list(alone)
    assert sorted(index for batch in whole for index, _ in batch) == list(range(count))
    assert all(alone.share(step) == 1 for step in range(len(alone)))
    each = [Batches(count, batch_size, seed, p, processes) for p in range(processes)]
    for part in each:
        part.go_to(epoch, 0)
    parts = [list(part) for part in each]
    for step, batch in enumerate(whole):
        assert all(parts[p][step] for p in range(processes)), "no process is without an image"
        owned = [parts[p][step][: each[p].own(step)] for p in range(processes)]
        assert sorted(itertools.chain(*owned)) == sorted(batch)
        # The mean over processes of share * own mean is the mean over the batch.
        means = [sum(index for index, _ in part) / max(len(part), 1) for part in owned]
        weighed = sum(each[p].share(step) * means[p] for p in range(processes)) / processes
        assert weighed == pytest.approx(sum(index for index, _ in batch) / len(batch))
    start = len(alone) // 2
    alone.go_to(epoch, start)
    assert list(alone) == whole[start:]


def test_noise_differs_by_every_part_of_its_key():
    keys = [(seed, step, process) for seed in range(5) for step in range(50) for process in (0, 1)]
    assert len({noise(*key) for key in keys}) == len(keys)
    assert all(0 <= noise(*key) < 2**63 for key in keys)


def test_an_item_is_a_function_of_its_seed(tmp_path):
    """The same crop whatever was drawn before; what is drawn afterwards does not notice."""
    settings = fine_tuning(tiny_config(tmp_path), 0)
    model, dataset = starting_point(settings, tmp_path)
    torch.manual_seed(1)
    first = dataset[3, 17]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first["image"], dataset[3, 17]["image"])
    assert not torch.equal(first["image"], dataset[3, 18]["image"])
    whole = dataset_for(model, settings, "train", augment=False)
    cached = CachedTokens(model, whole, 1)
    assert cached[3, 17]["index"] == cached[3]["index"] == 3
    assert cached[3, 17]["label"] == cached[3]["label"] == whole[3]["label"]

"""Trackers: real TensorBoard files, real wandb without a network; no key is told to anybody."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace

import pytest

from lib.training.loop import PROJECT, TrackerMissing
from lib.training.runs import fine_tuning, train_run

KEY = "0123456789abcdef0123456789abcdef01234567"  # the form of a real one, and nobody's


def tracked(config, *trackers):
    config.ft = replace(config.ft, log_every=1, trackers=trackers)
    return train_run("ft", fine_tuning(config, 0), config.runs)


def test_tensorboard_gets_every_row(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked(config, "tensorboard")
    events = EventAccumulator(str(run.folder / PROJECT)).Reload()
    assert [e.step for e in events.Scalars("cross_entropy")] == list(range(6))
    shown = [e.value for e in events.Scalars("epoch/val_top1")]
    assert shown == pytest.approx(list(run.history["val_top1"]))


def test_wandb_is_offline_by_default_and_its_key_stays_secret(config, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = tracked(config, "wandb")
    (kept,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):  # a process of wandb's own writes it
        if kept.stat().st_size > 1000:
            break
        time.sleep(0.2)
    assert kept.stat().st_size > 1000
    told = capfd.readouterr()
    assert KEY not in told.out + told.err
    for path in run.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_tracker_that_is_not_installed_is_named_before_training(config, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    with pytest.raises(TrackerMissing, match="pip install wandb"):
        tracked(config, "wandb")


def test_trackers_do_not_make_another_run(config):
    """How a run was watched says nothing about what came out."""
    first = tracked(config)
    config.ft = replace(config.ft, workers=1, checkpoint_minutes=9.0)
    assert tracked(config, "tensorboard").history.equals(first.history)

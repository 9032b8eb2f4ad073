"""Runs on disk: loaded, refused, resumed, locked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.config import RunConfig
from lib.files import StorageError, write_text
from lib.training import runs
from lib.training.runs import Run, RunBusy, RunConflict, fine_tuning, human_in_the_loop, train_run
from lib.training.state import STATE


def test_a_run_is_loaded_when_it_is_there_and_refused_when_it_differs(config):
    first = train_run("ft", fine_tuning(config, 0), config.runs)
    stamp = (first.folder / "last.safetensors").stat().st_mtime_ns
    (first.folder / STATE).write_bytes(b"left by a process that was killed as it finished")
    again = train_run("ft", fine_tuning(config, 0), config.runs)
    assert not (first.folder / STATE).exists()
    assert again == first and (first.folder / "last.safetensors").stat().st_mtime_ns == stamp
    other = fine_tuning(config, 1)
    with pytest.raises(RunConflict, match=r"train\.seed is 0 there and 1 here"):
        train_run("ft", other, config.runs)
    assert train_run("ft", other, config.runs, overwrite=True).config.train.seed == 1


def test_a_run_that_stopped_half_way_goes_on(config, monkeypatch):
    """It is trained from its checkpoint, not from the start; without one, from the start."""
    config.ft = replace(config.ft, checkpoint_minutes=0.0, log_every=1)
    whole = train_run("whole", fine_tuning(config, 0), config.runs)
    steps = []

    def stop(progress):
        steps.append(progress.steps[-1]["step"])
        if len(progress.history) == 1 and progress.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run("ft", fine_tuning(config, 0), config.runs, watch=stop)
    with pytest.raises(FileNotFoundError, match="stopped after 1 of 2 epochs; resume"):
        Run.load(config.runs / "ft")
    before = len(steps)
    run = train_run("ft", fine_tuning(config, 0), config.runs, watch=lambda p: steps.append(-1))
    assert len(steps) - before < 6 and not (run.folder / STATE).exists()
    for name in ("last.safetensors", "best.safetensors", "history.csv", "steps.csv"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Run.load(config.runs / "nothing")


def test_how_a_run_is_made_may_change_when_it_goes_on(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    config.ft = replace(config.ft, workers=2, checkpoint_minutes=7.0, log_every=3)
    assert train_run("ft", fine_tuning(config, 0), config.runs).folder == run.folder


def test_two_trainings_of_one_run_do_not_meet(config):
    other = []

    def train_it_again(progress):
        if not other:
            with pytest.raises(RunBusy, match="being trained by another process") as told:
                train_run("ft", fine_tuning(config, 0), config.runs)
            other.append(told)

    train_run("ft", fine_tuning(config, 0), config.runs, watch=train_it_again)
    assert other


def test_overwriting_starts_anew_and_takes_what_was_half_written(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    (run.folder / "state.pt.0123.tmp").write_bytes(b"half")
    write_text(run.folder / "notes.txt", "mine")
    again = train_run("ft", fine_tuning(config, 1), config.runs, overwrite=True)
    assert again.config.train.seed == 1 and not list(again.folder.glob("*.tmp"))
    assert (again.folder / "notes.txt").read_text() == "mine"


def test_a_runs_folder_that_cannot_be_made_is_one_sentence(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/ft cannot be made"):
        train_run("ft", fine_tuning(config, 0), tmp_path / "file")


def test_what_is_refused_leaves_no_run_behind(config):
    """Else the corrected command would meet a run of that name."""
    train_run("ft", fine_tuning(config, 0), config.runs)
    config.hitl = replace(config.hitl, trainable="last_block")
    refused = [human_in_the_loop(config, "ft", 0, blocks="all")]
    for changes in ({"mixed_precision": "fp16"}, {"trackers": ("nothing_of_that_name",)}):
        stage = replace(config.ft, **changes)
        refused.append(RunConfig(config.data, config.model, stage))
    for settings in refused:
        with pytest.raises(ValueError, match=r"freezes it|needs a GPU|is not installed"):
            train_run("x", settings, config.runs)
    assert not (config.runs / "x").exists()


def test_a_run_folder_that_is_read_only_is_one_sentence(config, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.FileLock, "acquire", denied)  # root may write everywhere
    with pytest.raises(StorageError, match="ft cannot be written to"):
        train_run("ft", fine_tuning(config, 0), config.runs)


def test_a_finished_run_without_weights_says_so(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    (run.folder / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ft has no weights: a sweep keeps none"):
        Run.load(run.folder)

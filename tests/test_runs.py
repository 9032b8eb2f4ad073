"""Runs on disk: loaded, refused, resumed, locked."""

from __future__ import annotations

import pytest

from lib.files import write_text
from lib.runs import Run, RunConflict, fine_tuning, train_run


def test_a_run_is_loaded_when_it_is_there_and_refused_when_it_differs(config):
    first = train_run("ft", fine_tuning(config, 0), config.runs)
    stamp = (first.folder / "last.safetensors").stat().st_mtime_ns
    again = train_run("ft", fine_tuning(config, 0), config.runs)
    assert again == first and (first.folder / "last.safetensors").stat().st_mtime_ns == stamp
    other = fine_tuning(config, 1)
    with pytest.raises(RunConflict, match=r"train\.seed is 0 there and 1 here"):
        train_run("ft", other, config.runs)
    assert train_run("ft", other, config.runs, overwrite=True).config.train.seed == 1


def test_a_run_that_stopped_half_way_is_trained_again(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    history = run.history
    write_text(run.folder / "history.csv", history.head(1).to_csv(index=False))
    with pytest.raises(FileNotFoundError, match="1 of 2 epochs"):
        Run.load(run.folder)
    assert len(train_run("ft", fine_tuning(config, 0), config.runs).history) == 2
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Run.load(config.runs / "nothing")

"""Curves that move while a model trains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib.training.runs import fine_tuning, human_in_the_loop, train_run
from lib.widgets import teaching
from lib.widgets.teaching import LiveCurves


class Shown:
    """What a notebook's display would show, and where it would be replaced."""

    def __init__(self) -> None:
        self.figures, self.updates = [], 0

    def __call__(self, figure, display_id):
        self.figures.append(figure)
        return self

    def update(self, figure):
        self.figures[-1] = figure
        self.updates += 1


def test_one_figure_follows_the_training(config, monkeypatch):
    shown = Shown()
    monkeypatch.setattr(teaching, "display", shown)
    config.ft, config.hitl = (replace(part, log_every=1) for part in (config.ft, config.hitl))
    train_run("ft", fine_tuning(config, 0), config.runs, watch=LiveCurves(seconds=0))
    assert len(shown.figures) == 1 and shown.updates == 6 + 2 - 1  # steps, epochs, the first
    losses, accuracy = shown.figures[0].axes
    assert [line.get_label() for line in losses.lines] == ["cross entropy"]
    assert [len(line.get_xdata()) for line in accuracy.lines] == [2, 2]
    settings = human_in_the_loop(config, "ft", 0, blocks="all")
    run = train_run("hitl", settings, config.runs, watch=LiveCurves(seconds=0))
    assert [len(line.get_xdata()) for line in shown.figures[1].axes[0].lines] == [6, 6]
    assert shown.figures[1].axes[1].lines[1].get_ydata() == pytest.approx(run.history["val_top1"])


def test_drawing_takes_no_more_time_than_it_may(config, monkeypatch):
    shown = Shown()
    monkeypatch.setattr(teaching, "display", shown)
    config.ft = replace(config.ft, log_every=1)
    train_run("ft", fine_tuning(config, 0), config.runs, watch=LiveCurves(seconds=1e6))
    assert shown.updates == 2  # the ends of the two epochs


def test_a_run_that_is_there_is_drawn_as_it_ended(config, monkeypatch):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    shown = Shown()
    monkeypatch.setattr(teaching, "display", shown)
    train_run("ft", fine_tuning(config, 0), config.runs, watch=LiveCurves())
    (figure,) = shown.figures
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx(run.history["train_top1"])

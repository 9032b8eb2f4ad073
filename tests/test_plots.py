"""Figures: one Figure each, with the title, panels and colours that they promise."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import plots

IMAGE = np.zeros((32, 48, 3), np.uint8)
MAP = np.arange(6.0).reshape(2, 3)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_an_overlay_covers_the_image_and_scales_to_its_own_maximum():
    _, axis = plt.subplots()
    plots.overlay(axis, IMAGE, MAP)
    above = axis.images[1]
    assert tuple(above.get_extent()) == (0, 48, 32, 0)
    assert above.get_array().max() == 1.0 and above.get_array().shape == (2, 3)
    plots.overlay(axis, IMAGE, np.zeros((2, 3)))  # nothing to see, but no division by zero
    assert np.isfinite(axis.images[-1].get_array()).all()


def test_the_gallery_frames_right_and_wrong():
    columns = {"a": [(MAP, True), (MAP, False)], "<b>": [(MAP, False), (MAP, True)]}
    figure = plots.gallery([IMAGE, IMAGE], [MAP, MAP], columns)
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_title() for axis in axes[0]] == ["image", "people", "a", "<b>"]
    colour = lambda axis: axis.spines["top"].get_edgecolor()  # noqa: E731
    assert colour(axes[0, 2]) == colour(axes[1, 3]) != colour(axes[0, 3]) == colour(axes[1, 2])


def test_maps_in_a_row_wrap():
    figure = plots.maps_in_a_row(IMAGE, {str(i): MAP for i in range(5)}, "five", columns=4)
    assert len(figure.axes) == 8
    assert figure.get_suptitle() == "five"


def test_comparison_has_a_panel_a_figure_of_merit_that_is_there():
    seeds = pd.DataFrame(
        {"variant": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "cc": [0.1, 0.3, 0.5, 0.5]}
    )
    figure = plots.comparison(seeds, {"cc": "CC", "conflicting": "not here"})
    assert [axis.get_title() for axis in figure.axes] == ["CC"]
    assert [bar.get_height() for bar in figure.axes[0].patches][:2] == pytest.approx([0.2, 0.5])
    assert "2 seeds" in figure.get_suptitle()


def test_density_history_and_ladder_name_every_model():
    images = pd.DataFrame({"p_true": np.linspace(0, 1, 20), "variant": ["a", "b"] * 10})
    rungs = pd.DataFrame({"rung": ["no edit", "all"] * 2, "variant": ["a", "a", "b", "b"],
                          "top1": [0.1, 0.2, 0.3, 0.4]})  # fmt: skip
    history = pd.DataFrame(
        {"epoch": [1, 2], "cross_entropy": [2, 1], "human_loss": [0, 0], "val_top1": [0, 1],
         "val_cc": [0, 1]}
    )  # fmt: skip
    supervised = history.assign(human_loss=[2, 1])
    density = plots.true_class_density(images)
    ladder = plots.ladder(rungs, "title", "accuracy")
    curves = plots.histories({"a": history, "b": supervised})
    for figure in (density, ladder, curves):
        names = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
        assert names == ["a", "b"]
    assert len(curves.axes) == 4
    assert len(plots.histories({"a": history}).axes) == 3  # no empty panel without human maps


def test_turns_show_the_median_and_every_turn():
    table = pd.DataFrame({"way": ["a", "b"] * 3, "ratio": [1, 2, 1, 4, 1, 9.0]})
    axis = plots.turns(table, "ratio", "title", "ratio", reference=1).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1, 4] and axis.get_title() == "title"
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 6
    assert axis.lines[-1].get_xdata()[0] == 1
    twice = pd.concat([table.assign(loading="no"), table.assign(loading="yes")])
    axis = plots.turns(twice, "ratio", "title", "ratio", hue="loading").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["no", "yes"]
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 12


def test_parts_stack_the_columns():
    table = pd.DataFrame({"one": [1.0, 2.0], "two": [3.0, 0.0]}, index=["a", "b"])
    axis = plots.parts(table, "title", "seconds").axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [
        (0, 1), (0, 2), (1, 3), (2, 0)
    ]  # fmt: skip
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]

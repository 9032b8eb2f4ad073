"""Figures: one Figure each, with the title, panels and colours that they promise."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib import figures

IMAGE = np.zeros((32, 48, 3), np.uint8)
MAP = np.arange(6.0).reshape(2, 3)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_an_overlay_covers_the_image_and_scales_to_its_own_maximum():
    _, axis = plt.subplots()
    figures.overlay(axis, IMAGE, MAP)
    above = axis.images[1]
    assert tuple(above.get_extent()) == (0, 48, 32, 0)
    assert above.get_array().max() == 1.0 and above.get_array().shape == (2, 3)
    figures.overlay(axis, IMAGE, np.zeros((2, 3)))  # nothing to see, but no division by zero
    assert np.isfinite(axis.images[-1].get_array()).all()


def test_a_picture_is_what_an_overlay_draws():
    image = np.random.default_rng(0).integers(0, 255, (6, 12, 3), dtype=np.uint8)
    map_ = np.array([[0.0, 1.0, 2.0], [np.nan, 3.0, 4.0]])
    figure = plt.figure(figsize=(0.12, 0.06), dpi=100)
    figures.overlay(figure.add_axes((0, 0, 1, 1)), image, map_)
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    found = figures.picture(image, map_, pixels=12)
    assert np.abs(found.astype(int) - drawn).max() <= 4  # opacity is rounded to 1/255
    assert (found[3:, :4] == image[3:, :4]).all()  # nothing is known there
    assert (figures.picture(image, pixels=12) == image).all()
    assert figures.picture(image, map_, pixels=24).shape == (12, 24, 3)


def test_rows_of_maps_frame_right_and_wrong():
    columns = {"a": [(MAP, True), (MAP, False)], "<b>": [(MAP, False), (MAP, True)]}
    figure = figures.rows_of_maps([IMAGE, IMAGE], [MAP, MAP], columns)
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_title() for axis in axes[0]] == ["image", "people", "a", "<b>"]
    colour = lambda axis: axis.spines["top"].get_edgecolor()  # noqa: E731
    assert colour(axes[0, 2]) == colour(axes[1, 3]) != colour(axes[0, 3]) == colour(axes[1, 2])


def test_maps_in_a_row_wrap():
    figure = figures.maps_in_a_row(IMAGE, {str(i): MAP for i in range(5)}, "five", columns=4)
    assert len(figure.axes) == 8
    assert figure.get_suptitle() == "five"


def test_comparison_has_a_panel_a_figure_of_merit_that_is_there():
    seeds = pd.DataFrame(
        {"variant": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "cc": [0.1, 0.3, 0.5, 0.5]}
    )
    figure = figures.comparison(seeds, {"cc": "CC", "conflicting": "not here"})
    assert [axis.get_title() for axis in figure.axes] == ["CC"]
    assert [bar.get_height() for bar in figure.axes[0].patches][:2] == pytest.approx([0.2, 0.5])
    assert "2 seeds" in figure.get_suptitle()


def test_comparison_has_room_for_long_names_and_many_panels(recwarn):
    name = "kl-l0.1-blocks_last-heads_all-offset_none-train_last_block"
    seeds = pd.DataFrame({"variant": ["control", name], "seed": [0, 0]})
    seeds = seeds.assign(**{f"m{i}": [0.1, 0.2] for i in range(7)})
    figure = figures.comparison(seeds, {f"m{i}": f"metric {i}" for i in range(7)}, wide=3)
    assert [axis.get_title() for axis in figure.axes] == [f"metric {i}" for i in range(7)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["control", name]
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert [bar.get_facecolor() for bar in legend.get_patches()] == colours[:2]
    assert not any(label.get_text() for label in figure.axes[0].get_xticklabels())
    figure.draw_without_rendering()
    assert not [w for w in recwarn if "constrained_layout" in str(w.message)]
    short = figures.comparison(seeds.replace(name, "kl"), {"m0": "metric 0"})
    assert [label.get_text() for label in short.axes[0].get_xticklabels()] == ["control", "kl"]


def test_density_history_and_ladder_name_every_model():
    images = pd.DataFrame({"p_true": np.linspace(0, 1, 20), "variant": ["a", "b"] * 10})
    rungs = pd.DataFrame({"rung": ["no edit", "all"] * 2, "variant": ["a", "a", "b", "b"],
                          "top1": [0.1, 0.2, 0.3, 0.4]})  # fmt: skip
    history = pd.DataFrame(
        {"epoch": [1, 2], "cross_entropy": [2, 1], "human_loss": [0, 0], "val_top1": [0, 1],
         "val_cc": [0, 1]}
    )  # fmt: skip
    supervised = history.assign(human_loss=[2, 1])
    density = figures.true_class_density(images)
    ladder = figures.ladder(rungs, "title", "accuracy")
    curves = figures.histories({"a": history, "b": supervised})
    for figure in (density, ladder, curves):
        names = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
        assert names == ["a", "b"]
    assert len(curves.axes) == 4
    assert len(figures.histories({"a": history}).axes) == 3  # no empty panel without human maps


def test_reliability_has_a_line_a_model_and_leaves_empty_bins_out():
    bins = pd.DataFrame(
        {"variant": ["a", "a", "b", "b"], "images": [3, 1, 4, 0],
         "confidence": [0.2, 0.9, 0.5, np.nan], "accuracy": [0.1, 0.8, 0.5, np.nan]}
    )  # fmt: skip
    axis, below = figures.reliability(bins, {"a": 0.1, "b": 0.0}, "val").axes
    assert "validation" in axis.get_title()
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["calibrated", "a (ECE 0.100)", "b (ECE 0.000)"]
    assert [list(line.get_xdata()) for line in axis.lines[1:]] == [[0.2, 0.9], [0.5]]
    assert list(below.lines[0].get_ydata()) == [0.75, 0.25]


def test_accuracy_and_alignment_has_a_dot_a_run_and_the_maps_of_no_model():
    seeds = pd.DataFrame({"variant": ["a", "a", "b"], "top1": [0.5, 0.6, 0.7], "cc": [0, 0.1, 0.2]})
    axis = figures.accuracy_and_alignment(seeds, {"one reader": 0.8}).axes[0]
    dots = [dots.get_offsets().tolist() for dots in axis.collections]
    assert dots == [[[0, 0.5], [0.1, 0.6]], [[0.2, 0.7]]]
    assert axis.lines[0].get_xdata()[0] == 0.8
    assert [text.get_text().strip() for text in axis.texts] == ["one reader"]
    assert not figures.accuracy_and_alignment(seeds, {}).axes[0].lines


def test_more_models_than_colours_all_have_a_line():
    history = pd.DataFrame({"epoch": [1], "cross_entropy": [1], "human_loss": [0], "val_top1": [0],
                            "val_cc": [0]})  # fmt: skip
    curves = figures.histories({str(i): history for i in range(len(figures.PALETTE) + 2)})
    assert len(curves.axes[0].lines) == len(figures.PALETTE) + 2


def test_turns_show_the_median_and_every_turn():
    table = pd.DataFrame({"way": ["a", "b"] * 3, "ratio": [1, 2, 1, 4, 1, 9.0]})
    axis = figures.turns(table, "ratio", "title", "ratio", reference=1).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [1, 4] and axis.get_title() == "title"
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 6
    assert axis.lines[-1].get_xdata()[0] == 1
    twice = pd.concat([table.assign(loading="no"), table.assign(loading="yes")])
    axis = figures.turns(twice, "ratio", "title", "ratio", hue="loading").axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["no", "yes"]
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 12


def test_parts_stack_the_columns():
    table = pd.DataFrame({"one": [1.0, 2.0], "two": [3.0, 0.0]}, index=["a", "b"])
    axis = figures.parts(table, "title", "seconds").axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [
        (0, 1), (0, 2), (1, 3), (2, 0)
    ]  # fmt: skip
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]


def test_snapshots_stand_side_by_side_and_wrap():
    scores = {"wren": 0.7, "$owl$": 0.2}
    painted = np.eye(2, 3, dtype=bool)
    shots = {f"_{k}": (MAP, painted, scores) for k in range(5)}
    figure = figures.snapshot_sheet(IMAGE, shots, "wren", "five")
    assert len(figure.axes) == 2 * 2 * 4
    above, below = figure.axes[0], figure.axes[4]
    assert above.get_title().endswith("✓ right") and below.texts[0].get_text() == "0.70 wren (true)"
    assert [bar.get_width() for bar in below.patches] == [0.7, 0.2]
    assert below.patches[0].get_facecolor() != below.patches[1].get_facecolor()
    assert len(above.lines) == 2 * 8  # around two cells that meet in a corner, twice
    wrong = figures.snapshot_sheet(IMAGE, {"A": (MAP, painted, scores)}, "$owl$", "one")
    assert wrong.axes[0].get_title().endswith("✗ wrong") and not figure.axes[7 + 8].texts
    wrong.draw_without_rendering()


def test_a_frame_of_the_strength_keeps_the_true_class_in_its_place():
    for scores, said in (({"wren": 0.7}, "✓ right"), ({"owl": 0.6, "wren": 0.3}, "✗ wrong")):
        figure = figures.strength_frame(IMAGE, MAP, 0.25, scores, "wren")
        assert [text.get_text() for text in figure.texts] == ["strength 0.25", said]
        assert figure.axes[1].texts[0].get_text() == f"{scores['wren']:.2f} wren (true)"


def test_a_rule_and_its_controls_are_bars_beside_each_other():
    rows = [("a", "own", 3, 1), ("a", "random cells", 5, 0), ("b", "own", 2, 2)]
    table = pd.DataFrame(rows, columns=["rule", "control", "right_to_wrong", "wrong_to_right"])
    figure = figures.rule_changes(table.assign(scope="last block", pictures=9))
    broken, mended = figure.axes
    heights = [[bar.get_height() for bar in group] for group in broken.containers]
    assert heights[0] == [3, 2] and heights[1][0] == 5 and np.isnan(heights[1][1])
    assert [bar.get_height() for bar in mended.containers[0]] == [1, 2]
    assert broken.get_title().startswith("right → wrong") and "9 pictures" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["own", "random cells"]
    hatches = {bar.patches[0].get_hatch() for bar in broken.containers}
    assert len(hatches) == 2  # told apart without their colours, too

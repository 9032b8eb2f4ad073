"""Figures: matplotlib and seaborn, plain arrays and tables in, one Figure out, none shown here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

# Colours that readers with any colour vision can tell apart (Okabe and Ito, 2008).
PALETTE = ["#0072B2", "#999999", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
MAP_COLOURS = "viridis"


def overlay(axis: plt.Axes, image: np.ndarray, grid_map: np.ndarray, strength: float = 0.8) -> None:
    """Draws an image and, over it, a map of its patch grid.

    Args:
        image: uint8 `[H, W, 3]`. grid_map: `[gh, gw]`, non-negative; scaled to its own maximum.
            NaN, a cell of which nothing is known, is left out.
        strength: opacity of the map where it is highest; where it is 0 the image is only dimmed.
    """
    height, width = image.shape[:2]
    known = np.isfinite(grid_map)
    scaled = np.where(known, grid_map, 0)
    scaled = scaled / max(float(scaled.max()), 1e-12)
    axis.imshow(image)
    axis.imshow(
        scaled,
        extent=(0, width, height, 0),
        cmap=MAP_COLOURS,
        vmin=0,
        vmax=1,
        alpha=strength * (0.4 + 0.6 * scaled) * known,
        interpolation="nearest",
    )
    axis.set_axis_off()


def gallery(
    images: Sequence[np.ndarray],
    human: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[tuple[np.ndarray, bool]]],
    title: str = "Where each model looks (class row of the last block)",
) -> Figure:
    """One row an image: picture, people's gaze, then one attention map a model.

    Args:
        images: uint8 `[H, W, 3]`. human: `[gh, gw]` each.
        columns: for every model its `(map [gh, gw], right)` of each image; a green or red frame
            tells a right from a wrong prediction.
    """
    names = ["image", "people", *columns]
    figure, axes = plt.subplots(
        len(images),
        len(names),
        figsize=(1.7 * len(names), 1.7 * len(images) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        axes[row, 0].set_axis_off()
        overlay(axes[row, 1], image, human[row])
        for column, maps in enumerate(columns.values(), start=2):
            map_, right = maps[row]
            overlay(axes[row, column], image, map_)
            _frame(axes[row, column], "#009E73" if right else "#D55E00")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    figure.suptitle(f"{title}\ngreen frame: right, red frame: wrong", fontsize=10)
    return figure


def _frame(axis: plt.Axes, colour: str) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=3)


def maps_in_a_row(
    image: np.ndarray, maps: Mapping[str, np.ndarray], title: str, columns: int = 6
) -> Figure:
    """One image under several maps of its grid, each scaled to its own maximum and named."""
    rows = -(-(len(maps) + 1) // columns)
    wide = min(columns, len(maps) + 1)
    figure, axes = plt.subplots(
        rows, wide, figsize=(1.8 * wide, 2.0 * rows + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("image", fontsize=9)
    for axis, (name, map_) in zip(axes.flat[1:], maps.items(), strict=False):
        overlay(axis, image, map_)
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def comparison(seeds: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """One panel a figure of merit: a bar a model (mean of seeds), a dot a seed."""
    shown = {k: words for k, words in columns.items() if k in seeds and seeds[k].notna().any()}
    models = list(dict.fromkeys(seeds["variant"]))
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.3 * len(shown), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (key, words) in zip(axes[0], shown.items(), strict=True):
        sns.barplot(
            seeds, x="variant", y=key, hue="variant", order=models, hue_order=models,
            palette=PALETTE[: len(models)], errorbar=None, ax=axis, legend=False, alpha=0.75,
        )  # fmt: skip
        sns.stripplot(seeds, x="variant", y=key, order=models, color="black", size=4, ax=axis)
        axis.set(title=words, xlabel="", ylabel="")
        axis.title.set_fontsize(9)
        axis.tick_params(axis="x", rotation=60, labelsize=8)
        for label in axis.get_xticklabels():
            label.set_ha("right")
            label.set_rotation_mode("anchor")
    count = seeds["seed"].nunique()
    figure.suptitle(f"Test images: mean of {count} seed{'s' * (count > 1)}, one dot a seed")
    return figure


def true_class_density(images: pd.DataFrame) -> Figure:
    """How sure each model is of the right class: the distribution over test images."""
    models = list(dict.fromkeys(images["variant"]))
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    sns.kdeplot(
        images, x="p_true", hue="variant", hue_order=models, palette=PALETTE[: len(models)],
        common_norm=False, clip=(0, 1), bw_adjust=0.6, ax=axis,
    )  # fmt: skip
    axis.set(
        title="Probability that each model gives to the true class, over test images",
        xlabel="probability of the true class",
        ylabel="density of images",
        xlim=(0, 1),
    )
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), title="", frameon=False)
    return figure


def training(steps: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """One training as it stands: its losses step by step, and accuracy epoch by epoch.

    Args:
        steps: columns step, cross_entropy, human_loss. history: one row a finished epoch, with
            columns epoch, train_top1, val_top1; empty before the first.
    """
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    losses.plot(steps["step"], steps["cross_entropy"], color=PALETTE[0], label="cross entropy")
    if steps["human_loss"].any():
        losses.plot(steps["step"], steps["human_loss"], color=PALETTE[2], label="human attention")
    losses.set(title="losses (training)", xlabel="step", ylim=(0, None))
    for name, words, colour in (
        ("train_top1", "training", PALETTE[1]),
        ("val_top1", "validation", PALETTE[3]),
    ):
        if len(history):
            accuracy.plot(history["epoch"], history[name], "o-", ms=4, color=colour, label=words)
    accuracy.set(title="accuracy", xlabel="epoch", ylim=(0, 1.02), xlim=(0.8, None))
    for axis in (losses, accuracy):
        axis.title.set_fontsize(9)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    done = f"{len(history)} epoch{'s' * (len(history) != 1)} done"
    figure.suptitle(f"Losses by step, accuracy by epoch: {done}", fontsize=10)
    return figure


def histories(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Learning curves, one line a run: cross entropy, human loss, accuracy and CC by epoch."""
    panels = {
        "cross_entropy": "cross entropy (training)",
        "human_loss": "human attention loss (training)",
        "val_top1": "accuracy (validation)",
        "val_cc": "CC with people (validation)",
    }
    if not any(history["human_loss"].any() for history in runs.values()):
        del panels["human_loss"]
    wide = len(panels)
    figure, axes = plt.subplots(1, wide, figsize=(3 * wide, 3), layout="constrained")
    for axis, (key, words) in zip(axes, panels.items(), strict=True):
        for colour, (name, history) in zip(PALETTE, runs.items(), strict=False):
            axis.plot(history["epoch"], history[key], marker="o", ms=3, color=colour, label=name)
        axis.set(title=words, xlabel="epoch")
        axis.title.set_fontsize(9)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.suptitle("How the models learned")
    return figure


def ladder(table: pd.DataFrame, title: str, ylabel: str) -> Figure:
    """Accuracy by rung of the edit ladder, one line a model.

    Args:
        table: columns rung, variant, top1 (one row an image, or means).
    """
    models = list(dict.fromkeys(table["variant"]))
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    sns.pointplot(
        table, x="rung", y="top1", hue="variant", hue_order=models,
        palette=PALETTE[: len(models)], errorbar=None, ax=axis,
    )  # fmt: skip
    axis.set(title=title, xlabel="where in the model the edit is made", ylabel=ylabel)
    axis.set_ylim(bottom=0)
    rungs = list(dict.fromkeys(table["rung"]))
    axis.set_xticks(range(len(rungs)), [rung.replace(", ", ",\n") for rung in rungs])
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), title="", frameon=False)
    return figure


def turns(
    table: pd.DataFrame,
    value: str,
    title: str,
    xlabel: str,
    hue: str | None = None,
    reference: float | None = None,
) -> Figure:
    """One row a way: a bar to the median of its turns, a dot a turn.

    Args:
        table: columns way, `value`, and `hue` where two conditions of a way stand side by side.
        reference: where a line marks the yardstick.
    """
    ways = list(dict.fromkeys(table["way"]))
    conditions = table[hue].nunique() if hue else 1
    figure, axis = plt.subplots(
        figsize=(7, (0.2 + 0.25 * conditions) * len(ways) + 1), layout="constrained"
    )
    colours = PALETTE[: conditions if hue else len(ways)]
    sns.barplot(
        table, x=value, y="way", hue=hue or "way", estimator="median", errorbar=None, order=ways,
        palette=colours, alpha=0.75, ax=axis, legend="auto" if hue else False,
    )  # fmt: skip
    dots = {"hue": hue, "palette": ["black"] * conditions, "dodge": True, "legend": False}
    look = dots if hue else {"color": "black"}
    sns.stripplot(table, x=value, y="way", order=ways, size=3, jitter=False, ax=axis, **look)
    if reference is not None:
        axis.axvline(reference, color="black", linewidth=1, linestyle=":")
    axis.set(title=title, xlabel=xlabel, ylabel="")
    axis.title.set_fontsize(10)
    if hue:
        sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def parts(table: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """One bar a row of the table, made of its columns one after the other."""
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(table) + 1), layout="constrained")
    table.plot.barh(stacked=True, color=PALETTE, alpha=0.75, width=0.7, ax=axis)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=xlabel, ylabel="")
    axis.title.set_fontsize(10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure

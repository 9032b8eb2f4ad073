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


# ---------------------------------------------------------------------------------- ablations


# One colour a loss, in every figure.
LOSS_COLOURS = {
    "mse": PALETTE[6],
    "mse_zero": PALETTE[2],
    "bce": PALETTE[4],
    "kl": PALETTE[0],
    "cosine": PALETTE[5],
    "energy": PALETTE[3],
    "control": "black",
}
HEAD_MARKS = {"all": "o", "mean": "D", "half": "^", "one": "v", "": "*"}


def pareto(
    settings: pd.DataFrame,
    front: Sequence[bool],
    lines: Mapping[str, float],
    title: str,
    xlabel: str = "CC with people",
    ylabel: str = "accuracy",
    x: str = "cc",
    y: str = "top1",
) -> Figure:
    """Accuracy against alignment: a point a setting, a colour a loss, the front drawn through.

    Args:
        settings: `lib.ablations.by_setting`: means over seeds and their standard deviations.
        front: which of them no other beats.
        lines: alignments to mark, e.g. that of people with each other (the ceiling).
    """
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    best = settings[np.asarray(front)].sort_values(x)
    axis.step(best[x], best[y], where="post", color="0.6", linewidth=6, alpha=0.35, zorder=1)
    for (loss, heads), part in settings.groupby(["loss", "heads"], sort=False):
        part = part.sort_values("lam")
        colour = LOSS_COLOURS[loss]
        if len(part) > 1:
            axis.plot(part[x], part[y], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        axis.errorbar(
            part[x], part[y], xerr=part[f"{x}_std"], yerr=part[f"{y}_std"], fmt="none",
            ecolor=colour, elinewidth=0.6, alpha=0.35, zorder=2,
        )  # fmt: skip
        mark = HEAD_MARKS.get(heads, "s")
        size = 140 if loss == "control" else 32
        name = loss if heads in ("", "all") else f"{loss}, {heads} of heads"
        axis.scatter(part[x], part[y], s=size, color=colour, marker=mark, label=name, zorder=3)
        for _, row in part[part["lam"] > 0].iterrows():
            place = {"xytext": (4, 4), "textcoords": "offset points"}
            axis.annotate(f"{row['lam']:g}", (row[x], row[y]), fontsize=6, color=colour, **place)
    for control in settings.loc[settings["loss"] == "control", y]:
        axis.axhline(control, color="black", linewidth=0.7, linestyle=":")
    for name, value in lines.items():
        axis.axvline(value, color="0.4", linewidth=1, linestyle="--")
        axis.text(value, 0.02, f" {name}", transform=axis.get_xaxis_transform(), fontsize=8,
                  rotation=90, va="bottom", ha="right", color="0.3")  # fmt: skip
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.title.set_fontsize(10)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def by_lambda(table: pd.DataFrame, panels: Mapping[str, str], title: str) -> Figure:
    """One panel a number, lambda on a logarithmic axis, a colour a loss; the control as a line.

    Args:
        table: rows of a sweep: a row a training, of one split; bands are standard deviations.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.3),
                                layout="constrained")  # fmt: skip
    trained = table[table["loss"] != "control"]
    control = table[table["loss"] == "control"]
    losses = [loss for loss in LOSS_COLOURS if loss in set(trained["loss"])]
    for axis, (name, words) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        axis.set_xscale("log")  # before drawing: bands are made on the axis as it is
        sns.lineplot(
            trained, x="lam", y=name, hue="loss", hue_order=losses, style="heads", errorbar="sd",
            palette=LOSS_COLOURS, markers=True, dashes=False, ax=axis, err_kws={"alpha": 0.12},
            legend="auto" if axis is np.atleast_1d(axes)[-1] else False,
        )  # fmt: skip
        if len(control):
            axis.axhline(control[name].mean(), color="black", linewidth=0.8, linestyle=":")
        axis.set(title=words, xlabel="lambda", ylabel="")
        axis.title.set_fontsize(9)
    sns.move_legend(np.atleast_1d(axes)[-1], "upper left", bbox_to_anchor=(1, 1), frameon=False,
                    fontsize=8, title_fontsize=8)  # fmt: skip
    figure.suptitle(f"{title}\ndotted: the control without maps", fontsize=10)
    return figure


def choices(table: pd.DataFrame, by: str, panels: Mapping[str, str], title: str) -> Figure:
    """One panel a number, one row a choice: a dot a seed, a stroke at their mean.

    Args:
        table: a row a training; `by` is the column of the choice, in the order of the rows.
    """
    names = list(dict.fromkeys(table[by]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.2, 0.36 * len(names) + 1.3), sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, (column, words) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        sns.pointplot(table, x=column, y=by, order=names, color=PALETTE[0], errorbar=None,
                      linestyle="none", marker="|", markersize=18, ax=axis)  # fmt: skip
        sns.stripplot(table, x=column, y=by, order=names, color="black", size=3.5, jitter=False,
                      alpha=0.6, ax=axis)  # fmt: skip
        axis.grid(axis="y", color="0.9")
        axis.set(title=words, xlabel="", ylabel="")
        axis.title.set_fontsize(9)
    figure.suptitle(title, fontsize=10)
    return figure

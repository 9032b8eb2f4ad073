"""Trainings, drawn: histories, speed and memory in turns, sweeps and their Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib.figures.fonts import LEGEND_LETTERS, label
from lib.figures.overlays import PALETTE, axes_grid, name_axis
from lib.figures.results import mark_lines


def training_curves(steps: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """One training as it stands: its losses step by step, and accuracy epoch by epoch.

    Args:
        steps: columns step, cross_entropy, human_loss. history: one row a finished epoch, with
            columns epoch, train_top1, val_top1; empty before the first.
    """
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    losses.plot(steps["step"], steps["cross_entropy"], color=PALETTE[0], label="cross entropy")
    if steps["human_loss"].any():
        losses.plot(steps["step"], steps["human_loss"], color=PALETTE[2], label="human attention")
    name_axis(losses, "losses (training)", 9, xlabel="step", ylim=(0, None))
    for name, words, colour in (
        ("train_top1", "training", PALETTE[1]),
        ("val_top1", "validation", PALETTE[3]),
    ):
        if len(history):
            accuracy.plot(history["epoch"], history[name], "o-", ms=4, color=colour, label=words)
    name_axis(accuracy, "accuracy", 9, xlabel="epoch", ylim=(0, 1.02), xlim=(0.8, None))
    for axis in (losses, accuracy):
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
    figure, (axes,) = axes_grid(1, len(panels), 3 * len(panels), 3)
    for axis, (key, words) in zip(axes, panels.items(), strict=True):
        for colour, (name, history) in zip(cycle(PALETTE), runs.items(), strict=False):
            look = {"marker": "o", "ms": 3, "color": colour, "label": label(name, LEGEND_LETTERS)}
            axis.plot(history["epoch"], history[key], **look)
        bottom = min(0, axis.get_ylim()[0] if key == "val_cc" else 0)  # a CC can be negative
        limits = (bottom, 1.02 if key == "val_top1" else None)
        name_axis(axis, words, 9, xlabel="epoch", ylim=limits)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.suptitle("How the models learned")
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
    size = (7, (0.2 + 0.25 * conditions) * len(ways) + 1)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
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
    name_axis(axis, title, 10, xlabel=xlabel, ylabel="")
    if hue:
        sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def parts(table: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """One bar a row of the table, made of its columns one after the other."""
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(table) + 1), layout="constrained")
    table.plot.barh(stacked=True, color=PALETTE, alpha=0.75, width=0.7, ax=axis)
    axis.invert_yaxis()
    name_axis(axis, title, 10, xlabel=xlabel, ylabel="")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


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
    x: str = "cc",
) -> Figure:
    """Accuracy against alignment: a point a setting, a colour a loss, the front drawn through.

    Args:
        settings: `lib.evaluation.tables.by_setting`: means over seeds, and their standard
            deviations.
        front: which of them no other beats; lambda stands beside these.
        lines: alignments to mark, e.g. that of people with each other (the ceiling).
    """
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    best = settings[np.asarray(front)].sort_values(x)
    axis.step(best[x], best["top1"], where="post", color="0.6", linewidth=6, alpha=0.35, zorder=1)
    for (loss, heads), part in settings.groupby(["loss", "heads"], sort=False):
        part = part.sort_values("lam")
        colour = LOSS_COLOURS[loss]
        if len(part) > 1:
            axis.plot(part[x], part["top1"], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        axis.errorbar(
            part[x], part["top1"], xerr=part[f"{x}_std"], yerr=part["top1_std"], fmt="none",
            ecolor=colour, elinewidth=0.6, alpha=0.35, zorder=2,
        )  # fmt: skip
        mark = HEAD_MARKS.get(heads, "s")
        size = 140 if loss == "control" else 32
        axis.scatter(part[x], part["top1"], s=size, color=colour, marker=mark, zorder=3)
    look = {"xytext": (-4, 6), "textcoords": "offset points", "fontsize": 8, "ha": "right"}
    for _, row in best[best["lam"] > 0].iterrows():
        axis.annotate(f"{row['lam']:g}", (row[x], row["top1"]), **look)
    for control in settings.loc[settings["loss"] == "control", "top1"]:
        axis.axhline(control, color="black", linewidth=0.7, linestyle=":")
    mark_lines(axis, lines)
    # A colour a loss, a mark for its heads: a name for each pair would be a dozen.
    key = [Line2D([], [], color=LOSS_COLOURS[loss], label=loss, linewidth=4)
           for loss in LOSS_COLOURS if loss in set(settings["loss"])]  # fmt: skip
    look = {"color": "0.4", "linestyle": "none", "markersize": 7}
    for heads, mark in HEAD_MARKS.items():
        if heads and heads in set(settings["heads"]):
            key.append(Line2D([], [], marker=mark, label=f"heads: {heads}", **look))
    axis.legend(handles=key, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    name_axis(axis, title, 10, xlabel=xlabel, ylabel="accuracy (does not start at 0)")
    return figure


def by_lambda(table: pd.DataFrame, panels: Mapping[str, str], title: str) -> Figure:
    """One panel a number, lambda on a logarithmic axis, a colour a loss; the control as a line.

    Args:
        table: rows of a sweep: a row a training, of one split; bands are standard deviations.
    """
    figure, (axes,) = axes_grid(1, len(panels), 3.2 * len(panels), 3.3)
    trained = table[table["loss"] != "control"]
    control = table[table["loss"] == "control"]
    losses = [loss for loss in LOSS_COLOURS if loss in set(trained["loss"])]
    for axis, (name, words) in zip(axes, panels.items(), strict=True):
        axis.set_xscale("log")  # before drawing: bands are made on the axis as it is
        sns.lineplot(
            trained, x="lam", y=name, hue="loss", hue_order=losses, style="heads", errorbar="sd",
            palette=LOSS_COLOURS, markers=True, dashes=False, ax=axis, err_kws={"alpha": 0.12},
            legend="auto" if axis is axes[-1] else False,
        )  # fmt: skip
        if len(control):
            axis.axhline(control[name].mean(), color="black", linewidth=0.8, linestyle=":")
        name_axis(axis, words, 9, xlabel="lambda", ylabel="")
    sns.move_legend(axes[-1], "upper left", bbox_to_anchor=(1, 1), frameon=False,
                    fontsize=8, title_fontsize=8)  # fmt: skip
    figure.suptitle(f"{title}\ndotted: the control without maps", fontsize=10)
    return figure


def choices(table: pd.DataFrame, by: str, panels: Mapping[str, str], title: str) -> Figure:
    """One panel a number, one row a choice: a dot a seed, a stroke at their mean.

    Args:
        table: a row a training; `by` is the column of the choice, in the order of the rows.
    """
    names = list(dict.fromkeys(table[by]))
    width, height = 2.6 * len(panels) + 1.2, 0.36 * len(names) + 1.3
    figure, (axes,) = axes_grid(1, len(panels), width, height, sharey=True)
    for axis, (column, words) in zip(axes, panels.items(), strict=True):
        sns.pointplot(table, x=column, y=by, order=names, color=PALETTE[0], errorbar=None,
                      linestyle="none", marker="|", markersize=18, ax=axis)  # fmt: skip
        sns.stripplot(table, x=column, y=by, order=names, color="black", size=3.5, jitter=False,
                      alpha=0.6, ax=axis)  # fmt: skip
        axis.grid(axis="y", color="0.9")
        axis.locator_params(axis="x", nbins=4)
        axis.margins(x=0.12)  # no dot on the frame
        name_axis(axis, words, 9, xlabel="", ylabel="")
    figure.suptitle(f"{title} One dot a seed; axes do not start at 0", fontsize=10)
    return figure

"""What an evaluation found, drawn: models side by side, calibration, erasing, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy.integrate import trapezoid

from lib.figures.fonts import LEGEND_LETTERS, LONGEST, label, labelled
from lib.figures.overlays import IMAGES_OF, PALETTE, axes_grid, name_axis

HATCHES = ("", "///", "...", "xxx")  # bars are told apart without their colours, too


def comparison(
    seeds: pd.DataFrame, columns: Mapping[str, str], split: str = "test", wide: int = 6
) -> Figure:
    """One panel a figure of merit: a bar a model (mean of seeds), a dot a seed.

    Args:
        seeds: a row a run, columns variant, seed and those of `columns`, which has their titles.
        wide: panels in a row.
    """
    shown = {k: words for k, words in columns.items() if k in seeds and seeds[k].notna().any()}
    seeds = labelled(seeds)
    models = list(dict.fromkeys(seeds["variant"]))
    fit = max(map(len, models)) <= LONGEST
    rows, across = -(-len(shown) // wide), min(wide, len(shown))
    figure, axes = axes_grid(rows, across, 2.3 * across, 3.6 * rows)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (key, words) in zip(axes.flat, shown.items(), strict=False):
        sns.barplot(
            seeds, x="variant", y=key, hue="variant", order=models, hue_order=models,
            palette=PALETTE[: len(models)], errorbar=None, ax=axis, legend=False, alpha=0.75,
        )  # fmt: skip
        sns.stripplot(seeds, x="variant", y=key, order=models, color="black", size=4, ax=axis)
        name_axis(axis, words, 9, xlabel="", ylabel="")
        axis.set_xticks(range(len(models)), models if fit else [], rotation=60, fontsize=8)
        for name in axis.get_xticklabels():
            name.set(ha="right", rotation_mode="anchor")
    if not fit:  # a name of a sweep is longer than a panel is high: named once, by their colours
        bars = axes[0, 0].patches[: len(models)]
        figure.legend(bars, models, loc="outside lower left", frameon=False, fontsize=8)
    count, start = seeds["seed"].nunique(), IMAGES_OF[split].capitalize()
    figure.suptitle(f"{start}: mean of {count} seed{'s' * (count > 1)}, one dot a seed")
    return figure


def true_class_density(images: pd.DataFrame, split: str = "test") -> Figure:
    """How sure each model is of the right class: the distribution over a split's images."""
    images = labelled(images)
    models = list(dict.fromkeys(images["variant"]))
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    sns.kdeplot(
        images, x="p_true", hue="variant", hue_order=models, palette=PALETTE[: len(models)],
        common_norm=False, clip=(0, 1), bw_adjust=0.6, ax=axis,
    )  # fmt: skip
    title = f"Probability that each model gives to the true class, over {IMAGES_OF[split]}"
    labels = {"xlabel": "probability of the true class", "ylabel": "density of images"}
    axis.set(title=title, xlim=(0, 1), **labels)
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1.0, 1.0), title="", frameon=False)
    return figure


def reliability(bins: pd.DataFrame, errors: Mapping[str, float], split: str = "test") -> Figure:
    """Whether a model that is 80 % sure is right in 80 % of cases: one line a model.

    Args:
        bins: a row a variant and bin of confidence: columns variant, images, confidence, accuracy.
        errors: expected calibration error of every variant, for the legend.
    """
    figure, (axis, below) = plt.subplots(
        2, 1, figsize=(5.8, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    axis.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":", label="calibrated")
    for colour, (name, error) in zip(cycle(PALETTE), errors.items(), strict=False):
        part = bins[(bins["variant"] == name) & (bins["images"] > 0)].sort_values("confidence")
        words = label(f"{name} (ECE {error:.3f})", LEGEND_LETTERS)
        look = {"ms": 4, "color": colour, "clip_on": False}
        axis.plot(part["confidence"], part["accuracy"], "o-", label=words, **look)
        share = part["images"] / part["images"].sum()
        below.plot(part["confidence"], share, "o-", ms=3, color=colour)
    title = f"Confidence against accuracy, {IMAGES_OF[split]} (below the line: too sure)"
    name_axis(axis, title, 10, ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="share of images")
    below.set_ylim(bottom=0)
    return figure


def accuracy_and_alignment(
    seeds: pd.DataFrame, lines: Mapping[str, float], split: str = "test"
) -> Figure:
    """Does looking where people look come with being right? One dot a run.

    Args:
        seeds: a row a run, columns variant, top1, cc.
        lines: CC of maps that no model made, e.g. of one person with the others, by name.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    seeds = labelled(seeds)
    models = list(dict.fromkeys(seeds["variant"]))
    for colour, marker, name in zip(cycle(PALETTE), cycle("osD^vPX*"), models, strict=False):
        part = seeds[seeds["variant"] == name]
        axis.scatter(part["cc"], part["top1"], color=colour, marker=marker, label=name, alpha=0.8)
    mark_lines(axis, lines)
    title = f"Accuracy and agreement with people, {IMAGES_OF[split]}: one dot a run"
    name_axis(axis, title, 10, xlabel="CC with people's maps", ylabel="accuracy")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def ladder(table: pd.DataFrame, title: str, ylabel: str) -> Figure:
    """Accuracy by rung of the edit ladder, one line a model.

    Args:
        table: columns rung, variant, top1 (one row an image, or means).
    """
    table = labelled(table)
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


def erasing(table: pd.DataFrame) -> Figure:
    """What erasing patches from the attention costs, rung by rung: one column of panels a model.

    Args:
        table: one row an image, what and rung: columns what, rung, p_true_change, flipped, and
            variant where there are several models. Bars are 95 % bootstrap intervals over images.
    """
    table = table.assign(variant=table.get("variant", ""))
    table["rung"] = table["rung"].str.replace(", ", ",\n")
    models, kinds = (list(dict.fromkeys(table[key])) for key in ("variant", "what"))
    panels = {
        "p_true_change": "change of the true\nclass's probability",
        "flipped": "share of predictions\nthat change",
    }
    wide = len(models)
    figure, axes = axes_grid(2, wide, 3.6 * wide + 2.2, 5.2, sharex=True, sharey="row")
    for column, model in enumerate(models):
        part = table[table["variant"] == model]
        for axis, (key, words) in zip(axes[:, column], panels.items(), strict=True):
            sns.pointplot(
                part, x="rung", y=key, hue="what", hue_order=kinds, palette=PALETTE[: len(kinds)],
                dodge=0.3, errorbar=("ci", 95), n_boot=500, seed=0, linewidth=1.5,
                err_kws={"linewidth": 1.2}, markersize=4, ax=axis,
            )  # fmt: skip
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set(xlabel="", ylabel=words if column == 0 else "")
            axis.legend_.remove()
        axes[0, column].set_title(label(model), fontsize=9)
        axes[1, column].tick_params(axis="x", labelsize=7)
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", frameon=False, title="erased")
    figure.supxlabel("where in the model the patches are erased", fontsize=10)
    count = table["index"].nunique()
    figure.suptitle(f"What erasing patches from the attention costs ({count} images)", fontsize=11)
    return figure


def curves(table: pd.DataFrame, hue: str | None = None) -> Figure:
    """Deletion and insertion: the mean probability of the true class, and the area below it.

    Args:
        table: columns curve ("deletion", "insertion"), fraction, p_true, one row an image, curve
            and fraction; variant where there are several models, which get a row of panels each.
            hue: a column that tells lines apart, e.g. order; 7 values at most.
    """
    table = table.assign(variant=table.get("variant", ""), hue=table[hue] if hue else "")
    models = list(dict.fromkeys(table["variant"]))
    panels = {
        "deletion": ("patches leave the picture: a small area is good", "patches taken out"),
        "insertion": ("patches enter a blurred picture: a large area is good", "patches put in"),
    }
    rows = len(models)
    figure, grid = axes_grid(rows, 2, 9, 2.9 * rows + 0.7, sharex=True, sharey=True)
    colours = dict(zip(dict.fromkeys(table["hue"]), PALETTE, strict=False))
    for axes, model in zip(grid, models, strict=True):
        for axis, (curve, (words, what)) in zip(axes, panels.items(), strict=True):
            part = table[(table["curve"] == curve) & (table["variant"] == model)]
            for name, line in part.groupby("hue", sort=False):
                mean = line.groupby("fraction")["p_true"].mean()
                area = trapezoid(mean, mean.index)
                told = f"{name}: area {area:.2f}" if hue else f"area {area:.2f}"
                look = {"ms": 3, "color": colours[name], "clip_on": False}
                axis.plot(mean.index, mean, "o-", label=told, **look)
            title = f"{label(model, LEGEND_LETTERS)}\n{words}" if model else words
            name_axis(axis, title, 9, xlim=(0, 1), ylim=(0, 1))
            axis.legend(frameon=False, fontsize=8)
            if model == models[-1]:
                axis.set_xlabel(f"share of {what}")
        axes[0].set_ylabel("p (true class)")
    count = table["index"].nunique()
    figure.suptitle(f"Patches of {count} pictures taken out and put in, step by step", fontsize=11)
    return figure


def outliers(table: pd.DataFrame) -> Figure:
    """How much of the attention goes where it should not, block by block and model by model.

    Args:
        table: one row an image and block: columns block, and for outliers, flat, background and
            sinks the share of patches and `_mass`; variant where there are several models. The
            dotted line is the share of patches: what uniform attention would put there.
    """
    table = table.assign(variant=table.get("variant", "model"), block=table["block"] + 1)
    table = labelled(table)
    models = list(dict.fromkeys(table["variant"]))
    palette = dict(zip(models, PALETTE, strict=False))
    panels = {
        "outliers": "tokens of outlying norm",
        "flat": "low-information background",
        "background": "all background",
        "sinks": "sinks on the background",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, (key, words) in zip(axes, panels.items(), strict=True):
        # Side by side: models with the same frozen trunk differ in its last blocks only.
        look = {"data": table, "x": "block", "hue": "variant", "palette": palette, "ax": axis}
        look |= {"dodge": 0.5 if len(models) > 1 else False, "linewidth": 1.2, "markersize": 3}
        sns.pointplot(y=f"{key}_mass", n_boot=500, seed=0, err_kws={"linewidth": 1}, **look)
        sns.pointplot(y=key, errorbar=None, linestyles=":", markers="", legend=False, **look)
        name_axis(axis, words, 10, ylabel="", xlabel="block", ylim=(0, None))
        axis.tick_params(axis="x", labelsize=7)
    for axis in axes[1:]:
        axis.legend_.remove()
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("share of the attention on patches")
    count = table["index"].nunique()
    title = f"Attention on outliers and background ({count} images); dotted: share of the patches"
    figure.suptitle(title, fontsize=11)
    return figure


def mark_lines(axis: plt.Axes, lines: Mapping[str, float]) -> None:
    """Named vertical lines."""
    for name, value in lines.items():
        axis.axvline(value, color="0.4", linewidth=1, linestyle="--")
        axis.text(value, 0.02, f" {name}", transform=axis.get_xaxis_transform(), fontsize=8,
                  rotation=90, va="bottom", ha="right", color="0.3")  # fmt: skip


def rule_changes(table: pd.DataFrame) -> Figure:
    """How many predictions a rule breaks and mends: bars by rule, its controls beside them.

    Args:
        table: a row a rule, control and scope: columns rule, control, scope, pictures,
            right_to_wrong, wrong_to_right.
    """
    rules, kinds = (list(dict.fromkeys(table[key])) for key in ("rule", "control"))
    scopes = list(dict.fromkeys(table["scope"]))
    panels = {"right_to_wrong": "right → wrong", "wrong_to_right": "wrong → right"}
    width = max(3.2, 1.1 + 0.34 * len(rules) * len(kinds))
    figure, axes = axes_grid(
        len(scopes), 2, 2 * width, 2.6 * len(scopes) + 1, sharex=True, sharey=True
    )
    for row, scope in zip(axes, scopes, strict=True):
        for axis, (key, words) in zip(row, panels.items(), strict=True):
            part = table[table["scope"] == scope]
            for place, kind in enumerate(kinds):
                found = part[part["control"] == kind].set_index("rule")[key].reindex(rules)
                at = [
                    k + (place - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for k in range(len(rules))
                ]
                look = {"color": PALETTE[place % len(PALETTE)], "hatch": HATCHES[place % 4]}
                bars = axis.bar(
                    at, found, 0.8 / len(kinds), label=label(kind), edgecolor="white", **look
                )
                axis.bar_label(bars, fmt="{:.0f}", fontsize=8, padding=1)
            name_axis(axis, f"{words}\n{label(scope, 60)}", 9)
            axis.set_xticks(range(len(rules)), [label(rule, 16) for rule in rules], fontsize=8)
            axis.margins(y=0.15)
            axis.set_ylim(0, max(axis.get_ylim()[1], 1))  # where nothing changes, too
        row[0].set_ylabel("pictures")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=8)
    count = int(table["pictures"].max())
    figure.suptitle(f"Predictions that one rule changes, of {count} pictures", fontsize=10)
    return figure

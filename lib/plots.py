"""Figures: matplotlib and seaborn, plain arrays and tables in, one Figure out, none shown here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

# Colours that readers with any colour vision can tell apart (Okabe and Ito, 2008).
PALETTE = ["#0072B2", "#999999", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
MAP_COLOURS = "viridis"
LONGEST = 24  # letters of a model's name that fit below a bar, or above a map
SPLITS = {"train": "training", "val": "validation", "test": "test"}  # in the words of titles


def overlay(axis: plt.Axes, image: np.ndarray, grid_map: np.ndarray, strength: float = 0.8) -> None:
    """Draws an image and, over it, a map of its patch grid.

    Args:
        image: uint8 `[H, W, 3]`. grid_map: `[gh, gw]`, non-negative; scaled to its own maximum.
            NaN, a cell of which nothing is known, is left out.
        strength: opacity of the map where it is highest; where it is 0 the image is only dimmed.
    """
    height, width = image.shape[:2]
    scaled, opacity = _scaled(grid_map, strength)
    axis.imshow(image)
    axis.imshow(
        scaled,
        extent=(0, width, height, 0),
        cmap=MAP_COLOURS,
        vmin=0,
        vmax=1,
        alpha=opacity,
        interpolation="nearest",
    )
    axis.set_axis_off()


def _scaled(grid_map: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """A map over its own maximum, and how opaque each cell is: both `[gh, gw]` in [0, 1]."""
    known = np.isfinite(grid_map)
    scaled = np.where(known, grid_map, 0)
    scaled = scaled / max(float(scaled.max()), 1e-12)
    return scaled, strength * (0.4 + 0.6 * scaled) * known


def picture(
    image: np.ndarray, grid_map: np.ndarray | None = None, pixels: int = 280, strength: float = 0.8
) -> np.ndarray:
    """What `overlay` draws as plain pixels, for pages that show hundreds: a figure takes 60 ms.

    Args:
        image: uint8 `[H, W, 3]`. grid_map: `[gh, gw]`, see `overlay`; None shows the image alone.
        pixels: width of the result; it keeps the image's proportions.

    Returns:
        uint8 `[h, pixels, 3]`.
    """
    size = (pixels, round(pixels * image.shape[0] / image.shape[1]))
    drawn = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    if grid_map is None:
        return drawn
    scaled, opacity = _scaled(grid_map, strength)
    colours = plt.get_cmap(MAP_COLOURS)(scaled)  # [gh, gw, 4], red, green, blue, opacity
    colours[..., 3] = opacity
    cells = Image.fromarray(np.uint8(np.rint(255 * colours)), "RGBA")
    above = Image.fromarray(drawn).convert("RGBA")
    above.alpha_composite(cells.resize(size, Image.Resampling.NEAREST))
    return np.asarray(above.convert("RGB"))


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
        axis.set_title(_wrapped(name), fontsize=9)
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


def comparison(
    seeds: pd.DataFrame, columns: Mapping[str, str], split: str = "test", wide: int = 6
) -> Figure:
    """One panel a figure of merit: a bar a model (mean of seeds), a dot a seed.

    Args:
        seeds: a row a run, columns variant, seed and those of `columns`, which has their titles.
        wide: panels in a row.
    """
    shown = {k: words for k, words in columns.items() if k in seeds and seeds[k].notna().any()}
    models = list(dict.fromkeys(seeds["variant"]))
    fit = max(map(len, models)) <= LONGEST
    rows, across = -(-len(shown) // wide), min(wide, len(shown))
    figure, axes = plt.subplots(
        rows,
        across,
        figsize=(2.3 * across, 3.6 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (key, words) in zip(axes.flat, shown.items(), strict=False):
        sns.barplot(
            seeds, x="variant", y=key, hue="variant", order=models, hue_order=models,
            palette=PALETTE[: len(models)], errorbar=None, ax=axis, legend=False, alpha=0.75,
        )  # fmt: skip
        sns.stripplot(seeds, x="variant", y=key, order=models, color="black", size=4, ax=axis)
        axis.set(title=words, xlabel="", ylabel="")
        axis.title.set_fontsize(9)
        axis.set_xticks(range(len(models)), models if fit else [], rotation=60, fontsize=8)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    if not fit:  # a name of a sweep is longer than a panel is high: named once, by their colours
        bars = axes[0, 0].patches[: len(models)]
        figure.legend(bars, models, loc="outside lower left", frameon=False, fontsize=8)
    count = seeds["seed"].nunique()
    start = f"{SPLITS[split].capitalize()} images"
    figure.suptitle(f"{start}: mean of {count} seed{'s' * (count > 1)}, one dot a seed")
    return figure


def _wrapped(name: str) -> str:
    """A model's name in lines that fit above a map: those of sweeps are long."""
    return textwrap.fill(name, LONGEST)


def true_class_density(images: pd.DataFrame, split: str = "test") -> Figure:
    """How sure each model is of the right class: the distribution over a split's images."""
    models = list(dict.fromkeys(images["variant"]))
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    sns.kdeplot(
        images, x="p_true", hue="variant", hue_order=models, palette=PALETTE[: len(models)],
        common_norm=False, clip=(0, 1), bw_adjust=0.6, ax=axis,
    )  # fmt: skip
    axis.set(
        title=f"Probability that each model gives to the true class, over {SPLITS[split]} images",
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
        for colour, (name, history) in zip(cycle(PALETTE), runs.items(), strict=False):
            axis.plot(history["epoch"], history[key], marker="o", ms=3, color=colour, label=name)
        axis.set(title=words, xlabel="epoch")
        axis.title.set_fontsize(9)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.suptitle("How the models learned")
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
        label = f"{name} (ECE {error:.3f})"
        axis.plot(part["confidence"], part["accuracy"], "o-", ms=4, color=colour, label=label)
        share = part["images"] / part["images"].sum()
        below.plot(part["confidence"], share, "o-", ms=3, color=colour)
    axis.set(
        title=f"Confidence against accuracy, {SPLITS[split]} images (below the line: too sure)",
        ylabel="accuracy",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axis.title.set_fontsize(10)
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
    models = list(dict.fromkeys(seeds["variant"]))
    for colour, marker, name in zip(cycle(PALETTE), cycle("osD^vPX*"), models, strict=False):
        part = seeds[seeds["variant"] == name]
        axis.scatter(part["cc"], part["top1"], color=colour, marker=marker, label=name, alpha=0.8)
    _mark(axis, lines)
    axis.set(
        title=f"Accuracy and agreement with people, {SPLITS[split]} images: one dot a run",
        xlabel="CC with people's maps",
        ylabel="accuracy",
    )
    axis.title.set_fontsize(10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
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
    figure, axes = plt.subplots(
        2,
        len(models),
        figsize=(3.6 * len(models) + 2.2, 5.2),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
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
        axes[0, column].set_title(model, fontsize=9)
        axes[1, column].tick_params(axis="x", labelsize=7)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False,
        title="erased",
    )  # fmt: skip
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
    figure, grid = plt.subplots(
        len(models), 2, figsize=(9, 2.9 * len(models) + 0.7), squeeze=False, sharex=True,
        sharey=True, layout="constrained",
    )  # fmt: skip
    colours = dict(zip(dict.fromkeys(table["hue"]), PALETTE, strict=False))
    for axes, model in zip(grid, models, strict=True):
        for axis, (curve, (words, what)) in zip(axes, panels.items(), strict=True):
            part = table[(table["curve"] == curve) & (table["variant"] == model)]
            for name, rows in part.groupby("hue", sort=False):
                mean = rows.groupby("fraction")["p_true"].mean()
                area = np.trapezoid(mean, mean.index)
                label = f"{name}: area {area:.2f}" if hue else f"area {area:.2f}"
                axis.plot(mean.index, mean, "o-", ms=3, color=colours[name], label=label)
            axis.set(title=f"{model}: {words}" if model else words, xlim=(0, 1), ylim=(0, 1))
            axis.title.set_fontsize(9)
            axis.legend(frameon=False, fontsize=8)
            if axes is grid[-1]:
                axis.set_xlabel(f"share of {what}")
        axes[0].set_ylabel("p (true class)")
    count = table["index"].nunique()
    figure.suptitle(f"Patches of {count} pictures taken out and put in, step by step", fontsize=11)
    return figure


def token_norms(models: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """How long the patches' tokens are as they leave each block, and where outliers begin.

    Args:
        models: for every model its norms `[n, D, P]` and the cutoff of each block `[D]`.
    """
    low = min(norms.min() for norms, _ in models.values())
    high = max(max(norms.max(), cutoffs.max()) for norms, cutoffs in models.values())
    edges = np.geomspace(max(low, 1e-3) * 0.95, high * 1.05, 120)
    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(4.2 * len(models) + 1, 3.8),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, (name, (norms, cutoffs)) in zip(axes[0], models.items(), strict=True):
        blocks = np.arange(norms.shape[1])
        counts = np.stack([np.histogram(norms[:, block], edges)[0] for block in blocks], axis=1)
        shares = np.ma.masked_equal(counts / norms[:, 0].size, 0)
        image = axis.pcolormesh(
            np.arange(len(blocks) + 1) - 0.5, edges, shares, cmap=MAP_COLOURS,
            norm="log", vmin=1e-5, vmax=1,
        )  # fmt: skip
        axis.hlines(cutoffs, blocks - 0.45, blocks + 0.45, color="#D55E00", label="cutoff")
        share = (norms > cutoffs[:, None]).mean()
        axis.set(yscale="log", xlabel="block", title=f"{name}: {share:.3%} are outliers")
        axis.set_xticks(blocks, blocks + 1)
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("L2 norm of a patch's token")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.colorbar(image, ax=axes, label="share of the block's patches")
    figure.suptitle(
        "Patch tokens by block, and the norm above which one is an outlier", fontsize=11
    )
    return figure


def artefacts(table: pd.DataFrame) -> Figure:
    """How much of the attention goes where it should not, block by block and model by model.

    Args:
        table: one row an image and block: columns block, and for outliers, flat, background and
            sinks the share of patches and `_mass`; variant where there are several models. The
            dotted line is the share of patches: what uniform attention would put there.
    """
    table = table.assign(variant=table.get("variant", "model"), block=table["block"] + 1)
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
        axis.set(title=words, ylabel="", xlabel="block", ylim=(0, None))
        axis.title.set_fontsize(10)
        axis.tick_params(axis="x", labelsize=7)
    for axis in axes[1:]:
        axis.legend_.remove()
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("share of the attention on patches")
    count = table["index"].nunique()
    figure.suptitle(
        f"Attention on artefacts and background ({count} images); dotted: share of the patches",
        fontsize=11,
    )
    return figure


def token_gallery(
    images: Sequence[np.ndarray],
    boxes: np.ndarray,
    norms: Mapping[str, np.ndarray],
    attention: Mapping[str, np.ndarray],
    outliers: Mapping[str, np.ndarray],
) -> Figure:
    """One row an image: the picture with the bird's box, then norms and attention of each model.

    Args:
        images: uint8 `[H, W, 3]`. boxes: `[n, 4]`, x0, y0, x1, y1 in pixels; NaN draws none.
        norms: for every model the norms `[n, gh, gw]`, in one scale for all. attention: the same
            for attention, each map scaled to its own maximum. outliers: bool `[n, gh, gw]`; a cross
            marks them.
    """
    wide = 1 + 2 * len(norms)
    figure, axes = plt.subplots(
        len(images),
        wide,
        figsize=(1.7 * wide + 0.8, 1.7 * len(images) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    lowest, highest = (f([f(maps) for maps in norms.values()]) for f in (np.min, np.max))
    for row, (image, box) in enumerate(zip(images, boxes, strict=True)):
        height, width = image.shape[:2]
        axes[row, 0].imshow(image)
        axes[row, 0].add_patch(
            plt.Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, color="#E69F00", linewidth=2)
        )
        for axis, (name, maps) in zip(axes[row, 1:], norms.items(), strict=False):
            shown = axis.imshow(
                maps[row], vmin=lowest, vmax=highest, cmap="magma", extent=(0, width, height, 0)
            )
            y, x = np.nonzero(outliers[name][row])
            gh, gw = maps[row].shape
            axis.scatter((x + 0.5) * width / gw, (y + 0.5) * height / gh, 12, "white", marker="x")
            axis.set(xlim=(0, width), ylim=(height, 0))
        for axis, maps in zip(axes[row, 1 + len(norms) :], attention.values(), strict=True):
            overlay(axis, image, maps[row])
    for axis in axes.flat:
        axis.set_axis_off()
    titles = ["image", *(f"norm\n{name}" for name in norms)]
    titles += [f"attention\n{name}" for name in attention]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label="norm of the token", shrink=0.6)
    figure.suptitle("Norms of the patches' tokens (cross: outlier), and attention", fontsize=10)
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
    _mark(axis, lines)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.title.set_fontsize(10)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _mark(axis: plt.Axes, lines: Mapping[str, float]) -> None:
    """Named vertical lines."""
    for name, value in lines.items():
        axis.axvline(value, color="0.4", linewidth=1, linestyle="--")
        axis.text(value, 0.02, f" {name}", transform=axis.get_xaxis_transform(), fontsize=8,
                  rotation=90, va="bottom", ha="right", color="0.3")  # fmt: skip


def by_lambda(table: pd.DataFrame, panels: Mapping[str, str], title: str) -> Figure:
    """One panel a number, lambda on a logarithmic axis, a colour a loss; the control as a line.

    Args:
        table: rows of a sweep: a row a training, of one split; bands are standard deviations.
    """
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.3), squeeze=False, layout="constrained"
    )
    axes = grid[0]
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
        axis.set(title=words, xlabel="lambda", ylabel="")
        axis.title.set_fontsize(9)
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
        axis.locator_params(axis="x", nbins=4)
        axis.set(title=words, xlabel="", ylabel="")
        axis.title.set_fontsize(9)
    figure.suptitle(title, fontsize=10)
    return figure

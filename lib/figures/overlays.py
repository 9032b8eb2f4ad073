"""Maps over pictures, and what all figures share: colours, and the words of titles."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lib.figures.fonts import label

# Colours that readers with any colour vision can tell apart (Okabe and Ito, 2008).
PALETTE = ["#0072B2", "#999999", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
MAP_COLOURS = "viridis"
IMAGES_OF = {
    "train": "training images",
    "val": "validation images",
    "test": "test images",
    "all": "training, validation and test images",
}


def as_file(figure: Figure, kind: str, dpi: int) -> bytes:
    """A figure as the bytes of a file, such as "png" or "svg"; it is closed."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=kind, dpi=dpi)
    finally:
        plt.close(figure)
    return content.getvalue()


def axes_grid(
    rows: int, columns: int, width: float, height: float, **how: object
) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches and its axes `[rows, columns]`."""
    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)


def name_axis(axis: plt.Axes, title: str, size: float, **others: object) -> None:
    """Title of an axis in `size` points, and what else `Axes.set` takes: labels, limits."""
    axis.set_title(title, fontsize=size)
    axis.set(**others)


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
    colours = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    axis.imshow(scaled, extent=(0, width, height, 0), alpha=opacity, **colours)
    axis.set_axis_off()


def _scaled(grid_map: np.ndarray, strength: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """A map over its own maximum, and how opaque each cell is: both `[gh, gw]` in [0, 1]."""
    known = np.isfinite(grid_map)
    scaled = np.where(known, grid_map, 0)
    scaled = scaled / max(float(scaled.max()), 1e-12)
    return scaled, strength * (0.4 + 0.6 * scaled) * known


def picture(image: np.ndarray, grid_map: np.ndarray | None = None, pixels: int = 280) -> np.ndarray:
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
    scaled, opacity = _scaled(grid_map)
    colours = plt.get_cmap(MAP_COLOURS)(scaled)  # [gh, gw, 4], red, green, blue, opacity
    colours[..., 3] = opacity
    cells = Image.fromarray(np.uint8(np.rint(255 * colours)), "RGBA")
    above = Image.fromarray(drawn).convert("RGBA")
    above.alpha_composite(cells.resize(size, Image.Resampling.NEAREST))
    return np.asarray(above.convert("RGB"))


def rows_of_maps(
    images: Sequence[np.ndarray],
    human: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[tuple[np.ndarray, bool]]],
) -> Figure:
    """One row an image: picture, people's gaze, then one attention map a model.

    Args:
        images: uint8 `[H, W, 3]`. human: `[gh, gw]` each.
        columns: for every model its `(map [gh, gw], right)` of each image; the frame, green and
            solid or red and dashed, tells a right from a wrong prediction.
    """
    names = ["image", "people", *columns]
    rows, wide = len(images), len(names)
    figure, axes = axes_grid(rows, wide, 1.7 * wide, 1.7 * rows + 0.6)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        axes[row, 0].set_axis_off()
        overlay(axes[row, 1], image, human[row])
        for column, maps in enumerate(columns.values(), start=2):
            axis, (map_, right) = axes[row, column], maps[row]
            overlay(axis, image, map_)
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                look = {"edgecolor": "#009E73" if right else "#D55E00", "linewidth": 3}
                spine.set(**look, linestyle="-" if right else (0, (3, 2)), capstyle="butt")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(label(name), fontsize=9)
    title = "Where each model looks (the row that decides)"
    figure.suptitle(f"{title}\ngreen, solid frame: right; red, dashed: wrong", fontsize=10)
    return figure


def maps_in_a_row(
    image: np.ndarray, maps: Mapping[str, np.ndarray], title: str, columns: int = 6
) -> Figure:
    """One image under several maps of its grid, each scaled to its own maximum and named."""
    rows = -(-(len(maps) + 1) // columns)
    wide = min(columns, len(maps) + 1)
    figure, axes = axes_grid(rows, wide, 1.8 * wide, 2.0 * rows + 0.4)
    for axis in axes.flat:
        axis.set_axis_off()
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("image", fontsize=9)
    for axis, (name, map_) in zip(axes.flat[1:], maps.items(), strict=False):
        overlay(axis, image, map_)
        axis.set_title(label(name), fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def transparent(grid_map: np.ndarray, size: tuple[int, int], strength: float = 1.0) -> np.ndarray:
    """A map to be laid over a picture of `size` (height, width): uint8 `[H, W, 4]`.

    Args:
        grid_map: `[gh, gw]` in [0, 1]: how opaque a patch is, and its colour. Alpha is the value
            times `strength`.
    """
    colours = plt.get_cmap(MAP_COLOURS)(grid_map)
    colours[..., 3] = strength * grid_map
    cells = Image.fromarray(np.uint8(np.rint(255 * colours)), "RGBA")
    return np.asarray(cells.resize(size[::-1], Image.Resampling.NEAREST))


def sample_sheet(
    image: np.ndarray,
    true: int,
    classes: Sequence[str],
    models: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]],
) -> Figure:
    """One picture, a row a model: its most probable classes, and its maps.

    Args:
        image: uint8 `[H, W, 3]`. true: its label among `classes`.
        models: of each the probabilities `[classes]`, and maps `[gh, gw]` in [0, 1] by name, the
            same names for all; each is drawn from its least to its most, as sigmoids may all be
            near 1.
    """
    side, gap, wide = 150, 24, 220  # pixels: of a picture, above a picture, of the probabilities
    names = [*next(iter(models.values()))[1]]
    size = (wide + (1 + len(names)) * (side + 6) + 24, 30 + len(models) * (side + gap))
    # One axis in pixels: a grid of axes takes ten times as long to draw.
    figure = plt.figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axis.set_axis_off()
    first = 24 + side + 6 + wide  # where the maps begin
    for row, (model, (probabilities, maps)) in enumerate(models.items()):
        y = 30 + row * (side + gap) + gap
        shown = {24: picture(image, pixels=side)}
        top = np.argsort(-probabilities, kind="stable")[:5]
        told = {24 + side / 2: "right" if top[0] == true else "wrong"}
        if true not in top:
            told[first - wide / 2] = f"true class {probabilities[true]:.3f}"
        for column, (name, values) in enumerate(maps.items()):
            x = first + column * (side + 6)
            shown[x] = picture(image, values - values.min(), side)
            told[x + side / 2] = (
                name if name == "rollout" else f"{name}, {values.min():.2f} to {values.max():.2f}"
            )
        for x, pixels in shown.items():
            high = pixels.shape[0] * min(1, side / pixels.shape[0])
            axis.imshow(pixels, extent=(x, x + side, y + high, y), interpolation="bilinear")
        for x, words in told.items():
            axis.text(x, y - 4, words, fontsize=8, ha="center")
        axis.text(12, y + side / 2, label(model), fontsize=8, rotation=90, ha="center", va="center")
        for place, k in enumerate(top):
            middle, right = y + (place + 0.5) * side / 5, k == true
            length = probabilities[k] * (wide - 12)
            axis.barh(
                middle, length, 24, left=first - wide, color=PALETTE[0 if right else 1], alpha=0.4
            )
            words = f"{probabilities[k]:.3f} {label(classes[k])}{' (true)' if right else ''}"
            axis.text(first - wide + 3, middle, words, fontsize=7, va="center")
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    what = "rollout of all blocks, and the sigmoid attention of the row that decides"
    axis.text(6, 20, f"{label(classes[true], 60)}: probabilities, {what}", fontsize=10)
    return figure


def snapshot_sheet(
    image: np.ndarray,
    shots: Mapping[str, tuple[np.ndarray, np.ndarray, Mapping[str, float]]],
    true: str,
    title: str,
    columns: int = 4,
) -> Figure:
    """One picture under several edits: where the model looks, and its scores below.

    Args:
        image: uint8 `[H, W, 3]`. true: name of its class.
        shots: of each edit, by name: the attention `[gh, gw]`, which cells were painted, bool
            `[gh, gw]`, and the probability of some classes by name, the prediction first.
    """
    rows, wide = -(-len(shots) // columns), min(columns, len(shots))
    figure, axes = axes_grid(
        2 * rows, wide, 2.3 * wide, 3.3 * rows + 0.6, height_ratios=(3, 1.6) * rows
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (name, (attention, painted, scores)) in enumerate(shots.items()):
        row, column = divmod(place, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        _lay_over(above, image, attention)
        _outline(above, painted)
        right = next(iter(scores)) == true
        above.set_title(f"{label(name)}\n{'✓ right' if right else '✗ wrong'}", fontsize=9)
        _score_bars(below, scores, true)
    figure.suptitle(title, fontsize=10)
    return figure


def _lay_over(axis: plt.Axes, image: np.ndarray, attention: np.ndarray) -> None:
    """A picture, covered as much as each cell is attended to; the rest stays as it is."""
    height, width = image.shape[:2]
    scaled = attention / max(float(attention.max()), 1e-12)
    for pixels in (image, transparent(scaled, (height, width), 0.8)):
        axis.imshow(pixels, extent=(0, width, height, 0))
    axis.set_axis_off()


def _outline(axis: plt.Axes, cells: np.ndarray) -> None:
    """A line around the cells that are True, on an axis that shows a picture."""
    width, height = axis.images[0].get_extent()[1], axis.images[0].get_extent()[2]
    dx, dy = width / cells.shape[1], height / cells.shape[0]
    rimmed = np.pad(cells, 1)
    lines = [
        ((c * dx, (c + 1) * dx), (r * dy, r * dy))
        for r, c in np.argwhere(rimmed[:-1, 1:-1] != rimmed[1:, 1:-1])
    ]
    lines += [
        ((c * dx, c * dx), (r * dy, (r + 1) * dy))
        for r, c in np.argwhere(rimmed[1:-1, :-1] != rimmed[1:-1, 1:])
    ]
    for colour, line in (("black", 2.4), ("white", 1.2)):
        for x, y in lines:
            axis.plot(x, y, color=colour, linewidth=line, solid_capstyle="round", clip_on=False)


def _score_bars(axis: plt.Axes, scores: Mapping[str, float], true: str) -> None:
    """A bar a class, its name and probability on it; the true class is blue and says so."""
    for place, (name, probability) in enumerate(scores.items()):
        is_true = name == true
        axis.barh(place, probability, color=PALETTE[0 if is_true else 1], alpha=0.5, height=0.85)
        words = f"{probability:.2f} {label(name, 60)}{' (true)' if is_true else ''}"
        axis.text(0.02, place, words, fontsize=7, va="center", clip_on=True)
    axis.set(xlim=(0, 1), ylim=(max(len(scores), 4) - 0.4, -0.6))


def strength_frame(
    image: np.ndarray,
    attention: np.ndarray,
    strength: float,
    scores: Mapping[str, float],
    true: str,
) -> Figure:
    """One picture of an animation: the attention at one strength of an edit, and two bars below.

    Args:
        image: uint8 `[H, W, 3]`. attention: `[gh, gw]`. true: name of the picture's class.
        scores: probability of the prediction, and of the true class where that is another.
    """
    figure = plt.figure(figsize=(3.6, 4.8), dpi=100)
    _lay_over(figure.add_axes((0.03, 0.22, 0.94, 0.7)), image, attention)
    right = next(iter(scores)) == true
    figure.text(0.03, 0.95, f"strength {strength:.2f}", fontsize=10)
    figure.text(0.97, 0.95, "✓ right" if right else "✗ wrong", fontsize=10, ha="right")
    bars = figure.add_axes((0.03, 0.02, 0.94, 0.18))
    bars.set_axis_off()
    # The true class keeps its place, so that its bar is seen to grow.
    others = {name: share for name, share in scores.items() if name != true}
    _score_bars(bars, {true: scores[true], **others}, true)
    bars.set_ylim(1.5, -0.5)
    return figure


def editor_state(
    image: np.ndarray, edited: np.ndarray, summary: str, scores: Sequence[Mapping[str, object]]
) -> Figure:
    """The attention editor where no kernel runs: the picture, the same under the map, the scores.

    Args:
        image, edited: uint8 `[H, W, 3]`, of any sizes. summary: one or two sentences.
        scores: rows with class, before, after (probabilities) and is_true, the likeliest first.
    """
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.5, 3.4), layout="constrained", width_ratios=(1, 1, 1.1)
    )
    for axis, pixels, title in ((left, image, "the picture"), (middle, edited, "asked for")):
        axis.imshow(pixels)
        axis.set_axis_off()
        name_axis(axis, title, 10)
    places = np.arange(len(scores))
    for shift, when, colour in ((-0.2, "before", PALETTE[1]), (0.2, "after", PALETTE[0])):
        right.barh(places + shift, [row[when] for row in scores], 0.38, color=colour, label=when)
    names = [label(f"{row['class']}{' (true)' * bool(row['is_true'])}") for row in scores]
    right.set_yticks(places, names, fontsize=9)
    right.invert_yaxis()
    right.legend(fontsize=8, loc="lower right")
    name_axis(right, "class scores", 10, xlim=(0, 1), xlabel="probability")
    figure.suptitle(label(summary, 110), fontsize=11)
    return figure

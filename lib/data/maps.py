"""From where people looked, or what they marked, to maps on a patch grid.

`human_map` puts any source on any grid: fixations, part locations, bounding boxes, and maps that
somebody rendered or painted (.png, .jpg, .npy). A map is an array [gh, gw] over the patches of the
model, cell (0, 0) top left; with it goes a bool array of the cells whose value is known. The grid
is always an argument: 14 x 14 is only one of many.

A fixation is a row (x, y, duration): a position in pixels of the picture, measured from its top
left corner, and milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lib.data.pictures import UNUSABLE, PictureError, read_brightness
from lib.edit import EPS

Weight = Literal["count", "duration"]
Unit = Literal["patch", "pixel"]


@dataclass(frozen=True)
class Recording:
    """What one reader (or one run of the collection) looked at in one picture."""

    image_id: int  # id of the picture in the data set
    width: int  # of the picture, pixels
    height: int  # of the picture, pixels
    fixations: np.ndarray  # float32 [F, 3]: x, y in pixels of the picture, duration in ms

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the fixations are measured in."""
        return self.height, self.width


@dataclass(frozen=True)
class Box:
    """A bounding box as a human map: look anywhere inside it."""

    corners: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture
    width: int  # of the picture, pixels
    height: int  # of the picture, pixels


@dataclass(frozen=True)
class Painted:
    """What a person painted in the editor: wanted attention on some patches, nothing on others."""

    values: np.ndarray  # float32 [gh, gw] in [0, 1], of any grid that shows the whole picture
    known: np.ndarray  # bool [gh, gw]; True where painted


# What a person gave for one picture. Part locations are a Recording whose durations are all 1.
HumanSource = tuple[Recording, ...] | Box | Painted | Path


class MapError(ValueError):
    """A map file cannot be read, or does not belong to its picture."""


def human_map(
    source: HumanSource | None,
    size: tuple[int, int] | None,
    grid: tuple[int, int],
    sigma: float = 1.0,
    unit: Unit = "patch",
    weight: Weight = "duration",
    fine: int = 1,
    shown: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put what a person gave for a picture on a grid.

    Args:
        source: recordings (of any number of readers; their fixations are pooled), a Box, what was
            Painted, the path of a map file, or None.
        size: height and width of the picture in pixels; needed for a map file only.
        grid: (gh, gw), the patches of the model.
        sigma, unit: standard deviation of a fixation's Gaussian, in patches of the grid or in
            pixels of the picture (the same width on both axes there, so not on the grid when the
            picture is not square).
        weight: what a fixation weighs.
        fine: cells of the result per patch and axis.
        shown: height and width of the squeezed picture that the model sees.

    Returns:
        float32 [fine * gh, fine * gw] in [0, 1], and bool of that shape: which cells are known.
        Nothing is known of a picture without a source, without a fixation inside, or with a map of
        zeros only. Maps of fixations and of files are scaled so that their mean over a patch has
        the maximum 1; a box is the share of the cell that it covers; painted values are taken as
        they are, zeros too, where at least half of the cell was painted.

    A map file is a picture, read as brightness and turned by its own EXIF (8 or 16 bit, or floats
    in [0, 1]), or an .npy array [h, w] of bool, uint8, uint16 or float in [0, 1]. It shows the
    whole picture: in the picture's proportions, or squeezed to exactly `shown` or `grid`. NaN and
    transparent pixels are not known.

    Raises:
        MapError: names the file. OSError: where it is missing.
    """
    cells = (fine * grid[0], fine * grid[1])
    unknown = torch.zeros(cells), torch.zeros(cells, dtype=torch.bool)
    known = ~unknown[1]
    if not source:
        return unknown
    if isinstance(source, Painted):
        values, painted = (torch.from_numpy(np.array(a)) for a in (source.values, source.known))
        return to_grid(values, painted, cells)
    if isinstance(source, Box):
        found = torch.from_numpy(box_map(source.corners, (source.height, source.width), cells))
    elif isinstance(source, Path):
        dense, known = read_map(source)
        _refuse_other_geometry(source, dense.shape, size, (shown, grid))
        found, known = to_grid(dense, known, cells)
    else:
        frame = source[0].size
        looks = np.concatenate([recording.fixations for recording in source])
        # On both axes in cells; a pixel is another share of the height than of the width.
        per_cell = fine if unit == "patch" else np.divide(cells, frame)
        found = torch.from_numpy(fixation_map(looks, frame, cells, sigma * per_cell, weight))
    if found.max() <= 0:
        return unknown
    if isinstance(source, Path) or (fine > 1 and not isinstance(source, Box)):
        # Without this, training on fine maps would ask for some 15 % less attention than
        # evaluation shows: the mean over a patch is below the fine peak.
        found = found / to_grid(found, known, grid)[0].max().clamp(min=1e-6)
    return found, known


def read_map(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A map file as float32 [h, w] in [0, 1], and bool [h, w]: where it is known.

    See `human_map` for what is read. Raises MapError with file, value and remedy, and
    FileNotFoundError where there is no file.
    """
    try:
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                values, opaque = np.lib.format.read_array(file), True
        else:
            values, opaque = read_brightness(path)
    except FileNotFoundError:
        raise
    except PictureError as error:
        raise MapError(str(error).replace(UNUSABLE, "cannot be read as a map", 1)) from error
    except Exception as error:  # NumPy's parsers raise anything, too
        raise MapError(f"{path} cannot be read as a map: {error}; make it again.") from error
    if values.ndim != 2 or not values.size:
        raise MapError(f"{path} has the shape {values.shape}; a map is one array [height, width].")
    known = np.ones(values.shape, dtype=bool)
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # of any byte order
        values = values / np.float32(np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f":
        known = ~np.isnan(values)
        values = np.where(known, values, 0)
        if values.min() < 0 or values.max() > 1:
            raise MapError(
                f"{path} has values from {values.min():g} to {values.max():g}; "
                "scale them to the range from 0 to 1."
            )
    elif values.dtype != bool:
        raise MapError(
            f"{path} holds {values.dtype}; save bool, uint8, uint16, or float from 0 to 1."
        )
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(known & opaque)


def _refuse_other_geometry(
    path: Path,
    found: tuple[int, int],
    size: tuple[int, int],
    squeezed: tuple[tuple[int, int] | None, ...],
) -> None:
    """A map that was cut, or that belongs to another picture, would point at the wrong place."""
    if tuple(found) in squeezed:
        return
    # Proportions to the rounding of one pixel of the smaller of the two.
    slack = max(1, found[0] / size[0], found[1] / size[1])
    by_width = abs(found[1] * size[0] / size[1] - found[0]) <= slack
    by_height = abs(found[0] * size[1] / size[0] - found[1]) <= slack
    if not (by_width or by_height):
        raise MapError(
            f"{path} is {found[1]} x {found[0]}, but its picture is {size[1]} x {size[0]} pixels; "
            "give a map of the whole picture in the same proportions."
        )


def fixation_counts(
    fixations: np.ndarray,
    size: tuple[int, int],
    grid: tuple[int, int],
    weight: Weight = "count",
) -> np.ndarray:
    """Sum the fixations that fall into each cell.

    `fixations` is [F, 3], `size` (height, width) of the frame they are measured in, `grid`
    (gh, gw). Returns float32 [gh, gw]: a number of fixations, or milliseconds with
    weight="duration". Fixations outside the frame are dropped; the right and the bottom border
    are outside.
    """
    position, weights = _in_frame(fixations, size, grid, weight)
    cell = np.floor(position).astype(np.int64)
    flat = cell[:, 0] * grid[1] + cell[:, 1]
    counts = np.bincount(flat, weights=weights, minlength=grid[0] * grid[1])
    return counts.reshape(grid).astype(np.float32)


def fixation_map(
    fixations: np.ndarray,
    size: tuple[int, int],
    grid: tuple[int, int],
    sigma: float | np.ndarray = 1.0,
    weight: Weight = "duration",
    truncate: float = 3.0,
) -> np.ndarray:
    """Blur the fixations to a human attention map.

    A sum of Gaussians around the exact fixations, evaluated at the cell centres, divided by its
    maximum. `sigma` is their standard deviation in grid cells, one number or (rows, columns); a
    cell farther than `truncate` standard deviations from every fixation is exactly 0, because some
    losses need a region where nobody looked. A fixation weighs its duration or 1.

    `fixations` is [F, 3], `size` (height, width) of the frame they are measured in, `grid`
    (gh, gw). Returns float32 [gh, gw] in [0, 1] with maximum 1, or zeros when no fixation with a
    weight lies in the frame (those outside are dropped). Raises ValueError when `truncate * sigma`
    is so small that a fixation could fall between the cell centres: below 0.71 cells.
    """
    sigmas = np.broadcast_to(np.asarray(sigma, dtype=np.float64), 2)
    if not (sigmas > 0).all() or np.hypot(*(0.5 / sigmas)) > truncate + 1e-9:
        shown = " x ".join(f"{value:g}" for value in np.unique(sigmas))
        raise ValueError(
            f"sigma is {shown} cells and truncate {truncate:g}: a fixation on a cell's corner "
            "would vanish; use a larger sigma."
        )
    position, weights = _in_frame(fixations, size, grid, weight)
    # Only the window of cells around a fixation that its Gaussian can reach: the cost does not grow
    # with the grid, which the fine maps for training are large in. Distances are in sigmas.
    row, down = _window(position[:, 0], sigmas[0], truncate, grid[0])  # [F, K] both
    column, across = _window(position[:, 1], sigmas[1], truncate, grid[1])
    # Outer products over the windows, [F, K, L]
    distance = down[:, :, None] ** 2 + across[:, None, :] ** 2  # squared
    down, across = np.exp(-0.5 * down**2), np.exp(-0.5 * across**2)
    values = (weights[:, None] * down)[:, :, None] * across[:, None, :]
    keep = distance <= truncate**2 + 1e-9
    flat = row[:, :, None] * grid[1] + column[:, None, :]
    total = np.bincount(flat[keep], weights=values[keep], minlength=grid[0] * grid[1])
    peak = total.max()
    return (total / peak if peak > 0 else total).reshape(grid).astype(np.float32)


def _in_frame(
    fixations: np.ndarray, size: tuple[int, int], grid: tuple[int, int], weight: Weight
) -> tuple[np.ndarray, np.ndarray]:
    """Position (row, column) in cells [F, 2] and weight [F] of fixations in the frame, float64."""
    if weight not in ("count", "duration"):
        raise ValueError(f"weight is {weight!r}; use 'count' or 'duration'.")
    # float64: a position just below the border must not round up into a cell that does not exist
    fixations = np.asarray(fixations, dtype=np.float64).reshape(-1, 3)
    x, y, duration = fixations.T
    inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    position = np.stack([y * grid[0] / size[0], x * grid[1] / size[1]], axis=1)
    weights = duration if weight == "duration" else np.ones_like(duration)
    return position[inside], weights[inside]


def _window(
    position: np.ndarray, sigma: float, truncate: float, cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the cells around each position [F, K], and how many sigmas off their centres are.

    A cell that does not exist is infinitely far.
    """
    extent = min(np.ceil(truncate * sigma), cells)
    index = np.floor(position)[:, None] + np.arange(-extent, extent + 1)
    distance = (index + 0.5 - position[:, None]) / sigma
    return index.astype(np.int64), np.where((index >= 0) & (index < cells), distance, np.inf)


def box_map(
    box: np.ndarray | tuple[float, float, float, float],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> np.ndarray:
    """Share of each cell that a box covers.

    `box` is (x0, y0, x1, y1) in pixels of a frame of `size` (height, width). Returns float32
    [gh, gw] in [0, 1]; what lies outside the frame is cut, and a box of NaN (there is none)
    covers nothing. Raises ValueError when a corner pair is the wrong way round.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box {x0, y0, x1, y1} ends before it starts; give (x0, y0, x1, y1).")
    if np.isnan([x0, y0, x1, y1]).any():
        return np.zeros(grid, dtype=np.float32)
    rows = _covered(y0 * grid[0] / size[0], y1 * grid[0] / size[0], grid[0])
    columns = _covered(x0 * grid[1] / size[1], x1 * grid[1] / size[1], grid[1])
    return np.outer(rows, columns).astype(np.float32)


def _covered(start: float | np.ndarray, end: float | np.ndarray, cells: int) -> np.ndarray:
    """Share of each of `cells` unit intervals that lies between start and end, [..., cells]."""
    left = np.arange(cells)
    return np.clip(np.minimum(end, left + 1) - np.maximum(start, left), 0, 1)


def to_grid(
    dense: torch.Tensor, valid: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool a dense map onto a grid by the mean over the valid area of each cell.

    `dense` is float [H, W], `valid` [H, W] (bool, or 0 and 1); H and W need not be multiples of
    the grid: a pixel on the border of two cells counts for both by its share. Returns the map,
    float32 [gh, gw], and bool [gh, gw]: a cell is valid when at least half of its area is. Invalid
    cells hold 0, whatever the dense map holds there (NaN included).
    """
    known = valid.bool()
    values = torch.where(known, dense.float(), 0.0)
    rows = _overlap(dense.shape[0], grid[0])  # [gh, H]
    columns = _overlap(dense.shape[1], grid[1]).T  # [W, gw]
    share = rows @ known.float() @ columns  # valid share of each cell's area [gh, gw]
    enough = share >= 0.5 - 1e-5  # half, but for the rounding of the shares
    pooled = rows @ values @ columns / share.clamp(min=1e-5)
    return torch.where(enough, pooled, 0.0), enough


def painted_on(painted: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What was painted, `[gh, gw]`, NaN where nothing, on another grid of the same picture.

    A value v is read as v / (1 - v) times the average patch, and so is attention by area, of which
    a cell takes the mean. A cell is painted where at least half of its area was.
    """
    if painted.shape == tuple(grid):
        return painted
    known = torch.from_numpy(~np.isnan(painted))
    inside = torch.from_numpy(np.nan_to_num(painted)).double().clamp(EPS, 1 - EPS)
    odds, known = to_grid(inside / (1 - inside), known, grid)
    return torch.where(known, odds / (1 + odds), torch.nan).numpy()


@lru_cache(maxsize=64)
def _overlap(pixels: int, cells: int) -> torch.Tensor:
    """Share of each cell that each pixel of a line covers, float32 [cells, pixels], rows sum 1."""
    edges = np.linspace(0, pixels, cells + 1)[:, None]
    share = _covered(edges[:-1], edges[1:], pixels) * (cells / pixels)
    return torch.from_numpy(share.astype(np.float32))

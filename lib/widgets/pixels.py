"""Pictures as pixels and PNG files: a map over a picture, its colours, the line around cells.

Of cells as pixels, a pixel has the value of the cell in which its middle lies ("nearest").
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from lib.edit import EPS

PREVIEW_SIDE = 448  # pixels of the longer side of a saved preview
OPACITY = 0.55  # of the map over the picture

# Colours of matplotlib's viridis, evenly spaced; readers with any colour vision see their order.
VIRIDIS = (
    "440154 47186a 472c7b 424085 3a528b 32628d 2c728e 26818e 20908c "
    "1e9f88 28ae7f 3ebc73 5ec961 83d34b addc30 d7e219 fde724"
)


def _colour_table() -> np.ndarray:
    """uint8 [256, 3]: the colour of each value from 0 to 1."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()])
    position = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(position, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


COLOURS = _colour_table()


def coloured(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to colours, uint8 [..., 3]."""
    return COLOURS[np.rint(255 * np.asarray(values)).astype(int)]


def png(pixels: np.ndarray | Image.Image) -> bytes:
    """A PNG file of uint8 pixels [h, w, 3 or 4]."""
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """A PNG file as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def map_over_picture(image: np.ndarray, values: np.ndarray, outlined: np.ndarray) -> Image.Image:
    """The picture with a map over it, its longer side `PREVIEW_SIDE` pixels.

    Args:
        image: uint8 [H, W, 3]. values: [gh, gw] in [0, 1]. outlined: bool [gh, gw], the cells
            around which a line is drawn.
    """
    height, width = image.shape[:2]
    scale = PREVIEW_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    heat = Image.fromarray(coloured(values)).resize(size, Image.Resampling.NEAREST)
    blend = Image.blend(picture, heat, OPACITY)
    for colour, line in (("black", 4), ("white", 2)):
        draw_outline(blend, outlined, colour, line)
    return blend


def draw_outline(picture: Image.Image, cells: np.ndarray, colour: str, width: int) -> None:
    """Draws the border between the cells that are True and all else."""
    draw = ImageDraw.Draw(picture)
    dx, dy = (side / count for side, count in zip(picture.size, cells.shape[::-1], strict=True))
    rimmed = np.pad(cells, 1)
    for r, c in np.argwhere(rimmed[:-1, 1:-1] != rimmed[1:, 1:-1]):
        draw.line([(c * dx, r * dy), ((c + 1) * dx, r * dy)], fill=colour, width=width)
    for r, c in np.argwhere(rimmed[1:-1, :-1] != rimmed[1:-1, 1:]):
        draw.line([(c * dx, r * dy), (c * dx, (r + 1) * dy)], fill=colour, width=width)


def heat_url(values: np.ndarray) -> str:
    """A map scaled to its own maximum, one pixel a cell, to lie over a picture."""
    opacity = np.full((*values.shape, 1), round(255 * 0.75), dtype=np.uint8)
    heat = coloured(values / max(float(values.max()), EPS))
    return data_url(png(np.concatenate([heat, opacity], axis=-1)))


# ------------------------------------------------------------------------------ cells and pixels


def _cell_of(pixels: int, cells: int) -> np.ndarray:
    """The cell of each of `pixels` in a line: int64 [pixels]."""
    return (2 * np.arange(pixels) + 1) * cells // (2 * pixels)


def to_pixels(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of cells `[gh, gw]` at the size (height, width) of a picture; "nearest"."""
    rows, columns = (_cell_of(*line) for line in zip(size, cells.shape, strict=True))
    return cells[rows[:, None], columns]


def run_lengths(pixels: np.ndarray) -> dict[str, list[int]]:
    """A mask, bool `[h, w]`, as COCO's uncompressed RLE: size [h, w], counts.

    The counts are lengths of runs, column by column from the top left, of False and True in turn;
    the first is of False, and may be 0.
    """
    flat = pixels.ravel(order="F").astype(np.int8)
    turns = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(turns, prepend=0, append=flat.size)
    return {"size": [int(side) for side in pixels.shape], "counts": counts.tolist()}


def outlines(cells: np.ndarray, size: tuple[int, int]) -> list[list[float]]:
    """The True cells `[gh, gw]` as COCO's polygons, x0, y0, x1, y1, ... in pixels of a picture.

    One polygon for cells that share sides. COCO's polygons have no holes, so what goes round a
    hole is cut at the hole's upper edge. Together they cover the pixels of `to_pixels` exactly.

    Args:
        size: (height, width) of the picture.
    """
    lines = zip(size, cells.shape, strict=True)
    down, across = (
        np.searchsorted(_cell_of(pixels, count), range(count + 1)) for pixels, count in lines
    )
    return [
        [float(edge) for x, y in corners for edge in (across[x], down[y])]
        for corners in _polygons({(int(r), int(c)) for r, c in np.argwhere(cells)})
    ]


def _polygons(cells: set[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Corners (x, y) of cells, of each piece in turn."""
    while cells:
        piece, found = set(), {min(cells)}
        while found:
            piece |= found
            around = {
                (r + y, c + x) for r, c in found for y, x in ((0, 1), (1, 0), (0, -1), (-1, 0))
            }
            found = around & cells - piece
        cells = cells - piece
        outer, *holes = loops_around(piece)
        if not holes:
            yield outer
        else:
            cut = min(y for _, y in holes[0])
            yield from _polygons({cell for cell in piece if cell[0] < cut})
            yield from _polygons({cell for cell in piece if cell[0] >= cut})


def loops_around(cells: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The borders of cells (row, column), each as its corners (x, y), clockwise, from the top.

    Those of holes go the other way. Of cells that share sides, the outer border comes first.
    """
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = {}  # from corner to corner, cells right
    for r, c in sorted(cells):
        sides = (
            ((r - 1, c), (c, r), (c + 1, r)),
            ((r, c + 1), (c + 1, r), (c + 1, r + 1)),
            ((r + 1, c), (c + 1, r + 1), (c, r + 1)),
            ((r, c - 1), (c, r + 1), (c, r)),
        )
        for beside, start, end in sides:
            if beside not in cells:
                ahead.setdefault(start, []).append(end)
    loops = []
    while ahead:
        # The topmost corner that is left; no border meets itself, or another one, there.
        at = start = min(ahead, key=lambda corner: corner[::-1])
        loop, way = [], (0, 0)
        while True:
            ends = ahead[at]
            right = (at[0] - way[1], at[1] + way[0])  # two cells that meet in a corner stay two
            end = right if right in ends else ends[0]
            ends.remove(end)
            if not ends:
                del ahead[at]
            turned = (end[0] - at[0], end[1] - at[1])
            if turned != way:
                loop.append(at)
            at, way = end, turned
            if at == start:
                break
        loops.append(loop)
    return loops

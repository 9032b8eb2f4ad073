"""Pictures as pixels and PNG files: a map over a picture, its colours, the line around cells."""

from __future__ import annotations

import base64
import io

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

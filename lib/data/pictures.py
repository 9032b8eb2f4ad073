"""How a file becomes pixels, and how large it is: the only file that opens pictures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DATA_REMEDY = "set DATA_DIR to the folder that holds the data, or fill datasets/ (see its README)"


def picture_size(path: Path) -> tuple[int, int] | None:
    """Height and width of what `read_picture` gives, from the header; None if unreadable."""
    try:
        return _header_size(path)
    except (OSError, SyntaxError):
        return None


@lru_cache(maxsize=100_000)  # errors are not kept: a file may be mended
def _header_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as header:
        turned = header.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
        return (header.width, header.height) if turned else (header.height, header.width)


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says; OSError that names a missing or broken file."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises both on broken files
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.") from error
        raise OSError(f"{path} cannot be decoded; restore it from where it came from.") from error


def read_brightness(path: Path) -> tuple[np.ndarray, np.ndarray | bool]:
    """The brightness of a picture as it is stored, uint8 or uint16 [h, w], and where it is opaque.

    Raises what Pillow raises on missing and broken files: OSError, SyntaxError, ValueError.
    """
    with Image.open(path) as picture:
        if picture.mode.startswith("I"):  # 16 bit; older versions of Pillow say 32
            return np.asarray(picture).astype(np.uint16), True
        if picture.has_transparency_data:
            grey, alpha = picture.convert("RGBA").convert("LA").split()
            return np.asarray(grey), np.asarray(alpha) >= 128
        return np.asarray(picture.convert("L")), True


def is_in_colours(path: Path) -> bool:
    """Whether the channels of a picture differ by more than JPEG does to grey ones."""
    with Image.open(path) as picture:
        if picture.mode not in ("RGB", "RGBA", "P"):
            return False
        channels = np.asarray(picture.convert("RGB")).astype(int)
    return int(np.ptp(channels, axis=2).max()) > 24

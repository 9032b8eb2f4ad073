"""How a file becomes pixels, and how large it is."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from lib.data.records import DATA_REMEDY


def picture_size(path: Path) -> tuple[int, int] | None:
    """Height and width from the header of a file, turned as its EXIF says; None if unreadable."""
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

"""What a data set on disk is read into: a `Listing` of its pictures, then one `Record` a picture.

And how the text files that data sets are published with are read, line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from lib.data.maps import Recording, Source
from lib.data.splits import Row, Split

Part = Literal["train", "val", "test"]
T = TypeVar("T")

DATA_REMEDY = "set DATA_DIR to the folder that holds the data, or fill datasets/ (see its README)"
MAP_EXTENSIONS = (".npy", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Record:
    """One picture before any tensor is made of it."""

    image_id: int
    label: int
    image: Path | np.ndarray  # a file, or uint8 [h, w, 3]
    human: Source | None = None  # recordings: one per reader with a fixation, one size for all
    boxes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # prefix -> x0, y0, x1, y1
    size: tuple[int, int] | None = None  # height, width of the picture; None: cannot be read
    columns: dict[str, int] = field(default_factory=dict)  # further columns of the table
    parts: np.ndarray | None = None  # float32 [K, 3]: x, y in pixels, 1; None: parts are not known

    @property
    def gaze(self) -> tuple[Recording, ...]:
        """The recordings; () where the human map is no gaze."""
        return self.human if isinstance(self.human, tuple) else ()


@dataclass(frozen=True)
class Listing:
    """All pictures of a data set on disk."""

    home: Path  # folder of the data set
    images: Path  # folder that the paths of the rows start from
    rows: tuple[Row, ...]
    label_list: tuple[str, ...]  # names of the class folders, by label
    published: Split | None  # None: the data set comes without a split
    ids: dict[str, int]  # path of a row -> image id


def as_listing(
    home: Path, images: Path, rows: Sequence[Row], names: tuple[str, ...], split: Split | None
) -> Listing:
    """A listing whose image ids count the pictures from 1 in the order of their paths."""
    ids = {path: i for i, path in enumerate(sorted(row.path for row in rows), start=1)}
    return Listing(home, images, tuple(rows), names, split, ids)


def read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.")
    return path.read_text(encoding="utf-8", errors="replace")


def id_lines(path: Path, kind: Callable[[str], T], columns: int) -> list[tuple[int, tuple[T, ...]]]:
    """Lines `id value...` of an official file, in its order."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            if len(words) != columns + 1:
                raise ValueError
            found.append((int(words[0]), tuple(kind(word) for word in words[1:])))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r} where an id and {columns} value(s) are "
                "expected; restore the file from the published archive."
            ) from None
    return found


def id_table(path: Path, kind: Callable[[str], T], columns: int = 1) -> dict[int, tuple[T, ...]]:
    """Lines by id; an id that comes twice is refused."""
    lines = id_lines(path, kind, columns)
    table = dict(lines)
    if len(table) < len(lines):
        seen: set[int] = set()
        twice = next(image for image, _ in lines if image in seen or seen.add(image))
        raise ValueError(
            f"{path} has the id {twice} twice; restore the file from the published archive."
        )
    return table


def look_up(table: dict[int, T], key: int, name: str) -> T:
    try:
        return table[key]
    except KeyError:
        raise ValueError(
            f"{name} has no line for id {key}; restore the file from the published archive."
        ) from None

"""CUB-200-2011 and CUB-200 of 2010: the pictures, boxes and parts, and people's gaze (CUB-GHA).

CUB-GHA is Rong et al., "Human Attention in Fine-grained Classification", BMVC 2021,
https://github.com/yaorong0921/CUB-GHA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from lib.config import DataConfig
from lib.data.maps import Box, HumanSource, Recording
from lib.data.pictures import DATA_REMEDY, picture_size
from lib.data.sources import (
    Corners,
    DataSet,
    Listing,
    as_listing,
    list_by_folders,
    part_folders,
    pictures_in,
)
from lib.data.splits import Row, Split, SplitError, by_flag
from lib.files import CUB2010_HOMES, one_form, visible

BUBBLES = "train_bubbles"  # the original experiment's training pictures that have a map
PART_LOCATIONS = Path("parts", "part_locs.txt")  # of CUB-200-2011, below its home
RESTORE = "restore the file from the published archive"

# Values before the first fixation. A fixation adds three, so a line's length modulo 3 tells which.
SHORT_HEADER = 3  # image_id, width, height: fixations in pixels of the original picture
LONG_HEADER = 7  # ... and shown_width, shown_height, shown_x, shown_y: fixations in screen pixels


# --------------------------------------------------------------------------------------- pictures


def list_cub2011(root: Path) -> Listing:
    """CUB-200-2011 (Wah et al., 2011), whole or cut to some classes; labels as in classes.txt."""
    home = root / "CUB_200_2011"
    files = IdTable(home / "images.txt", str)
    classes = IdTable(home / "classes.txt", str)
    class_of = IdTable(home / "image_class_labels.txt", int)
    official = IdTable(home / "train_test_split.txt", int)
    names = tuple(classes.values())
    on_disk = as_on_disk(home / "images")
    rows = []
    for image, path in files.items():
        name, folder = classes[class_of[image]], str(PurePosixPath(path).parent)
        if one_form(name) != one_form(folder):  # ids of one list that are not those of another
            raise ValueError(
                f"{files.path} has image {image} in the folder {folder!r}, but the other lists "
                f"give it to the class {name!r}; restore the lists from the published archive."
            )
        if official[image] not in (0, 1):
            raise ValueError(
                f"{official.path} has {official[image]} for id {image} where 1 (train) or 0 (test) "
                f"is expected; {RESTORE}."
            )
        rows.append(Row(on_disk(path), names.index(name), str(image)))
    split = _published(home, rows, names, [official[image] == 1 for image in files])
    ids = {row.path: image for row, image in zip(rows, files, strict=True)}
    return Listing(home, home / "images", tuple(rows), names, split, ids)


def list_cub2010(root: Path) -> Listing:
    """CUB-200 of 2010 (Welinder et al.): as published (images, lists), or sorted into folders."""
    for home in (root / name for name in CUB2010_HOMES):
        if (home / "lists").is_dir():
            return _list_by_lists(home)
        if home.is_dir() and part_folders(home):
            return _with_bubbles(list_by_folders(home))
    raise FileNotFoundError(
        f"{root} holds neither lists/ and images/ nor train/ and val/ of CUB-200-2010; "
        f"{DATA_REMEDY}."
    )


def _with_bubbles(listing: Listing) -> Listing:
    """Training takes pictures of train_bubbles/<class>/ too that neither train nor val has."""
    known = {one_form(row.path.partition("/")[2]) for row in listing.rows}
    more = listing.home / BUBBLES
    labels = {one_form(name): label for label, name in enumerate(listing.label_list)}
    rows = []
    for folder in visible(more) if more.is_dir() else ():
        name, paths = one_form(folder.name), pictures_in(folder)
        if paths and name not in labels:
            raise ValueError(f"{folder} is a class that train does not have; move it away.")
        for path in paths:
            if f"{name}/{one_form(path.name)}" not in known:
                rows.append(Row(path.relative_to(listing.home).as_posix(), labels[name], path.stem))
    split = listing.published
    split = split and replace(split, train=(*split.train, *rows))
    rows = (*listing.rows, *rows)
    return as_listing(listing.home, listing.images, rows, listing.label_list, split)


def _list_by_lists(home: Path) -> Listing:
    on_disk = as_on_disk(home / "images")
    train, test = (
        [PurePosixPath(on_disk(line)) for line in _paths_in(home / "lists" / name)]
        for name in ("train.txt", "test.txt")
    )
    names = tuple(sorted({path.parent.name for path in (*train, *test)}))
    rows = [Row(str(p), names.index(p.parent.name), p.stem) for p in (*train, *test)]
    is_train = [True] * len(train) + [False] * len(test)
    split = _published(home, rows, names, is_train)
    return as_listing(home, home / "images", rows, names, split)


def _paths_in(path: Path) -> Iterator[str]:
    """The lines of a list of pictures, each `<class folder>/<picture>`."""
    for number, line in enumerate(map(str.strip, text_lines(path)), start=1):
        folder, *names = line.split("/")
        if line and (len(names) != 1 or folder in ("", "..") or "\\" in line):
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r} where <class folder>/<picture> is "
                f"expected; {RESTORE}."
            )
        if line:
            yield line


def _published(home: Path, rows: list[Row], names: Sequence[str], is_train: list[bool]) -> Split:
    try:
        return by_flag(rows, names, is_train)
    except SplitError as error:
        raise SplitError(f"the lists in {home} cannot be used: {error}") from None


# -------------------------------------------------------------------------------- official lists


def text_lines(path: Path) -> list[str]:
    """The lines of a list: UTF-8 or UTF-16, with or without a byte order mark, any line ends.

    Raises FileNotFoundError, and ValueError for another encoding.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.")
    content = path.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start)
        line = content.split(b"\n")[number][:60].decode("ascii", "replace").strip()
        raise ValueError(
            f"{path}, line {number + 1} has {line!r}, which is no UTF-8; save the list as UTF-8, "
            f"or {RESTORE}."
        ) from None
    # Not splitlines: it would break names that hold a rare separator.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def as_on_disk(images: Path) -> Callable[[str], str]:
    """A function from a path of a list to the same path in the Unicode form that the disk has."""

    @cache
    def names(folder: Path) -> dict[str, str]:
        return {one_form(path.name): path.name for path in visible(folder)}

    def found(path: str) -> str:
        if path.isascii() or (images / path).exists():
            return path
        there = images
        for part in PurePosixPath(path).parts:
            there /= names(there).get(one_form(part), part) if there.is_dir() else part
        return there.relative_to(images).as_posix()

    return found


def id_lines(path: Path, kind: type, columns: int) -> list[tuple[int, tuple]]:
    """Lines `id value...` of an official file, in its order; values of the type `kind`."""
    found = []
    for number, line in enumerate(text_lines(path), start=1):
        words = line.split(maxsplit=columns)  # a name may hold spaces
        if not words:
            continue
        try:
            if len(words) != columns + 1:
                raise ValueError
            found.append((int(words[0]), tuple(kind(word.strip()) for word in words[1:])))
        except ValueError:
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r} where an id and {columns} value(s) are "
                f"expected; {RESTORE}."
            ) from None
    return found


class IdTable(dict):
    """An official file by id: a value, or a tuple of several; an id without a line is refused."""

    def __init__(self, path: Path, kind: type, columns: int = 1) -> None:
        self.path = path
        for key, values in id_lines(path, kind, columns):
            if key in self:
                raise ValueError(f"{path} has the id {key} twice; {RESTORE}.")
            self[key] = values[0] if columns == 1 else values

    def __missing__(self, key: int) -> None:
        raise ValueError(f"{self.path} has no line for id {key}; {RESTORE}.")


# -------------------------------------------------------------------------------- boxes and parts


BOXES = "bounding_boxes.txt"  # of CUB-200-2011, in its home


def known_boxes(listing: Listing) -> Callable[[Row], Corners] | None:
    """`box_corners`; None where the list is not there: they are measured on, if known."""
    return box_corners(listing) if (listing.home / BOXES).is_file() else None


def box_corners(listing: Listing) -> Callable[[Row], Corners]:
    boxes = IdTable(listing.home / BOXES, float, columns=4)

    def corners(row: Row) -> Corners:
        x, y, w, h = boxes[listing.ids[row.path]]
        if not (w >= 0 and h >= 0 and math.isfinite(x + y + w + h)):
            raise ValueError(
                f"{boxes.path} gives id {listing.ids[row.path]} the box {x:g} {y:g} {w:g} {h:g} "
                f"where x, y, width and height are expected; {RESTORE}."
            )
        return x, y, x + w, y + h

    return corners


def as_boxes(
    listing: Listing, corners: Callable[[Row], Corners | None]
) -> Callable[[Row], Box | None]:
    """Bounding boxes as human maps."""

    def source(row: Row) -> Box | None:
        size, box = picture_size(listing.images / row.path), corners(row)
        return None if size is None or box is None else Box(box, size[1], size[0])

    return source


def visible_parts(listing: Listing) -> Callable[[Row], np.ndarray | None]:
    """Of the 15 parts of a bird, see `Record.parts`; none where the file is not there."""
    path = listing.home / PART_LOCATIONS
    parts = _parts_in(path, path.stat().st_mtime_ns) if path.is_file() else {}
    return lambda row: parts.get(listing.ids[row.path])


@lru_cache(maxsize=2)  # 177,000 lines that every split of every run would read again
def _parts_in(path: Path, changed: int) -> dict[int, np.ndarray]:
    """The parts of a file; `changed`, its time, makes a changed file another one."""
    parts: dict[int, list[tuple[float, float, float]]] = {}
    for image, (_, x, y, is_visible) in id_lines(path, float, columns=4):
        if is_visible:
            parts.setdefault(image, []).append((x, y, 1.0))
    return {image: np.array(places, dtype=np.float32) for image, places in parts.items()}


def parts_as_looks(config: DataConfig, listing: Listing) -> Callable[[Row], tuple[Recording, ...]]:
    """The visible parts as looks of equal length."""
    if not (listing.home / PART_LOCATIONS).is_file():
        raise FileNotFoundError(f"{listing.home / PART_LOCATIONS} is missing; {DATA_REMEDY}.")
    parts = visible_parts(listing)

    def source(row: Row) -> tuple[Recording, ...]:
        size, places = picture_size(listing.images / row.path), parts(row)
        if size is None or places is None:
            return ()
        return (Recording(listing.ids[row.path], size[1], size[0], places),)

    return source


def box_corners_2010(listing: Listing) -> Callable[[Row], Corners | None]:
    """annotations-mat/<class>/<picture>.mat of the published set: bbox.left, top, right, bottom."""
    from scipy.io import loadmat  # takes long to import

    boxes = listing.home / "annotations-mat"
    on_disk = as_on_disk(boxes)

    def corners(row: Row) -> Corners | None:
        path = boxes / on_disk(str(PurePosixPath(row.path).with_suffix(".mat")))
        if not path.is_file():
            return None
        try:
            box = loadmat(path, simplify_cells=True)["bbox"]
            return tuple(float(box[side]) for side in ("left", "top", "right", "bottom"))
        except Exception as error:  # of scipy or zlib: whatever their parsers come upon
            raise ValueError(f"{path} holds no bbox; restore it from the archive.") from error

    return corners


# ------------------------------------------------------------------------------------------- gaze


def gaze_of(config: DataConfig, listing: Listing) -> Callable[[Row], HumanSource | None]:
    paths = gaze_files(Path(config.root) / "CUB_GHA", config.gaze_runs)
    gaze = _read_gaze(tuple((path, path.stat().st_mtime_ns) for path in paths))
    return lambda row: gaze.get(listing.ids[row.path])


def gaze_files(folder: Path, runs: Literal["all"] | tuple[int, ...]) -> list[Path]:
    """The gaze files of CUB-GHA: data_5runs/Fixation_run<n>.txt, or Fixation.txt with all runs."""
    home, found = folder / "data_5runs", {}
    for path in home.glob("Fixation_run*.txt"):
        number = path.stem.removeprefix("Fixation_run")
        if number.isdigit():
            found[int(number)] = path
    if runs == "all" and not found and (folder / "Fixation.txt").is_file():
        return [folder / "Fixation.txt"]
    if not found:
        raise FileNotFoundError(f"{home}/Fixation_run*.txt is missing; {DATA_REMEDY}.")
    wanted = sorted(found if runs == "all" else set(runs))
    for run in wanted:
        if run not in found:
            there = ", ".join(map(str, sorted(found)))
            name = f"{home}/Fixation_run{run}.txt"
            raise FileNotFoundError(f"{name} is missing; there are runs {there}.")
    return [found[run] for run in wanted]


@lru_cache(maxsize=4)
def _read_gaze(files: tuple[tuple[Path, int], ...]) -> dict[int, tuple[Recording, ...]]:
    """Recordings with at least one fixation of all files, by image id.

    Read once a process for every state of the files (path, time): each run of a comparison asks.
    """
    gaze: dict[int, tuple[Recording, ...]] = {}
    for path, _ in tqdm(files, desc="gaze files", delay=1.0, leave=False):
        for image, look in read_fixations(path).items():
            if not len(look.fixations):
                continue
            known = gaze.get(image, ())
            if known and known[0].size != look.size:
                raise ValueError(
                    f"{path} gives image {image} the size {look.width} x {look.height}, another "
                    f"run {known[0].width} x {known[0].height}; restore the gaze files."
                )
            gaze[image] = (*known, look)
    return gaze


def read_fixations(path: str | Path) -> dict[int, Recording]:
    """Read one gaze file of CUB-GHA, a line a picture, and return its recordings by image id.

    Two layouts are read, both in whole or decimal numbers without a title line:
    `image_id,width,height,(x,y,ms)*` (the files in data_5runs, original pixels) and
    `image_id,width,height,shown_width,shown_height,shown_x,shown_y,(x,y,ms)*` (the layout that the
    data set's README gives for Fixation.txt, in pixels of the screen that showed the picture
    scaled and shifted; converted here to original pixels). All lines of a file have one layout.
    Lines of one image id are joined: run 1 has up to four lines for some pictures.

    Raises ValueError with file, line number, value and remedy for a line that is neither, and
    FileNotFoundError where there is no file.
    """
    recordings: dict[int, Recording] = {}
    first = header = 0  # number of the first line that is not blank, and length of its header
    for number, line in enumerate(text_lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            values = _numbers_in(line)
            if not header:
                header, first = _header_length(values), number
            if len(values) < header or (len(values) - header) % 3:
                raise ValueError(
                    f"has {len(values)} values, but {header} and 3 more for each fixation are "
                    f"expected as in line {first}"
                )
            recording = _recording(values, header)
            known = recordings.get(recording.image_id)
            recordings[recording.image_id] = _join(known, recording) if known else recording
        except ValueError as error:
            remedy = "restore the line from the published file"
            raise ValueError(f"{path}, line {number} {error}; {remedy}.") from None
    return recordings


def _numbers_in(line: str) -> np.ndarray:
    """The comma-separated numbers of a line, float64."""
    values = []
    for text in line.split(","):
        try:
            values.append(float(text))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise ValueError(f"has {text.strip()[:40]!r} where a number is expected")
    return np.array(values)


def _header_length(values: np.ndarray) -> int:
    for header in (SHORT_HEADER, LONG_HEADER):
        if len(values) >= header and (len(values) - header) % 3 == 0:
            return header
    raise ValueError(
        f"has {len(values)} values, but 3 or 7 and 3 more for each fixation are expected"
    )


def _recording(values: np.ndarray, header: int) -> Recording:
    fixations = values[header:].reshape(-1, 3).copy()
    for name, value in zip(("image_id", "width", "height"), values, strict=False):
        if value < 1 or value != int(value):
            raise ValueError(f"has {name} {value:g}, which is no whole number above 0")
    if (fixations[:, 2] < 0).any():
        raise ValueError(f"has the duration {fixations[:, 2].min():g} ms, which is below 0")
    if header == LONG_HEADER:
        shown, start = values[3:5], values[5:7]
        if (shown <= 0).any():
            raise ValueError(f"has the size on screen {shown[0]:g} x {shown[1]:g}, which is empty")
        fixations[:, :2] = (fixations[:, :2] - start) * values[1:3] / shown
    image_id, width, height = (int(value) for value in values[:3])
    return Recording(image_id, width, height, fixations.astype(np.float32))


def _join(known: Recording, more: Recording) -> Recording:
    if known.size != more.size:
        raise ValueError(
            f"gives image {more.image_id} the size {more.width} x {more.height}, an earlier line "
            f"{known.width} x {known.height}"
        )
    return replace(known, fixations=np.concatenate([known.fixations, more.fixations]))


CUB2011 = DataSet(
    list_cub2011,
    maps={
        "gaze": gaze_of,
        "boxes": lambda _, listing: as_boxes(listing, box_corners(listing)),
        "parts": parts_as_looks,
    },
    boxes=known_boxes,
    parts=visible_parts,
)
CUB2010 = DataSet(
    list_cub2010, maps={"boxes": lambda _, listing: as_boxes(listing, box_corners_2010(listing))}
)

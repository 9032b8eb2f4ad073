"""CUB-200-2011 and CUB-200 of 2010: the pictures, boxes and parts, and people's gaze (CUB-GHA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from lib.config import DataConfig
from lib.data.folders import list_by_folders
from lib.data.maps import Box, Recording, Source, read_fixations
from lib.data.pictures import picture_size
from lib.data.records import (
    DATA_REMEDY,
    Listing,
    as_listing,
    id_lines,
    id_table,
    look_up,
    read_text,
)
from lib.data.splits import Row, by_flag

PARTS = Path("parts", "part_locs.txt")  # of CUB-200-2011, below its home


def list_cub2011(config: DataConfig) -> Listing:
    """CUB-200-2011 (Wah et al., 2011), whole or cut to some classes; labels as in classes.txt."""
    home = Path(config.root) / "CUB_200_2011"
    files = id_table(home / "images.txt", str)
    classes = id_table(home / "classes.txt", str)
    labels = id_table(home / "image_class_labels.txt", int)
    official = id_table(home / "train_test_split.txt", int)
    position = {class_id: i for i, class_id in enumerate(classes)}
    rows = []
    for image, (path,) in files.items():
        class_id = look_up(labels, image, "image_class_labels.txt")[0]
        rows.append(Row(path, look_up(position, class_id, "classes.txt"), str(image)))
    is_train = [look_up(official, image, "train_test_split.txt")[0] == 1 for image in files]
    names = tuple(name for (name,) in classes.values())
    ids = {path: image for image, (path,) in files.items()}
    split = by_flag(rows, names, is_train)
    return Listing(home, home / "images", tuple(rows), names, split, ids)


def list_cub2010(config: DataConfig) -> Listing:
    """CUB-200 of 2010 (Welinder et al.): as published (images, lists), or sorted into folders."""
    root = Path(config.root)
    for home in (root / "CUB_200_2010", root / "cub200", root):
        if (home / "lists").is_dir():
            return _list_by_lists(home)
        if (home / "train").is_dir():
            return list_by_folders(home)
    raise FileNotFoundError(
        f"{root} holds neither lists/ and images/ nor train/ and val/ of CUB-200-2010; "
        f"{DATA_REMEDY}."
    )


def _list_by_lists(home: Path) -> Listing:
    lines = {}
    for name in ("train", "test"):
        text = read_text(home / "lists" / f"{name}.txt")
        lines[name] = [line.strip() for line in text.splitlines() if line.strip()]
    paths = sorted({*lines["train"], *lines["test"]})
    names = tuple(sorted({PurePosixPath(path).parent.name for path in paths}))
    row = {
        p: Row(p, names.index(PurePosixPath(p).parent.name), PurePosixPath(p).stem) for p in paths
    }
    rows = [row[path] for path in (*lines["train"], *lines["test"])]
    is_train = [True] * len(lines["train"]) + [False] * len(lines["test"])
    return as_listing(home, home / "images", rows, names, by_flag(rows, names, is_train))


def gaze_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    paths = gaze_files(Path(config.root) / "CUB_GHA", config.gaze_runs)
    gaze = _read_gaze(tuple((path, path.stat().st_mtime_ns) for path in paths))
    return lambda row: gaze.get(listing.ids[row.path])


def gaze_files(folder: Path, runs: Literal["all"] | tuple[int, ...]) -> list[Path]:
    """The gaze files of CUB-GHA: data_5runs/Fixation_run<n>.txt, or Fixation.txt with all runs."""
    found = {}
    for path in (folder / "data_5runs").glob("Fixation_run*.txt"):
        number = path.stem.removeprefix("Fixation_run")
        if number.isdigit():
            found[int(number)] = path
    if runs == "all" and not found and (folder / "Fixation.txt").is_file():
        return [folder / "Fixation.txt"]
    if not found:
        raise FileNotFoundError(
            f"{folder / 'data_5runs'}/Fixation_run*.txt is missing; {DATA_REMEDY}."
        )
    missing = [run for run in (() if runs == "all" else runs) if run not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder / 'data_5runs'}/Fixation_run{missing[0]}.txt is missing; "
            f"there are runs {', '.join(map(str, sorted(found)))}."
        )
    return [found[run] for run in sorted(found) if runs == "all" or run in runs]


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
            if known and frame_of(known) != (look.height, look.width):
                raise ValueError(
                    f"{path} gives image {image} the size {look.width} x {look.height}, another "
                    f"run {known[0].width} x {known[0].height}; restore the gaze files."
                )
            gaze[image] = (*known, look)
    return gaze


def frame_of(gaze: Sequence[Recording]) -> tuple[int, int]:
    """Height and width that the fixations are measured in."""
    return gaze[0].height, gaze[0].width


def boxes_by_id(home: Path) -> dict[int, tuple[float, ...]]:
    """x0, y0, x1, y1 by image id."""
    table = id_table(home / "bounding_boxes.txt", float, columns=4)
    return {image: (x, y, x + w, y + h) for image, (x, y, w, h) in table.items()}


def box_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    boxes = boxes_by_id(listing.home)

    def source(row: Row) -> Box | None:
        size = picture_size(listing.images / row.path)
        box = look_up(boxes, listing.ids[row.path], "bounding_boxes.txt")
        return None if size is None else Box(box, size[1], size[0])

    return source


def parts_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    """The visible ones of the 15 parts as looks of equal length."""
    parts = parts_by_id(listing.home)
    if not parts:
        raise FileNotFoundError(f"{listing.home / PARTS} is missing; {DATA_REMEDY}.")

    def source(row: Row) -> tuple[Recording, ...]:
        image, size = listing.ids[row.path], picture_size(listing.images / row.path)
        if size is None or image not in parts:
            return ()
        return (Recording(image, size[1], size[0], parts[image]),)

    return source


def parts_by_id(home: Path) -> dict[int, np.ndarray]:
    """Visible parts by image id, see `Record.parts`; none where the file is not there."""
    path = home / PARTS
    return _parts_in(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=2)  # 177,000 lines that every split of every run would read again
def _parts_in(path: Path, changed: int) -> dict[int, np.ndarray]:
    """The parts of a file; `changed`, its time, makes a changed file another one."""
    parts: dict[int, list[tuple[float, float, float]]] = {}
    for image, (_, x, y, visible) in id_lines(path, float, columns=4):
        if visible:
            parts.setdefault(image, []).append((x, y, 1.0))
    return {image: np.array(places, dtype=np.float32) for image, places in parts.items()}


def box_of_2010(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    """annotations-mat/<class>/<picture>.mat of the published set: bbox.left, top, right, bottom."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError("boxes of CUB-200-2010 are .mat files; `pip install scipy`.") from error

    def source(row: Row) -> Box | None:
        path = (listing.home / "annotations-mat" / row.path).with_suffix(".mat")
        size = picture_size(listing.images / row.path)
        if size is None or not path.is_file():
            return None
        try:
            box = loadmat(path, simplify_cells=True)["bbox"]
            corners = tuple(float(box[side]) for side in ("left", "top", "right", "bottom"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no bbox; restore it from the archive.") from error
        return Box(corners, size[1], size[0])

    return source

"""From the files of a data set to `Record`s: where the picture is, its label, who looked where.

A `DataSet` says what is particular to one data set on disk. What all have in common is here: the
choice of the split, maps as files, corrections, and anybody's pictures in class folders.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from lib.config import DataConfig, file_md5
from lib.data.corrections import load_corrections
from lib.data.maps import Box, HumanSource, Painted, Recording
from lib.data.pictures import DATA_REMEDY, picture_size
from lib.data.splits import Part, Row, Split, SplitError, per_class, read_split, with_validation

MAP_EXTENSIONS = (".npy", ".png", ".jpg", ".jpeg")
Corners = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture


@dataclass(frozen=True)
class Record:
    """One picture before any tensor is made of it."""

    image_id: int
    label: int
    image: Path | np.ndarray  # a file, or uint8 [h, w, 3]
    human: HumanSource | None = None  # recordings: one per reader with a fixation, one size for all
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


# Makes a function from a row to what people gave for its picture.
MapsOf = Callable[[DataConfig, Listing], Callable[[Row], HumanSource | None]]


@dataclass(frozen=True)
class DataSet:
    """What is particular to one data set on disk: functions of it, or of its listing.

    A new data set is a file that makes one of these, and a line in `lib.data.dataset.DATA_SETS`.
    """

    pictures: Callable[[Path], Listing]  # what the folder DATA_DIR holds of it
    maps: dict[str, MapsOf] = field(default_factory=dict)  # by the name of DataConfig.maps
    # For every row its box, and its Record.parts; None: the data set has none.
    boxes: Callable[[Listing], Callable[[Row], Corners]] | None = None
    parts: Callable[[Listing], Callable[[Row], np.ndarray | None]] | None = None

    def records(self, config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
        """As `lib.data.dataset.read_records`."""
        listing = self.pictures(Path(config.root))
        split = choose_split(config, listing)
        rows = getattr(split, part)  # () is possible for "val" alone
        human = self._human(config, listing, (*split.train, *split.val, *split.test))
        corners = self.boxes and self.boxes(listing)
        parts = self.parts and self.parts(listing)
        records = []
        for row in tqdm(rows, desc=f"{part} records", delay=1.0, leave=False):
            record = Record(
                image_id=listing.ids[row.path],
                label=row.label,
                image=listing.images / row.path,
                human=human(row),
                boxes={"": corners(row)} if corners else {},
                parts=parts(row) if parts else None,
            )
            size = record.gaze[0].size if record.gaze else picture_size(record.image)
            records.append(replace(record, size=size))
        # "001.Black_footed_Albatross" -> "Black footed Albatross"
        words = [re.sub(r"^\d+\.", "", name).replace("_", " ") for name in listing.label_list]
        return records, words

    def _human(
        self, config: DataConfig, listing: Listing, rows: Sequence[Row]
    ) -> Callable[[Row], HumanSource | None]:
        """A function from a row of the split to what people gave for it."""
        if config.maps == "none":
            return lambda row: None
        if config.maps == "files":
            return map_files(config.maps_dir, rows).get
        if config.maps == "corrections":
            painted = painted_maps(config.maps_dir)
            return lambda row: painted.get(listing.ids[row.path])
        if config.maps not in self.maps:
            raise ValueError(
                f"{config.name} comes without {config.maps}; set MAPS to one of "
                f"{', '.join((*self.maps, 'none'))}, or to a folder of map files."
            )
        return self.maps[config.maps](config, listing)


def as_boxes(
    listing: Listing, corners: Callable[[Row], Corners | None]
) -> Callable[[Row], Box | None]:
    """Bounding boxes as human maps."""

    def source(row: Row) -> Box | None:
        size, box = picture_size(listing.images / row.path), corners(row)
        return None if size is None or box is None else Box(box, size[1], size[0])

    return source


def choose_split(config: DataConfig, listing: Listing) -> Split:
    """The split file of the configuration, else the published split, else 8 : 2 by class.

    Validation images are carved from train where the split has none: no checkpoint is ever chosen
    on test images. Of few images there may be none to carve.

    Raises SplitError where there is one class alone, or a split cannot be made or used.
    """
    if len(listing.label_list) < 2:
        raise SplitError(
            f"{listing.images} has one class alone, {listing.label_list[0]!r}: there is nothing to "
            "tell it from; sort the pictures into folders, one a class, of two classes or more."
        )
    path = config.split_file
    if path is None:
        split = listing.published or per_class(
            listing.rows, listing.label_list, share=0.8, shuffle=True, seed=config.seed
        )
    elif config.split_md5 not in (None, file_md5(path)):
        raise ValueError(f"{path} changed since this configuration was made; start again with it.")
    else:
        split = read_split(path)
        for row in (*split.train, *split.val, *split.test):
            if row.path not in listing.ids:
                raise ValueError(
                    f"{path} names {row.path}, which the data set in {listing.home} does not have; "
                    "make the split again with `python -m lib split`."
                )
    return split if split.val else with_validation(split, config.val_share, config.seed)


def map_files(folder: Path, rows: Iterable[Row]) -> dict[Row, Path]:
    """The map file of every row that has one.

    A map has the path of its picture below `folder` (train/ and val/ may be left out), or the map
    name of the split file, `<image id>` for CUB-200-2011; its extension is its own.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; set MAPS to the folder of the map files.")
    there: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in MAP_EXTENSIONS:
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in there:
                raise ValueError(f"{there[key]} and {path} are maps of one picture; keep one.")
            there[key] = path
    found: dict[Row, Path] = {}
    taken: dict[Path, Row] = {}
    for row in rows:
        picture = PurePosixPath(row.path).with_suffix("")
        name = re.sub(r"\.(npy|png|jpe?g)$", "", row.map_name, flags=re.IGNORECASE)
        keys = (picture.as_posix(), "/".join(picture.parts[-2:]), name)
        path = next((there[key] for key in keys if key in there), None)
        if path is None:
            continue
        if path in taken:
            raise ValueError(
                f"{path} would be the map of {taken[path].path} and of {row.path}; sort the maps "
                "into class folders like the pictures."
            )
        found[row], taken[path] = path, row
    return found


def painted_maps(folder: Path) -> dict[int, Painted]:
    """What was painted in the editor, by image id; says which files were skipped, and why."""
    corrections, skipped = load_corrections(folder)
    for file in skipped:
        warnings.warn(f"{file.path} is skipped: {file.reason}", stacklevel=2)
    return {
        int(one.image_id): Painted(one.edit.values.numpy(), one.edit.mask.numpy())
        for one in corrections
        if one.image_id.isdigit()
    }


def list_by_folders(home: Path) -> Listing:
    """Anybody's pictures in class folders.

    They are `train/<class>/*`, `val/<class>/*` and perhaps `test/<class>/*`, or `<class>/*` alone.
    With train and val only, val is what results are reported on, hence the test part. A folder
    named maps holds human maps, no class.
    """
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is missing; {DATA_REMEDY}.")
    if not (home / "train").is_dir():
        rows, names = _class_folders(home, "", None)
        return as_listing(home, home, rows, names, None)
    train, names = _class_folders(home, "train", None)
    val, test = (
        tuple(_class_folders(home, part, names)[0]) if (home / part).is_dir() else ()
        for part in ("val", "test")
    )
    if not test:
        val, test = (), val
    split = Split(tuple(train), test, names, val) if test else None
    return as_listing(home, home, (*train, *val, *test), names, split)


def _class_folders(
    home: Path, part: str, names: tuple[str, ...] | None
) -> tuple[list[Row], tuple[str, ...]]:
    """The pictures below the class folders of `home/part`; classes must be among `names`."""
    found = {}
    for folder in sorted((home / part).iterdir()):
        if folder.is_dir() and folder.name != "maps" and not folder.name.startswith("."):
            files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
            if files:
                found[folder.name] = files
    if not found:
        raise FileNotFoundError(
            f"{home / part} has no class folders with pictures in them "
            f"({', '.join(IMG_EXTENSIONS)}); {DATA_REMEDY}."
        )
    strangers = [name for name in found if names is not None and name not in names]
    if strangers:
        raise ValueError(
            f"{home / part / strangers[0]} is a class that {home / 'train'} does not have; "
            "add training pictures of it, or move it away."
        )
    names = names or tuple(found)
    rows = [
        Row(path.relative_to(home).as_posix(), names.index(name), path.stem)
        for name, files in found.items()
        for path in files
    ]
    return rows, names


CLASS_FOLDERS = DataSet(list_by_folders)

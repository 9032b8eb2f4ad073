"""From the files of a data set to `Record`s: where the picture is, its label, who looked where.

A `DataSet` says what is particular to one data set on disk. What all have in common is here: the
choice of the split, maps as files, corrections, and anybody's pictures in class folders.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from lib.config import DataConfig, file_md5
from lib.data.classes import chosen_classes, shown_names
from lib.data.corrections import found_again, load_corrections
from lib.data.maps import HumanSource, Painted, Recording
from lib.data.pictures import DATA_REMEDY, picture_size
from lib.data.splits import (
    Part,
    Row,
    Split,
    SplitError,
    per_class,
    read_split,
    with_classes,
    with_validation,
)
from lib.files import is_hidden, maps_beside, one_form, visible

with suppress(ImportError):  # whoever installed it means .heic and .heif to be read
    import pillow_heif

    pillow_heif.register_heif_opener()

# What Pillow has a name for and cannot show as one picture: measurements, documents, films, and
# suffixes that mean something else more often.
NO_PICTURES = {"BUFR", "EPS", "FITS", "FLI", "GBR", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "WMF"}
PICTURE_SUFFIXES = frozenset(
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if (kind in Image.OPEN or kind == "MPO") and kind not in NO_PICTURES  # MPO: the JPEG's reader
)
MAP_EXTENSIONS = PICTURE_SUFFIXES | {".npy"}
# What the editor saves beside a correction, to look at: no map.
PREVIEW = re.compile(r"\d{4}-\d\d-\d\dT\d{6}Z-.*-[0-9a-f]{4}\.png")
# Names of folders for the parts, in any case.
PART_NAMES: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
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
    """A listing whose image ids count the pictures from 1 in the order of their paths.

    Raises SplitError where two names look the same: no list and no map could tell them apart.
    """
    seen: dict[str, str] = {}
    for path in (*names, *(row.path for row in rows)):
        if seen.setdefault(one_form(path), path) != path:
            raise SplitError(
                f"{images / path} is there twice, in two Unicode forms of its name; rename one."
            )
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
    boxes: Callable[[Listing], Callable[[Row], Corners] | None] | None = None
    parts: Callable[[Listing], Callable[[Row], np.ndarray | None]] | None = None

    def records(self, config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
        """As `lib.data.dataset.read_records`."""
        listing = self.pictures(Path(config.root))
        split = choose_split(config, listing)
        rows = getattr(split, part)  # () is possible for "val" alone
        names = shown_names(split.label_list)
        human = self._human(config, listing, (*split.train, *split.val, *split.test), names)
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
        return records, names

    def _human(
        self, config: DataConfig, listing: Listing, rows: Sequence[Row], names: Sequence[str]
    ) -> Callable[[Row], HumanSource | None]:
        """A function from a row of the split to what people gave for it."""
        if config.maps == "none":
            return lambda row: None
        if config.maps_dir is not None:
            _refuse_pictures_as_maps(config.maps_dir, listing)
        if config.maps == "files":
            return map_files(config.maps_dir, rows).get
        if config.maps == "corrections":
            pictures = {
                str(listing.ids[row.path]): (names[row.label], row.path.rpartition("/")[2])
                for row in rows
            }
            painted = painted_maps(config.maps_dir, pictures)
            return lambda row: painted.get(listing.ids[row.path])
        if config.maps not in self.maps:
            raise ValueError(
                f"{config.name} comes without {config.maps}; set MAPS to "
                f"{', '.join((*self.maps, 'none'))}, or a folder of map files."
            )
        return self.maps[config.maps](config, listing)


def choose_split(config: DataConfig, listing: Listing) -> Split:
    """The split file of the configuration, else the published split, else 8 : 2 by class; of all
    classes, or those of `config.classes`.

    Validation images are carved from train where the split has none: no checkpoint is ever chosen
    on test images. Of few images there may be none to carve.
    """
    path = config.split_file
    if path is None:
        split = listing.published or per_class(
            listing.rows, listing.label_list, share=0.8, shuffle=True, seed=config.seed
        )
    elif config.split_md5 not in (None, file_md5(path)):
        raise ValueError(f"{path} changed since this configuration was made; start again with it.")
    else:
        split = _as_listed(read_split(path), listing, path)
    if config.classes:
        split = with_classes(split, chosen_classes(split.label_list, config.classes))
    return split if split.val else with_validation(split, config.val_share, config.seed)


def _as_listed(split: Split, listing: Listing, path: Path) -> Split:
    """A split that was read from the file `path`, with the paths that the pictures have on disk.

    Its label_list may regroup the classes; but under the name of a class folder no other class's
    pictures are taken.
    """
    there = {one_form(row.path): row for row in listing.rows}
    names = [one_form(name) for name in split.label_list]
    folders = [one_form(name) for name in listing.label_list]

    def as_listed(row: Row) -> Row:
        listed = there.get(one_form(row.path))
        if listed is None:
            raise SplitError(
                f"{path} names {row.path}, which the data set in {listing.home} does not have; "
                "make the split again with `python -m lib split`."
            )
        asked, found = names[row.label], folders[listed.label]
        if asked != found and asked in folders:
            raise SplitError(
                f"{path} gives {row.path} to the class {asked!r}, but its class is {found!r}; make "
                "the split again with `python -m lib split`."
            )
        return replace(row, path=listed.path)

    parts = {part: tuple(map(as_listed, getattr(split, part))) for part in ("train", "val", "test")}
    used = {row.path for rows in parts.values() for row in rows}
    left = {row.label for row in listing.rows} - {r.label for r in listing.rows if r.path in used}
    if left:
        some = ", ".join(listing.label_list[label] for label in sorted(left)[:5])
        warnings.warn(
            f"{path} names no picture of {len(left)} class(es) of {listing.home} ({some}): left "
            "out; to take part, make the split again with `python -m lib split`.",
            stacklevel=2,
        )
    return replace(split, **parts)


def _refuse_pictures_as_maps(folder: Path, listing: Listing) -> None:
    """A folder of maps among the pictures would make each picture a map, or each map a picture."""
    for name in {PurePosixPath(row.path).parent for row in listing.rows}:
        if (listing.images / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"MAPS is {folder}, but {listing.images / name} holds pictures of the data set; "
                "keep human maps in a folder of their own."
            )


def _map_files_in(folder: Path) -> Iterator[Path]:
    """All map files below a folder, by name."""
    for path in visible(folder):
        if path.is_dir():
            yield from _map_files_in(path)
        elif path.suffix.lower() in MAP_EXTENSIONS and not PREVIEW.fullmatch(path.name):
            yield path


def map_files(folder: Path, rows: Iterable[Row]) -> dict[Row, Path]:
    """The map file of every row that has one.

    A map has the path of its picture below `folder` (train/ and val/ may be left out), or the map
    name of the split file, `<image id>` for CUB-200-2011; its extension is its own.
    """
    if not folder.is_dir():
        missing = "is a file" if folder.is_file() else "is missing"
        raise FileNotFoundError(f"{folder} {missing}; set MAPS to the folder of the map files.")
    there: dict[str, Path] = {}
    for path in _map_files_in(folder):
        key = one_form(path.relative_to(folder).with_suffix("").as_posix())
        if key in there:
            raise ValueError(f"{there[key]} and {path} are maps of one picture; keep one.")
        there[key] = path
    if not there:
        raise ValueError(
            f"{folder} holds neither map files (pictures, .npy) nor corrections of the editor "
            "(.json); set MAPS to the folder that does, or to none."
        )
    found: dict[Row, Path] = {}
    taken: dict[Path, Row] = {}
    for row in rows:
        picture, name = PurePosixPath(row.path).with_suffix(""), PurePosixPath(row.map_name)
        keys = [picture.as_posix(), "/".join(picture.parts[-2:]), row.map_name]
        if name.suffix.lower() in MAP_EXTENSIONS:  # a list may give the map's own name
            keys.append(name.stem)
        path = next((there[key] for key in map(one_form, keys) if key in there), None)
        if path is None:
            continue
        if path in taken:
            raise ValueError(
                f"{path} would be the map of {taken[path].path} and of {row.path}; sort the maps "
                "into class folders like the pictures, which need different names in a class."
            )
        found[row], taken[path] = path, row
    return found


def painted_maps(
    folder: Path, pictures: Mapping[str, tuple[str, str]] | None = None
) -> dict[int, Painted]:
    """What was painted in the editor, by image id; says which files were skipped, and why.

    Ids count the pictures, so that a new picture moves them. With `pictures`, class and file name
    by image id, a correction goes to the picture of its class and file, if that is known.

    Raises ValueError where map files lie beside them (one of the two would be left out), and where
    a picture is of another class than the correction, and its file is not known.
    """
    corrections, skipped = load_corrections(folder)
    for path in _map_files_in(folder):
        raise ValueError(
            f"{folder} holds corrections of the editor and map files ({path.name}); keep them in "
            "two folders, and set MAPS to one."
        )
    for file in (file for file in skipped if not is_hidden(file.path.name)):
        warnings.warn(f"{file.path} is skipped: {file.reason}", stacklevel=2)
    corrections, gone = found_again(corrections, pictures) if pictures else (corrections, ())
    for one in gone:
        left = f"{folder} has a correction of {one.class_name}/{one.file}, which is skipped"
        warnings.warn(f"{left}: there is no such picture, or more than one", stacklevel=2)
    painted = {int(one.image_id): one for one in corrections if one.image_id.isdigit()}
    for image, one in painted.items():
        now = (pictures or {}).get(str(image), (one.class_name,))[0]
        if one.class_name not in ("", now):
            raise ValueError(
                f"{folder} has a correction of image {image}, then of the class "
                f"{one.class_name!r}, now of {now!r}: pictures or classes were added, removed or "
                "renamed since; undo that, or set MAPS to a new folder of corrections."
            )
    return {
        image: Painted(one.edit.values.numpy(), one.edit.mask.numpy())
        for image, one in painted.items()
    }


def list_by_folders(home: Path) -> Listing:
    """Anybody's pictures in class folders.

    They are `train/<class>/*` with `val/<class>/*`, `test/<class>/*` or both beside it (see
    PART_NAMES), or `<class>/*` alone. With train and val only, val is what results are reported
    on, hence the test part; train alone is split. A folder named maps holds human maps, or is a
    class: see `maps_beside`.

    Raises FileNotFoundError where no class folders are, ValueError where they could be read in two
    ways.
    """
    if not home.is_dir():
        missing = "is a file" if home.is_file() else "is missing"
        raise FileNotFoundError(f"{home} {missing}; {DATA_REMEDY}.")
    maps, classes, parts = maps_beside(home), _class_folders(home), part_folders(home)
    if maps:
        classes.pop(maps.name, None)
    beside = [name for name in classes if name.lower() not in PART_NAMES]
    if beside and not ("train" in parts and len(parts) > 1):
        # A single one that holds pictures itself is a class, whatever folders are in it.
        parts = {part: folder for part, folder in parts.items() if folder.name not in classes}
        for folder in parts.values():
            raise ValueError(
                f"{folder} holds class folders, and so does {home} itself "
                f"({', '.join(beside[:5])}); move these into {home / 'train'}, or {folder.name} "
                "elsewhere."
            )
    if not parts:
        if not beside:
            raise _no_classes(home)
        names = tuple(classes)
        return as_listing(home, home, _rows(home, classes, names), names, None)
    if "train" not in parts:
        one = next(iter(parts.values()))
        raise FileNotFoundError(
            f"{home} has {one.name}, but no folder train; put training pictures into "
            f"{home / 'train'}, or set DATA_DIR to {one} to split that."
        )
    found = {part: _class_folders(folder) for part, folder in parts.items()}
    names = tuple(found["train"])
    train, val, test = (_rows(home, found.get(p, {}), names) for p in ("train", "val", "test"))
    if not test:
        val, test = (), val
    split = Split(train, test, names, val) if test else None
    return as_listing(home, home, (*train, *val, *test), names, split)


def part_folders(home: Path) -> dict[Part, Path]:
    """The folders that bear the name of a part and hold class folders.

    Raises ValueError where two are for the same part.
    """
    found: dict[Part, Path] = {}
    for folder in visible(home):
        part = PART_NAMES.get(folder.name.lower())
        if part and folder.is_dir() and any(map(pictures_in, visible(folder))):
            if part in found:
                raise ValueError(
                    f"{found[part]} and {folder} are both for {part}; put their class folders into "
                    "one of the two."
                )
            found[part] = folder
    return found


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, by name."""
    inside = visible(folder) if folder.is_dir() else []
    return [p for p in inside if p.suffix.lower() in PICTURE_SUFFIXES and not p.is_dir()]


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of the folders in a folder that hold any, by name."""
    return {inner.name: files for inner in visible(folder) if (files := pictures_in(inner))}


def _rows(home: Path, classes: dict[str, list[Path]], names: Sequence[str]) -> tuple[Row, ...]:
    """The pictures of class folders, whose labels are their places among `names`."""
    labels = {one_form(name): label for label, name in enumerate(names)}
    for name, files in classes.items():
        if one_form(name) not in labels:
            raise ValueError(
                f"{files[0].parent} is a class that train does not have; add training pictures "
                "of it, or move it away."
            )
    return tuple(
        Row(path.relative_to(home).as_posix(), labels[one_form(name)], path.stem)
        for name, files in classes.items()
        for path in files
    )


def _no_classes(home: Path) -> FileNotFoundError:
    """Says what is there instead of class folders with pictures."""
    inside = [path for path in visible(home) if path.is_dir()]
    whole = [path for path in inside if any(part_folders(path))]
    deeper = [path.name for path in inside if any(map(pictures_in, visible(path)))]
    flat = [path for path in (*inside, home) if pictures_in(path)]
    others = {path.suffix.lower() for folder in inside for path in visible(folder)} - {""}
    there = f"; {DATA_REMEDY}"
    if whole:
        there = f", but {whole[0]} has parts with such folders; set DATA_DIR to that"
    elif deeper:
        one = home / deeper[0]
        there = f", but {', '.join(deeper[:5])} with class folders; set DATA_DIR to {one}, or call "
        there += "them train and val"
    elif flat:
        there = f", but pictures in {flat[0]}; sort them into one folder a class"
    elif others:
        heic = "pillow-heif reads .heic once installed; " * bool(others & {".heic", ".heif"})
        there = f", but files of other kinds ({', '.join(sorted(others)[:5])}); {heic}{DATA_REMEDY}"
    return FileNotFoundError(f"{home} has no class folders with pictures in them{there}.")


CLASS_FOLDERS = DataSet(list_by_folders)

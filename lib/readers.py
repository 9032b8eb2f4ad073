"""From the files of a data set to `Record`s: where the picture is, its label, who looked where.

Two steps for pictures on disk. A lister finds all pictures of a data set and the split that was
published with it (`LISTERS`); `read_records` then chooses the split and attaches human maps. A new
data set is a new lister.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from lib import toybirds
from lib.config import DataConfig, file_md5
from lib.feedback import load_corrections
from lib.gaze import Box, Painted, Recording, Source, read_fixations
from lib.splits import Row, Split, by_flag, per_class, read_split, with_validation

Part = Literal["train", "val", "test"]
T = TypeVar("T")

DATA_REMEDY = "set DATA_DIR to the folder that holds the data, or fill datasets/ (see its README)"
TOY_FIRST_ID = {"train": 0, "val": 100_000, "test": 200_000}  # an id names one drawn bird only
PARTS = Path("parts", "part_locs.txt")  # of CUB-200-2011, below its home
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


def read_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    """The records of one part of a data set, and the names of all classes by label.

    Raises ValueError (a `SplitError` among them) and FileNotFoundError, one sentence with the
    remedy each. Broken and missing pictures are not noticed here: reading them is.
    """
    if config.name == "toy":
        return _toy_records(config, part)
    listing = list_pictures(config)
    split = choose_split(config, listing)
    rows = getattr(split, part)
    if not rows:
        raise ValueError(
            f"the {part} split is empty (val_share {config.val_share:g}); "
            "choose another val_share or more images."
        )
    human = _human_sources(config, listing, (*split.train, *split.val, *split.test))
    boxes = _cub_boxes(listing.home) if config.name == "cub2011" else {}
    parts = _cub_parts(listing.home) if config.name == "cub2011" else {}
    records = []
    for row in tqdm(rows, desc=f"{part} records", delay=1.0, leave=False):
        path, image_id = listing.images / row.path, listing.ids[row.path]
        source = human(row)
        size = _frame(source) if isinstance(source, tuple) and source else picture_size(path)
        box = {"": _look_up(boxes, image_id, "bounding_boxes.txt")} if boxes else {}
        found = parts.get(image_id)
        records.append(Record(image_id, row.label, path, source, box, size, parts=found))
    return records, [_words(name) for name in listing.label_list]


def list_pictures(config: DataConfig) -> Listing:
    """All pictures of the data set that `config.name` names; ValueError for an unknown name."""
    if config.name not in LISTERS:
        known = ", ".join(("toy", *LISTERS))
        raise ValueError(f"data set {config.name!r} is unknown; use one of {known}.")
    return LISTERS[config.name](config)


def choose_split(config: DataConfig, listing: Listing) -> Split:
    """The split file of the configuration, else the published split, else 8 : 2 by class.

    Validation images are carved from train where the split has none: no checkpoint is ever chosen
    on test images.
    """
    if config.split_file is not None:
        split = _split_from_file(config, listing)
    else:
        split = listing.published or per_class(
            listing.rows, listing.label_list, share=0.8, shuffle=True, seed=config.seed
        )
    return split if split.val else with_validation(split, config.val_share, config.seed)


def _split_from_file(config: DataConfig, listing: Listing) -> Split:
    path = config.split_file
    if config.split_md5 not in (None, file_md5(path)):
        raise ValueError(f"{path} changed since this configuration was made; start again with it.")
    split = read_split(path)
    for row in (*split.train, *split.val, *split.test):
        if row.path not in listing.ids:
            raise ValueError(
                f"{path} names {row.path}, which the data set in {listing.home} does not have; "
                "make the split again with `python -m lib split`."
            )
    return split


def _words(class_folder: str) -> str:
    """The name for readers: "001.Black_footed_Albatross" -> "Black footed Albatross"."""
    return re.sub(r"^\d+\.", "", class_folder).replace("_", " ")


# ------------------------------------------------------------------------------------------ listing


def _list_cub2011(config: DataConfig) -> Listing:
    """CUB-200-2011 (Wah et al., 2011), whole or cut to some classes; labels as in classes.txt."""
    home = Path(config.root) / "CUB_200_2011"
    files = _table(home / "images.txt", str)
    classes = _table(home / "classes.txt", str)
    labels = _table(home / "image_class_labels.txt", int)
    official = _table(home / "train_test_split.txt", int)
    position = {class_id: i for i, class_id in enumerate(classes)}
    rows = []
    for image, (path,) in files.items():
        class_id = _look_up(labels, image, "image_class_labels.txt")[0]
        rows.append(Row(path, _look_up(position, class_id, "classes.txt"), str(image)))
    is_train = [_look_up(official, image, "train_test_split.txt")[0] == 1 for image in files]
    names = tuple(name for (name,) in classes.values())
    ids = {path: image for image, (path,) in files.items()}
    split = by_flag(rows, names, is_train)
    return Listing(home, home / "images", tuple(rows), names, split, ids)


def _list_cub2010(config: DataConfig) -> Listing:
    """CUB-200 of 2010 (Welinder et al.): as published (images, lists), or sorted into folders."""
    root = Path(config.root)
    for home in (root / "CUB_200_2010", root / "cub200", root):
        if (home / "lists").is_dir():
            return _list_by_lists(home)
        if (home / "train").is_dir():
            return _list_by_folders(home)
    raise FileNotFoundError(
        f"{root} holds neither lists/ and images/ nor train/ and val/ of CUB-200-2010; "
        f"{DATA_REMEDY}."
    )


def _list_by_lists(home: Path) -> Listing:
    lines = {}
    for name in ("train", "test"):
        text = _text(home / "lists" / f"{name}.txt")
        lines[name] = [line.strip() for line in text.splitlines() if line.strip()]
    paths = sorted({*lines["train"], *lines["test"]})
    names = tuple(sorted({PurePosixPath(path).parent.name for path in paths}))
    row = {
        p: Row(p, names.index(PurePosixPath(p).parent.name), PurePosixPath(p).stem) for p in paths
    }
    rows = [row[path] for path in (*lines["train"], *lines["test"])]
    is_train = [True] * len(lines["train"]) + [False] * len(lines["test"])
    return _listing(home, home / "images", rows, names, by_flag(rows, names, is_train))


def _list_folder(config: DataConfig) -> Listing:
    """Anybody's pictures in class folders, see `_list_by_folders`."""
    return _list_by_folders(Path(config.root))


def _list_by_folders(home: Path) -> Listing:
    """`train/<class>/*`, `val/<class>/*` and perhaps `test/<class>/*`, or `<class>/*` alone.

    With train and val only, val is what results are reported on, hence the test part. A folder
    named maps holds human maps, no class.
    """
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is missing; {DATA_REMEDY}.")
    parts = [name for name in ("train", "val", "test") if (home / name).is_dir()]
    if "train" not in parts:
        rows, names = _class_folders(home, "", None)
        return _listing(home, home, rows, names, None)
    rows, names = _class_folders(home, "train", None)
    found = {"train": rows, "val": [], "test": []}
    for part in parts[1:]:
        found[part], _ = _class_folders(home, part, names)
    if not found["test"]:
        found["test"], found["val"] = found["val"], []
    rows = [*found["train"], *found["val"], *found["test"]]
    if not found["test"]:
        return _listing(home, home, rows, names, None)
    split = Split(*(tuple(found[part]) for part in ("train", "test")), names, tuple(found["val"]))
    return _listing(home, home, rows, names, split)


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


def _listing(
    home: Path, images: Path, rows: Sequence[Row], names: tuple[str, ...], split: Split | None
) -> Listing:
    """A listing whose image ids count the pictures from 1 in the order of their paths."""
    ids = {path: i for i, path in enumerate(sorted(row.path for row in rows), start=1)}
    return Listing(home, images, tuple(rows), names, split, ids)


LISTERS: dict[str, Callable[[DataConfig], Listing]] = {
    "cub2011": _list_cub2011,
    "cub2010": _list_cub2010,
    "folder": _list_folder,
}


# --------------------------------------------------------------------------------------- human maps


def _human_sources(
    config: DataConfig, listing: Listing, rows: Sequence[Row]
) -> Callable[[Row], Source | None]:
    """A function from a row of the split to what people gave for it."""
    if config.maps == "none":
        return lambda row: None
    if config.maps == "files":
        return _map_files(config.maps_dir, rows).get
    if config.maps == "corrections":
        painted = _painted(config.maps_dir)
        return lambda row: painted.get(listing.ids[row.path])
    makers = {
        ("cub2011", "gaze"): _cub_gaze_of,
        ("cub2011", "boxes"): _cub_box_of,
        ("cub2011", "parts"): _cub_parts_of,
        ("cub2010", "boxes"): _cub2010_box_of,
    }
    if (config.name, config.maps) not in makers:
        have = [maps for name, maps in makers if name == config.name]
        raise ValueError(
            f"{config.name} comes without {config.maps}; set MAPS to one of "
            f"{', '.join((*have, 'none'))}, or to a folder of map files."
        )
    return makers[config.name, config.maps](config, listing)


def _map_files(folder: Path, rows: Iterable[Row]) -> dict[Row, Path]:
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


def _painted(folder: Path) -> dict[int, Painted]:
    """What was painted in the editor, by image id; says which files were skipped, and why."""
    corrections, skipped = load_corrections(folder)
    for file in skipped:
        warnings.warn(f"{file.path} is skipped: {file.reason}", stacklevel=2)
    return {
        int(one.image_id): Painted(one.edit.values, one.edit.mask)
        for one in corrections
        if one.image_id.isdigit()
    }


def _cub_gaze_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
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
            if known and _frame(known) != (look.height, look.width):
                raise ValueError(
                    f"{path} gives image {image} the size {look.width} x {look.height}, another "
                    f"run {known[0].width} x {known[0].height}; restore the gaze files."
                )
            gaze[image] = (*known, look)
    return gaze


def _frame(gaze: Sequence[Recording]) -> tuple[int, int]:
    """Height and width that the fixations are measured in."""
    return gaze[0].height, gaze[0].width


def _cub_boxes(home: Path) -> dict[int, tuple[float, ...]]:
    """x0, y0, x1, y1 by image id."""
    table = _table(home / "bounding_boxes.txt", float, columns=4)
    return {image: (x, y, x + w, y + h) for image, (x, y, w, h) in table.items()}


def _cub_box_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    boxes = _cub_boxes(listing.home)

    def source(row: Row) -> Box | None:
        size = picture_size(listing.images / row.path)
        box = _look_up(boxes, listing.ids[row.path], "bounding_boxes.txt")
        return None if size is None else Box(box, size[1], size[0])

    return source


def _cub_parts_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
    """The visible ones of the 15 parts as looks of equal length."""
    parts = _cub_parts(listing.home)
    if not parts:
        raise FileNotFoundError(f"{listing.home / PARTS} is missing; {DATA_REMEDY}.")

    def source(row: Row) -> tuple[Recording, ...]:
        image, size = listing.ids[row.path], picture_size(listing.images / row.path)
        if size is None or image not in parts:
            return ()
        return (Recording(image, size[1], size[0], parts[image]),)

    return source


def _cub_parts(home: Path) -> dict[int, np.ndarray]:
    """Visible parts by image id, see `Record.parts`; none where the file is not there."""
    path = home / PARTS
    return _parts_in(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=2)  # 177,000 lines that every split of every run would read again
def _parts_in(path: Path, changed: int) -> dict[int, np.ndarray]:
    """The parts of a file; `changed`, its time, makes a changed file another one."""
    parts: dict[int, list[tuple[float, float, float]]] = {}
    for image, (_, x, y, visible) in _lines(path, float, columns=4):
        if visible:
            parts.setdefault(image, []).append((x, y, 1.0))
    return {image: np.array(places, dtype=np.float32) for image, places in parts.items()}


def _cub2010_box_of(config: DataConfig, listing: Listing) -> Callable[[Row], Source | None]:
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


# ---------------------------------------------------------------------------------- files and lines


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.")
    return path.read_text(encoding="utf-8", errors="replace")


def _lines(path: Path, kind: Callable[[str], T], columns: int) -> list[tuple[int, tuple[T, ...]]]:
    """Lines `id value...` of an official file, in its order."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
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


def _table(path: Path, kind: Callable[[str], T], columns: int = 1) -> dict[int, tuple[T, ...]]:
    """Lines by id; an id that comes twice is refused."""
    lines = _lines(path, kind, columns)
    table = dict(lines)
    if len(table) < len(lines):
        seen: set[int] = set()
        twice = next(image for image, _ in lines if image in seen or seen.add(image))
        raise ValueError(
            f"{path} has the id {twice} twice; restore the file from the published archive."
        )
    return table


def _look_up(table: dict[int, T], key: int, name: str) -> T:
    try:
        return table[key]
    except KeyError:
        raise ValueError(
            f"{name} has no line for id {key}; restore the file from the published archive."
        ) from None


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


# -------------------------------------------------------------------------------------- drawn birds


def _toy_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    height, width = config.image_size
    if height != width:
        raise ValueError(
            f"image_size is {height} x {width}, but toy birds are drawn on a square; "
            "give both sides the same length."
        )
    count = {"train": config.toy_train, "val": config.toy_val, "test": config.toy_test}[part]
    birds = _drawn(part, count, config.seed, height, config.agreement)
    first = TOY_FIRST_ID[part]
    painted = _painted(config.maps_dir) if config.maps == "corrections" else {}
    records = []
    for i in range(count):
        image_id, box = first + i, tuple(birds.boxes[i])
        places = np.column_stack([birds.parts[i], np.ones(len(birds.parts[i]), np.float32)])
        recordings = tuple(
            Recording(image_id, width, height, looks) for looks in birds.gaze[i] if len(looks)
        )
        sources = {
            "gaze": recordings,
            "boxes": Box(box, width, height),
            "parts": (Recording(image_id, width, height, places),),
            "corrections": painted.get(image_id),
            "none": None,
        }
        if config.maps not in sources:
            raise ValueError(
                f"toy birds come without {config.maps}; set MAPS to gaze, boxes, parts, none, or "
                "to a folder of corrections."
            )
        records.append(
            Record(
                image_id=image_id,
                label=int(birds.labels[i]),
                image=birds.images[i],
                human=sources[config.maps],
                boxes={"": box, "d": tuple(birds.decoy_boxes[i])},
                size=(height, width),
                columns={"decoy": int(birds.decoys[i])},
                parts=places,
            )
        )
    return records, [species.name for species in toybirds.SPECIES]


@lru_cache(maxsize=8)
def _drawn(part: str, count: int, seed: int, size: int, agreement: float) -> toybirds.ToyBirds:
    """Drawn once a process: a comparison reads the same split for every run. Not to be changed."""
    return toybirds.make(part, count, seed, size=size, agreement=agreement)

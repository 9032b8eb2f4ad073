"""Anybody's pictures in class folders, and human maps as files beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from torchvision.datasets.folder import IMG_EXTENSIONS

from lib.config import DataConfig
from lib.data.corrections import load_corrections
from lib.data.maps import Painted
from lib.data.records import DATA_REMEDY, MAP_EXTENSIONS, Listing, as_listing
from lib.data.splits import Row, Split


def list_folder(config: DataConfig) -> Listing:
    """Anybody's pictures in class folders, see `list_by_folders`."""
    return list_by_folders(Path(config.root))


def list_by_folders(home: Path) -> Listing:
    """`train/<class>/*`, `val/<class>/*` and perhaps `test/<class>/*`, or `<class>/*` alone.

    With train and val only, val is what results are reported on, hence the test part. A folder
    named maps holds human maps, no class.
    """
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is missing; {DATA_REMEDY}.")
    parts = [name for name in ("train", "val", "test") if (home / name).is_dir()]
    if "train" not in parts:
        rows, names = _class_folders(home, "", None)
        return as_listing(home, home, rows, names, None)
    rows, names = _class_folders(home, "train", None)
    found = {"train": rows, "val": [], "test": []}
    for part in parts[1:]:
        found[part], _ = _class_folders(home, part, names)
    if not found["test"]:
        found["test"], found["val"] = found["val"], []
    rows = [*found["train"], *found["val"], *found["test"]]
    if not found["test"]:
        return as_listing(home, home, rows, names, None)
    split = Split(*(tuple(found[part]) for part in ("train", "test")), names, tuple(found["val"]))
    return as_listing(home, home, rows, names, split)


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

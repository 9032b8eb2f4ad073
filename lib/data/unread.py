"""What lies in the folders of a data set and is not read, and what to do about it.

`left_out` walks through the folders of the pictures and of the maps, and compares what lies there
with what the data set lists. No picture is opened.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lib.config import DataConfig
from lib.data.corrections import load_corrections
from lib.data.cub import BUBBLES
from lib.data.sources import (
    MAP_EXTENSIONS,
    PART_NAMES,
    PICTURE_SUFFIXES,
    PREVIEW,
    Listing,
    choose_split,
    map_files,
)
from lib.files import bubbles_in, is_hidden, maps_beside

# Why something is not read, and what to do about it.
KIND, PACKED = "picture of a kind that is not read", "archive"
UNNAMED, LOST = "picture without its suffix", "link that leads nowhere"
LOOSE, DEEPER = "picture in no class folder", "picture in a sub-folder of a class"
STRAY, EMPTY = "picture in no part or class", "class folder without a picture"
UNLISTED, HIDDEN, OTHER = "picture in no list or split", "hidden file or folder", "other file"
NO_MAP, BESIDE, SKIPPED = (
    "map of no picture",
    "other file among the maps",
    "correction that cannot be used",
)
CLOSED, REST = "folder that cannot be opened", "more than was looked through"
UNREAD = {
    KIND: "save them as .jpg or .png; .heic and .heif are read after `pip install pillow-heif`",
    PACKED: "unpack it, if pictures are in it",
    UNNAMED: "give the files the suffix of what they are, such as .jpg",
    LOST: "restore what it leads to, or delete it",
    LOOSE: "move them into a folder that is named like their class",
    DEEPER: "move them up into the folder of the class",
    STRAY: "parts are called train, val and test and hold class folders; a class holds its "
    "pictures directly",
    EMPTY: "put pictures there, or delete the folder",
    UNLISTED: "make the split again with `python -m lib split`, or add them to the lists",
    HIDDEN: "nothing, these belong to a system or program; delete them where they are in the way",
    NO_MAP: "name a map like its picture, in a folder that is named like the picture's class",
    BESIDE: "maps are pictures or .npy, corrections are .json; each have a folder of their own",
    SKIPPED: "mend or delete the file",
    CLOSED: "give yourself the right to read it",
    REST: "move away from the folder what does not belong to the data set",
    OTHER: "nothing, unless it was meant to be read: labels are the names of folders",
}

WALKED = 20_000  # files and folders, beside four for each picture, after which a walk ends
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
# Pictures, or what pictures can be taken from, beside those that Pillow has a name for.
PICTURED = {
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".psd", ".xcf", ".svg", ".ai", ".eps", ".pdf"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".dcm", ".nii", ".exr"),
}
NO_HOLDERS = {  # of pictures, whatever they start with
    *(".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".npy", ".mat", ".py"),
}
STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)


@dataclass(frozen=True)
class LeftOut:
    """What is not read for one reason in one folder."""

    problem: str  # a key of UNREAD
    path: Path  # the folder, or the first of the files
    count: int = 1
    detail: str = ""


def left_out(config: DataConfig, listing: Listing | None = None) -> list[LeftOut]:
    """What is not read of the folders of a data set, in the order of UNREAD.

    Args:
        config: of the data; drawn birds leave nothing out.
        listing: all its pictures; None where they cannot be listed: then classes and parts are not
            known, and only files are told that are read nowhere.

    Never raises for what lies there. It stops where far more lies there than is listed, and says
    so; the folders of maps and of decoded pictures, and hidden ones, are not walked as pictures.
    """
    if config.name == "toy" or (listing is None and config.name != "folder"):
        return []
    found: list[LeftOut] = []
    rows = {row.path for row in listing.rows} if listing else set()
    named, mapped, ours = rows, None, ()
    with suppress(OSError, ValueError):  # a split that cannot be used is told elsewhere
        split = listing and choose_split(replace(config, classes=None), listing)
        ours = (*split.train, *split.val, *split.test) if split else ()
        named = {row.path for row in ours} if config.split_file else rows
    with suppress(OSError, ValueError):  # and so are maps
        if config.maps == "files" and listing:
            mapped = {*map_files(config.maps_dir, ours).values()}
            mapped |= {*map_files(config.maps_dir, listing.rows).values()}
    home = listing.images if listing else config.root
    kept = {config.maps_dir, config.cache, config.root / "decoded"}
    if config.name == "cub2010":  # its pictures are those of train, where they are not listed
        kept |= {home / BUBBLES, bubbles_in(config.root)}
    with suppress(OSError, ValueError):
        kept.add(maps_beside(home))
    found += _among_pictures(home, rows, named, kept, listing)
    if mapped is not None:
        found += _among_maps(config.maps_dir, mapped)
    if config.maps == "corrections" and listing:
        found += _among_corrections(config.maps_dir, {*listing.ids.values()})
    order = list(UNREAD)
    return sorted(found, key=lambda one: (order.index(one.problem), one.path))


def in_a_sentence(found: Iterable[LeftOut]) -> str:
    """What is left out and could have been meant to be read: "3 x archive (a.zip), ..."."""
    first: dict[str, LeftOut] = {}
    counts: Counter[str] = Counter()
    for one in found:
        first.setdefault(one.problem, one)
        counts[one.problem] += one.count
    return ", ".join(
        f"{counts[problem]} x {problem} ({one.path.name})"
        for problem, one in first.items()
        if problem != OTHER
    )


def _walk(
    home: Path, limit: int, kept: Iterable[Path | None] = ()
) -> Iterator[tuple[Path, list[str], list[LeftOut]]]:
    """Every folder with the names of its files, and what is told of the walk itself."""
    seen: set[str] = set()
    closed: list[OSError] = []
    count = 0
    for place, folders, files in os.walk(home, followlinks=True, onerror=closed.append):
        here, told = Path(place), []
        real = os.path.realpath(here)
        if real in seen or here in kept:  # links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        hidden = sorted(name for name in (*folders, *files) if is_hidden(name))
        if hidden:
            told.append(LeftOut(HIDDEN, here / hidden[0], len(hidden)))
        folders[:] = sorted({*folders} - {*hidden})
        count += len(files) + len(folders)
        if count > limit:
            told.append(LeftOut(REST, here, 1, f"more than {limit:,} files"))
            folders.clear()
        yield here, sorted({*files} - {*hidden}), told
        if count > limit:
            return
    denied = [error.filename for error in closed if isinstance(error, PermissionError)]
    yield home, [], [LeftOut(CLOSED, Path(name)) for name in denied]


def _kind(path: Path) -> str | None:
    """Why a file is no picture that is read; None if it is one."""
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return None
    if suffix in PICTURED:
        return KIND
    if suffix in ARCHIVES:
        return PACKED
    if not path.exists():
        return LOST
    with suppress(OSError):
        if suffix not in NO_HOLDERS and path.is_file():  # a pipe would never end
            with path.open("rb") as file:
                return UNNAMED if STARTS.match(file.read(16)) else OTHER
    return OTHER


def _by_kind(here: Path, names: Iterable[str]) -> tuple[list[LeftOut], list[str]]:
    """What is told of each kind and suffix of files in a folder; and its pictures."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    pictures = []
    for name in names:
        kind = _kind(here / name)
        if kind is None:
            pictures.append(name)
        else:
            groups[kind, Path(name).suffix.lower()].append(name)
    told = [
        LeftOut(kind, here / names[0], len(names), suffix)
        for (kind, suffix), names in groups.items()
    ]
    return told, pictures


def _among_pictures(
    home: Path,
    rows: set[str],
    named: set[str],
    kept: set[Path | None],
    listing: Listing | None,
) -> Iterator[LeftOut]:
    """What is not read below the folder of the pictures."""
    classes = {str(PurePosixPath(path).parent) for path in rows}
    above = {str(folder) for path in classes for folder in PurePosixPath(path).parents} or {"."}
    parents = {str(PurePosixPath(path).parent) for path in classes}
    kept = {path for path in kept if path not in {home / folder for folder in classes | above}}
    strays: dict[str, int] = {}  # folders beside classes and parts, and how many pictures they hold
    for here, files, told in _walk(home, WALKED + 4 * len(rows), kept):
        yield from told
        told, pictures = _by_kind(here, files)
        yield from told
        inside = here.relative_to(home)
        lines = [folder.as_posix() for folder in reversed((inside / "x").parents)]
        top = next((folder for folder in lines if folder not in above), None)
        if inside.as_posix() in classes:
            paths = [(inside / name).as_posix() for name in pictures]
            missing = [path for path in paths if path not in named]
            if missing:
                yield LeftOut(UNLISTED, home / missing[0], len(missing))
        elif top is None and pictures:
            yield LeftOut(LOOSE, here / pictures[0], len(pictures))
        elif top in classes and pictures:
            yield LeftOut(DEEPER, here / pictures[0], len(pictures))
        elif top is not None and top not in classes:
            strays[top] = strays.get(top, 0) + len(pictures)
    if listing is None:
        return
    in_lists = listing.images != listing.home  # what lies in its folder need not be in them
    for folder, count in strays.items():
        path = home / folder
        if count:
            yield LeftOut(UNLISTED if in_lists else STRAY, path, count, f"pictures in it: {count}")
        elif str(PurePosixPath(folder).parent) in parents or path.name.lower() in PART_NAMES:
            yield LeftOut(EMPTY, path)


def _among_maps(folder: Path, mapped: set[Path]) -> Iterator[LeftOut]:
    """What is not read in a folder of map files."""
    for here, files, told in _walk(folder, WALKED + 4 * len(mapped)):
        yield from told
        maps = [name for name in files if Path(name).suffix.lower() in MAP_EXTENSIONS]
        alone = [name for name in maps if here / name not in mapped]
        if alone:
            yield LeftOut(NO_MAP, here / alone[0], len(alone))
        others = sorted({*files} - {*maps})
        if others:
            suffixes = sorted({Path(name).suffix.lower() for name in others})
            yield LeftOut(BESIDE, here / others[0], len(others), " ".join(suffixes))


def _among_corrections(folder: Path, ids: set[int]) -> Iterator[LeftOut]:
    """What is not read in a folder of corrections."""
    with suppress(OSError):
        corrections, skipped = load_corrections(folder)
        yield from (LeftOut(SKIPPED, file.path, 1, file.reason) for file in skipped)
        alone = [one.image_id for one in corrections]
        alone = [name for name in alone if not (name.isdigit() and int(name) in ids)]
        if alone:
            words = f"of image {alone[0]}, which the data set does not have"
            yield LeftOut(NO_MAP, folder, len(alone), words)
        files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() != ".json"]
        files = [path for path in files if path.is_file() and not is_hidden(path.name)]
        files = [path for path in files if not PREVIEW.fullmatch(path.name)]
        if files:
            yield LeftOut(BESIDE, files[0], len(files))

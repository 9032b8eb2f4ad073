"""Files that are never half-written (a temporary name in the same folder, then a rename), and what
names mean: of paths in environment variables, and in a folder of data.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def _root() -> Path:
    """The project's folder; where only the package is installed, the folder that one stands in.

    Else runs and results would go where packages are installed, and with the next install be lost.
    """
    above = Path(__file__).resolve().parents[1]
    project = above / "pyproject.toml"  # some packages leave one of theirs beside them
    ours = project.is_file() and "sigmoid-attention-vit" in project.read_text(encoding="utf-8")
    return above if ours else Path.cwd()


ROOT = _root()

# What to do where an environment variable names something that is not there.
INPUTS = {
    "DATA_DIR": "set DATA_DIR to the folder that holds the data",
    "MAPS": "set MAPS to gaze, boxes, parts, none, or a folder of map files or corrections",
    "SPLIT": "make it with `python -m lib split`",
    "WEIGHTS": "set WEIGHTS to a .safetensors or .pt file",
    "ZERO_SHOT": "set ZERO_SHOT to a .npz file of text embeddings (models/README.md)",
}


class StorageError(OSError):
    """A file could not be written; what stood there before is intact."""


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for lack of room: on the disk, in the quota, or in one file."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def move_into_place(finished: Path, path: Path) -> None:
    """Gives a finished file or folder its name, in one step; an old file is replaced."""
    os.replace(finished, path)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """An open file that becomes `path` when the block ends; after any error nothing of it is left.

    `temporary` is its name meanwhile, in the same folder. Left out, it is a name of its own: two
    processes may write the same file at the same time. OSErrors pass as they are.
    """
    temporary = temporary or path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut leaves a name only
        move_into_place(temporary, path)
    finally:
        with suppress(OSError):  # in a read-only folder nothing was made
            temporary.unlink(missing_ok=True)  # still there only after an error


def write_bytes(path: Path, *content: bytes | memoryview) -> None:
    """Writes a file of these parts; `path` holds the old content or the new, whatever happens.

    Raises:
        StorageError: full disk, read-only folder and the like; names the file and the remedy.
    """
    path = Path(path)
    try:
        with replacing(path) as file:
            file.writelines(content)
    except OSError as error:
        size = sum(map(len, content)) / 1e6
        kept = "the file that was there is intact" if path.is_file() else "nothing was there before"
        raise StorageError(
            f"{path} could not be written ({error.strerror}; {size:.0f} MB); {kept}. "
            "Free space, or name a folder that can be written"
        ) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8.

    Python has the bytes of a file name that is not UTF-8 as halves of letters, which no encoding
    has. They are written as escapes (\\udce9); JSON reads them back as they were.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def file_name(words: str, longest: int = 100) -> str:
    """What a person calls something, as part of a file's name that any system takes.

    Names that will do stay as they are. Others lose what is not allowed, and what is beyond
    `longest` bytes, and get a digest of the whole: different names stay different.
    """
    raw = words.encode(errors="backslashreplace")
    safe = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]+', "_", words).rstrip(" .")
    if safe == words and 0 < len(raw) <= longest:
        return words
    start = safe.encode(errors="ignore")[: longest - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(raw).hexdigest()[:8]}"


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; StorageError names the folder and the remedy."""
    try:
        os.fsencode(path).decode()
    except UnicodeError as error:
        raise StorageError(
            f"{path} is not UTF-8, and weights could not be read from there; name another folder"
        ) from error
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be made ({error.strerror}); name a folder that can be written"
        ) from error


@contextmanager
def claimed(paths: Iterable[Path]) -> Iterator[Path]:
    """The first of these paths where nothing is, nobody else's while the context lasts.

    Several processes may claim at once. Who makes the mark beside a path owns it, the others go on
    to the next. Only the owner makes the file, so looking for it after the claim is safe.

    Raises:
        StorageError: all are taken.
    """
    path = None
    for path in paths:
        mark = path.with_name(f".{path.name}.part")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(
                f"{path.parent} cannot be written to ({error.strerror}); name a folder that can be"
            ) from error
        try:
            if not path.exists():
                yield path
                return
        finally:
            mark.unlink(missing_ok=True)
    raise StorageError(f"no name is free up to {path}; use another folder")


# ------------------------------------------------------------------- paths of the environment


def asked(variable: str) -> str:
    """The value of an environment variable without quotes and spaces around it; "" when unset."""
    return os.environ.get(variable, "").strip().strip("\"'").strip()


def resolved(path: str | Path) -> Path:
    """A path made absolute, `~` expanded.

    A relative one starts where you stand. The kernels of this project's notebooks stand in
    notebooks/: there it starts in ROOT, as for commands that are typed in ROOT.
    """
    path = Path(os.path.expanduser(path))
    if path.is_absolute():
        return path
    here = Path.cwd()
    return (ROOT if here.is_relative_to(ROOT / "notebooks") else here) / path


def there(variable: str, missing: bool = False) -> Path | None:
    """The file or folder that an environment variable names; None where it is unset.

    What is not where `resolved` says is looked for in the working folder, then in the shell's.

    Raises:
        FileNotFoundError: it is in none of them (unless it may be `missing`); names all, and the
            remedy.
    """
    text = asked(variable)
    if not text:
        return None
    text = os.path.expanduser(text)  # an absolute path is the same below every folder
    below = (Path(folder, text) for folder in (Path.cwd(), os.environ.get("PWD") or Path.cwd()))
    first, *others = dict.fromkeys([resolved(text), *below])
    found = next((path for path in (first, *others) if path.exists()), None)
    if found is None and not missing:
        also = "".join(f", and so is {path}" for path in others)
        also += "" if Path(text).is_absolute() else f' ({variable} is "{text}")'
        raise FileNotFoundError(f"{first} is missing{also}; {INPUTS[variable]}.")
    return found or first


# ------------------------------------------------------------------------------ folders of data

CUB2010_HOMES = ("CUB_200_2010", "cub200", "")  # of CUB-200-2010, below DATA_DIR
# What systems leave in any folder, beside names that start with a dot (.DS_Store, ._picture.jpg).
OF_SYSTEMS = {"__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "@eadir"}
OF_SYSTEMS |= {"system volume information"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's own: no picture, no map, no class."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def visible(folder: Path) -> list[Path]:
    """What lies directly in a folder, by name, without what is hidden."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def one_form(name: str) -> str:
    """A name in the one Unicode form (NFC) that names are compared in: a Mac writes another."""
    return unicodedata.normalize("NFC", name)


def has_corrections(folder: Path) -> bool:
    """Whether a .json file directly in a folder is a correction of the editor.

    Other programs leave .json files beside maps, so its keys decide; the start holds them.
    """
    for path in visible(folder) if folder.is_dir() else ():
        if path.suffix.lower() == ".json" and path.is_file():
            with path.open("rb") as file:
                start = file.read(2**16)
            if b'"schema"' in start and b'"image_id"' in start:
                return True
    return False


def maps_beside(root: Path) -> Path | None:
    """The folder of human maps that lies beside class folders, `maps` in any case; None: no such.

    Human maps lie in class folders of their own, or are named like one picture each. A folder that
    holds files of other names is a class of pictures that is called maps.

    Raises ValueError where two folders are.
    """
    folders = [path for path in visible(root) if path.is_dir()] if root.is_dir() else []
    found = [
        folder
        for folder in folders
        if folder.name.lower() == "maps"
        and _holds_maps(folder, [other for other in folders if other != folder])
    ]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} both hold human maps; keep them in one.")
    return found[0] if found else None


def bubbles_in(root: Path) -> Path:
    """Human maps of CUB-200-2010: bubbles_att beside its pictures, as the original experiment has
    them; `root`/maps where there is none.
    """
    found = (root / home / "bubbles_att" for home in CUB2010_HOMES)
    return next((folder for folder in found if folder.is_dir()), root / "maps")


def _holds_maps(folder: Path, beside: list[Path]) -> bool:
    inside = visible(folder)
    files = [path for path in inside if not path.is_dir()]
    arrays = any(path.suffix.lower() == ".npy" for path in files)
    if not files or arrays or has_corrections(folder):
        return len(inside) > 0
    pictures, classes, flat = Counter(), set(), False
    for other in beside:
        there = visible(other)
        nested = [path for path in there if path.is_dir()]
        flat |= len(nested) < len(there)
        classes |= {other.name} | {path.name for path in nested if len(nested) == len(there)}
        there += [path for deeper in nested for path in visible(deeper)]
        pictures.update(one_form(path.stem) for path in there)
    # Beside train/ and val/ alone, nothing is a class.
    if not flat or any(path.name in classes for path in inside):
        return True
    return 2 * sum(pictures[one_form(path.stem)] == 1 for path in files) > len(files)

"""Files that are never half-written: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class StorageError(OSError):
    """A file could not be written; what stood there before is intact."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; `path` holds the old content or the new, whatever happens meanwhile.

    Raises:
        StorageError: full disk, read-only folder and the like; names the file and the remedy.
    """
    path = Path(path)
    # A name of its own: two processes may write the same file at the same time.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut leaves a name only
        temporary.replace(path)
    except OSError as error:
        kept = "the file that was there is intact" if path.is_file() else "nothing was there before"
        raise StorageError(
            f"{path} could not be written ({error.strerror}; {len(content) / 1e6:.0f} MB); {kept}. "
            "Free space, or name a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):  # in a read-only folder nothing was made
            temporary.unlink(missing_ok=True)  # still there only after an error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; StorageError names the folder and the remedy."""
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
        try:
            if not path.exists():
                yield path
                return
        finally:
            mark.unlink(missing_ok=True)
    raise StorageError(f"no name is free up to {path}; use another folder")

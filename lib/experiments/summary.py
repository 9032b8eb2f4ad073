"""One table of all that was ever evaluated: a row a run, appended by whoever evaluates."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from lib.files import StorageError, make_folder, write_text

# The first columns of every version of this tool; a file that lacks one is not ours.
KEYS = ("date", "result", "run", "variant", "seed")


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of a summary as text, in their order; empty where there is no file.

    Raises:
        ValueError: the file is damaged, or not a summary; names the line and the remedy.
    """
    if not path.exists():
        return []
    try:
        # Line ends are kept as they are: a cell may hold one.
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(_refusal(path, f"cannot be read as a table ({error})")) from error
    names = reader.fieldnames or []
    missing = [name for name in KEYS if name not in names]
    if missing:
        raise ValueError(_refusal(path, f"has no column {missing[0]}"))
    if len(set(names)) < len(names):
        raise ValueError(_refusal(path, "has two columns of one name"))
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():  # more cells than columns, or fewer
            raise ValueError(_refusal(path, f"has a row {number} that does not fit its columns"))
    if not text.endswith("\n"):
        raise ValueError(_refusal(path, "ends in the middle of a line"))
    return rows


def _refusal(path: Path, reason: str) -> str:
    return f"{path} {reason}, so nothing is added to it; mend it, or move it away"


def append_summary(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows to a summary; made where there is none.

    Two processes that append at once wait for each other (a lock file beside the summary), and a
    reader finds the old file or the new one, never half of it. Columns may differ from those that
    are there: new ones follow the old, and cells without a value are empty.

    Args:
        rows: each with `KEYS` and any other columns; None and NaN are empty cells.

    Raises:
        ValueError: the file is damaged or not a summary; it stays as it is.
        StorageError: it cannot be written.
    """
    make_folder(path.parent)
    try:
        with FileLock(path.with_name(f"{path.name}.lock")):
            there = read_summary(path)
            write_text(path, _as_csv([*there, *rows]))
    except PermissionError as error:
        raise StorageError(
            f"{path} cannot be written to ({error.strerror}); name a folder that can be written"
        ) from error


def _as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    names = list(dict.fromkeys([*KEYS, *(name for row in rows for name in row)]))
    text = io.StringIO(newline="")
    # With the line end of the standard (RFC 4180): with \n alone, a \r in a cell is not quoted.
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    # NaN is the one value that differs from itself.
    writer.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in rows)
    return text.getvalue()

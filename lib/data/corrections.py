"""What people asked of the attention of single pictures: the schema, saving and loading.

A `Correction` is an `AttentionEdit` with the picture it belongs to, who made it and when. Each
correction is one file `<time>-<image id, made safe>-<4 hex digits>.json` that holds one line of
JSON, with a picture of it beside it, `<same name>.png`, where one was given:

    schema        1
    image_id      id of the picture in the data set
    class_name    of the picture, may be ""
    file          name of the picture's file, may be ""; older files have no such field
    grid          [gh, gw]
    mask          gh * gw characters 0 or 1, row by row; 1 where the cell is edited
    values        gh * gw numbers from 0 to 1 with at most 4 decimals; null where not edited
    blocks, heads, queries, offset    the scope, as in `AttentionEdit`; heads from 0
    strength      share of the shift that is made, from 0 to 1; older files have none, that is 1
    model         fingerprint of the weights that the person looked at
    author, note  any text, may be ""
    time          2026-08-01T12:34:56Z: ISO 8601, UTC, seconds
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from lib.data.maps import painted_on
from lib.edit import AttentionEdit, brief, is_index, is_share
from lib.files import (
    StorageError,
    claimed,
    make_folder,
    move_into_place,
    one_form,
    write_bytes,
)

SCHEMA = 1
MAX_BYTES = 4 * 2**20  # of one file; a correction on 64 x 64 patches takes 0.04 MB
NAME_LENGTH = 40  # characters of the image id that stay in the file name
REPLACED = "replaced by "  # before the name of the newer file, in the reason
TRASH = "trash"  # folder below that of the corrections, for those that somebody deleted

TEXTS = ("image_id", "class_name", "file", "model", "author", "time", "note")
SCOPE = ("blocks", "heads", "queries", "offset")
CELLS = {"grid": list, "mask": str, "values": list}
YOUNGER = {"file": "", "strength": 1}  # than the schema: what a file without them means


class CorrectionError(ValueError):
    """A correction that makes no sense, or that cannot be saved or read."""


@dataclass(frozen=True)
class Correction:
    """An edit that a person wants to keep, for one picture.

    Raises:
        CorrectionError: names the field, what it holds, and what it may hold.
    """

    image_id: str  # id of the picture in the data set; any text but ""
    edit: AttentionEdit  # on the grid of patches, mask [gh, gw]
    model: str  # fingerprint of the weights that the person looked at
    author: str
    time: str  # ISO 8601 with a time zone; kept in UTC and whole seconds, 2026-08-01T12:34:56Z
    class_name: str = ""
    note: str = ""
    file: str = ""  # name of the picture's file; "" where it is drawn, or not known

    def __post_init__(self) -> None:
        for name in TEXTS:
            if not isinstance(getattr(self, name), str):
                raise CorrectionError(f"{name} is {brief(getattr(self, name))}; give a text")
        if not self.image_id:
            raise CorrectionError("image_id is empty; name the picture")
        edit = self.edit
        if not isinstance(edit, AttentionEdit):
            raise CorrectionError(f"edit is a {type(edit).__name__}; give an AttentionEdit")
        if edit.mask.ndim != 2:
            raise CorrectionError(f"mask is bool {list(edit.mask.shape)}; give bool [gh, gw]")
        if not isinstance(edit.heads, str) and edit.heads[0] < 0:
            raise CorrectionError(
                f'heads is {list(edit.heads)}; use "mean", "all" or different indices from 0'
            )
        object.__setattr__(self, "time", _utc(self.time))

    @classmethod
    def now(
        cls, image_id: str, edit: AttentionEdit, model: str, author: str, **texts: str
    ) -> Correction:
        """A correction made at this moment; `texts` are class_name, note and file."""
        return cls(image_id, edit, model, author, datetime.now(UTC).isoformat(), **texts)


@dataclass(frozen=True)
class Skipped:
    """A file that `load_corrections` left out."""

    path: Path
    reason: str  # a clause that names the field and what it holds


@dataclass(frozen=True)
class Saved:
    """A file of the folder, as `list_corrections` finds it."""

    path: Path
    correction: Correction | None  # None: it cannot be read
    reason: str  # why it does not count, a clause; "" where it does


def save_correction(
    correction: Correction, folder: str | Path, preview: bytes | None = None
) -> Path:
    """Write a correction to a file of its own; the folder is made.

    Several processes may save to the same folder. No file is overwritten, and none appears before
    it is whole: a correction that was given a preview is never seen without it.

    Args:
        correction: what to keep; its values are rounded to 4 decimals.
        folder: where corrections are kept.
        preview: a PNG file of what the person saw, kept as it is.

    Returns:
        Path of the .json file. Within the same second, later corrections of a picture get higher
        numbers.

    Raises:
        CorrectionError: when the file would be larger than `load_corrections` reads.
        StorageError: when it cannot be written; nothing of it is left behind.
    """
    line = _line(_to_fields(correction))
    folder = Path(folder)
    make_folder(folder)
    stem = _stem(correction)
    names = (folder / f"{stem}-{number:04x}.json" for number in range(16**4))
    with claimed(name for name in names if not name.with_suffix(".png").exists()) as path:
        picture = path.with_suffix(".png")
        try:
            if preview is not None:
                write_bytes(picture, preview)
            write_bytes(path, line)
        except BaseException:  # an interrupt from the keyboard too
            picture.unlink(missing_ok=True)
            raise
    return path


def load_corrections(
    folder: str | Path, grid: tuple[int, int] | None = None
) -> tuple[list[Correction], list[Skipped]]:
    """Read the corrections of a folder, at most one a picture, by time.

    Training wants one answer a picture. So where several usable corrections name the same picture,
    the newest counts, whatever their scopes (blocks, heads, queries, offset) are; the older ones
    are skipped as replaced. Those of the same second count in the order they were saved in.

    Args:
        folder: where corrections are kept; every *.json file directly in it is looked at.
        grid: (gh, gw); those on a finer one are brought to it (`on_grid`), on others skipped.

    Returns:
        The corrections, oldest first, and the files that were left out, by name, each with the
        reason. A damaged file is left out as a whole, and never raises.

    Raises:
        FileNotFoundError: when there is no such folder. An empty one gives ([], []).
    """
    listed = list_corrections(folder, grid)
    skipped = [Skipped(one.path, one.reason) for one in listed if one.reason]
    found = [one.correction for one in listed if not one.reason]
    found = found if grid is None else [on_grid(one, grid) for one in found]
    return found, sorted(skipped, key=lambda left: left.path)


def list_corrections(folder: str | Path, grid: tuple[int, int] | None = None) -> list[Saved]:
    """Every *.json file directly in a folder: first those that cannot be read, then by time.

    Those that `load_corrections` leaves out have the reason; arguments and errors are as there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; save a correction in the attention editor "
            "(notebook 06), or name the folder that holds them."
        )
    found: dict[Path, Correction] = {}
    listed: list[Saved] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found[path] = _read_correction(path)
        except CorrectionError as error:
            listed.append(Saved(path, None, str(error)))
    other = {path: _misfit(one, grid) for path, one in found.items()}
    in_order = sorted(found, key=lambda path: (found[path].time, path.name))
    # An id may have passed to another picture; a later one takes the place.
    pictures = {path: (found[path].image_id, found[path].file) for path in in_order}
    newest = {pictures[path]: path for path in in_order if not other[path]}
    for path in in_order:
        last = newest.get(pictures[path])
        replaced = "" if last == path or other[path] else f"{REPLACED}{last.name}"
        listed.append(Saved(path, found[path], other[path] or replaced))
    return listed


def _misfit(correction: Correction, wanted: tuple[int, int] | None) -> str:
    """Why a correction on one grid is of no use on another; "" where it is, see `on_grid`."""
    found = correction.edit.grid
    if wanted is None or found == tuple(wanted):
        return ""
    rows, columns = wanted
    if found[0] >= rows and found[1] >= columns:
        is_lost = correction.edit.mask.any() and not on_grid(correction, wanted).edit.mask.any()
        return f"it fills no half of a cell of the model's {rows} x {columns}" if is_lost else ""
    return f"grid is {found[0]} x {found[1]}, but the model has {rows} x {columns} patches"


def on_grid(correction: Correction, grid: tuple[int, int]) -> Correction:
    """The correction on another grid, see `painted_on`; the very same where it is on this one."""
    edit = correction.edit
    if edit.grid == tuple(grid):
        return correction
    painted = painted_on(torch.where(edit.mask, edit.values, torch.nan).numpy(), grid)
    cells = ~np.isnan(painted)
    return replace(correction, edit=AttentionEdit(cells, np.nan_to_num(painted), **edit.scope))


def found_again(
    corrections: Sequence[Correction], pictures: Mapping[str, tuple[str, str]]
) -> tuple[list[Correction], list[Correction]]:
    """Corrections with the ids that their pictures have now: a new picture moves those of others.

    Args:
        corrections: by time. pictures: class name and file name of every picture, by image id.

    Returns:
        One a picture, the newest; those that know no file keep their id. And those whose class has
        no such file, or several in its parts, where the id does not tell which.
    """
    ids = ids_by_name(pictures)
    here: dict[object, Correction] = {}
    gone = []
    for place, one in enumerate(corrections):
        image = id_now(one, ids)
        if image is None:
            gone.append(one)
        else:
            here[(image, one.file) if one.file else place] = replace(one, image_id=image)
    return list(here.values()), gone


def ids_by_name(pictures: Mapping[str, tuple[str, str]]) -> dict[tuple[str, ...], list[str]]:
    """Image ids by class name and file name, from those by image id."""
    ids: dict[tuple[str, ...], list[str]] = {}
    for image, names in pictures.items():
        ids.setdefault(tuple(map(one_form, names)), []).append(image)
    return ids


def id_now(correction: Correction, ids: Mapping[tuple[str, ...], list[str]]) -> str | None:
    """The id that a correction's picture has now, see `found_again`; None: it is gone."""
    now = ids.get((one_form(correction.class_name), one_form(correction.file)), [])
    if not correction.file or correction.image_id in now:
        return correction.image_id
    return now[0] if len(now) == 1 else None


# ----------------------------------------------------------------- what becomes of a saved one


def write_note(path: str | Path, note: str) -> None:
    """Gives a saved correction another note; all else in the file stays as it is.

    Raises:
        CorrectionError: it cannot be read, or would be too large. StorageError: nor written.
    """
    path = Path(path)
    _read_correction(path)
    write_bytes(path, _line(_from_json(path) | {"note": note}))


def discard(path: str | Path) -> Path:
    """Moves a saved file and its picture to the folder `TRASH` beside it; returns the new path."""
    path = Path(path)
    return _moved(path, path.parent / TRASH)


def bring_back(path: str | Path) -> Path:
    """Moves a file from the folder `TRASH` to where it was saved; returns the new path."""
    path = Path(path)
    return _moved(path, path.parent.parent)


def _moved(path: Path, folder: Path) -> Path:
    """Moves a file, and its picture first, to a folder, under a name that is free there.

    Raises StorageError where one of them cannot be moved; both are then where they were.
    """
    make_folder(folder)
    others = (f"{path.stem}-{number:04x}.json" for number in range(16**4))
    names = (folder / name for name in (path.name, *others))
    with claimed(name for name in names if not name.with_suffix(".png").exists()) as new:
        pictures = path.with_suffix(".png"), new.with_suffix(".png")
        has_picture = pictures[0].is_file()
        try:
            if has_picture:
                move_into_place(*pictures)
            move_into_place(path, new)
        except OSError as error:
            if has_picture and pictures[1].is_file():
                move_into_place(*pictures[::-1])
            raise StorageError(
                f"{path} could not be moved to {folder} ({error.strerror}); it is where it was, "
                "unless somebody else moved it"
            ) from error
    return new


# ----------------------------------------------------------------------------------------- saving


def _utc(time: str) -> str:
    """The same moment in UTC and whole seconds; texts in this form sort by time."""
    try:
        moment = datetime.fromisoformat(time)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError) as error:  # the latter at the ends of the calendar
        raise CorrectionError(
            f"time is {brief(time)}; give ISO 8601 with a time zone, 2026-08-01T12:34:56Z"
        ) from error


def _to_fields(correction: Correction) -> dict[str, object]:
    edit = correction.edit
    mask, values = edit.mask.ravel().tolist(), edit.values.ravel().tolist()
    return {
        "schema": SCHEMA,
        "image_id": correction.image_id,
        "class_name": correction.class_name,
        "file": correction.file,
        "grid": list(edit.grid),
        "mask": "".join("01"[edited] for edited in mask),
        "values": [
            round(value, 4) if edited else None for edited, value in zip(mask, values, strict=True)
        ],
        **{name: getattr(edit, name) for name in SCOPE},
        "strength": round(edit.strength, 4),
        "model": correction.model,
        "author": correction.author,
        "time": correction.time,
        "note": correction.note,
    }


def _line(fields: dict[str, object]) -> bytes:
    """The content of a file. CorrectionError when it would be larger than is read."""
    line = (json.dumps(fields) + "\n").encode("ascii")
    if len(line) > MAX_BYTES:
        raise CorrectionError(
            f"The correction of {brief(fields['image_id'])} takes {len(line) / 1e6:.1f} MB, "
            f"but a file may have {MAX_BYTES / 1e6:.1f} MB; use a coarser grid or a shorter note."
        )
    return line


def _stem(correction: Correction) -> str:
    """Start of the file name: short, and letters that every file system takes.

    The id's end is kept, not its start: in ids that are paths, the end tells pictures apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", correction.image_id)[-NAME_LENGTH:]
    return f"{correction.time.replace(':', '')}-{safe}"


# ---------------------------------------------------------------------------------------- loading


def _read_correction(path: Path) -> Correction:
    """The correction in a file. Raises CorrectionError with the reason why there is none."""
    fields = _from_json(path)
    schema = fields.get("schema")
    if not is_index(schema) or schema != SCHEMA:  # first: other schemas have other fields
        raise CorrectionError(f"schema is {brief(schema)}; this version reads {SCHEMA}")
    fields = YOUNGER | fields
    for name in (*TEXTS, *CELLS, *SCOPE):
        if name not in fields:
            raise CorrectionError(f"{name} is missing")
    return Correction(edit=_to_edit(fields), **{name: fields[name] for name in TEXTS})


def _from_json(path: Path) -> dict[str, object]:
    if not path.is_file():  # reading a pipe would wait for ever
        raise CorrectionError("it is not a file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CorrectionError(f"it cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise CorrectionError(
            f"it has more than {MAX_BYTES / 1e6:.1f} MB; no correction is as large"
        )
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # the latter: thousands of open brackets
        raise CorrectionError(f"it is not JSON, or cut off: {error}") from error
    if not isinstance(fields, dict):
        raise CorrectionError(f"it holds {brief(fields)}; expected a JSON object")
    return fields


def _to_edit(fields: dict) -> AttentionEdit:
    for name, kind in CELLS.items():
        if not isinstance(fields[name], kind):
            expected = {str: "a text", list: "a list"}[kind]
            raise CorrectionError(f"{name} is {brief(fields[name])}; expected {expected}")
    grid, mask, values = (fields[name] for name in CELLS)
    if len(grid) != 2 or not all(is_index(cells) and cells > 0 for cells in grid):
        raise CorrectionError(f"grid is {brief(grid)}; expected two numbers above 0")
    for name in ("mask", "values"):
        if len(fields[name]) != grid[0] * grid[1]:
            raise CorrectionError(
                f"{name} has {len(fields[name])} cells, but grid is {grid[0]} x {grid[1]}"
            )
    if set(mask) - {"0", "1"}:
        raise CorrectionError(f"mask is {brief(mask)}; expected 0 and 1 only")
    for cell, (edited, value) in enumerate(zip(mask, values, strict=True)):
        if edited == "0" and value is not None:
            raise CorrectionError(f"values holds {brief(value)} at {cell}, where mask is 0")
        if edited == "1" and not is_share(value):
            raise CorrectionError(f"values holds {brief(value)} at {cell}; expected 0 to 1")
    painted = np.array([edited == "1" for edited in mask]).reshape(grid)
    asked = np.array(values, dtype=np.float32).reshape(grid)  # NaN where not painted
    if not is_share(fields["strength"]):
        raise CorrectionError(f"strength is {brief(fields['strength'])}; expected 0 to 1")
    try:
        scope = {name: fields[name] for name in (*SCOPE, "strength")}
        return AttentionEdit(painted, asked, **scope)
    except ValueError as error:
        raise CorrectionError(str(error)) from error

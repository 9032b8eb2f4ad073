"""What people asked of the attention of single pictures: the schema, saving and loading.

An `Edit` says which patches of a picture should get which sigmoid attention, and in which part of
the model. A `Correction` is an edit with the picture it belongs to, who made it and when. Each
correction is one file `<time>-<image id, made safe>-<4 hex digits>.json` that holds one line of
JSON, with a picture of it beside it, `<same name>.png`, where one was given:

    schema        1
    image_id      id of the picture in the data set
    class_name    of the picture, may be ""
    grid          [gh, gw]
    mask          gh * gw characters 0 or 1, row by row; 1 where the cell is edited
    values        gh * gw numbers from 0 to 1 with at most 4 decimals; null where not edited
    blocks, heads, queries, offset    the scope, as in `Edit`
    model         fingerprint of the weights that the person looked at
    author, note  any text, may be ""
    time          2026-08-01T12:34:56Z: ISO 8601, UTC, seconds
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

SCHEMA = 1
MAX_BYTES = 4 * 2**20  # of one file; a correction on 64 x 64 patches takes 0.04 MB
NAME_LENGTH = 40  # characters of the image id that stay in the file name

FIELDS: dict[str, type | tuple[type, ...]] = {
    "image_id": str,
    "class_name": str,
    "grid": list,
    "mask": str,
    "values": list,
    "blocks": (str, list),
    "heads": (str, list),
    "queries": str,
    "offset": str,
    "model": str,
    "author": str,
    "time": str,
    "note": str,
}
KINDS = {str: "a text", list: "a list", (str, list): "a text or a list"}  # of FIELDS, in words

_brief = reprlib.Repr()  # quotes what a file holds without repeating megabytes of it
_brief.maxstring = 80


class FeedbackError(ValueError):
    """An edit or a correction that makes no sense, or that cannot be saved or read."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What a person asks of the attention of one picture (numpy twin of attention.AttentionEdit).

    The arrays are copied and read-only. Indices of blocks and heads are sorted, so that two edits
    that ask for the same compare equal.

    Raises:
        FeedbackError: names the field, what it holds, and what it may hold.
    """

    mask: np.ndarray  # bool [gh, gw]; True where the cell is edited
    values: np.ndarray  # float32 [gh, gw], wanted sigmoid attention in [0, 1]; 0 where not masked
    blocks: str | tuple[int, ...] = "last"  # "last", "last2", "all", or indices (-1: the last)
    heads: str | tuple[int, ...] = "all"  # "all" or indices from 0
    queries: str = "cls"  # "cls" or "all"
    offset: str = "none"  # "none" or "centred"

    def __post_init__(self) -> None:
        mask = np.array(self.mask)
        if mask.dtype != bool or mask.ndim != 2 or mask.size == 0:
            raise FeedbackError(
                f"mask is {mask.dtype} {list(mask.shape)}; give bool [gh, gw], True where edited"
            )
        values = _numbers(self.values)
        if values.shape != mask.shape:
            raise FeedbackError(
                f"values is {list(values.shape)}, but mask is {list(mask.shape)}; "
                "give one value a cell"
            )
        outside = mask & ~((values >= 0) & (values <= 1))  # NaN is outside too
        if outside.any():
            raise FeedbackError(
                f"values holds {values[outside][0]:g} on an edited cell; give 0 to 1"
            )
        values = np.where(mask, values, 0).astype(np.float32)
        mask.flags.writeable = values.flags.writeable = False
        blocks = _scope("blocks", self.blocks, ("last", "last2", "all"), signed=True)
        heads = _scope("heads", self.heads, ("all",), signed=False)
        _one_of("queries", self.queries, ("cls", "all"))
        _one_of("offset", self.offset, ("none", "centred"))
        _set(self, mask=mask, values=values, blocks=blocks, heads=heads)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return (
            np.array_equal(self.mask, other.mask)
            and np.array_equal(self.values, other.values)
            and (self.blocks, self.heads, self.queries, self.offset)
            == (other.blocks, other.heads, other.queries, other.offset)
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw), the patches of the model."""
        return self.mask.shape

    @property
    def is_empty(self) -> bool:
        """Whether no cell is edited."""
        return not self.mask.any()


@dataclass(frozen=True)
class Correction:
    """An edit that a person wants to keep, for one picture.

    Raises:
        FeedbackError: names the field, what it holds, and what it may hold.
    """

    image_id: str  # id of the picture in the data set; any text but ""
    edit: Edit
    model: str  # fingerprint of the weights that the person looked at
    author: str
    time: str  # ISO 8601 with a time zone; kept in UTC and whole seconds, 2026-08-01T12:34:56Z
    class_name: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("image_id", "model", "author", "time", "class_name", "note"):
            if not isinstance(getattr(self, name), str):
                raise FeedbackError(f"{name} is {_brief.repr(getattr(self, name))}; give a text")
        if not self.image_id:
            raise FeedbackError("image_id is empty; name the picture")
        if not isinstance(self.edit, Edit):
            raise FeedbackError(f"edit is a {type(self.edit).__name__}; give an Edit")
        _set(self, time=_utc(self.time))

    @classmethod
    def now(
        cls,
        image_id: str,
        edit: Edit,
        model: str,
        author: str,
        class_name: str = "",
        note: str = "",
    ) -> Correction:
        """A correction made at this moment."""
        time = datetime.now(UTC).isoformat()
        return cls(image_id, edit, model, author, time, class_name, note)


@dataclass(frozen=True)
class Skipped:
    """A file that `load_corrections` left out."""

    path: Path
    reason: str  # a clause that names the field and what it holds


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
        FeedbackError: when the file would be larger than `load_corrections` reads.
        OSError: when it cannot be written; nothing of it is left behind.
    """
    line = (json.dumps(_to_fields(correction)) + "\n").encode("ascii")
    if len(line) > MAX_BYTES:
        raise FeedbackError(
            f"The correction of {_brief.repr(correction.image_id)} takes {len(line) / 1e6:.1f} MB, "
            f"but a file may have {MAX_BYTES / 1e6:.1f} MB; use a coarser grid or a shorter note."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target, claim = _claim(folder, _stem(correction))
    picture = target.with_suffix(".png")
    part = _part(picture)
    try:
        _write(claim, line)
        if preview is not None:
            _write(part, preview)
            os.replace(part, picture)
        os.replace(claim, target)
    except BaseException:  # an interrupt from the keyboard too
        for path in (claim, part, picture):
            path.unlink(missing_ok=True)
        raise
    return target


def load_corrections(
    folder: str | Path,
    grid: tuple[int, int] | None = None,
    model: str | None = None,
    image_ids: Collection[str] | None = None,
) -> tuple[list[Correction], list[Skipped]]:
    """Read the corrections of a folder, at most one a picture, by time.

    Training wants one answer a picture. So where several usable corrections name the same picture,
    the newest counts, whatever their scopes (blocks, heads, queries, offset) are; the older ones
    are skipped as replaced. Those of the same second count in the order they were saved in.

    Args:
        folder: where corrections are kept; every *.json file directly in it is looked at.
        grid: (gh, gw); corrections on another grid are skipped.
        model: fingerprint; corrections made with other weights are skipped.
        image_ids: ids of the data set; corrections of other pictures are skipped.

    Returns:
        The corrections, oldest first, and the files that were left out, by name, each with the
        reason. A damaged file is left out as a whole, and never raises.

    Raises:
        FileNotFoundError: when there is no such folder. An empty one gives ([], []).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; save a correction in the attention editor "
            "(notebook 06), or name the folder that holds them."
        )
    known = None if image_ids is None else set(image_ids)
    found: dict[Path, Correction] = {}
    skipped: list[Skipped] = []
    for path in folder.glob("*.json"):
        try:
            correction = _read(path)
            _refuse_foreign(correction, grid, model, known)
            found[path] = correction
        except FeedbackError as error:
            skipped.append(Skipped(path, str(error)))
    in_order = sorted(found, key=lambda path: (found[path].time, path.name))
    newest = {found[path].image_id: path for path in in_order}  # a later one takes the place
    counting = [path for path in in_order if newest[found[path].image_id] == path]
    for path in set(in_order) - set(counting):
        skipped.append(Skipped(path, f"replaced by {newest[found[path].image_id].name}"))
    return [found[path] for path in counting], sorted(skipped, key=lambda left: left.path)


# ----------------------------------------------------------------------------------------- fields


def _set(frozen: object, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(frozen, name, value)


def _numbers(values: object) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FeedbackError(f"values is {_brief.repr(values)}; give numbers [gh, gw]") from error


def _one_of(name: str, word: object, words: tuple[str, ...]) -> None:
    if word not in words:
        raise FeedbackError(f"{name} is {_brief.repr(word)}; use {_quoted(words)}")


def _scope(
    name: str, wanted: object, words: tuple[str, ...], signed: bool
) -> str | tuple[int, ...]:
    """A word as it is, or indices as a sorted tuple of int."""
    if isinstance(wanted, str) and wanted in words:
        return wanted
    if isinstance(wanted, tuple | list) and wanted and all(map(_is_index, wanted)):
        indices = tuple(sorted(int(index) for index in wanted))
        if len(set(indices)) == len(indices) and (signed or indices[0] >= 0):
            return indices
    kind = "different indices" if signed else "different indices from 0"
    raise FeedbackError(f"{name} is {_brief.repr(wanted)}; use {_quoted(words)} or {kind}")


def _is_index(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _quoted(words: tuple[str, ...]) -> str:
    return " or ".join(f'"{word}"' for word in words)


def _utc(time: str) -> str:
    """The same moment in UTC and whole seconds; texts in this form sort by time."""
    try:
        moment = datetime.fromisoformat(time)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError) as error:  # the latter at the ends of the calendar
        raise FeedbackError(
            f"time is {_brief.repr(time)}; give ISO 8601 with a time zone, 2026-08-01T12:34:56Z"
        ) from error


# ----------------------------------------------------------------------------------------- saving


def _to_fields(correction: Correction) -> dict[str, object]:
    edit = correction.edit
    mask = edit.mask.ravel().tolist()
    values = edit.values.ravel().tolist()
    return {
        "schema": SCHEMA,
        "image_id": correction.image_id,
        "class_name": correction.class_name,
        "grid": list(edit.grid),
        "mask": "".join("01"[edited] for edited in mask),
        "values": [
            round(value, 4) if edited else None for edited, value in zip(mask, values, strict=True)
        ],
        "blocks": edit.blocks,
        "heads": edit.heads,
        "queries": edit.queries,
        "offset": edit.offset,
        "model": correction.model,
        "author": correction.author,
        "time": correction.time,
        "note": correction.note,
    }


def _stem(correction: Correction) -> str:
    """Start of the file name: short, and letters that every file system takes.

    The id's end is kept, not its start: in ids that are paths, the end tells pictures apart.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", correction.image_id)[-NAME_LENGTH:]
    return f"{correction.time.replace(':', '')}-{safe}"


def _part(path: Path) -> Path:
    """Temporary name; no pattern for .json or .png files finds it."""
    return path.with_name(f".{path.name}.part")


def _claim(folder: Path, stem: str) -> tuple[Path, Path]:
    """A free .json name and its temporary file, which exists from now on and is ours.

    Who makes the temporary file owns the name, other processes go on to the next number. Only the
    owner makes the .json file, so looking for it after the claim is safe.
    """
    for number in range(16**4):
        target = folder / f"{stem}-{number:04x}.json"
        claim = _part(target)
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        if not target.exists() and not target.with_suffix(".png").exists():
            return target, claim
        claim.unlink()
    raise FeedbackError(f"{folder} holds all {16**4} files {stem}-*.json; use another folder.")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file


# ---------------------------------------------------------------------------------------- loading


def _read(path: Path) -> Correction:
    """The correction in a file. Raises FeedbackError with the reason why there is none."""
    fields = _from_json(path)
    schema = fields.get("schema")
    if not _is_index(schema) or schema != SCHEMA:  # first: other schemas have other fields
        raise FeedbackError(f"schema is {_brief.repr(schema)}; this version reads {SCHEMA}")
    for name, kind in FIELDS.items():
        if name not in fields:
            raise FeedbackError(f"{name} is missing")
        if not isinstance(fields[name], kind):
            raise FeedbackError(f"{name} is {_brief.repr(fields[name])}; expected {KINDS[kind]}")
    texts = ("image_id", "model", "author", "time", "class_name", "note")
    return Correction(edit=_to_edit(fields), **{name: fields[name] for name in texts})


def _from_json(path: Path) -> dict[str, object]:
    if not path.is_file():  # reading a pipe would wait for ever
        raise FeedbackError("it is not a file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FeedbackError(f"it cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise FeedbackError(f"it has more than {MAX_BYTES / 1e6:.1f} MB; no correction is as large")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # the latter: thousands of open brackets
        raise FeedbackError(f"it is not JSON, or cut off: {error}") from error
    if not isinstance(fields, dict):
        raise FeedbackError(f"it holds {_brief.repr(fields)}; expected a JSON object")
    return fields


def _to_edit(fields: dict) -> Edit:
    grid, mask, values = fields["grid"], fields["mask"], fields["values"]
    if len(grid) != 2 or not all(_is_index(cells) and cells > 0 for cells in grid):
        raise FeedbackError(f"grid is {_brief.repr(grid)}; expected two numbers above 0")
    for name in ("mask", "values"):
        if len(fields[name]) != grid[0] * grid[1]:
            raise FeedbackError(
                f"{name} has {len(fields[name])} cells, but grid is {grid[0]} x {grid[1]}"
            )
    if set(mask) - {"0", "1"}:
        raise FeedbackError(f"mask is {_brief.repr(mask)}; expected 0 and 1 only")
    for cell, (edited, value) in enumerate(zip(mask, values, strict=True)):
        if edited == "0" and value is not None:
            raise FeedbackError(f"values holds {_brief.repr(value)} at {cell}, where mask is 0")
        if edited == "1" and not _is_share(value):
            raise FeedbackError(f"values holds {_brief.repr(value)} at {cell}; expected 0 to 1")
    return Edit(
        mask=np.array([edited == "1" for edited in mask]).reshape(grid),
        values=np.array([value or 0.0 for value in values]).reshape(grid),
        **{name: fields[name] for name in ("blocks", "heads", "queries", "offset")},
    )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _refuse_foreign(
    correction: Correction,
    grid: tuple[int, int] | None,
    model: str | None,
    image_ids: set[str] | None,
) -> None:
    """Raise FeedbackError when a correction does not belong to this model or data set."""
    found = correction.edit.grid
    if grid is not None and found != tuple(grid):
        raise FeedbackError(
            f"grid is {found[0]} x {found[1]}, but the model has {grid[0]} x {grid[1]} patches"
        )
    if model is not None and correction.model != model:
        raise FeedbackError(
            f"model is {_brief.repr(correction.model)}, but the weights are {_brief.repr(model)}"
        )
    if image_ids is not None and correction.image_id not in image_ids:
        raise FeedbackError(
            f"image_id is {_brief.repr(correction.image_id)}, which is not in the data set"
        )

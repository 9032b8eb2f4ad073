"""Saved corrections, to be looked at, opened again, given another note, and deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np

from lib.data.classes import other_classes
from lib.data.corrections import (
    REPLACED,
    Correction,
    Saved,
    bring_back,
    discard,
    id_now,
    ids_by_name,
    list_corrections,
    write_note,
)
from lib.data.pictures import read_picture
from lib.edit import AttentionEdit
from lib.model.resolution import size_for
from lib.widgets.controller import EditorController
from lib.widgets.history import Work
from lib.widgets.panel import Panel, in_row, told, wide
from lib.widgets.session import LiveSession, refuse_scope
from lib.widgets.thumbs import Thumbnails

ON_SHELF = 12  # corrections a page


@dataclass(frozen=True)
class Entry:
    """A file of the folder, and what it is worth to a session."""

    path: Path
    correction: Correction | None  # None: it cannot be read
    index: int | None  # of its picture in the session's data set; None: it is not there
    reason: str  # why it does not teach, a clause; "" where it does


class CorrectionFolder:
    """What a folder of corrections holds for a session; read again only when it has changed.

    Args:
        folder: need not be there yet. session: whose pictures the corrections are of.
    """

    def __init__(self, folder: str | Path, session: LiveSession) -> None:
        self.folder, self.session = Path(folder), session
        self._state: object = None
        self._entries: list[Entry] = []
        table = session.dataset.table
        ids = table["image_id"].astype(str)
        files = (Path(path).name for path in table["path"])
        self._names = list(zip(table["class_name"], files, strict=True))
        self._index = {image: k for k, image in enumerate(ids)}
        self._ids = ids_by_name(dict(zip(ids, self._names, strict=True)))

    def entries(self) -> list[Entry]:
        """All files: first those that cannot be read, then by time."""
        if not self.folder.is_dir():
            return []
        state = {
            (file.name, (stat := file.stat(follow_symlinks=False)).st_mtime_ns, stat.st_size)
            for file in os.scandir(self.folder)
            if file.name.endswith(".json")
        }
        if state != self._state:
            listed = list_corrections(self.folder, self.session.model.grid)
            self._entries = [self._placed(one) for one in listed]
            self._state = state
        return self._entries

    def _placed(self, saved: Saved) -> Entry:
        one = saved.correction
        if one is None:
            return Entry(saved.path, None, None, saved.reason)
        index = self._index.get(id_now(one, self._ids) or "")
        if index is None:
            what = one.file or f'image_id "{one.image_id}"'
            reason = f"its picture, {what}, is not in the data set"
        elif one.class_name and other_classes([one.class_name], [self._names[index][0]]):
            reason = f"it is of the class {one.class_name}, that picture of {self._names[index][0]}"
            index = None
        else:
            reason = saved.reason
        return Entry(saved.path, one, index, reason)


def work_of(edit: AttentionEdit) -> Work:
    """A saved edit as the editor holds it."""
    painted = np.where(edit.mask.numpy(), edit.values.numpy(), np.nan)
    scope = edit.scope
    return Work(painted, strength=scope.pop("strength"), scope=scope)


class CorrectionShelf(Panel):
    """Saved corrections, newest first.

    Args:
        controller: gets the correction that is opened.
        changed: called after that, and after a change of the folder.
        folder: where corrections are saved.
    """

    def __init__(
        self,
        controller: EditorController,
        changed: Callable[[], None] = lambda: None,
        folder: str | Path = "corrections",
    ) -> None:
        super().__init__()
        self.controller, self.changed = controller, changed
        self.saved = CorrectionFolder(folder, controller.session)
        self._by_path: dict[Path, Entry] = {}
        self._chosen: Path | None = None
        self._gone: list[Path] = []  # what was deleted here, last one last
        self._words, self._facts = widgets.HTML(), widgets.HTML()
        self.thumbs = Thumbnails(self, self._picture, self._name, self._choose, ON_SHELF)
        note = widgets.Text(description="Note", continuous_update=True, **wide())
        self.controls["note"] = note
        self.button("open", "Open in the editor", self._open).button_style = "primary"
        self.button("rename", "Save note", self._rename)
        self.button("delete", "Delete", self._delete)
        self.button("undo", "Undo delete", self._undo)
        buttons = in_row(self.controls[name] for name in ("open", "rename", "delete", "undo"))
        self.children = [self.thumbs, self._facts, note, buttons, self._words]
        self.add_class("teach-panel")  # the frame of all panels
        self.refresh()

    def refresh(self) -> None:
        """Lists the folder anew, where it has changed."""
        entries = self.saved.entries()
        self._by_path = {one.path: one for one in reversed(entries)}
        if self._chosen not in self._by_path:
            self._show(None)
        self.thumbs.show(list(self._by_path), self._chosen)
        if not entries and not self._gone:
            self._words.value = told(f"Nothing is saved in {self.saved.folder} yet.")

    def show_error(self, html: str) -> None:
        self._words.value = html

    # -- callbacks

    def _choose(self, path: Path) -> None:
        self._show(path)
        self._words.value = ""
        self.thumbs.show(self.thumbs.items, path)

    def _open(self) -> None:
        entry = self._by_path[self._chosen]
        session, edit = self.controller.session, entry.correction.edit
        refuse_scope(session.layout, edit)  # of another model: says which it does not have
        if edit.grid != session.grid:
            self.controller.see_at(size_for(session.model, edit.grid))
        self.controller.open(entry.index)
        self.controller.restore(work_of(edit))
        self.controller.note = entry.correction.note
        height, width = session.image_size
        size = "" if session.now.model is session.model else f" at {height} x {width} pixels"
        words = "Undo in the editor brings back what was painted there."
        self._words.value = told(f"Opened{size}. {words}")
        self.changed()

    def _rename(self) -> None:
        write_note(self._chosen, self.controls["note"].value)
        self.refresh()
        self._show(self._chosen)
        self._words.value = told("The note is saved.")
        self.changed()

    def _delete(self) -> None:
        self._gone.append(discard(self._chosen))
        self.refresh()
        self._words.value = told(f"Deleted: it lies in {self._gone[-1].parent} now.")
        self._enable()
        self.changed()

    def _undo(self) -> None:
        path = bring_back(self._gone[-1])
        self._gone.pop()  # still there where that failed
        self.refresh()
        self._choose(path)
        self._words.value = told("Brought back.")
        self.changed()

    # -- showing

    def _show(self, path: Path | None) -> None:
        """Shows one correction in full."""
        self._chosen = path
        entry = self._by_path.get(path)
        one = entry.correction if entry else None
        self._facts.value = "" if entry is None else facts_html(entry)
        self.controls["note"].value = one.note if one else ""
        self._enable()

    def _enable(self) -> None:
        entry = self._by_path.get(self._chosen)
        none = "" if entry else "choose a correction first"
        unread = none or (entry.reason if entry.correction is None else "")
        is_replaced = entry is not None and entry.reason.startswith(REPLACED)
        why = {"open": unread or (entry.reason if not is_replaced else ""), "rename": unread}
        why["delete"] = none
        why["undo"] = "" if self._gone else "nothing was deleted here"
        for name, reason in why.items():
            self.controls[name].disabled, self.controls[name].tooltip = bool(reason), reason
        self.controls["note"].disabled = bool(unread)

    def _picture(self, path: Path) -> np.ndarray | None:
        picture = path.with_suffix(".png")
        return np.asarray(read_picture(picture)) if picture.is_file() else None

    def _name(self, path: Path) -> str:
        entry = self._by_path[path]
        if entry.correction is None:
            return f"{path.name}, cannot be read"
        one = entry.correction
        words = [f"{one.class_name} {one.image_id}".strip(), one.time[:16].replace("T", " ")]
        words += [f"“{one.note}”"] if one.note else []
        words += ["does not teach"] if entry.reason else []
        return ", ".join(words)


def facts_html(entry: Entry) -> str:
    """What a saved file says, and why it does not teach, as HTML."""
    one, facts = entry.correction, {"file": entry.path.name}
    if entry.reason:
        facts["does not teach"] = entry.reason
    if one is not None:
        edit = one.edit
        listed = (
            word if isinstance(word, str) else ", ".join(map(str, word))
            for word in (edit.blocks, edit.heads, edit.queries, edit.offset)
        )
        words = ("blocks", "heads", "queries", "offset")
        scope = [f"{name} {word}" for name, word in zip(words, listed, strict=True)]
        facts |= {
            "picture": f"{one.class_name} {one.image_id} {one.file}",
            "painted": f"{int(edit.mask.sum())} of {edit.grid[0]} x {edit.grid[1]} cells",
            "edit": "; ".join([*scope, f"strength {edit.strength:g}"]),
            "saved": f"{one.time[:16].replace('T', ' ')} UTC by {one.author}",
            "made on": f"weights {one.model}",
        }
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return f'<dl class="shelf-facts">{lines}</dl>'

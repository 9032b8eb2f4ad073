"""All state of the attention editor, its history and its words; no widget, and arrays only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lib.data.corrections import Correction, save_correction
from lib.edit import (
    EPS,
    LADDER,
    LOW,
    AttentionEdit,
    as_odds,
    brief,
    is_index,
    is_share,
    resolve_heads,
)
from lib.widgets.history import OFF, SLIDERS, History, Work, as_logits, asked_map
from lib.widgets.pixels import map_over_picture, png

CACHED = 64  # maps and unedited outcomes that are kept

# What the heads see together is edited, and each keeps its part: of right predictions, such an
# edit breaks the fewest. Centred: with the paper's offset, all cells of a pretrained model read
# about 0.97.
SCOPE_AT_FIRST = {"blocks": "last", "heads": "mean", "queries": "cls", "offset": "centred"}


@dataclass(frozen=True)
class Shown:
    """One picture of a data set, as the editor shows it."""

    index: int  # position in the data set
    image_id: str
    image: np.ndarray  # uint8 [H, W, 3], RGB, as large as the model sees it
    label: int
    class_name: str
    file: str  # name of the picture's file; "" where it is drawn
    human: np.ndarray | None  # float32 [gh, gw] in [0, 1], NaN where not known; None: no map
    box: np.ndarray | None  # float32 [gh, gw], share of the cell in the bird's box; None: no box


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a picture, after an edit if there is one."""

    probabilities: np.ndarray  # float32 [classes]
    attention: np.ndarray  # float32 [depth, gh, gw]: class row's softmax on patches, mean of heads
    class_token: np.ndarray  # float32 [depth]: what the class row keeps on the class token itself


class Session(Protocol):
    """What the editor asks of a model and its pictures; a `LiveSession` answers it."""

    classes: list[str]  # names by label
    grid: tuple[int, int]  # (gh, gw), the patches of the model
    depth: int  # blocks of the model
    num_heads: int
    fingerprint: str  # of the weights: another one when the model has changed

    def __len__(self) -> int: ...

    def open(self, index: int) -> Shown: ...

    def sigmoid(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def seen_together(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome: ...


class EditorController:
    """State of the editor without any widget.

    Each picture has its own work, history and note, which live as long as the controller. A picture
    that is opened for the first time starts with the scope that was set last. No array that was
    handed out is ever changed.

    Attributes:
        index, shown: number of the open picture, and the session's `Shown` of it.
        block: the block whose map is shown; set it freely.
        strength, sharpness, suppression: see `Work`; to set one is a step of the history.
        scope: blocks, heads, queries and offset of the edit; change it with `set_scope`.
    """

    strength, sharpness, suppression = (
        property(
            lambda self, name=name: getattr(self.work, name),
            lambda self, value, name=name: self._history.change(name, **{name: float(value)}),
        )
        for name in SLIDERS
    )

    def __init__(self, session: Session, index: int = 0) -> None:
        self.session = session
        self.block: int = session.depth - 1
        self._scope = dict(SCOPE_AT_FIRST)
        self._histories: dict[int, History] = {}  # by picture
        self._notes: dict[int, str] = {}
        # The fingerprint is part of each key: after teaching, the model is another one.
        self._sigmoid = lru_cache(CACHED)(lambda _, *asked: session.sigmoid(*asked))
        self._own = lru_cache(CACHED)(self._mean_of_heads)
        self._unedited = lru_cache(CACHED)(lambda _, index: session.outcome(index))
        self._edited = lru_cache(CACHED)(  # a work is known by itself, as it never changes
            lambda _, index, block, work: session.outcome(index, self.edit_of(work))
        )
        self.open(index)

    def open(self, index: int) -> None:
        """Opens a picture, with its own history. Raises IndexError where there is none."""
        count = len(self.session)
        if not 0 <= index < count:
            raise IndexError(f"picture {index} is asked for; there are {count}, from 0 on")
        self.shown = self.session.open(index)
        self.index = index
        self._history = self._history_of(index)

    def _history_of(self, index: int) -> History:
        if index not in self._histories:
            self._histories[index] = History(self.session.grid, self._scope)
        return self._histories[index]

    def set_scope(self, **changes: str | Sequence[int] | None) -> None:
        """Changes which part of the model is edited: blocks, heads, queries, offset; one step.

        None keeps what was set. Raises ValueError for a word or an index that the model does not
        have.
        """
        scope = self.scope | {name: value for name, value in changes.items() if value is not None}
        checked = AttentionEdit(np.zeros(self.session.grid, dtype=bool), 0.0, **scope)
        for name, count in (("blocks", self.session.depth), ("heads", self.session.num_heads)):
            indices = getattr(checked, name)
            least = -count if name == "blocks" else 0  # a correction's heads count from 0
            for k in () if isinstance(indices, str) else indices:
                if not least <= k < count:
                    raise ValueError(f"{name} holds {k}, but the model has {count} {name}")
        self._scope = {name: getattr(checked, name) for name in scope}
        self._history.change("scope", scope=self._scope)

    # -- what is shown and asked for

    @property
    def work(self) -> Work:
        """All that is set for the open picture."""
        return self._history.work

    @property
    def scope(self) -> dict[str, Any]:
        return dict(self.work.scope)

    @property
    def note(self) -> str:
        """Why the open picture was edited, for the saved file."""
        return self._notes.get(self.index, "")

    @note.setter
    def note(self, text: str) -> None:
        self._notes[self.index] = text

    @property
    def painted(self) -> np.ndarray:
        """What a person painted, float32 [gh, gw], NaN where nothing; read-only."""
        return self.work.painted

    @property
    def own_by_head(self) -> np.ndarray:
        """The model's own map in the shown block, float32 [heads, gh, gw]."""
        return self._sigmoid(*self._place)

    @property
    def _place(self) -> tuple[str, int, int, str]:
        return self.session.fingerprint, self.index, self.block, self.scope["offset"]

    @property
    def own(self) -> np.ndarray:
        """The model's own map of the chosen heads together, float32 [gh, gw].

        For heads "mean" what they see together (`lib.model.mean_edit.read_mean`), else the mean of
        `own_by_head`.
        """
        return self._own(self.scope["heads"], *self._place)

    def _mean_of_heads(self, heads: str | tuple[int, ...], *place: Any) -> np.ndarray:
        if heads == "mean":
            return self.session.seen_together(*place[1:])
        chosen = resolve_heads(heads, self.session.num_heads)
        return self._sigmoid(*place)[list(chosen)].mean(axis=0)

    @property
    def base(self) -> np.ndarray:
        """`asked` if nothing were painted."""
        nothing = np.full(self.session.grid, np.nan)
        return self._asked(replace(self.work, painted=nothing))

    @property
    def asked(self) -> np.ndarray:
        """The map after the edit, float32 [gh, gw] in [0, 1]; see `asked_map`."""
        return self._asked(self.work)

    def _asked(self, work: Work) -> np.ndarray:
        return asked_map(self.own, work.painted, **work.sliders)

    def edit(self) -> AttentionEdit:
        """What is asked of the model: the painted cells, and those that a slider changes."""
        return self.edit_of(self.work)

    def edit_of(self, work: Work) -> AttentionEdit:
        """The same of any work on the open picture."""
        wanted = self._asked(replace(work, strength=1.0))
        touched = ~np.isnan(work.painted) | (np.abs(wanted - self.own) > EPS)
        touched &= work.strength > 0
        return AttentionEdit(touched, wanted, **work.scope, strength=work.strength)

    # -- painting

    def paint(self, cells: Sequence[tuple[int, int]], value: float) -> None:
        """One stroke: `value` on cells (row, column from 0)."""
        places = np.asarray(cells, dtype=int).reshape(-1, 2)
        if (places < 0).any() or (places >= self.session.grid).any():
            rows, columns = self.session.grid
            raise ValueError(f"a cell outside the grid of {rows} x {columns} is named")
        painted = self.painted.copy()
        painted[tuple(places.T)] = value
        self._history.change(painted=painted)

    def erase(self, cells: Sequence[tuple[int, int]]) -> None:
        """Gives cells (row, column) back to the model."""
        self.paint(cells, np.nan)

    def fill(self, value: float) -> None:
        """`value` on every cell."""
        self._history.change(painted=np.full(self.session.grid, value))

    def only_here(self) -> None:
        """`LOW` on every cell that is not painted. ValueError where nothing is painted."""
        free = np.isnan(self.painted)
        if free.all():
            raise ValueError("nothing is painted yet, so there is no here; paint first")
        self._history.change(painted=np.where(free, LOW, self.painted))

    def copy_human(self) -> None:
        """Asks for people's distribution, see `copy_map`. ValueError without a human map."""
        self.copy_map(self._known(self.shown.human, "human map"))

    def copy_box(self) -> None:
        """Asks for the box, evenly. ValueError without a box."""
        self.copy_map(self._known(self.shown.box, "box"))

    def copy_map(self, weights: np.ndarray) -> None:
        """Asks for attention in proportion to `weights`, see `lib.edit.as_odds`; NaN stays free.

        Args:
            weights: [gh, gw], from 0, not 0 everywhere.
        """
        known = ~np.isnan(weights)
        now = np.exp(as_logits(self.own))[known].mean() if known.any() else 1.0
        self._history.change(painted=as_odds(weights, now))

    def reset(self) -> None:
        """Back to the model's own map: erases all, switches `OFF` the three sliders."""
        self._reset(self._history)

    def lay_aside(self) -> None:
        """`reset` on all pictures: what was painted was for a model that is no longer there."""
        for history in self._histories.values():
            self._reset(history)

    def _reset(self, history: History) -> None:
        history.change(painted=np.full(self.session.grid, np.nan), **OFF)

    def restore(self, work: Work) -> None:
        """Another work on the open picture, such as an earlier one; one step."""
        self._history.change(
            **{name: getattr(work, name) for name in ("painted", *SLIDERS, "scope")}
        )
        self._scope = self.scope

    def stroke(self, cells: Mapping[int, Any], stroke: Hashable, index: int | None = None) -> None:
        """What a stroke of the browser has changed so far, laid over what is there.

        The versions of one stroke have one name, and become one step of the history.

        Args:
            cells: by number, row by row: the value in [0, 1], None for erased. stroke: its name.
            index: the picture on which it began; the open one by default.
        """
        history = self._history_of(self.index if index is None else index)
        painted = history.work.painted.copy()
        for cell, value in cells.items():
            if not is_index(cell) or not 0 <= cell < painted.size:
                raise ValueError(f"a stroke names cell {brief(cell)} of {painted.size}")
            if value is not None and not is_share(value):
                raise ValueError(f"a stroke holds {brief(value)}; expected 0 to 1 or None")
            painted.flat[cell] = np.nan if value is None else value
        history.change(("stroke", stroke), painted=painted)

    def _known(self, values: np.ndarray | None, what: str) -> np.ndarray:
        if values is None:
            raise ValueError(f"picture {self.shown.image_id} has no {what}; paint by hand")
        return values

    # -- history

    @property
    def can_undo(self) -> bool:
        return self._history.can_undo

    @property
    def can_redo(self) -> bool:
        return self._history.can_redo

    def undo(self) -> None:
        """One step back; nothing where there is none."""
        self._history.undo()

    def redo(self) -> None:
        """One step forward again; nothing where there is none."""
        self._history.redo()

    # -- what it leads to

    def outcome(self) -> tuple[Outcome, Outcome]:
        """What the model says before and after the edit; computed once for each edit."""
        return self._unedited(self.session.fingerprint, self.index), self.outcome_of(self.work)

    def outcome_of(self, work: Work) -> Outcome:
        """What the model says under another work on the open picture."""
        place = self.session.fingerprint, self.index
        if self.edit_of(work).is_empty:
            return self._unedited(*place)
        return self._edited(*place, self.block, work)

    def moved(self) -> float:
        """Share of the shown block's attention that went elsewhere, in [0, 1].

        Half the sum of absolute differences, over patches and class token, mean of the heads.
        """
        return self._moved(*self.outcome())

    def _moved(self, before: Outcome, after: Outcome) -> float:
        cells = np.abs(after.attention[self.block] - before.attention[self.block]).sum()
        kept = abs(after.class_token[self.block] - before.class_token[self.block])
        return float(cells + kept) / 2

    def summary(self) -> str:
        """One or two sentences; not escaped for HTML."""
        before, after = self.outcome()
        first, now = int(before.probabilities.argmax()), int(after.probabilities.argmax())
        name, true = self.session.classes[first], self.shown.label
        if before is after:
            right = "that is right" if first == true else f"it is {self.shown.class_name}"
            return f"The model says {name} ({before.probabilities[first]:.2f}); {right}."
        share = f"{self._moved(before, after):.2f} of the attention moved."
        if first == now:
            return f"The prediction stays {name} ({after.probabilities[now]:.2f}); {share}"
        turn = " It is right now." if now == true else " It was right before." * (first == true)
        return f"The prediction changed from {name} to {self.session.classes[now]}; {share}{turn}"

    def score_rows(self, k: int = 5) -> list[dict[str, Any]]:
        """The k most probable classes after the edit, the former prediction and the true class.

        Each row: class, before and after (probabilities), change (in points of 100), is_true.
        """
        before, after = (outcome.probabilities for outcome in self.outcome())
        top = [int(c) for c in np.argsort(-after, kind="stable")[:k]]
        listed = dict.fromkeys([*top, int(before.argmax()), self.shown.label])
        return [
            {
                "class": self.session.classes[c],
                "before": float(before[c]),
                "after": float(after[c]),
                "change": 100 * float(after[c] - before[c]),
                "is_true": c == self.shown.label,
            }
            for c in listed
        ]

    def ladder(self) -> list[dict[str, Any]]:
        """The same edit in more and more of the model, whatever its own scope is, a row a rung.

        Each row: rung (no edit at first), prediction (class name), probability (of the prediction),
        p_true (of the true class).
        """
        edits = {"no edit": None}
        edits |= {rung: replace(self.edit(), **scope) for rung, scope in LADDER.items()}
        rows = []
        for rung, edit in edits.items():
            found = self.session.outcome(self.index, edit).probabilities
            best, true = int(found.argmax()), float(found[self.shown.label])
            row = {"rung": rung, "prediction": self.session.classes[best]}
            rows.append(row | {"probability": float(found[best]), "p_true": true})
        return rows

    # -- keeping it

    def correction(self, author: str, note: str = "") -> Correction:
        """The edit with its picture, made now. Raises ValueError where nothing is edited."""
        edit, shown = self.edit(), self.shown
        if edit.is_empty:
            raise ValueError("nothing is edited, so there is nothing to save; paint first")
        texts = {"class_name": shown.class_name, "file": shown.file, "note": note}
        return Correction.now(shown.image_id, edit, self.session.fingerprint, author, **texts)

    def save(self, folder: str | Path, author: str, note: str = "") -> Path:
        """Saves the correction and a preview beside it; see `save_correction`."""
        correction = self.correction(author, note)
        preview = map_over_picture(self.shown.image, self.asked, correction.edit.mask)
        return save_correction(correction, folder, png(preview))

"""All state of the attention editor, its history and its words; no widget, and arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lib.data.corrections import Correction, save_correction
from lib.edit import EPS, LADDER, AttentionEdit, is_share, resolve_heads
from lib.widgets.pixels import map_over_picture, png

LOW = 0.02  # "do not look here": next to nothing, without the extreme logit of 0
OFF = (1.0, 1.0, 0.0)  # strength, sharpness and suppression that change nothing
CACHED = 64  # maps and unedited outcomes that are kept


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

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome: ...


@dataclass(frozen=True, eq=False)
class _Step:
    painted: np.ndarray  # float32 [gh, gw], read-only
    stroke: int | None = None  # of the browser; None for an operation of Python
    switched_off: tuple[float, ...] | None = None  # a reset: what was set before it, like OFF


class History:
    """The painted maps of one picture, step by step; its length counts them all."""

    def __init__(self, grid: tuple[int, int]) -> None:
        empty = np.full(grid, np.nan, dtype=np.float32)
        empty.flags.writeable = False
        self._steps, self._position = [_Step(empty)], 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def painted(self) -> np.ndarray:
        """The current map, float32 [gh, gw], NaN where nothing is painted; read-only."""
        return self._steps[self._position].painted

    @property
    def can_undo(self) -> bool:
        return self._position > 0

    @property
    def can_redo(self) -> bool:
        return self._position < len(self) - 1

    def keep(
        self,
        painted: np.ndarray,
        stroke: int | None = None,
        switched_off: tuple[float, ...] | None = None,
    ) -> None:
        """Makes a map the current one; what was undone is gone. Versions of a stroke are one step.

        Raises ValueError for a value outside [0, 1].
        """
        painted = painted.astype(np.float32)
        wrong = (painted < 0) | (painted > 1)
        if wrong.any():
            raise ValueError(f"{painted[wrong][0]:g} is painted; sigmoid attention is from 0 to 1")
        if np.array_equal(painted, self.painted, equal_nan=True) and not switched_off:
            return
        painted.flags.writeable = False
        same_stroke = stroke is not None and stroke == self._steps[self._position].stroke
        self._steps[self._position + (not same_stroke) :] = [_Step(painted, stroke, switched_off)]
        self._position = len(self) - 1

    def undo(self) -> tuple[float, ...] | None:
        """One step back, where there is one; returns what that step had switched off."""
        if not self.can_undo:
            return None
        self._position -= 1
        return self._steps[self._position + 1].switched_off

    def redo(self) -> tuple[float, ...] | None:
        """One step forward again, where there is one; returns what that step switches off."""
        if not self.can_redo:
            return None
        self._position += 1
        return self._steps[self._position].switched_off


class EditorController:
    """State of the editor without any widget.

    Each picture has its own painted map and its own history, which live as long as the controller.
    Every other setting holds for all pictures. No array that was handed out is ever changed.

    Attributes (set them freely, except the first two; what they lead to is computed on demand):
        index, shown: number of the open picture, and the session's `Shown` of it.
        block: the block whose map is shown.
        strength: in [0, 1]. How far the whole edit goes from the model's own values to those that
            are asked for; 0 is no edit.
        sharpness: from 0. Every value v of the map becomes sigmoid(sharpness * logit(v)), the
            painted ones too: 1 changes nothing, more makes the map starker, less makes it flatter.
        suppression: in [0, 1]. Share by which the cells that nobody painted go down to `LOW`.
        scope: blocks, heads, queries and offset of the edit; change it with `set_scope`.
    """

    def __init__(self, session: Session, index: int = 0) -> None:
        self.session = session
        self.strength, self.sharpness, self.suppression = OFF
        self.block: int = session.depth - 1
        # Centred: with the paper's offset, all cells of a pretrained model read about 0.97.
        self.scope = {"blocks": "last", "heads": "all", "queries": "cls", "offset": "centred"}
        self._histories: dict[int, History] = {}  # by picture
        # The fingerprint is part of each key: after teaching, the model is another one.
        self._sigmoid = lru_cache(CACHED)(lambda _, *asked: session.sigmoid(*asked))
        self._own = lru_cache(CACHED)(
            lambda heads, *place: self._sigmoid(*place)[list(heads)].mean(axis=0)
        )
        self._unedited = lru_cache(CACHED)(lambda _, index: session.outcome(index))
        self._edited: tuple[tuple[str, int, AttentionEdit], Outcome] | None = None
        self.open(index)

    def open(self, index: int) -> None:
        """Opens a picture, with its own history. Raises IndexError where there is none."""
        count = len(self.session)
        if not 0 <= index < count:
            raise IndexError(f"picture {index} is asked for; there are {count}, from 0 on")
        self.shown = self.session.open(index)
        self.index = index
        self._history = self._histories.setdefault(index, History(self.session.grid))

    def set_scope(self, **changes: str | Sequence[int] | None) -> None:
        """Changes which part of the model is edited: blocks, heads, queries, offset.

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
        self.scope = {name: getattr(checked, name) for name in scope}

    # -- what is shown and asked for

    @property
    def painted(self) -> np.ndarray:
        """What a person painted, float32 [gh, gw], NaN where nothing; read-only."""
        return self._history.painted

    @property
    def own_by_head(self) -> np.ndarray:
        """The model's own map in the shown block, float32 [heads, gh, gw]."""
        return self._sigmoid(*self._place)

    @property
    def _place(self) -> tuple[str, int, int, str]:
        return self.session.fingerprint, self.index, self.block, self.scope["offset"]

    @property
    def own(self) -> np.ndarray:
        """`own_by_head`, the mean of the chosen heads, float32 [gh, gw]."""
        return self._own(resolve_heads(self.scope["heads"], self.session.num_heads), *self._place)

    @property
    def base(self) -> np.ndarray:
        """`asked` if nothing were painted."""
        return self._asked(np.full(self.session.grid, np.nan, dtype=np.float32))

    @property
    def asked(self) -> np.ndarray:
        """The map after the edit, float32 [gh, gw] in [0, 1]."""
        return self._asked(self.painted)

    def _asked(self, painted: np.ndarray) -> np.ndarray:
        return asked_map(self.own, painted, self.strength, self.sharpness, self.suppression)

    def edit(self) -> AttentionEdit:
        """What is asked of the model: the painted cells, and those that a slider changes."""
        asked = self.asked
        touched = ~np.isnan(self.painted) & (self.strength > 0)
        return AttentionEdit(touched | (np.abs(asked - self.own) > EPS), asked, **self.scope)

    # -- painting

    def paint(self, cells: Sequence[tuple[int, int]], value: float) -> None:
        """One stroke: `value` on cells (row, column from 0)."""
        places = np.asarray(cells, dtype=int).reshape(-1, 2)
        if (places < 0).any() or (places >= self.session.grid).any():
            rows, columns = self.session.grid
            raise ValueError(f"a cell outside the grid of {rows} x {columns} is named")
        painted = self.painted.copy()
        painted[tuple(places.T)] = value
        self._history.keep(painted)

    def erase(self, cells: Sequence[tuple[int, int]]) -> None:
        """Gives cells (row, column) back to the model."""
        self.paint(cells, np.nan)

    def fill(self, value: float) -> None:
        """`value` on every cell."""
        self._history.keep(np.full(self.session.grid, value))

    def only_here(self) -> None:
        """`LOW` on every cell that is not painted."""
        self._history.keep(np.where(np.isnan(self.painted), LOW, self.painted))

    def copy_human(self) -> None:
        """Paints the human map of the picture; NaN, unknown, stays free. ValueError without one."""
        self._copy(self.shown.human, "human map")

    def copy_box(self) -> None:
        """Paints the share of each cell that the box covers. ValueError without a box."""
        self._copy(self.shown.box, "box")

    def reset(self) -> None:
        """Back to the model's own map: erases all, switches `OFF` the three sliders."""
        settings = (self.strength, self.sharpness, self.suppression)
        empty = np.full(self.session.grid, np.nan)
        self._history.keep(empty, switched_off=None if settings == OFF else settings)
        self.strength, self.sharpness, self.suppression = OFF

    def stroke(self, cells: Any, stroke: int) -> None:
        """The painted map as the browser sends it while a stroke goes on, see `as_painted`.

        The versions of one stroke have one number, and become one step of the history.
        """
        self._history.keep(as_painted(cells, self.session.grid), stroke)

    def _copy(self, values: np.ndarray | None, what: str) -> None:
        if values is None:
            raise ValueError(f"picture {self.shown.image_id} has no {what}; paint by hand")
        self._history.keep(np.asarray(values))

    # -- history

    @property
    def can_undo(self) -> bool:
        return self._history.can_undo

    @property
    def can_redo(self) -> bool:
        return self._history.can_redo

    def undo(self) -> None:
        """One step back; nothing where there is none."""
        switched_off = self._history.undo()
        if switched_off:
            self.strength, self.sharpness, self.suppression = switched_off

    def redo(self) -> None:
        """One step forward again; nothing where there is none."""
        if self._history.redo():
            self.strength, self.sharpness, self.suppression = OFF

    # -- what it leads to

    def outcome(self) -> tuple[Outcome, Outcome]:
        """What the model says before and after the edit; computed once for each edit."""
        fingerprint, edit = self.session.fingerprint, self.edit()
        before = self._unedited(fingerprint, self.index)
        if edit.is_empty:
            return before, before
        key = (fingerprint, self.index, edit)
        if self._edited is None or self._edited[0] != key:
            self._edited = (key, self.session.outcome(self.index, edit))
        return before, self._edited[1]

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


def asked_map(
    own: np.ndarray, painted: np.ndarray, strength: float, sharpness: float, suppression: float
) -> np.ndarray:
    """What a person asks for, float32 [gh, gw] in [0, 1]; the settings are `EditorController`'s.

    Args:
        own: the model's map. painted: NaN where nothing is painted.
    """
    free = np.isnan(painted)
    wanted = np.where(free, own, painted)
    if sharpness != 1:
        inside = np.clip(wanted.astype(np.float64), EPS, 1 - EPS)
        wanted = 1 / (1 + ((1 - inside) / inside) ** sharpness)  # sigmoid(sharpness * logit)
    wanted = np.where(free, wanted + suppression * (LOW - wanted), wanted)
    return np.clip((1 - strength) * own + strength * wanted, 0, 1).astype(np.float32)


def as_painted(cells: Any, grid: tuple[int, int]) -> np.ndarray:
    """A painted map [gh, gw] from gh * gw numbers in [0, 1] row by row, None where nothing is.

    Raises ValueError for anything else.
    """
    rows, columns = grid
    if not isinstance(cells, list | tuple) or len(cells) != rows * columns:
        length = len(cells) if isinstance(cells, list | tuple) else type(cells).__name__
        raise ValueError(f"a painted map holds {length} values, not {rows} x {columns}")
    for value in cells:
        if value is not None and not is_share(value):
            raise ValueError(f"a painted map holds {value!r}; expected 0 to 1 or None")
    return np.array(cells, dtype=float).reshape(grid)

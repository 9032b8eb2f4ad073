"""All state of the attention editor, its history and its words; NumPy only, no widget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.corrections import Correction, Edit, FeedbackError, save_correction
from lib.widgets.pixels import EPS, map_over_picture, png

LOW = 0.02  # "do not look here": next to nothing, without the extreme logit of 0
OFF = (1.0, 1.0, 0.0)  # strength, sharpness and suppression that change nothing
CACHED = 64  # maps and unedited outcomes that are kept


@dataclass(frozen=True, eq=False)
class _Step:
    """One entry of a history."""

    painted: np.ndarray  # float32 [gh, gw], read-only
    stroke: int | None = None  # of the browser; None for an operation of Python
    switched_off: tuple[float, ...] | None = None  # a reset: what was set before it, like OFF


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

    def __init__(self, session: Any, index: int = 0) -> None:
        self.session = session
        self.strength, self.sharpness, self.suppression = OFF
        self.block: int = session.depth - 1
        # Centred: with the paper's offset, all cells of a pretrained model read about 0.97.
        self.scope = {"blocks": "last", "heads": "all", "queries": "cls", "offset": "centred"}
        self._histories: dict[int, tuple[list[_Step], int]] = {}  # steps, position of the current
        # The fingerprint is part of each key: after teaching, the model is another one.
        self._sigmoid = lru_cache(CACHED)(lambda _, *asked: session.sigmoid(*asked))
        self._unedited = lru_cache(CACHED)(lambda _, index: session.outcome(index))
        self._edited: tuple[tuple[str, int, Edit], Any] | None = None
        self.open(index)

    def open(self, index: int) -> None:
        """Opens a picture, with its own history. Raises IndexError where there is none."""
        count = len(self.session)
        if not 0 <= index < count:
            raise IndexError(f"picture {index} is asked for; there are {count}, from 0 on")
        self.shown = self.session.open(index)
        self.index = index
        empty = np.full(self.session.grid, np.nan, dtype=np.float32)
        empty.flags.writeable = False
        self._histories.setdefault(index, ([_Step(empty)], 0))

    def set_scope(
        self,
        blocks: str | Sequence[int] | None = None,
        heads: str | Sequence[int] | None = None,
        queries: str | None = None,
        offset: str | None = None,
    ) -> None:
        """Changes which part of the model is edited; None keeps what was set.

        Raises FeedbackError (a ValueError) for a word or an index that the model does not have.
        """
        named = {"blocks": blocks, "heads": heads, "queries": queries, "offset": offset}
        scope = self.scope | {name: value for name, value in named.items() if value is not None}
        checked = self._edit_of(np.full(self.session.grid, np.nan), **scope)
        for name, count in (("blocks", self.session.depth), ("heads", self.session.num_heads)):
            indices = getattr(checked, name)
            for k in () if isinstance(indices, str) else indices:
                if not -count <= k < count:
                    raise FeedbackError(f"{name} holds {k}, but the model has {count} {name}")
        self.scope = {name: getattr(checked, name) for name in scope}

    # -- what is shown and asked for

    @property
    def painted(self) -> np.ndarray:
        """What a person painted, float32 [gh, gw], NaN where nothing; read-only."""
        steps, position = self._histories[self.index]
        return steps[position].painted

    @property
    def own(self) -> np.ndarray:
        """The model's own map in the shown block, float32 [gh, gw], mean of the chosen heads."""
        heads, offset = self.scope["heads"], self.scope["offset"]
        fingerprint = self.session.fingerprint
        return self._sigmoid(fingerprint, self.index, self.block, heads, offset)

    @property
    def base(self) -> np.ndarray:
        """`asked` if nothing were painted."""
        return self._asked(np.full(self.session.grid, np.nan, dtype=np.float32))

    @property
    def asked(self) -> np.ndarray:
        """The map after the edit, float32 [gh, gw] in [0, 1]."""
        return self._asked(self.painted)

    def _asked(self, painted: np.ndarray) -> np.ndarray:
        own, free = self.own, np.isnan(painted)
        wanted = np.where(free, own, painted)
        if self.sharpness != 1:
            wanted = sharpened(wanted, self.sharpness)
        wanted = np.where(free, wanted + self.suppression * (LOW - wanted), wanted)
        mixed = (1 - self.strength) * own + self.strength * wanted
        return np.clip(mixed, 0, 1).astype(np.float32)

    def edit(self) -> Edit:
        """What is asked of the model: the painted cells, and those that a slider changes."""
        asked = self.asked
        touched = ~np.isnan(self.painted) & (self.strength > 0)
        mask = touched | (np.abs(asked - self.own) > EPS)
        return self._edit_of(np.where(mask, asked, np.nan), **self.scope)

    @staticmethod
    def _edit_of(values: np.ndarray, **scope: Any) -> Edit:
        return Edit(mask=~np.isnan(values), values=np.nan_to_num(values), **scope)

    # -- painting

    def paint(
        self,
        cells: Sequence[tuple[int, int]],
        value: float,
        weights: Sequence[float] | None = None,
    ) -> None:
        """One stroke: `value` on cells (row, column from 0).

        `weights` in [0, 1], one a cell, are a soft edge: the cell moves by this share from what is
        painted there, or from the model's own value.
        """
        rows, columns = self._places(cells)
        painted = self.painted.copy()
        before = np.where(np.isnan(painted), self.own, painted)[rows, columns]
        share = np.ones(len(cells)) if weights is None else np.asarray(weights, dtype=float)
        painted[rows, columns] = (1 - share) * before + share * value
        self._keep(painted)

    def erase(self, cells: Sequence[tuple[int, int]]) -> None:
        """Gives cells (row, column) back to the model."""
        painted = self.painted.copy()
        painted[self._places(cells)] = np.nan
        self._keep(painted)

    def rectangle(self, r0: int, c0: int, r1: int, c1: int, value: float) -> None:
        """`value` from corner (r0, c0) to corner (r1, c1), both included, in any order."""
        rows = range(min(r0, r1), max(r0, r1) + 1)
        columns = range(min(c0, c1), max(c0, c1) + 1)
        self.paint([(r, c) for r in rows for c in columns], value)

    def fill(self, value: float) -> None:
        """`value` on every cell."""
        self._keep(np.full(self.session.grid, value))

    def only_here(self, low: float = LOW) -> None:
        """`low` on every cell that is not painted."""
        self._keep(np.where(np.isnan(self.painted), low, self.painted))

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
        self._keep(empty, switched_off=None if settings == OFF else settings)
        self.strength, self.sharpness, self.suppression = OFF

    def stroke(self, cells: Any, stroke: int) -> None:
        """A version of the painted map, as the browser sends it while a stroke goes on.

        Args:
            cells: gh * gw numbers in [0, 1], row by row; None where nothing is painted.
            stroke: the versions of one stroke have one number, and become one step of the history.

        Raises:
            ValueError: for anything else.
        """
        rows, columns = self.session.grid
        if not isinstance(cells, list | tuple) or len(cells) != rows * columns:
            length = len(cells) if isinstance(cells, list | tuple) else type(cells).__name__
            raise ValueError(f"a painted map holds {length} values, not {rows} x {columns}")
        for value in cells:
            if value is not None and not is_share(value):
                raise ValueError(f"a painted map holds {value!r}; expected 0 to 1 or None")
        painted = np.array([np.nan if value is None else value for value in cells])
        self._keep(painted.reshape(rows, columns), stroke)

    def _places(self, cells: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Row and column indices; raises ValueError for a cell outside the grid."""
        places = np.asarray(cells, dtype=int).reshape(-1, 2)
        if (places < 0).any() or (places >= self.session.grid).any():
            rows, columns = self.session.grid
            raise ValueError(f"a cell outside the grid of {rows} x {columns} is named")
        return places[:, 0], places[:, 1]

    def _copy(self, values: np.ndarray | None, what: str) -> None:
        if values is None:
            raise ValueError(f"picture {self.shown.image_id} has no {what}; paint by hand")
        self._keep(np.asarray(values))

    # -- history

    @property
    def can_undo(self) -> bool:
        return self._histories[self.index][1] > 0

    @property
    def can_redo(self) -> bool:
        steps, position = self._histories[self.index]
        return position < len(steps) - 1

    def undo(self) -> None:
        """One step back; nothing where there is none."""
        if self.can_undo:
            steps, position = self._histories[self.index]
            if steps[position].switched_off:
                self.strength, self.sharpness, self.suppression = steps[position].switched_off
            self._histories[self.index] = (steps, position - 1)

    def redo(self) -> None:
        """One step forward again; nothing where there is none."""
        if self.can_redo:
            steps, position = self._histories[self.index]
            if steps[position + 1].switched_off:
                self.strength, self.sharpness, self.suppression = OFF
            self._histories[self.index] = (steps, position + 1)

    def _keep(
        self,
        painted: np.ndarray,
        stroke: int | None = None,
        switched_off: tuple[float, ...] | None = None,
    ) -> None:
        """Makes a painted map the current one; what was undone is gone."""
        painted = painted.astype(np.float32)
        wrong = (painted < 0) | (painted > 1)
        if wrong.any():
            raise ValueError(f"{painted[wrong][0]:g} is painted; sigmoid attention is from 0 to 1")
        if np.array_equal(painted, self.painted, equal_nan=True) and not switched_off:
            return
        painted.flags.writeable = False
        steps, position = self._histories[self.index]
        same_stroke = stroke is not None and stroke == steps[position].stroke
        kept = steps[: position + (not same_stroke)]
        kept.append(_Step(painted, stroke, switched_off))
        self._histories[self.index] = (kept, len(kept) - 1)

    # -- what it leads to

    def outcome(self) -> tuple[Any, Any]:
        """The session's `Outcome` before and after the edit; computed once for each edit."""
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
        before, after = self.outcome()
        cells = np.abs(after.attention[self.block] - before.attention[self.block]).sum()
        kept = abs(after.class_token[self.block] - before.class_token[self.block])
        return float(cells + kept) / 2

    def summary(self) -> str:
        """One or two sentences; not escaped for HTML."""
        before, after = self.outcome()
        first, now = int(before.probabilities.argmax()), int(after.probabilities.argmax())
        name, true = self.session.classes[first], self.shown.label
        if self.edit().is_empty:
            right = "that is right" if first == true else f"it is {self.shown.class_name}"
            return f"The model says {name} ({before.probabilities[first]:.2f}); {right}."
        share = f"{self.moved():.2f} of the attention moved."
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
        """The same edit in more and more of the model, a row a rung; see LiveSession.ladder."""
        return self.session.ladder(self.index, self.edit())

    # -- keeping it

    def correction(self, author: str, note: str = "") -> Correction:
        """The edit with its picture, made now. Raises ValueError where nothing is edited."""
        edit, shown = self.edit(), self.shown
        if edit.is_empty:
            raise ValueError("nothing is edited, so there is nothing to save; paint first")
        fingerprint = self.session.fingerprint
        return Correction.now(shown.image_id, edit, fingerprint, author, shown.class_name, note)

    def save(self, folder: str | Path, author: str, note: str = "") -> Path:
        """Saves the correction and a preview beside it; see `feedback.save_correction`."""
        correction = self.correction(author, note)
        preview = map_over_picture(self.shown.image, self.asked, correction.edit.mask)
        return save_correction(correction, folder, png(preview))


def sharpened(values: np.ndarray, sharpness: float) -> np.ndarray:
    """sigmoid(sharpness * logit(values)), values clamped to EPS and 1 - EPS."""
    inside = np.clip(np.asarray(values, dtype=np.float64), EPS, 1 - EPS)
    return 1 / (1 + ((1 - inside) / inside) ** sharpness)


def is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1

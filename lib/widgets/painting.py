"""What a person does on the pictures of a session: works, their history, notes; arrays only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from lib.edit import EPS, LOW, AttentionEdit, brief, is_index, is_share
from lib.widgets.history import OFF, SLIDERS, History, Work, asked_map, in_proportion
from lib.widgets.session import Session, refuse_scope

COPY_STRENGTH = 0.5  # of a copied map: of 100 right predictions it breaks about 7, and 1.0 about 20
CACHED = 64  # maps and outcomes that are kept

# What the heads see together is edited, and each keeps its part: of right predictions, such an
# edit breaks the fewest. Centred: with the paper's offset, all cells of a pretrained model read
# about 0.97.
SCOPE_AT_FIRST = {"blocks": "last", "heads": "mean", "queries": "cls", "offset": "centred"}


class Painting:
    """What is painted and set on each picture of a session, and what that asks of the model.

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
        self.block: int = session.layout.depth - 1
        self._scope = dict(SCOPE_AT_FIRST)
        # By grid and picture: on another grid, another one is painted.
        self._histories: dict[tuple[tuple[int, int], int], History] = {}
        self._notes: dict[int, str] = {}
        # The model is part of each key: after teaching, and at another size, it is another one.
        self._sigmoid = lru_cache(CACHED)(lambda _, *asked: session.sigmoid(*asked))
        self._own = lru_cache(CACHED)(self._mean_of_heads)
        self._edits = lru_cache(CACHED)(self._make_edit)  # a work is known by itself: none changes
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
        place = self.session.grid, index
        if place not in self._histories:
            self._histories[place] = History(self.session.grid, self._scope)
        return self._histories[place]

    def begin_in(self, blocks: str) -> None:
        """Other blocks to begin with; nothing where something was done on the picture already."""
        self._history.start_with(self.scope | {"blocks": blocks})

    def set_scope(self, **changes: str | Sequence[int] | None) -> None:
        """Changes which part of the model is edited: blocks, heads, queries, offset; one step.

        None keeps what was set. Raises ValueError for a word or an index that the model does not
        have.
        """
        scope = self.scope | {name: value for name, value in changes.items() if value is not None}
        checked = AttentionEdit(np.zeros(self.session.grid, dtype=bool), 0.0, **scope)
        refuse_scope(self.session.layout, checked)
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
        return self._sigmoid(self._model, self.index, self.block, self.scope["offset"])

    @property
    def _model(self) -> tuple[Any, ...]:
        return self.session.fingerprint, self.session.grid

    @property
    def own(self) -> np.ndarray:
        """The model's own map of the chosen heads together, float32 [gh, gw].

        For heads "mean" what they see together (`lib.model.mean_edit.read_mean`), else the mean of
        `own_by_head`.
        """
        return self._own_of(self.work)

    def _own_of(self, work: Work) -> np.ndarray:
        place = self._model, self.index, self.block, work.scope["offset"]
        return self._own(work.scope["heads"], *place)

    def _mean_of_heads(self, heads: str | tuple[int, ...], *place: Any) -> np.ndarray:
        if heads == "mean":
            return self.session.seen_together(*place[1:])
        by_head = self._sigmoid(*place)
        if heads == "all":
            return by_head.mean(axis=0)
        # Heads that are edited in other blocks need not be in this one.
        chosen = [head for head in heads if head < len(by_head)]
        return by_head[chosen or slice(None)].mean(axis=0)

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
        return asked_map(self._own_of(work), work.painted, **work.sliders)

    def edit(self) -> AttentionEdit:
        """What is asked of the model: the painted cells, and those that a slider changes."""
        return self.edit_of(self.work)

    def edit_of(self, work: Work) -> AttentionEdit:
        """The same of any work on the open picture; made once: a stroke asks for it many times."""
        return self._edits(self._model, self.index, self.block, work)

    def _make_edit(self, _: Any, __: int, ___: int, work: Work) -> AttentionEdit:
        wanted = self._asked(replace(work, strength=1.0))
        touched = ~np.isnan(work.painted) | (np.abs(wanted - self._own_of(work)) > EPS)
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

        The strength becomes `COPY_STRENGTH`.

        Args:
            weights: [gh, gw], from 0, not 0 everywhere.
        """
        self._history.change(painted=in_proportion(weights, self.own), strength=COPY_STRENGTH)

    def reset(self) -> None:
        """Back to the model's own map: erases all, switches `OFF` the three sliders."""
        self._reset(self._history)

    def lay_aside(self) -> None:
        """`reset` on all pictures: what was painted was for a model that is no longer there."""
        for history in self._histories.values():
            self._reset(history)

    def _reset(self, history: History) -> None:
        history.change(painted=np.full_like(history.work.painted, np.nan), **OFF)

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
        index = self.index if index is None else index
        if not is_index(index) or not 0 <= index < len(self.session):
            raise ValueError(f"a stroke names picture {brief(index)} of {len(self.session)}")
        history = self._history_of(index)
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

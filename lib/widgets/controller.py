"""All state of the attention editor and its words; no widget, and arrays only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lib.data.corrections import Correction, save_correction
from lib.data.maps import painted_on
from lib.widgets.history import Work
from lib.widgets.painting import CACHED, Painting
from lib.widgets.pixels import map_over_picture, png
from lib.widgets.session import Outcome, Session


def attention_moved(before: Outcome, after: Outcome, block: int) -> float:
    """Share of a block's attention that went elsewhere, in [0, 1].

    Half the sum of absolute differences, over patches and the tokens in front of them together,
    mean of the heads.
    """
    cells = np.abs(after.attention[block] - before.attention[block]).sum()
    return float(cells + abs(after.prefix[block] - before.prefix[block])) / 2


class EditorController(Painting):
    """State of the editor without any widget: what is painted, and what it leads to.

    Attributes:
        seconds: that the model takes for a picture; see `Painting` for the others.
    """

    def __init__(self, session: Session, index: int = 0) -> None:
        self.seconds = 0.0
        self._unedited = lru_cache(CACHED)(self._first_outcome)
        self._edited = lru_cache(CACHED)(  # a work is known by itself, as it never changes
            lambda _, index, block, work: session.outcome(index, self.edit_of(work))
        )
        super().__init__(session, index)

    def outcome(self) -> tuple[Outcome, Outcome]:
        """What the model says before and after the edit; computed once for each edit."""
        return self._unedited(self._model, self.index), self.outcome_of(self.work)

    def see_at(self, image_size: int | Sequence[int]) -> None:
        """Goes on at another picture size, see `LiveSession.see_at`: on a finer or coarser grid.

        What is painted goes along, as the first step there, unless something was done there before.
        """
        work, self.seconds = self.work, 0.0  # which are measured anew
        self.session.see_at(image_size)
        self.open(self.index)
        if not (self.can_undo or np.isnan(work.painted).all()):
            self.restore(replace(work, painted=painted_on(work.painted, self.session.grid)))

    def _first_outcome(self, _: Any, index: int) -> Outcome:
        start = time.perf_counter()
        found = self.session.outcome(index)
        self.seconds = max(self.seconds, time.perf_counter() - start)
        return found

    def outcome_of(self, work: Work) -> Outcome:
        """What the model says under another work on the open picture."""
        place = self._model, self.index
        if self.edit_of(work).is_empty:
            return self._unedited(*place)
        return self._edited(*place, self.block, work)

    def possible(self) -> dict[str, bool]:
        """Which of the operations would do something now."""
        return {
            "undo": self.can_undo,
            "redo": self.can_redo,
            "only_here": not np.isnan(self.painted).all(),
            "copy_human": self.shown.human is not None,
            "copy_box": self.shown.box is not None,
            "save": not self.edit().is_empty,
        }

    def moved(self) -> float:
        """Share of the shown block's attention that went elsewhere, see `attention_moved`."""
        return attention_moved(*self.outcome(), self.block)

    def summary(self) -> str:
        """One or two sentences; not escaped for HTML."""
        before, after = self.outcome()
        first, now = int(before.probabilities.argmax()), int(after.probabilities.argmax())
        name, true = self.session.classes[first], self.shown.label
        if before is after:
            right = "that is right" if first == true else f"it is {self.shown.class_name}"
            return f"The model says {name} ({before.probabilities[first]:.2f}); {right}."
        share = f"{attention_moved(before, after, self.block):.2f} of the attention moved."
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

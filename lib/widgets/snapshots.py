"""Edits of one picture that were kept, side by side.

`SnapshotList` is the state, without a widget: the snapshots of every picture, and what the model
makes of them. `SnapshotPanel` shows those of the open picture as cards.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import chain, count, product
from string import ascii_uppercase
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch

from lib import figures
from lib.data.maps import to_grid
from lib.edit import EPS, AttentionEdit
from lib.widgets.controller import EditorController, attention_moved
from lib.widgets.history import OFF, Work, in_proportion
from lib.widgets.panel import Panel, in_column, in_row, told
from lib.widgets.pixels import data_url, loops_around, png
from lib.widgets.session import Outcome, scope_in_words

Place = tuple[tuple[int, int], int]  # the grid and the picture that snapshots belong to

BEFORE = "before"  # the first of all: no edit
LISTED = 3  # classes whose scores a card shows

# Maps that are asked for as they are, by name: where they come from, see `SnapshotList.ready_made`.
READY = {"people's map": "human", "box": "box", "uniform": "uniform", "mean map": "mean"}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An edit of a picture that was kept."""

    name: str
    work: Work


@dataclass(frozen=True, eq=False)
class Judged:
    """What the model makes of a snapshot, beside the same picture before any edit."""

    name: str
    edit: AttentionEdit
    before: Outcome
    after: Outcome


class SnapshotList:
    """Snapshots of all pictures, each with its own; what is asked is asked of the open one's.

    What the model makes of them is computed when needed, and anew when the model is another one.
    """

    def __init__(self, controller: EditorController) -> None:
        self.controller = controller
        self._kept: dict[Place, list[Snapshot]] = {}
        self._deleted: dict[Place, tuple[int, Snapshot]] = {}  # the last one, and where it stood
        # Of which maps, and their mean.
        self._mean: tuple[object, torch.Tensor | None] = (None, None)

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Those of the open picture, without "before"."""
        return tuple(self._here)

    @property
    def _here(self) -> list[Snapshot]:
        return self._kept.setdefault(self.place, [])

    @property
    def place(self) -> Place:
        """Snapshots on another grid come back with it."""
        return self.controller.session.grid, self.controller.index

    def keep(self, name: str = "") -> Snapshot:
        """The present edit as the last snapshot; A, B, C, ... where it is given no name.

        Raises ValueError where nothing is edited, or where this very edit is kept.
        """
        return self._add(name, self.controller.work)

    def keep_ready_made(self, name: str) -> Snapshot:
        """One of `READY` as a snapshot, at the strength that is set.

        It asks for people's distribution, or the map's, of what the heads see together, in the
        blocks that are set. Raises ValueError where the picture has no such map, and says why.
        """
        values, why = self.ready_made(name)
        if values is None:
            raise ValueError(why)
        controller = self.controller
        own = controller.session.seen_together(controller.index, controller.block, "centred")
        scope = controller.scope | {"heads": "mean", "offset": "centred"}
        settings = OFF | {"strength": controller.strength}
        return self._add(name, Work(in_proportion(values, own), **settings, scope=scope))

    def ready_made(self, name: str) -> tuple[np.ndarray | None, str]:
        """The map of one of `READY`, `[gh, gw]` from 0, and "" ; or None, and why there is none."""
        shown, session = self.controller.shown, self.controller.session
        values, why = None, f"picture {shown.image_id} has no {name}"
        if READY[name] == "uniform":
            values = np.ones(session.grid, dtype=np.float32)
        elif READY[name] == "mean":
            values, why = self._mean_map(), "the data set has no human maps to take the mean of"
        else:
            values = getattr(shown, READY[name])
        if values is not None and not np.nansum(values) > 0:
            values, why = None, f"the {name} of picture {shown.image_id} is 0 everywhere"
        return values, "" if values is not None else why

    def rename(self, place: int, name: str) -> None:
        """Another name. Raises ValueError for one that is empty, or that another one has."""
        name = name.strip()
        taken = [BEFORE, *(one.name for k, one in enumerate(self._here) if k != place)]
        if not name or name in taken:
            why = f'the name "{name}" is taken' if name else "a snapshot needs a name"
            raise ValueError(f"{why}; give it another one")
        self._here[place] = replace(self._here[place], name=name)

    def move(self, place: int, by: int) -> int:
        """Moves a snapshot along; returns its new place, which is between the first and last."""
        one = self._here.pop(place)
        place = min(max(place + by, 0), len(self._here))
        self._here.insert(place, one)
        return place

    def delete(self, place: int) -> Snapshot:
        """Takes a snapshot away; `bring_back` puts the last one where it was."""
        one = self._here.pop(place)
        self._deleted[self.place] = place, one
        return one

    @property
    def can_bring_back(self) -> bool:
        return self.place in self._deleted

    def bring_back(self) -> None:
        """The snapshot of this picture that was deleted last; nothing where there is none."""
        if self.can_bring_back:
            place, one = self._deleted.pop(self.place)
            self._here.insert(place, replace(one, name=self._free(one.name)))

    def restore(self, place: int | None) -> None:
        """Makes a snapshot the present edit, in one step that can be undone; None is "before"."""
        if place is None:
            self.controller.reset()
        else:
            self.controller.restore(self._here[place].work)

    def judged(self) -> list[Judged]:
        """ "before" and the snapshots of the open picture, with what the model makes of each."""
        controller = self.controller
        nothing = Work(np.full(controller.session.grid, np.nan), scope=controller.scope)
        works = [Snapshot(BEFORE, nothing), *self._here]
        before = controller.outcome_of(nothing)
        return [
            Judged(one.name, controller.edit_of(one.work), before, controller.outcome_of(one.work))
            for one in works
        ]

    def to_frame(self) -> pd.DataFrame:
        """A row a snapshot, "before" first.

        Columns: name; prediction, p_prediction, right; p_true; change (of p_true, in points of
        100); moved (share of the attention, in the shown block); cells (that are edited); blocks,
        heads, queries, offset, strength.
        """
        controller, rows = self.controller, []
        classes, true = controller.session.classes, controller.shown.label
        for one in self.judged():
            before, after, edit = one.before.probabilities, one.after.probabilities, one.edit
            best = int(after.argmax())
            row = {"name": one.name, "prediction": classes[best], "p_prediction": after[best]}
            row |= {"right": best == true, "p_true": after[true]}
            row |= {"change": 100 * (after[true] - before[true])}
            row |= {
                "moved": attention_moved(one.before, one.after, controller.block),
                "cells": int(edit.mask.sum()),
            }
            rows.append(row | edit.scope)
        return pd.DataFrame(rows)

    def _mean_map(self) -> np.ndarray | None:
        """Mean of all human maps of the data set, where known; None without any."""
        dataset = getattr(self.controller.session, "dataset", None)
        if dataset is None:
            return None
        maps, valid = dataset.maps
        if self._mean[0] is not maps:
            known, times = valid.numpy(), valid.sum(dim=0).numpy()
            mean = (maps.numpy() * known).sum(axis=0) / np.maximum(times, 1)
            self._mean = maps, torch.from_numpy(mean) if times.any() else None
        mean = self._mean[1]
        if mean is None:
            return None
        return to_grid(mean, torch.ones_like(mean), self.controller.session.grid)[0].numpy()

    def _add(self, name: str, work: Work) -> Snapshot:
        edit = self.controller.edit_of(work)
        if edit.is_empty:
            raise ValueError('nothing is edited, and "before" is kept already; paint first')
        for one in self._here:
            if self.controller.edit_of(one.work) == edit:
                raise ValueError(f"this edit is kept already, as {one.name}")
        self._here.append(Snapshot(self._free(name.strip()), work))
        return self._here[-1]

    def _free(self, name: str) -> str:
        """The name, with a number where it is taken; "" is the next free of A, ..., Z, AA, ..."""
        taken = {BEFORE, *(one.name for one in self._here)}
        letters = (product(ascii_uppercase, repeat=length) for length in count(1))
        tried = (f"{name} {k}" if k > 1 else name for k in count(1))
        tried = tried if name else map("".join, chain.from_iterable(letters))
        return next(words for words in tried if words not in taken)


# ---------------------------------------------------------------------------------------- cards


def _map_html(one: Judged, block: int) -> str:
    """The attention over the picture, which the panel's style brings, and the painted cells."""
    rows, columns = one.edit.grid
    path = "".join(
        "M" + "L".join(f"{x} {y}" for x, y in corners) + "Z"
        for corners in loops_around({(r, c) for r, c in one.edit.mask.argwhere().tolist()})
    )
    line = "".join(f'<path class="cp-{kind}" d="{path}"/>' for kind in ("under", "line"))
    attention = one.after.attention[block]
    heat = figures.transparent(attention / max(float(attention.max()), EPS), one.edit.grid, 0.8)
    return (
        f'<div class="cp-map"><img src="{data_url(png(heat))}" '
        f'alt="attention: {escape(one.name)}">'
        f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">'
        f"{line}</svg></div>"
    )


def _scores_html(one: Judged, controller: EditorController) -> str:
    """Right or wrong; a bar a class, with the change in points; what it took."""
    session, true, block = controller.session, controller.shown.label, controller.block
    classes = session.classes
    before, after = one.before.probabilities, one.after.probabilities
    first, best = int(before.argmax()), int(after.argmax())
    right = best == true
    verdict = ("✓ right" if right else "✗ wrong") + " now" * ((first == true) != right)
    listed = dict.fromkeys([*np.argsort(-after, kind="stable")[:LISTED].tolist(), first, true])
    lines = []
    for k in listed:
        tags = "".join(
            f' <span class="cp-tag">{word}</span>'
            for word, is_so in (("true", k == true), ("was", k == first != best))
            if is_so
        )
        change = 100 * float(after[k] - before[k])
        points = f"{change:+.1f}" if abs(change) >= 0.05 else ""
        lines.append(
            f'<li class="cp-{"true" if k == true else "other"}" '
            f'style="--share:{100 * after[k]:.1f}%"><span>{after[k]:.2f} {escape(classes[k])}{tags}'
            f"</span><b>{points}</b></li>"
        )
    took = ""
    if not one.edit.is_empty:
        moved = attention_moved(one.before, one.after, block)
        took = f"{moved:.2f} of the attention moved; {scope_in_words(one.edit, session.layout)}"
    return (
        f'<p class="cp-verdict cp-{"right" if right else "wrong"}">{verdict}</p>'
        f'<ul class="cp-scores">{"".join(lines)}</ul><p class="ae-dim">{took}</p>'
    )


class _Card:
    """A place in the row; what stands there changes, so that the keyboard's focus stays."""

    def __init__(self, panel: SnapshotPanel, place: int | None) -> None:
        """`place` None is that of "before", which has no name to change and is not moved."""
        self._place, self._busy = place, False

        def button(text: str, callback: Callable[[], object]) -> widgets.Button:
            made = widgets.Button(description=text)
            made.on_click(lambda _: panel.act(callback))
            return made

        def renamed(change: dict[str, Any]) -> None:
            if not self._busy:
                panel.act(lambda: panel.kept.rename(place, change["new"]))

        self.name = widgets.Text(description="Name", continuous_update=False)
        self.name.observe(renamed, "value")
        self._map, self._scores = widgets.HTML(), widgets.HTML()
        self.restore = button("No edit", lambda: panel.restore(place)).add_class("cp-restore")
        self.restore.tooltip = "make this the present edit; can be undone"
        self.moves = {
            by: button(text, partial(panel.move, place, by)) for by, text in ((-1, "←"), (1, "→"))
        }
        self.delete = button("Delete", lambda: panel.delete(place))
        title = widgets.HTML(f"<b>{BEFORE}</b>") if place is None else self.name
        parts = [title, in_column([self._map, self.restore], "cp-stage"), self._scores]
        parts += [] if place is None else [in_row([*self.moves.values(), self.delete])]
        self.box = in_column(parts, "cp-card")

    def show(self, one: Judged, texts: tuple[str, str], places: int) -> None:
        """Shows a snapshot; `texts` are its map and scores, `places` how many there are."""
        self._map.value, self._scores.value = texts
        if self._place is None:
            return
        self._busy = True
        self.name.value = one.name
        self._busy = False
        self.restore.description = f"Restore {one.name}"
        for by, side, end in ((-1, "left", "first"), (1, "right", "last")):
            button = self.moves[by]
            button.disabled = not 0 <= self._place + by < places
            button.tooltip = f"move {one.name} to the {side}"
            if button.disabled:
                button.tooltip = f"{one.name} is the {end} already"
        self.delete.tooltip = f"delete {one.name}; can be brought back"


class SnapshotPanel(Panel):
    """The snapshots of the open picture, side by side, and how they come and go.

    Args:
        controller: whose edits are kept.
        changed: called when a snapshot was restored: the editor shows the controller anew.

    Attributes:
        kept: the `SnapshotList`; after changing it from Python, call `refresh`.
        errors, controls: see `Panel`.
    """

    def __init__(self, controller: EditorController, changed: Callable[[], None]) -> None:
        super().__init__()
        self.controller, self.kept, self._changed = controller, SnapshotList(controller), changed
        self._mark = f"cp-{uuid.uuid4().hex[:8]}"  # ties the style of the picture to this panel
        self._style, self._said = widgets.HTML(), widgets.HTML()
        self._styled: Place | None = None  # of the picture that the style brings
        self._judged_by = controller.session.fingerprint
        self._texts: dict[str, tuple[Outcome, int, tuple[str, str]]] = {}  # of cards, by name
        keep = self.button("keep", "Keep this edit", self._keep)
        menu = widgets.Dropdown(description="Ready-made")
        self.controls["ready"] = menu
        add = self.button("add", "Add", lambda: self.kept.keep_ready_made(menu.value))
        back = self.button("bring_back", "Bring back", self.kept.bring_back)
        back.tooltip = "the snapshot that was deleted last"
        self._first, self._cards = _Card(self, None), []
        self._row = in_row([self._first.box], "cp-cards")
        self.children = [self._style, in_row([keep, menu, add, back]), self._said, self._row]
        self.add_class("cp-panel").add_class(self._mark)
        self.refresh()

    def act(self, callback: Callable[[], object]) -> None:
        """Calls back, then shows what became of it; what was said before is gone."""
        self._said.value = ""
        super().act(callback)
        self.refresh()

    def refresh(self) -> None:
        """Shows those of the open picture, after controller, snapshots or model have changed."""
        super().act(self._show)

    def show_error(self, html: str) -> None:
        self._said.value = html

    def restore(self, place: int | None) -> None:
        self.kept.restore(place)
        self._changed()

    def move(self, place: int, by: int) -> None:
        """Moves a snapshot, and the focus with it, where ipywidgets knows how (8 does)."""
        place = self.kept.move(place, by)
        goes_on = 0 <= place + by < len(self.kept.snapshots)
        button = self._cards[place].moves[by if goes_on else -by]  # at the end, its own is disabled
        getattr(button, "focus", lambda: None)()

    def delete(self, place: int) -> None:
        self._say(f"Deleted {self.kept.delete(place).name}.")

    def _keep(self) -> None:
        self._say(f"Kept as {self.kept.keep().name}.")

    def _say(self, words: str) -> None:
        self._said.value = told(words)

    # -- showing

    def _show(self) -> None:
        controller = self.controller
        if self._styled != self.kept.place:
            self._styled = self.kept.place
            picture = data_url(png(figures.picture(controller.shown.image, pixels=224)))
            self._style.value = (
                f"<style>.{self._mark} .cp-map {{ background-image: url({picture}) }}</style>"
            )
            self._texts, self._said.value = {}, ""
        if self._judged_by != controller.session.fingerprint:
            self._judged_by = controller.session.fingerprint
            if self.kept.snapshots:
                self._say("The model is another one now: all outcomes were computed anew.")
        self._show_controls()
        self._show_cards()

    def _show_controls(self) -> None:
        menu, chosen = self.controls["ready"], self.controls["ready"].value
        entries = [
            (name + " (none here)" * bool(self.kept.ready_made(name)[1]), name) for name in READY
        ]
        if list(menu.options) != entries:
            menu.options = entries
            menu.value = chosen or entries[0][1]
        empty, keep = self.controller.edit().is_empty, self.controls["keep"]
        keep.disabled = empty
        keep.tooltip = "nothing is edited yet; paint first" if empty else "as a snapshot below"
        self.controls["bring_back"].layout.display = None if self.kept.can_bring_back else "none"

    def _show_cards(self) -> None:
        first, *others = self.kept.judged()
        while len(self._cards) < len(others):
            self._cards.append(_Card(self, len(self._cards)))
        cards = [self._first, *self._cards[: len(others)]]
        now = self.controller.edit()
        for card, one in zip(cards, (first, *others), strict=True):
            card.show(one, self._texts_of(one), len(others))
            (card.box.add_class if one.edit == now else card.box.remove_class)("cp-now")
        self._row.children = tuple(card.box for card in cards)  # the same ones change nothing

    def _texts_of(self, one: Judged) -> tuple[str, str]:
        """Map and scores of a card; made once, as all snapshots are shown after every stroke."""
        block = self.controller.block
        after, shown, texts = self._texts.get(one.name, (None, None, None))
        if after is not one.after or shown != block:
            texts = _map_html(one, block), _scores_html(one, self.controller)
            self._texts[one.name] = one.after, block, texts
        return texts

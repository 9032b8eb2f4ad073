"""One rule for many pictures, in the editor: choose, watch, and see what it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib import figures
from lib.data.dataset import evenly_spaced
from lib.edit import AttentionEdit
from lib.evaluation.many import count_changes, edit_many, make_rules
from lib.widgets.controller import EditorController
from lib.widgets.panel import Panel, in_row, table_html, told
from lib.widgets.pixels import data_url
from lib.widgets.session import scope_in_words

OFFERED = ("border to 0", "decoy to 0", "outside the box low", "people's map", "this edit")
EVERY_RULE = "all of them"
HOW_MANY = (32, 128, 512)  # pictures, evenly spaced, beside all of them
SETS = {"train": "training", "val": "validation", "test": "test"}

# Columns of `count_changes` that are shown, and their titles.
COUNTED = {
    "pictures": "pictures",
    "right": "right before",
    "right_to_wrong": "right → wrong",
    "wrong_to_right": "wrong → right",
    "changed": "changed",
    "p_change": "change of p(true)",
}


class ManyPanel(Panel):
    """Applies one rule to a set of pictures, in a thread of its own, beside its controls.

    Args:
        controller: of the editor. Its session has a model and a data set; its blocks, heads,
            queries, offset and strength hold for the rule, and its edit is a rule, too.

    Attributes:
        table: `lib.evaluation.many.count_changes` of the last time; None before it.
        errors, controls: see `Panel`.
    """

    def __init__(self, controller: EditorController) -> None:
        super().__init__()
        self.controller = controller
        self.table: pd.DataFrame | None = None
        self._stop, self._busy = threading.Event(), False
        dataset = controller.session.dataset
        parts = dataset.table.get("part", pd.Series(dataset.part, index=dataset.table.index))
        words = parts.map(SETS).fillna("all").to_numpy()
        self._sets = {
            f"{word} ({(words == word).sum()})": np.flatnonzero(words == word)
            for word in dict.fromkeys(words)
        }
        counts = [(f"{k} at even distances", k) for k in HOW_MANY if k < len(dataset)]
        menus = {
            "rule": ("Rule", [*OFFERED, EVERY_RULE]),
            "set": ("Pictures", list(self._sets)),
            "number": ("How many", [*counts, ("all", len(dataset))]),
        }
        for name, (text, options) in menus.items():
            self.controls[name] = widgets.Dropdown(description=text, options=options)
        self.button("apply", "Apply", self.start).button_style = "primary"
        self.button("cancel", "Cancel", lambda: self._stop.set())
        self._words, self._result = widgets.HTML(), widgets.HTML()
        self.children = [in_row(self.controls.values()), self._words, self._result]
        self.add_class("cp-panel")
        self._enable()

    def refresh(self) -> None:
        """Nothing here follows the controller: what it holds is asked when a rule is applied."""

    def start(self) -> None:
        """Applies the rule; what the button does."""
        if self._busy:
            return
        edit, name = self.controller.edit(), self.controls["rule"].value
        if name == "this edit" and edit.is_empty:
            raise ValueError("nothing is edited, so there is no edit to apply; paint first")
        chosen = self._sets[self.controls["set"].value]
        chosen = chosen[evenly_spaced(chosen, self.controls["number"].value)]
        self._busy, self._result.value = True, ""
        self._enable()
        self._progress(0, len(chosen))
        self._stop = self.behind(lambda tell, stop: self._work(name, edit, chosen, tell, stop))

    def _work(
        self,
        name: str,
        edit: AttentionEdit,
        chosen: np.ndarray,
        tell: Callable[[Callable[[], object]], None],
        stop: threading.Event,
    ) -> None:
        """`start` in the thread: `tell` lets the kernel show what there is."""
        session = self.controller.session

        def progress(done: int, of: int) -> bool:
            tell(lambda: self._progress(done, of))
            return stop.is_set()

        now = session.now
        rules = make_rules(now.dataset, None if edit.is_empty else edit)
        if name not in (*rules, EVERY_RULE):
            raise ValueError(f'the pictures have nothing for "{name}"; choose another rule')
        asked = list(rules.values()) if name == EVERY_RULE else [rules[name]]
        scopes = {scope_in_words(edit, session.layout): edit.scope}
        frame = edit_many(now.model, now.dataset, asked, chosen, scopes, progress=progress)
        tell(lambda: self._finish(frame, stop.is_set()))

    def _progress(self, done: int, of: int) -> None:
        # Without a value the bar moves by itself: the first pictures take longest.
        value = f' value="{done}"' if done else ""
        self._words.value = (
            f'<progress class="cp-progress" aria-label="pictures that are done"{value} max="{of}">'
            f"</progress> {done} of {of} pictures"
        )

    def _finish(self, frame: pd.DataFrame, is_cancelled: bool) -> None:
        self._free()
        done = frame["index"].nunique() if len(frame) else 0
        if is_cancelled:
            self._say(f"Cancelled after {done} pictures" + "; what they say is below." * bool(done))
        elif not done:
            self._say("None of these pictures has what the rule needs.")
        else:
            session, size = self.controller.session, ""
            if session.now.model is not session.model:
                size = ", at {} x {} pixels".format(*session.image_size)
            self._say(f"{done} pictures, {self.controls['set'].value.split(' (')[0]}{size}.")
        if done:
            self.table = count_changes(frame)
            self._result.value = many_html(self.table)

    def _say(self, words: str) -> None:
        self._words.value = told(words)

    def _free(self) -> None:
        self._busy = False
        self._enable()

    def _enable(self) -> None:
        controls, busy = self.controls, self._busy
        controls["apply"].disabled, controls["cancel"].disabled = busy, not busy
        controls["apply"].tooltip = "a rule is being applied now" if busy else ""
        controls["cancel"].tooltip = "" if busy else "nothing is being applied"

    def show_error(self, html: str) -> None:
        self._words.value = html
        self._free()


def many_html(table: pd.DataFrame) -> str:
    """`count_changes` as a table, with the figure of it below."""
    lines = []
    for row in table.to_dict("records"):
        own = row["control"] == "own"
        title = f"<b>{escape(row['rule'])}</b>" if own else f"control: {escape(row['control'])}"
        cells = [f"{row[name]:+.3f}" if name == "p_change" else str(row[name]) for name in COUNTED]
        lines.append([title, *cells])
    drawn = figures.as_file(figures.rule_changes(table), "png", dpi=110)
    where = escape("; ".join(dict.fromkeys(table["scope"])))
    return (
        f'<p>Edited: {where}.</p><div class="cp-wide" tabindex="0" '
        'role="region" aria-label="table and figure">'
        f"{table_html(['', *COUNTED.values()], lines, 'ae-scores')}"
        f'<img src="{data_url(drawn)}" '
        'alt="bars of the table: right to wrong, and wrong to right"></div>'
    )

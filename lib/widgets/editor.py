"""The attention editor: paint where the model should look, and see at once what that changes.

`attention_editor(session)` is the whole tool for a notebook. It has three layers, each of use
without the one after it: `EditorController` (all state, the history and the words), `PaintWidget`
or `PlainPaint` (the picture to paint on), `AttentionEditor` (controls and scores around it).

Maps are arrays [gh, gw] over the patches; a painted map holds NaN where nobody painted. Rows and
columns are counted from 1 on the screen; blocks and heads from 0, as in an `AttentionEdit`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from lib.widgets import brush, rungs, views
from lib.widgets.browser import PictureBrowser
from lib.widgets.brush import PaintWidget, PlainPaint
from lib.widgets.controller import EditorController
from lib.widgets.controls import Controls
from lib.widgets.many_panel import ManyPanel
from lib.widgets.out import ComparePanel
from lib.widgets.panel import Panel, in_column, in_row, style_sheet, told
from lib.widgets.session import LiveSession, Session
from lib.widgets.shelf import CorrectionShelf
from lib.widgets.teaching import TeachPanel

QUIET = 0.4  # seconds without an action before the other rungs are tried
SLOW = 1.0  # seconds for a rung from which on they are not tried unasked


class AttentionEditor(Controls):
    """The tool that `attention_editor` makes.

    Attributes:
        controller: the `EditorController`; after changing it from Python, call `refresh`.
        paint: the `PaintWidget`, or the `PlainPaint`.
        parts: the panels below, by the text of the button that opens them.
        errors, controls: see `Panel`.
    """

    def __init__(
        self, controller: EditorController, folder: str | Path, author: str, plain: bool
    ) -> None:
        super().__init__(controller, Path(folder))
        self.parts: dict[str, Panel] = {}
        self._author = author
        self._laddered: tuple[Any, ...] | None = None  # what the shown ladder belongs to
        self._titled: tuple[Any, ...] | None = None  # what the title names
        self._later: asyncio.TimerHandle | None = None
        self._mark = f"ae-{uuid.uuid4().hex[:8]}"  # ties the style of the picture to this tool
        if plain:
            self.paint = PlainPaint(self._operate)
        else:
            act = {"undo": EditorController.undo, "redo": EditorController.redo}
            self.paint = PaintWidget(
                on_stroke=self._stroke,
                on_action=lambda action: self._operate(act[action]),
                on_error=self.fail,
            )
        self._below = in_column([], "ae-part")
        columns = [
            in_column([self.paint], "ae-left"),
            in_column([self._html["result"]], "ae-result"),
            in_column(self._settings(), "ae-settings"),
        ]
        for name in ("verdict", "notice"):
            self._html[name].add_class(f"ae-{name}")
        top = [self._html["verdict"], self._toolbar(), self._html["notice"]]
        style = [style_sheet()] if plain else []  # else the brush brings it
        self._openers = in_row([], "ae-openers")
        self.children = [
            *(*style, self._header(), *top, in_row(columns, "ae-columns")),
            *(self._openers, self._below),
        ]
        self.add_class("ae-tool")
        self.add_class(self._mark)
        self._show()
        self._soon()

    # -- parts below

    def add_part(self, text: str, make: Callable[[], Panel]) -> None:
        """A panel below, closed until its button is pressed, and made then."""
        opener = widgets.ToggleButton(description=text)

        def opened(_: Any) -> None:
            if opener.value and text not in self.parts:
                self.parts[text] = make()
            for other in self._openers.children:
                if opener.value and other is not opener:
                    other.value = False
            if opener.value:
                self.parts[text].refresh()
            self._below.children = [self.parts[text]] if opener.value else []

        self._watch(f"part {text}", opener, opened)
        self._openers.children = [*self._openers.children, opener]

    # -- callbacks

    def act(self, callback: Callable[[], object]) -> None:
        """Calls back; whatever becomes of it, the state is then shown."""
        self._html["notice"].value, index = "", self.controller.index  # it is the last action's
        super().act(callback)
        super().act(self._show)
        for part in self._below.children:  # the one that is open
            if part.follows or index != self.controller.index:
                super().act(part.refresh)
        self._soon()

    def refresh(self) -> None:
        """Shows the state of the controller, after it or the session's model was changed."""
        super().act(self._show)
        for part in self.parts.values():
            part.refresh()

    def show_error(self, html: str) -> None:
        self._html["notice"].value = html

    def _operate(self, operation: Callable[[EditorController], None]) -> None:
        self.act(partial(operation, self.controller))

    def _stroke(self, index: int, cells: dict[int, float | None], stroke: str) -> None:
        self._operate(lambda controller: controller.stroke(cells, stroke, index))

    def _ladder(self) -> None:
        ladder = views.ladder_html(rungs.climb(self.controller))
        rows, columns = self.controller.session.grid
        if rows * columns > rungs.MOST_ROWS:
            ladder += f'<p class="ae-dim">All rows of {rows} x {columns} cells would take long.</p>'
        self._html["ladder"].value = ladder
        self._laddered = self._asked()

    def _asked(self) -> tuple[Any, ...]:
        controller = self.controller
        session = controller.session
        model = session.fingerprint, session.grid
        return model, controller.index, controller.block, controller.work

    def _save(self) -> None:
        path = self.controller.save(self._folder, self._author, self.controller.note)
        self._html["notice"].value = told(f"Saved as {path}")
        for part in self.parts.values():
            part.refresh()

    # -- which part of the model

    def _soon(self) -> None:
        """When nothing has been done for a while, tries what the edit does elsewhere."""
        if self._later is not None:
            self._later.cancel()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # no kernel
        self._later = loop.call_later(QUIET, super().act, self._try_rungs)

    def _try_rungs(self) -> None:
        """A hint where another rung would do more; before anything is done, that rung itself."""
        controller = self.controller
        is_wide = controller.scope["queries"] == "all" and controller.own.size > rungs.MOST_ROWS
        if controller.seconds > SLOW or is_wide:
            return
        if not (controller.can_undo or self._has_chosen_blocks):
            controller.begin_in(rungs.blocks_to_begin_with(controller))
        self._hinted, words = rungs.wider(controller)
        self._html["hint"].value = escape(words)
        self._show()

    def _take_hint(self) -> None:
        self._set_blocks(self._hinted)
        self._hinted = ""

    # -- showing

    def _show(self) -> None:
        controller, is_hidden = self.controller, self.controls["guess"].value
        self._is_showing = True
        try:
            self._set_controls()
        finally:
            self._is_showing = False
        titled = controller.index, controller.session.grid, is_hidden
        if self._titled != titled:
            self._html["title"].value = views.title_html(controller, self._mark, is_hidden)
            self._titled = titled
        self.paint.show(controller, is_hidden)
        for box in (self._openers, self._below):  # which would tell
            box.layout.display = "none" if is_hidden else None
        self._html["verdict"].value = views.verdict_html(controller, is_hidden)
        as_trained = "" if is_hidden else views.as_trained_html(controller)
        self._html["result"].value = (
            f"{views.scores_html(controller.score_rows(), is_hidden)}{as_trained}"
            f"{views.attention_html(controller)}"
        )
        if self._laddered is not None and self._laddered != self._asked():
            self._html["ladder"].value, self._laddered = "", None

    def _repr_mimebundle_(self, **how: Any) -> Mapping[str, Any]:
        """With a picture beside the widget, which is shown where no kernel answers."""
        data = super()._repr_mimebundle_(**how)
        bundle = data[0] if isinstance(data, tuple) else data
        bundle["image/png"] = views.state_png(self.controller)
        return data


def attention_editor(
    session: Session,
    index: int = 0,
    folder: str | Path = "corrections",
    author: str = "anonymous",
    teach: TeachPanel | None = None,
    plain: bool = False,
) -> AttentionEditor:
    """The attention editor for a notebook.

    Args:
        session: a `lib.widgets.session.LiveSession`, or anything like it. The menu Cells has finer
            maps, as `LiveSession(..., image_size=)` has from the start.
        index: of the picture that is opened first.
        folder: where "Save correction" writes; made when needed.
        author: is written into the corrections.
        teach: trains on the saved corrections; opened by the button Teach.
        plain: sliders and buttons instead of the brush, as where anywidget is absent.

    Returns:
        A widget with the attributes controller, paint, parts, errors and controls.
    """
    controller = EditorController(session, index)
    tool = AttentionEditor(controller, folder, author, plain or brush.anywidget is None)
    where = controller, tool.refresh, folder
    tool.add_part("Compare and export", lambda: ComparePanel(*where, author))
    if isinstance(session, LiveSession):  # it has a data set to browse
        tool.add_part("Many pictures", lambda: ManyPanel(controller))
        tool.add_part("Pictures", lambda: PictureBrowser(*where))
        tool.add_part("Saved corrections", lambda: CorrectionShelf(*where))
    if teach is not None:
        teach.attach(controller, tool.refresh)
        tool.add_part("Teach", lambda: teach)
    return tool

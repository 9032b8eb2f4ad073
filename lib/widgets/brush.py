"""The picture with the map over it, to paint on: in the browser, or with sliders and buttons.

`PaintWidget` is painted on in the browser (static/editor.js). Where anywidget is absent,
`PlainPaint` does its work with sliders and buttons.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as widgets
import numpy as np
import traitlets

from lib.widgets.controller import EditorController
from lib.widgets.panel import STATIC, in_row, make_slider, wide
from lib.widgets.pixels import (
    COLOURS,
    OPACITY,
    data_url,
    draw_outline,
    map_over_picture,
    png,
)

try:
    import anywidget
except ImportError:  # the tool then has the plain brush
    anywidget = None


PAGES = 16  # whose last messages are remembered


def _listed(values: np.ndarray) -> list[float | None]:
    """A map for the browser: row by row, 4 decimals, None for NaN."""
    flat = np.round(np.asarray(values, dtype=np.float64).ravel(), 4)
    return [None if np.isnan(value) else value for value in flat.tolist()]


class PaintWidget(anywidget.AnyWidget if anywidget else widgets.DOMWidget):
    """The picture with the map over it, to paint on; without anywidget it cannot be displayed.

    Several pages may show one widget. Each paints at once on its own copy and sends what a stroke
    changes, cells and values; it is laid over the map that is there now, and all pages get that.
    A page sends its next message when its last one is in `answered`, so of each page one at most is
    on its way.
    """

    _esm = STATIC / "editor.js"
    _css = STATIC / "editor.css"

    # Written by Python. Lists are replaced as a whole, never changed in place.
    picture = traitlets.Unicode().tag(sync=True)  # PNG as a data URL
    subject = traitlets.Int(-1).tag(sync=True)  # number of the picture
    draft_key = traitlets.Unicode().tag(sync=True)  # names picture and grid in the browser's store
    run = traitlets.Unicode().tag(sync=True)  # another one for every widget
    rows = traitlets.Int().tag(sync=True)
    columns = traitlets.Int().tag(sync=True)
    painted = traitlets.List().tag(sync=True)  # [P], None where not painted
    own = traitlets.List().tag(sync=True)  # [P], the model's own map
    base = traitlets.List().tag(sync=True)  # [P], what is shown where nothing is painted
    strength = traitlets.Float(1.0).tag(sync=True)
    sharpness = traitlets.Float(1.0).tag(sync=True)
    odds = traitlets.Bool(True).tag(sync=True)  # whether v / (1 - v) is "times the average patch"
    colours = traitlets.List(COLOURS.ravel().tolist()).tag(sync=True)  # 256 times red, green, blue
    sentence = traitlets.Unicode().tag(sync=True)  # for screen readers
    answered = traitlets.Dict().tag(sync=True)  # by page: number of its last message

    # Set in the browser, or from Python.
    tool = traitlets.Enum(["brush", "erase", "rectangle", "fill"], "brush").tag(
        sync=True, echo_update=False
    )
    view = traitlets.Enum(["contour", "dimming", "heat"], "contour").tag(
        sync=True, echo_update=False
    )
    # Beyond .99 odds mean nothing: one cell would take all there is.
    brush_value = traitlets.Float(0.9, min=0, max=0.99).tag(sync=True, echo_update=False)
    brush_size = traitlets.Float(2.0, min=1, max=12).tag(sync=True, echo_update=False)  # cells
    soft_edge = traitlets.Float(0.0, min=0, max=1).tag(sync=True, echo_update=False)  # of the size
    opacity = traitlets.Float(OPACITY, min=0, max=1).tag(sync=True, echo_update=False)
    grid_lines = traitlets.Bool(False).tag(sync=True, echo_update=False)

    def __init__(
        self,
        on_stroke: Callable[[int, dict[int, float | None], str], None],
        on_action: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """The three are called with what a stroke changes, "undo" or "redo", an error.

        A stroke comes in versions, as (number of the picture, value by cell, name of the stroke);
        each holds what the stroke has changed since the one before, None for erased.
        """
        self._on_stroke, self._on_action, self._on_error = on_stroke, on_action, on_error
        super().__init__(run=uuid.uuid4().hex[:8])
        self.on_msg(self._receive)

    def show(self, controller: EditorController, is_hidden: bool = False) -> None:
        """Brings all pages to the state of the controller, in one message.

        Args:
            is_hidden: the class is still to be guessed, so the outcome is not told.
        """
        with self.hold_sync():
            grid = self.rows, self.columns
            if (self.subject, grid) != (controller.index, controller.session.grid):
                self.subject = controller.index
                self.rows, self.columns = controller.session.grid
                self.draft_key = f"{controller.shown.image_id}, {self.rows} x {self.columns}"
                self.picture = data_url(png(controller.shown.image))
            self.painted = _listed(controller.painted)
            self.own, self.base = _listed(controller.own), _listed(controller.base)
            self.strength, self.sharpness = controller.strength, controller.sharpness
            self.odds = controller.scope["offset"] == "centred"
            self.sentence = "" if is_hidden else controller.summary()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes what a control of the browser has set; no error ends in a log."""
        try:
            super().set_state(sync_data)
        except Exception as error:
            self.send_state(sync_data.keys() & set(self.keys))  # the browser takes ours back
            self._on_error(error)

    def _receive(self, _: widgets.Widget, message: Any, __: Any) -> None:
        """Takes a stroke or an action of a page. It is always answered, in one message."""
        with self.hold_sync():
            try:
                self._take(message)
            except Exception as error:
                self._on_error(error)
            finally:
                if isinstance(message, dict):
                    page, number = str(message.get("page")), message.get("n")
                    others = {p: n for p, n in self.answered.items() if p != page}
                    last = list(others.items())[1 - PAGES :]
                    self.answered = dict(last) | {page: number}

    def _take(self, message: Any) -> None:
        subject, action = message["subject"], message.get("action")
        cells = self.rows * self.columns
        if not action and message.get("of", cells) != cells:
            return  # it was meant for the cells of a picture size that is no longer shown
        if not action:
            # Two pages count their strokes from 1 on.
            name = f"{message['page']}-{message['number']}"
            self._on_stroke(subject, dict(message["cells"]), name)
        elif subject == self.subject:  # else it was meant for a picture that is no longer shown
            self._on_action(action)


class PlainPaint(widgets.VBox):
    """The brush without anywidget: rows and columns by sliders, one button press is one stroke."""

    def __init__(self, apply: Callable[[Callable[[EditorController], None]], None]) -> None:
        """`apply` is called with each operation on the controller."""
        self._picture = widgets.Image(format="png", layout=widgets.Layout(width="100%"))
        self.row_range, self.column_range = (
            widgets.IntRangeSlider(description=text, value=(1, 1), min=1, max=1, **wide())
            for text in ("Rows", "Columns")
        )
        self.brush_value = make_slider("Value", 0.9, 1.0)
        buttons = []
        for text, operation in (
            ("Paint", self._rectangle),
            ("Erase", lambda controller: controller.erase(self.cells)),
            ("Fill", lambda controller: controller.fill(self.brush_value.value)),
        ):
            button = widgets.Button(description=text)
            button.on_click(partial(lambda chosen, _: apply(chosen), operation))
            buttons.append(button)
        for slider in (self.row_range, self.column_range):
            slider.observe(lambda _: apply(lambda _: None), "value")  # only to be drawn
        ranges = [self.row_range, self.column_range, self.brush_value]
        super().__init__([self._picture, *ranges, in_row(buttons)])

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The chosen cells, rows and columns from 0."""
        (r0, r1), (c0, c1) = self.row_range.value, self.column_range.value
        return [(r, c) for r in range(r0 - 1, r1) for c in range(c0 - 1, c1)]

    def show(self, controller: EditorController, is_hidden: bool = False) -> None:
        """The picture, with a white line around what is painted and a red one around the choice."""
        sliders = (self.row_range, self.column_range)
        for slider, count in zip(sliders, controller.session.grid, strict=True):
            slider.max = count
        chosen = np.zeros(controller.session.grid, dtype=bool)
        chosen[tuple(np.transpose(self.cells))] = True
        painted = ~np.isnan(controller.painted)
        picture = map_over_picture(controller.shown.image, controller.asked, painted)
        draw_outline(picture, chosen, "red", 3)
        self._picture.value = png(picture)

    def _rectangle(self, controller: EditorController) -> None:
        controller.paint(self.cells, self.brush_value.value)

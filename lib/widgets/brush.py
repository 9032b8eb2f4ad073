"""The picture with the map over it, to paint on: in the browser, or with sliders and buttons.

`PaintWidget` is painted on in the browser (static/editor.js). Where anywidget is absent,
`PlainPaint` does its work with sliders and buttons.
"""

from __future__ import annotations

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


def _listed(values: np.ndarray) -> list[float | None]:
    """A map for the browser: row by row, 4 decimals, None for NaN."""
    flat = np.round(np.asarray(values, dtype=np.float64).ravel(), 4)
    return [None if np.isnan(value) else value for value in flat.tolist()]


class PaintWidget(anywidget.AnyWidget if anywidget else widgets.DOMWidget):
    """The picture with the map over it, to paint on; without anywidget it cannot be displayed.

    The browser paints at once on its own copy and sends that copy as `painted`, with the number of
    the `stroke`. It sends the next message when `ack` ticks, so one at most is on its way. Whatever
    Python changes on its own gets a new `revision`; a message that was painted on an older one is
    answered but not used, and the browser lays its strokes over the new map and sends them again.
    """

    _esm = STATIC / "editor.js"
    _css = STATIC / "editor.css"

    # Written by Python. Lists are replaced as a whole, never changed in place.
    picture = traitlets.Unicode().tag(sync=True)  # PNG as a data URL
    subject = traitlets.Int(-1).tag(sync=True)  # number of the picture
    rows = traitlets.Int().tag(sync=True)
    columns = traitlets.Int().tag(sync=True)
    own = traitlets.List().tag(sync=True)  # [P], the model's own map
    base = traitlets.List().tag(sync=True)  # [P], what is shown where nothing is painted
    strength = traitlets.Float(1.0).tag(sync=True)
    sharpness = traitlets.Float(1.0).tag(sync=True)
    colours = traitlets.List(COLOURS.ravel().tolist()).tag(sync=True)  # 256 times red, green, blue
    sentence = traitlets.Unicode().tag(sync=True)  # for screen readers
    revision = traitlets.Int().tag(sync=True)
    ack = traitlets.Int().tag(sync=True)  # messages from the browser that were answered

    # Written by the browser, and by Python where it changes the map.
    painted = traitlets.List().tag(sync=True, echo_update=False)  # [P], None where not painted
    stroke = traitlets.Int().tag(sync=True, echo_update=False)
    sent = traitlets.Dict().tag(sync=True, echo_update=False)  # n, subject, revision, action

    # Set in the browser, or from Python.
    tool = traitlets.Enum(["brush", "erase", "rectangle", "fill"], "brush").tag(
        sync=True, echo_update=False
    )
    brush_value = traitlets.Float(0.9, min=0, max=1).tag(sync=True, echo_update=False)
    brush_size = traitlets.Float(2.0, min=1, max=12).tag(sync=True, echo_update=False)  # cells
    soft_edge = traitlets.Float(0.0, min=0, max=1).tag(sync=True, echo_update=False)  # of the size
    opacity = traitlets.Float(OPACITY, min=0, max=1).tag(sync=True, echo_update=False)
    grid_lines = traitlets.Bool(False).tag(sync=True, echo_update=False)

    def __init__(
        self,
        on_stroke: Callable[[list, int], None],
        on_action: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """The three are called with a painted map and its stroke, "undo" or "redo", an error."""
        self._on_stroke, self._on_action, self._on_error = on_stroke, on_action, on_error
        super().__init__()

    def show(self, controller: EditorController) -> None:
        """Brings the browser to the state of the controller, in one message."""
        with self.hold_sync():
            painted = _listed(controller.painted)
            if self.subject != controller.index:
                self.subject = controller.index
                self.rows, self.columns = controller.session.grid
                self.picture = data_url(png(controller.shown.image))
                self.painted, self.revision = painted, self.revision + 1
            elif painted != self.painted:
                self.painted, self.revision = painted, self.revision + 1
            self.own, self.base = _listed(controller.own), _listed(controller.base)
            self.strength, self.sharpness = controller.strength, controller.sharpness
            self.sentence = controller.summary()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes a message of the browser. It is always answered, and no error ends in a log."""
        about_map = sync_data.keys() & {"painted", "stroke", "sent"}
        with self.hold_sync():
            try:
                sent = sync_data.get("sent", {})
                action = sent.get("action")
                # A map belongs to the revision it was painted on, undo and redo to the picture.
                name, now = ("subject", self.subject) if action else ("revision", self.revision)
                stale = sent.get(name, now) != now
                unused = about_map if stale else set()
                super().set_state({k: v for k, v in sync_data.items() if k not in unused})
                if about_map and not stale:
                    self._take(action)
            except Exception as error:
                self.send_state(sync_data.keys() & set(self.keys))  # the browser takes ours back
                self.revision += 1
                self._on_error(error)
            finally:
                self.ack += bool(about_map)

    def _take(self, action: str | None) -> None:
        if action:
            self._on_action(action)
        else:
            self._on_stroke(self.painted, self.stroke)


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

    def show(self, controller: EditorController) -> None:
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

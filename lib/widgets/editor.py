"""The attention editor: paint where the model should look, and see at once what that changes.

`attention_editor(session)` is the whole tool for a notebook. It has three layers, each of use
without the one after it: `EditorController` (all state, the history and the words), `PaintWidget`
or `PlainPaint` (the picture to paint on), `AttentionEditor` (controls and scores around it).

Maps are arrays [gh, gw] over the patches; a painted map holds NaN where nobody painted. Rows and
columns are counted from 1 on the screen; blocks and heads from 0, as in an `AttentionEdit`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from lib.widgets import brush
from lib.widgets.brush import PaintWidget, PlainPaint
from lib.widgets.controller import EditorController, Outcome, Session
from lib.widgets.panel import (
    Panel,
    figure_html,
    in_column,
    in_row,
    make_slider,
    style_sheet,
    table_html,
    wide,
)
from lib.widgets.pixels import coloured, data_url, heat_url, png

# Buttons below the picture: text, what they do, and a hint.
OPERATIONS = {
    "undo": ("Undo", EditorController.undo, "one stroke back"),
    "redo": ("Redo", EditorController.redo, "one stroke forward again"),
    "reset": ("Reset", EditorController.reset, "back to the model's own map"),
    "only_here": (
        "Only here",
        EditorController.only_here,
        "a low value on every cell that is not painted",
    ),
    "copy_human": ("Copy human map", EditorController.copy_human, "paint where people looked"),
    "copy_box": ("Copy box", EditorController.copy_box, "paint the bounding box"),
}

# Menus of the scope: text, and entries with their values.
MENUS = {
    "blocks": {
        "last block": "last",
        "last two blocks": "last2",
        "all blocks": "all",
        "the shown block": "shown",
    },
    "queries": {"class token": "cls", "all tokens": "all"},
    "offset": {"centred": "centred", "none (the paper)": "none"},
}
SLIDERS = ("strength", "sharpness", "suppression")


def scores_html(rows: Iterable[dict[str, Any]]) -> str:
    """Class scores as a table with two bars a class; takes `EditorController.score_rows`."""
    lines = []
    for row in rows:
        mark = '<span class="ae-true">true class</span>' if row["is_true"] else ""
        bars = "".join(
            f'<div class="ae-bar ae-{when}" style="width:{100 * row[when]:.1f}%"></div>'
            for when in ("before", "after")
        )
        change = f"{row['change']:+.1f}" if abs(row["change"]) >= 0.05 else "0.0"
        numbers = (f"{row['before']:.2f}", f"<b>{row['after']:.2f}</b>", change)
        title = f"{escape(row['class'])} {mark}"
        lines.append((title, f'<div class="ae-bars">{bars}</div>', *numbers))
    return table_html(("class", "", "before", "after", "points"), lines, "ae-scores")


def attention_html(before: Outcome, after: Outcome, block: int) -> str:
    """Softmax maps over the picture, each brightest where it is highest, and their figures."""
    maps = {"before": before.attention[block], "after": after.attention[block]}
    figures = "".join(
        figure_html(heat_url(values), f"softmax attention {when} the edit", when)
        for when, values in maps.items()
    )
    kept = (before.class_token[block], after.class_token[block])
    tops = (values.max() for values in maps.values())
    facts = (("class token keeps", kept, 2), ("highest cell", tops, 3))
    lines = "".join(
        f'<div class="ae-dim">{what}</div><div>{old:.{digits}f} → <b>{new:.{digits}f}</b></div>'
        for what, (old, new), digits in facts
    )
    return f'<div class="ae-figures">{figures}<div>{lines}</div></div>'


class AttentionEditor(Panel):
    """The tool that `attention_editor` makes.

    Attributes:
        controller: the `EditorController`; after changing it from Python, call `refresh`.
        paint: the `PaintWidget`, or the `PlainPaint`.
        errors, controls: see `Panel`.
    """

    def __init__(
        self,
        controller: EditorController,
        folder: str | Path,
        author: str,
        on_teach: Callable[[EditorController], None] | None,
        plain: bool,
    ) -> None:
        super().__init__()
        self.controller = controller
        self._folder, self._author, self._on_teach = Path(folder), author, on_teach
        self._busy = False  # the tool itself sets its controls; nobody moved them
        self._laddered: tuple[Any, ...] | None = None  # what the shown ladder belongs to
        self._titled: int | None = None  # the picture that the title names
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
        names = ("title", "result", "ladder", "notice", "error")
        self._html = {name: widgets.HTML(layout=widgets.Layout(width="auto")) for name in names}
        dismiss = self.button("dismiss", "Dismiss", self._dismiss)
        self._error_row = in_row([self._html["error"], dismiss], "ae-error")
        self._dismiss()
        buttons = [
            self.button(name, text, partial(operation, controller), tooltip)
            for name, (text, operation, tooltip) in OPERATIONS.items()
        ]
        parts = [
            in_column([self.paint, in_row(buttons)], "ae-left"),
            in_column([self._html["result"]], "ae-result"),
            in_column(self._settings(), "ae-settings"),
            in_column(self._keeping(), "ae-keeping"),
        ]
        style = [style_sheet()] if plain else []  # else the brush brings it
        self.children = [*style, self._header(), self._error_row, in_row(parts, "ae-columns")]
        self.add_class("ae-tool")
        self.add_class(self._mark)
        self._show()

    # -- building

    def _header(self) -> widgets.Widget:
        last = len(self.controller.session) - 1
        number = widgets.BoundedIntText(
            self.controller.index,
            min=0,
            max=last,
            description="Picture",
            layout=widgets.Layout(width="130px"),
            style={"description_width": "50px"},
        )
        self._watch("picture", number, self.controller.open)
        previous = self.button("previous", "Previous", lambda: self._step(-1))
        following = self.button("next", "Next", lambda: self._step(1))
        return in_row([previous, number, following, self._html["title"]], "ae-header")

    def _settings(self) -> list[widgets.Widget]:
        limits = {"Strength": (1.0, 1.0), "Sharpness": (1.0, 4.0, 0.1), "Background": (0.0, 1.0)}
        sliders = [make_slider(text, *numbers) for text, numbers in limits.items()]
        for name, slider in zip(SLIDERS, sliders, strict=True):
            self._watch(name, slider, partial(setattr, self.controller, name))
        depth = self.controller.session.depth
        blocks = {f"{k}{' (last)' * (k == depth - 1)}": k for k in range(depth)}
        scope = self.controller.set_scope
        menus = {
            "block": ("Shown block", blocks, self._show_block),
            "blocks": ("Edit in", MENUS["blocks"], self._set_blocks),
            "queries": ("Queries", MENUS["queries"], lambda chosen: scope(queries=chosen)),
            "offset": ("Offset", MENUS["offset"], lambda chosen: scope(offset=chosen)),
        }
        for name, (text, entries, callback) in menus.items():
            menu = widgets.Dropdown(options=list(entries.items()), description=text, **wide())
            self._watch(name, menu, callback)
        grid = in_row([self.controls[name] for name in menus], "ae-menus")
        return [*sliders, grid, *self._heads()]

    def _heads(self) -> list[widgets.Widget]:
        """A chip a head, and on request its map above it. No chip pressed means all of them."""
        everything = widgets.ToggleButton(True, description="all")
        self._watch("all_heads", everything, lambda _: self.controller.set_scope(heads="all"))
        maps = widgets.ToggleButton(False, description="show maps")
        self._watch("head_maps", maps, lambda _: None)
        self._thumbs, chips = [], []
        for head in range(self.controller.session.num_heads):
            chip = widgets.ToggleButton(False, description=str(head))
            self._watch(f"head_{head}", chip, lambda _: self._set_heads())
            thumb = widgets.HTML(layout=widgets.Layout(display="none"))
            self._thumbs.append(thumb)
            chips.append(in_column([thumb, chip], "ae-head"))
        label = widgets.HTML('<span class="ae-label">Heads</span>')
        return [in_row([label, everything, *chips, maps], "ae-heads")]

    def _keeping(self) -> list[widgets.Widget]:
        note = widgets.Text(description="Note", placeholder="why, for the saved file", **wide())
        self.controls["note"] = note
        buttons = [
            self.button("ladder", "Ladder", self._ladder, "the same edit in more of the model"),
            self.button("save", "Save correction", self._save, f"to the folder {self._folder}"),
        ]
        buttons[1].button_style = "primary"
        if self._on_teach is not None:
            teach = partial(self._on_teach, self.controller)
            tooltip = "train on the saved corrections"
            buttons.append(self.button("teach", "Teach", teach, tooltip))
        return [note, in_row(buttons), self._html["notice"], self._html["ladder"]]

    def _watch(self, name: str, control: widgets.Widget, callback: Callable[[Any], None]) -> None:
        """Calls back with a control's new value when a person changed it, then shows the state."""
        self.controls[name] = control

        def changed(change: Any) -> None:
            if not self._busy:
                self.act(partial(callback, change["new"]))

        control.observe(changed, "value")

    # -- callbacks

    def act(self, callback: Callable[[], object]) -> None:
        """Calls back; whatever becomes of it, the state is then shown."""
        super().act(callback)
        super().act(self._show)

    def refresh(self) -> None:
        """Shows the state of the controller, after it or the session's model was changed."""
        self.act(lambda: None)

    def show_error(self, html: str) -> None:
        self._html["error"].value = html
        self._error_row.layout.display = None

    def _dismiss(self) -> None:
        self._error_row.layout.display = "none"

    def _operate(self, operation: Callable[[EditorController], None]) -> None:
        self.act(partial(operation, self.controller))

    def _stroke(self, cells: list[float | None], stroke: int) -> None:
        self._operate(lambda controller: controller.stroke(dict(enumerate(cells)), stroke))

    def _step(self, by: int) -> None:
        self.controller.open((self.controller.index + by) % len(self.controller.session))

    def _show_block(self, block: int) -> None:
        follows = self.controller.scope["blocks"] == (self.controller.block,)
        self.controller.block = block
        self.controller.set_scope(blocks=(block,) if follows else None)

    def _set_blocks(self, blocks: str) -> None:
        self.controller.set_scope(blocks=(self.controller.block,) if blocks == "shown" else blocks)

    def _set_heads(self) -> None:
        """The heads whose chips are pressed; none of them stands for all."""
        heads = range(self.controller.session.num_heads)
        pressed = tuple(head for head in heads if self.controls[f"head_{head}"].value)
        self.controller.set_scope(heads=pressed or "all")

    def _ladder(self) -> None:
        rows = [
            (escape(rung), escape(prediction), f"{share:.3f}", f"{p_true:.3f}")
            for rung, prediction, share, p_true in map(dict.values, self.controller.ladder())
        ]
        head = ("rung", "prediction", "probability", "true class")
        self._html["ladder"].value = table_html(head, rows, "ae-table")
        self._laddered = self._asked()

    def _asked(self) -> tuple[Any, ...]:
        controller = self.controller
        return controller.session.fingerprint, controller.index, controller.edit()

    def _save(self) -> None:
        if self.controller.edit().is_empty:
            self._html["notice"].value = "Nothing is edited yet, so there is nothing to save."
            return
        path = self.controller.save(self._folder, self._author, self.controls["note"].value)
        self._html["notice"].value = f"Saved as {escape(str(path))}"

    # -- showing

    def _show(self) -> None:
        controller = self.controller
        self._busy = True
        try:
            self._set_controls()
        finally:
            self._busy = False
        if self._titled != controller.index:
            self._html["title"].value, self._html["notice"].value = self._title_html(), ""
            self._titled = controller.index
        self.paint.show(controller)
        self._html["result"].value = self._result_html()
        if self._laddered is not None and self._laddered != self._asked():
            self._html["ladder"].value, self._laddered = "", None

    def _set_controls(self) -> None:
        controller, controls = self.controller, self.controls
        scope = controller.scope
        blocks = "shown" if scope["blocks"] == (controller.block,) else scope["blocks"]
        if not isinstance(blocks, str):  # other blocks, chosen from Python: no entry of the menu
            blocks = None
        values = {"picture": controller.index, "block": controller.block, "blocks": blocks}
        values |= {name: scope[name] for name in ("queries", "offset")}
        values |= {name: getattr(controller, name) for name in SLIDERS}
        values["all_heads"] = scope["heads"] == "all"
        for head in range(controller.session.num_heads):
            values[f"head_{head}"] = scope["heads"] != "all" and head in scope["heads"]
        for name, value in values.items():
            controls[name].value = value
        controls["undo"].disabled = not controller.can_undo
        controls["redo"].disabled = not controller.can_redo
        controls["copy_human"].disabled = controller.shown.human is None
        controls["copy_box"].disabled = controller.shown.box is None
        self._show_heads()

    def _show_heads(self) -> None:
        visible = self.controls["head_maps"].value
        controller = self.controller
        maps = controller.own_by_head if visible else []
        for thumb in self._thumbs:
            thumb.layout.display = None if visible else "none"
        for thumb, values in zip(self._thumbs, maps, strict=False):
            thumb.value = f'<img class="ae-headmap" alt="" src="{data_url(png(coloured(values)))}">'

    def _title_html(self) -> str:
        """Names the picture, and gives it to the small maps as their ground."""
        shown = self.controller.shown
        picture = data_url(png(shown.image))
        return (
            f"<style>.{self._mark} .ae-thumb {{ background-image: url({picture}) }}</style>"
            f"<b>{escape(shown.class_name)}</b> "
            f'<span class="ae-dim">{escape(str(shown.image_id))}</span>'
        )

    def _result_html(self) -> str:
        controller = self.controller
        attention = attention_html(*controller.outcome(), controller.block)
        return (
            f'<p class="ae-summary">{escape(controller.summary())}</p>'
            f"{scores_html(controller.score_rows())}"
            f"<h4>Softmax attention of block {controller.block}</h4>{attention}"
        )


def attention_editor(
    session: Session,
    index: int = 0,
    folder: str | Path = "corrections",
    author: str = "anonymous",
    on_teach: Callable[[EditorController], None] | None = None,
    plain: bool = False,
) -> AttentionEditor:
    """The attention editor for a notebook.

    Args:
        session: a `lib.widgets.session.LiveSession`, or anything like it.
        index: of the picture that is opened first.
        folder: where "Save correction" writes; made when needed.
        author: is written into the corrections.
        on_teach: what the button Teach calls with the controller; without it there is no button.
            When it returns, the tool shows what the session's model makes of the picture.
        plain: sliders and buttons instead of the brush, as where anywidget is absent.

    Returns:
        A widget with the attributes controller, paint, errors and controls.
    """
    controller = EditorController(session, index)
    return AttentionEditor(controller, folder, author, on_teach, plain or brush.anywidget is None)

"""The attention editor: paint where the model should look, and see at once what that changes.

`attention_editor(session)` is the whole tool for a notebook. It has three layers, each of use
without the one after it:

- `EditorController`: all state, the history and the words; NumPy only, no widget.
- `PaintWidget`: the picture with the map over it, painted on in the browser (static/editor.js).
  Where anywidget is absent, `PlainPaint` does its work with sliders and buttons.
- `AttentionEditor`: one of the two, with controls, scores and buttons around it.

A session is a `LiveSession`, or anything with its methods. Maps are arrays [gh, gw] over
the patches; a painted map holds NaN where nobody painted. Rows and columns are counted from 1 on
the screen; blocks and heads from 0, as in an `AttentionEdit`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np

from lib.edit import AttentionEdit
from lib.widgets import brush
from lib.widgets.brush import STATIC, PaintWidget, PlainPaint, in_column, in_row, make_slider, wide
from lib.widgets.controller import EditorController
from lib.widgets.pixels import coloured, data_url, heat_url, png


def scores_html(rows: Iterable[dict[str, Any]]) -> str:
    """Class scores as a table with two bars a class; takes `EditorController.score_rows`."""
    lines = []
    for row in rows:
        mark = '<span class="ae-true">true class</span>' if row["is_true"] else ""
        bars = "".join(
            f'<div class="ae-bar ae-{when}" style="width:{100 * row[when]:.1f}%"></div>'
            for when in ("before", "after")
        )
        numbers = f"<td>{row['before']:.2f}</td><td><b>{row['after']:.2f}</b></td>"
        change = f"{row['change']:+.1f}" if abs(row["change"]) >= 0.05 else "0.0"
        lines.append(
            f'<tr><th scope="row">{escape(row["class"])} {mark}</th>'
            f'<td class="ae-bars">{bars}</td>{numbers}<td>{change}</td></tr>'
        )
    head = "".join(f'<th scope="col">{text}</th>' for text in ("before", "after", "points"))
    return (
        '<table class="ae-scores"><thead><tr><th scope="col">class</th>'
        f"<td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def attention_html(maps: dict[str, np.ndarray], class_token: dict[str, float]) -> str:
    """Softmax maps over the picture, each brightest where it is highest, and their figures.

    Both dicts have the keys "before" and "after".
    """
    figures = "".join(
        f'<figure><div class="ae-thumb"><img src="{heat_url(values)}" '
        f'alt="softmax attention {when} the edit"></div><figcaption>{when}</figcaption></figure>'
        for when, values in maps.items()
    )
    tops = {when: float(values.max()) for when, values in maps.items()}
    facts = (("class token keeps", class_token, 2), ("highest cell", tops, 3))
    lines = "".join(
        f'<div class="ae-dim">{what}</div>'
        f"<div>{found['before']:.{digits}f} → <b>{found['after']:.{digits}f}</b></div>"
        for what, found, digits in facts
    )
    return f'<div class="ae-figures">{figures}<div>{lines}</div></div>'


def table_html(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a small table."""
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in rows)
    return f'<table class="ae-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"<td>{escape(shown)}</td>"


class AttentionEditor(widgets.VBox):
    """The tool that `attention_editor` makes.

    Attributes:
        controller: the `EditorController`; after changing it from Python, call `refresh`.
        paint: the `PaintWidget`, or the `PlainPaint`.
        errors: every exception of a callback, in order; the last one is shown in red.
        controls: the sliders, menus and buttons by name.
    """

    def __init__(
        self,
        controller: EditorController,
        folder: str | Path,
        author: str,
        on_teach: Callable[[EditorController], None] | None,
        plain: bool,
    ) -> None:
        self.controller, self.errors = controller, []
        self.controls: dict[str, widgets.Widget] = {}
        self._folder, self._author, self._on_teach = Path(folder), author, on_teach
        self._busy = False  # the tool itself sets its controls; nobody moved them
        self._laddered: AttentionEdit | None = None  # the edit that the shown ladder belongs to
        self._titled: int | None = None  # the picture that the title names
        self._mark = f"ae-{uuid.uuid4().hex[:8]}"  # ties the style of the picture to this tool
        if plain:
            self.paint = PlainPaint(self._operate)
        else:
            act = {"undo": EditorController.undo, "redo": EditorController.redo}
            self.paint = PaintWidget(
                on_stroke=lambda cells, stroke: self._operate(lambda c: c.stroke(cells, stroke)),
                on_action=lambda action: self._operate(act[action]),
                on_error=self._fail,
            )
        names = ("title", "result", "ladder", "notice", "error")
        self._html = {name: widgets.HTML(layout=widgets.Layout(width="auto")) for name in names}
        parts = [
            in_column([self.paint, *self._paint_buttons()], "ae-left"),
            in_column([self._html["result"]], "ae-result"),
            in_column(self._settings(), "ae-settings"),
            in_column(self._keeping(), "ae-keeping"),
        ]
        children = [self._header(), self._error_line(), in_row(parts, "ae-columns")]
        if plain:  # nobody else brings the style
            style = (STATIC / "editor.css").read_text(encoding="utf-8")
            children.insert(0, widgets.HTML(f"<style>{style}</style>"))
        super().__init__(children)
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
        previous = self._button("previous", "Previous", lambda: self._step(-1))
        following = self._button("next", "Next", lambda: self._step(1))
        return in_row([previous, number, following, self._html["title"]], "ae-header")

    def _error_line(self) -> widgets.Widget:
        dismiss = self._button("dismiss", "Dismiss", self._dismiss)
        self._error_row = in_row([self._html["error"], dismiss], "ae-error")
        self._error_row.layout.display = "none"
        return self._error_row

    def _paint_buttons(self) -> list[widgets.Widget]:
        operations = {
            "undo": ("Undo", EditorController.undo, "one stroke back"),
            "redo": ("Redo", EditorController.redo, "one stroke forward again"),
            "reset": ("Reset", EditorController.reset, "back to the model's own map"),
            "only_here": (
                "Only here",
                EditorController.only_here,
                "a low value on every cell that is not painted",
            ),
            "copy_human": (
                "Copy human map",
                EditorController.copy_human,
                "paint where people looked",
            ),
            "copy_box": ("Copy box", EditorController.copy_box, "paint the bounding box"),
        }
        made = [
            self._button(name, text, partial(operation, self.controller), tooltip)
            for name, (text, operation, tooltip) in operations.items()
        ]
        return [in_row(made)]

    def _settings(self) -> list[widgets.Widget]:
        sliders = {
            "strength": make_slider("Strength", 1.0, 1.0),
            "sharpness": make_slider("Sharpness", 1.0, 4.0, 0.1),
            "suppression": make_slider("Background", 0.0, 1.0),
        }
        for name, slider in sliders.items():
            self._watch(name, slider, partial(setattr, self.controller, name))
        depth = self.controller.session.depth
        blocks = [(f"{k}{' (last)' * (k == depth - 1)}", k) for k in range(depth)]
        menus = {
            "block": ("Shown block", blocks, self._show_block),
            "blocks": (
                "Edit in",
                [
                    ("last block", "last"),
                    ("last two blocks", "last2"),
                    ("all blocks", "all"),
                    ("the shown block", "shown"),
                ],
                self._set_blocks,
            ),
            "queries": (
                "Queries",
                [("class token", "cls"), ("all tokens", "all")],
                lambda queries: self.controller.set_scope(queries=queries),
            ),
            "offset": (
                "Offset",
                [("centred", "centred"), ("none (the paper)", "none")],
                lambda offset: self.controller.set_scope(offset=offset),
            ),
        }
        for name, (text, options, callback) in menus.items():
            menu = widgets.Dropdown(options=options, description=text, **wide())
            self._watch(name, menu, callback)
        grid = in_row([self.controls[name] for name in menus], "ae-menus")
        return [*sliders.values(), grid, *self._heads()]

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
            self._button("ladder", "Ladder", self._ladder, "the same edit in more of the model"),
            self._button("save", "Save correction", self._save, f"to the folder {self._folder}"),
        ]
        buttons[1].button_style = "primary"
        if self._on_teach is not None:
            teach = partial(self._on_teach, self.controller)
            tooltip = "train on the saved corrections"
            buttons.append(self._button("teach", "Teach", teach, tooltip))
        return [note, in_row(buttons), self._html["notice"], self._html["ladder"]]

    def _watch(self, name: str, control: widgets.Widget, callback: Callable[[Any], None]) -> None:
        """Calls back with a control's new value when a person changed it, then shows the state."""
        self.controls[name] = control

        def changed(change: Any) -> None:
            if not self._busy:
                self._guarded(partial(callback, change["new"]))
                self.refresh()

        control.observe(changed, "value")

    def _button(
        self, name: str, text: str, callback: Callable[[], None], tooltip: str = ""
    ) -> widgets.Button:
        button = widgets.Button(description=text, tooltip=tooltip)
        button.on_click(lambda _: (self._guarded(callback), self.refresh()))
        self.controls[name] = button
        return button

    # -- errors

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.errors.append(error)
        text = escape(f"{type(error).__name__}: {error}")
        self._html["error"].value = f'<span role="alert">{text}</span>'
        self._error_row.layout.display = None

    def _dismiss(self) -> None:
        self._error_row.layout.display = "none"

    # -- what the controls do

    def _operate(self, operation: Callable[[EditorController], None]) -> None:
        """An operation on the controller; whatever becomes of it, its state is then shown."""
        self._guarded(partial(operation, self.controller))
        self.refresh()

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
        names = {"p_true": "true class"}
        rungs = [{names.get(k, k): v for k, v in rung.items()} for rung in self.controller.ladder()]
        self._html["ladder"].value = table_html(rungs)
        self._laddered = self.controller.edit()

    def _save(self) -> None:
        if self.controller.edit().is_empty:
            self._html["notice"].value = "Nothing is edited yet, so there is nothing to save."
            return
        path = self.controller.save(self._folder, self._author, self.controls["note"].value)
        self._html["notice"].value = f"Saved as {escape(str(path))}"

    # -- showing

    def refresh(self) -> None:
        """Shows the state of the controller, after it or the session's model was changed."""
        self._guarded(self._show)

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
        if self._laddered is not None and self._laddered != controller.edit():
            self._html["ladder"].value, self._laddered = "", None

    def _set_controls(self) -> None:
        controller, controls = self.controller, self.controls
        scope = controller.scope
        blocks = "shown" if scope["blocks"] == (controller.block,) else scope["blocks"]
        if not isinstance(blocks, str):  # other blocks, chosen from Python: no entry of the menu
            blocks = None
        values = {"picture": controller.index, "block": controller.block, "blocks": blocks}
        values |= {name: scope[name] for name in ("queries", "offset")}
        values |= {k: getattr(controller, k) for k in ("strength", "sharpness", "suppression")}
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
        place = (controller.index, controller.block, controller.scope["offset"])
        maps = controller.session.sigmoid_heads(*place) if visible else []
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
        before, after = controller.outcome()
        block = controller.block
        found = {"before": before, "after": after}
        attention = attention_html(
            {when: outcome.attention[block] for when, outcome in found.items()},
            {when: float(outcome.class_token[block]) for when, outcome in found.items()},
        )
        return (
            f'<p class="ae-summary">{escape(controller.summary())}</p>'
            f"{scores_html(controller.score_rows())}"
            f"<h4>Softmax attention of block {block}</h4>{attention}"
        )


def attention_editor(
    session: Any,
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

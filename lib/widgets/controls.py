"""The controls of the attention editor, and what they set in its controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from lib.edit import Layout
from lib.model.resolution import cost_at, own_size
from lib.widgets.browser import three_examples
from lib.widgets.controller import EditorController
from lib.widgets.history import SLIDERS
from lib.widgets.panel import Panel, hint, in_column, in_row, make_slider, wide
from lib.widgets.pixels import coloured, data_url, png
from lib.widgets.rungs import blocks_apart
from lib.widgets.session import LiveSession, blocks_in_words

# Buttons above the picture: text, what they do, and a hint.
OPERATIONS = {
    "undo": ("Undo", EditorController.undo, "one step back: strokes, sliders, scope, copies"),
    "redo": ("Redo", EditorController.redo, "one step forward again"),
    "reset": ("Reset", EditorController.reset, "back to the model's own map"),
    "only_here": (
        "Only here",
        EditorController.only_here,
        "a low value on every cell that is not painted",
    ),
    "copy_human": (
        "Human map",
        EditorController.copy_human,
        "ask for people's attention, half of the way (Strength)",
    ),
    "copy_box": ("Box", EditorController.copy_box, "ask for the bounding box, half of the way"),
}
# Why a button can do nothing now.
WHY_NOT = {
    "undo": "nothing has been done on this picture yet",
    "redo": "nothing was undone",
    "only_here": "nothing is painted yet",
    "copy_human": "this picture has no human map",
    "copy_box": "this picture has no bounding box",
    "save": "nothing is edited yet, so there is nothing to save",
}

# Menus of the scope that are the same for all models: entries with their values.
MENUS = {
    "offset": {"centred": "centred", "none (the paper)": "none"},
}
FINER = (1, 2, 4)  # times the side of the model's own picture size: the menu of cells
MOST_CELLS = 64 * 64  # that are offered; more are possible from Python
EXAMPLES = ("a mistake", "unsure", "sure")  # what `three_examples` names
HINTS = {
    "strength": "how much of the edit is made: 0 none of it, 1 all of it",
    "sharpness": "above 1 the map becomes starker, below 1 flatter",
    "suppression": "how far down the cells go that nobody painted",
    "block": "the layer of the model whose map is shown on the picture",
    "blocks": "in how many layers of the model the edit is made",
    "size": "the picture enlarged for the model: more and smaller cells, and other scores",
    "offset": "centred: 0.5 is as much as the average patch; none: the raw sigmoid of the paper",
}


def rows_in_words(layout: Layout) -> tuple[str, str]:
    """The row that is read, for a menu, and with what it does."""
    if not layout.pooled:
        return "class token", "class token, which decides"
    if len(layout.read) == 1:
        return "pooling query", "pooling query, which decides"
    return "class token, pooling query", "class token and of the pooling query, which decides"


def _set_options(menu: widgets.Dropdown, entries: dict[str, Any]) -> None:
    if menu.options != tuple(entries.items()):
        menu.options = tuple(entries.items())


class Controls(Panel):
    """Buttons, sliders and menus of a controller; what their buttons lead to is the editor's."""

    def __init__(self, controller: EditorController, folder: Path) -> None:
        super().__init__()
        self.controller, self._folder = controller, folder
        self._is_showing = False  # the tool itself sets its controls; nobody moved them
        self._has_chosen_blocks = False
        self._hinted = ""  # blocks in which the edit would do more
        self._html = {
            name: widgets.HTML(layout=widgets.Layout(width="auto"))
            for name in ("title", "verdict", "notice", "result", "ladder", "hint")
        }

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
        present = widgets.ToggleButton(
            description="Present", tooltip="a large picture and large bars, for a class"
        )
        guess = widgets.ToggleButton(
            description="Guess first",
            tooltip="hides the true class and the verdict; the key G brings them back",
        )
        guess.add_class("ae-guess")  # the brush presses it with the key G
        for name, toggle in (("present", present), ("guess", guess)):
            self._watch(name, toggle, lambda _: None)
        # For a class: pictures that were chosen, as soon as somebody asks for one.
        self._examples: dict[str, int] = {}
        shown = [
            self.button(f"example {name}", name.capitalize(), partial(self._show_example, name))
            for name in EXAMPLES
        ]
        self._example_row = in_row(shown)
        parts = [
            previous,
            number,
            following,
            self._html["title"],
            self._example_row,
            guess,
            present,
        ]
        return in_row(parts, "ae-header")

    def _toolbar(self) -> widgets.Widget:
        buttons = [
            self.button(name, text, partial(operation, self.controller), tooltip)
            for name, (text, operation, tooltip) in OPERATIONS.items()
        ]
        note = widgets.Text(description="Note", placeholder="why, for the saved file", **wide())
        note.add_class("ae-note")
        self._watch("note", note, partial(setattr, self.controller, "note"))
        save = self.button("save", "Save correction", self._save, f"to the folder {self._folder}")
        save.button_style = "primary"
        return in_row([*buttons, save, note], "ae-toolbar")

    def _settings(self) -> list[widgets.Widget]:
        texts = {"strength": "Strength", "sharpness": "Sharpness", "suppression": "Background"}
        for name, text in texts.items():
            slider = make_slider(text, *SLIDERS[name], 0.1 if name == "sharpness" else 0.01)
            self._watch(name, slider, partial(setattr, self.controller, name))
        session, scope = self.controller.session, self.controller.set_scope
        layout = session.layout
        last = layout.depth - 1
        blocks = {f"{layout.names[k]}{' (last)' * (k == last)}": k for k in layout.read}
        one, decides = rows_in_words(layout)
        menus = {
            "blocks": ("Edit in", self._blocks(), self._set_blocks),
            "block": ("Shown block", blocks, self._show_block),
            "queries": (
                "Queries",
                {one: "cls", "all tokens": "all"},
                lambda chosen: scope(queries=chosen),
            ),
            "offset": ("Offset", MENUS["offset"], lambda chosen: scope(offset=chosen)),
            "size": ("Cells", self._sizes(), self.controller.see_at),
        }
        for name, (text, entries, callback) in menus.items():
            menu = widgets.Dropdown(options=list(entries.items()), description=text, **wide())
            self._watch(name, menu, callback)
        for name, words in HINTS.items():
            hint(self.controls[name], words)
        words = f"whose attention is edited: that of the {decides}, or of all tokens"
        hint(self.controls["queries"], words)
        more = widgets.ToggleButton(description="More settings")
        folded = ["sharpness", "suppression", *["block"] * (len(blocks) > 1), "queries", "offset"]
        folded += ["size"] * isinstance(session, LiveSession)
        folded = [self.controls[name] for name in folded]
        self._more = in_column([*folded, self._heads()], "ae-more")
        self._watch("more", more, lambda _: None)
        ladder = self.button("ladder", "Ladder", self._ladder, "the same edit in more of the model")
        wider = self.button("wider", "Edit there", self._take_hint)
        self._hint_row = in_row([self._html["hint"], wider], "ae-hint")
        shown = [self.controls["strength"], self.controls["blocks"], self._hint_row]
        return [*shown, in_row([ladder, more]), self._html["ladder"], self._more]

    def _blocks(self) -> dict[str, str]:
        """Entries of the menu "Edit in": those that are not the same in this model."""
        layout, queries = self.controller.session.layout, self.controller.scope["queries"]
        found = {
            blocks_in_words(layout, name).removeprefix("the "): name
            for name in blocks_apart(layout, queries)
        }
        return found | ({"the shown block": "shown"} if len(layout.read) > 1 else {})

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Picture sizes by what they give and cost; nothing is computed for it."""
        session = self.controller.session
        if not isinstance(session, LiveSession):
            return {}
        own, found = own_size(session.model), {}
        for size in dict.fromkeys([*((k * own[0], k * own[1]) for k in FINER), session.image_size]):
            cost = cost_at(session.model, size)
            text = f"{cost.grid[0]} x {cost.grid[1]}"
            size_kept = f"{max(1, round(cost.megabytes))} MB a picture"
            costs = f"about {cost.times:.2g} x the time, {size_kept}"
            if size in (own, session.image_size) or math.prod(cost.grid) <= MOST_CELLS:
                found[f"{text}, the model's own" if size == own else f"{text}: {costs}"] = size
        return found

    def _heads(self) -> widgets.Widget:
        """A chip a head, and on request its map above it."""
        chosen = {"mean": "together", "all": "each"}
        words = {
            "mean": "the mean of the heads shows what is painted, and each keeps its part",
            "all": "every head is set to what is painted",
        }
        chips = []
        for name, text in chosen.items():
            chip = widgets.ToggleButton(description=text, tooltip=words[name])
            self._watch(f"heads_{name}", chip, partial(self._set_heads, name))
            chips.append(chip)
        maps = widgets.ToggleButton(False, description="show maps")
        self._watch("head_maps", maps, lambda _: None)
        self._thumbs, self._head_boxes = [], []
        for head in range(max(self.controller.session.layout.heads)):
            chip = widgets.ToggleButton(False, description=str(head))
            self._watch(f"head_{head}", chip, partial(self._set_heads, "chips"))
            thumb = widgets.HTML(layout=widgets.Layout(display="none"))
            self._thumbs.append(thumb)
            self._head_boxes.append(in_column([thumb, chip], "ae-head"))
            chips.append(self._head_boxes[-1])
        label = widgets.HTML('<span class="ae-label">Heads</span>')
        return in_row([label, *chips, maps], "ae-heads")

    def _watch(self, name: str, control: widgets.Widget, callback: Callable[[Any], None]) -> None:
        """Calls back with a control's new value when a person changed it, then shows the state."""
        self.controls[name] = control

        def changed(change: Any) -> None:
            if not self._is_showing:
                self.act(partial(callback, change["new"]))

        control.observe(changed, "value")

    # -- callbacks

    def _step(self, by: int) -> None:
        self.controller.open((self.controller.index + by) % len(self.controller.session))

    def _show_example(self, name: str) -> None:
        session = self.controller.session
        if not self._examples:
            self._examples = three_examples(session.model, session.dataset)
        if name not in self._examples:
            raise ValueError(f'no picture is "{name}" among the first that were looked at')
        self.controller.open(self._examples[name])

    def _show_block(self, block: int) -> None:
        follows = self.controller.scope["blocks"] == (self.controller.block,)
        self.controller.block = block
        self.controller.set_scope(blocks=(block,) if follows else None)

    def _set_blocks(self, blocks: str) -> None:
        self._has_chosen_blocks = True
        self.controller.set_scope(blocks=(self.controller.block,) if blocks == "shown" else blocks)

    def _set_heads(self, chosen: str, _: bool) -> None:
        """The heads whose chips are pressed; without any, what they see together."""
        if chosen == "chips":
            heads = range(max(self.controller.session.layout.heads))
            pressed = tuple(head for head in heads if self.controls[f"head_{head}"].value)
            chosen = pressed or "mean"
        self.controller.set_scope(heads=chosen)

    # -- showing

    def _set_controls(self) -> None:
        controller, controls = self.controller, self.controls
        scope, session = controller.scope, controller.session
        _set_options(controls["blocks"], self._blocks())
        _set_options(controls["size"], self._sizes())
        values = {"picture": controller.index, "block": controller.block}
        values |= {"blocks": self._chosen_blocks()}
        values |= {"size": session.image_size} if isinstance(session, LiveSession) else {}
        values |= {name: scope[name] for name in ("queries", "offset")}
        values |= controller.work.sliders | {"note": controller.note}
        values |= {f"heads_{name}": scope["heads"] == name for name in ("mean", "all")}
        for head, box in enumerate(self._head_boxes):
            values[f"head_{head}"] = (
                scope["heads"] not in ("all", "mean") and head in scope["heads"]
            )
            is_there = head < session.layout.heads[controller.block]
            box.layout.display = None if is_there else "none"
        for name, value in values.items():
            controls[name].value = value
        can = controller.possible()
        for name, why in WHY_NOT.items():
            controls[name].disabled = not can[name]
            text = OPERATIONS[name][2] if name in OPERATIONS else f"to the folder {self._folder}"
            hint(controls[name], text if can[name] else f"Not now: {why}.")
        self._more.layout.display = None if controls["more"].value else "none"
        self._hint_row.layout.display = None if self._hinted else "none"
        is_shown = controls["present"].value and isinstance(controller.session, LiveSession)
        self._example_row.layout.display = None if is_shown else "none"
        (self.add_class if controls["present"].value else self.remove_class)("ae-present")
        self._show_heads()

    def _chosen_blocks(self) -> str | None:
        """The entry of the menu "Edit in"; None for blocks that were chosen from Python."""
        scope, layout = self.controller.scope, self.controller.session.layout
        entries = self._blocks().values()
        if scope["blocks"] == (self.controller.block,) and "shown" in entries:
            return "shown"
        wanted = layout.resolve(scope["blocks"], scope["queries"])
        same = (
            n for n in entries if n != "shown" and layout.resolve(n, scope["queries"]) == wanted
        )
        return next(same, None)

    def _show_heads(self) -> None:
        visible = self.controls["head_maps"].value
        maps = self.controller.own_by_head if visible else []
        for thumb in self._thumbs:
            thumb.layout.display = None if visible else "none"
        for thumb, values in zip(self._thumbs, maps, strict=False):
            thumb.value = f'<img class="ae-headmap" alt="" src="{data_url(png(coloured(values)))}">'

"""The attention editor: paint where the model should look, and see at once what that changes.

`attention_editor(session)` is the whole tool for a notebook. It has three layers, each of use
without the one after it:

- `EditorController`: all state, the history and the words; NumPy only, no widget.
- `PaintWidget`: the picture with the map over it, painted on in the browser (static/editor.js).
  Where anywidget is absent, `PlainPaint` does its work with sliders and buttons.
- `AttentionEditor`: one of the two, with controls, scores and buttons around it.

A session is a `lib.live.LiveSession`, or anything with its methods. Maps are arrays [gh, gw] over
the patches; a painted map holds NaN where nobody painted. Rows and columns are counted from 1 on
the screen; blocks and heads from 0, as in an `Edit`.
"""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import traitlets
from PIL import Image, ImageDraw

from lib.feedback import Correction, Edit, FeedbackError, save_correction

try:
    import anywidget
except ImportError:  # the tool then has the plain brush
    anywidget = None

STATIC = Path(__file__).parent / "static"
LOW = 0.02  # "do not look here": next to nothing, without the extreme logit of 0
EPS = 1e-6  # two sigmoid values this close are the same; lib.attention has the same bound
OFF = (1.0, 1.0, 0.0)  # strength, sharpness and suppression that change nothing
CACHED = 64  # maps and unedited outcomes that are kept
PREVIEW_SIDE = 448  # pixels of the longer side of a saved preview
OPACITY = 0.55  # of the map over the picture

# Colours of matplotlib's viridis, evenly spaced; readers with any colour vision see their order.
VIRIDIS = (
    "440154 47186a 472c7b 424085 3a528b 32628d 2c728e 26818e 20908c "
    "1e9f88 28ae7f 3ebc73 5ec961 83d34b addc30 d7e219 fde724"
)


def _colour_table() -> np.ndarray:
    """uint8 [256, 3]: the colour of each value from 0 to 1."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()])
    position = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(position, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


COLOURS = _colour_table()


def coloured(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to colours, uint8 [..., 3]."""
    return COLOURS[np.rint(255 * np.asarray(values)).astype(int)]


def png(pixels: np.ndarray | Image.Image) -> bytes:
    """A PNG file of uint8 pixels [h, w, 3 or 4]."""
    buffer = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """A PNG file as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def map_over_picture(image: np.ndarray, values: np.ndarray, outlined: np.ndarray) -> Image.Image:
    """The picture with a map over it, its longer side `PREVIEW_SIDE` pixels.

    Args:
        image: uint8 [H, W, 3]. values: [gh, gw] in [0, 1]. outlined: bool [gh, gw], the cells
            around which a line is drawn.
    """
    height, width = image.shape[:2]
    scale = PREVIEW_SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    heat = Image.fromarray(coloured(values)).resize(size, Image.Resampling.NEAREST)
    blend = Image.blend(picture, heat, OPACITY)
    for colour, line in (("black", 4), ("white", 2)):
        _outline(blend, outlined, colour, line)
    return blend


def _outline(picture: Image.Image, cells: np.ndarray, colour: str, width: int) -> None:
    """Draws the border between the cells that are True and all else."""
    draw = ImageDraw.Draw(picture)
    dx, dy = (side / count for side, count in zip(picture.size, cells.shape[::-1], strict=True))
    rimmed = np.pad(cells, 1)
    for r, c in np.argwhere(rimmed[:-1, 1:-1] != rimmed[1:, 1:-1]):
        draw.line([(c * dx, r * dy), ((c + 1) * dx, r * dy)], fill=colour, width=width)
    for r, c in np.argwhere(rimmed[1:-1, :-1] != rimmed[1:-1, 1:]):
        draw.line([(c * dx, r * dy), (c * dx, (r + 1) * dy)], fill=colour, width=width)


# -------------------------------------------------------------------------------------- controller


@dataclass(frozen=True, eq=False)
class _Step:
    """One entry of a history."""

    painted: np.ndarray  # float32 [gh, gw], read-only
    stroke: int | None = None  # of the browser; None for an operation of Python
    switched_off: tuple[float, ...] | None = None  # a reset: what was set before it, like OFF


class EditorController:
    """State of the editor without any widget.

    Each picture has its own painted map and its own history, which live as long as the controller.
    Every other setting holds for all pictures. No array that was handed out is ever changed.

    Attributes (set them freely, except the first two; what they lead to is computed on demand):
        index, shown: number of the open picture, and the session's `Shown` of it.
        block: the block whose map is shown.
        strength: in [0, 1]. How far the whole edit goes from the model's own values to those that
            are asked for; 0 is no edit.
        sharpness: from 0. Every value v of the map becomes sigmoid(sharpness * logit(v)), the
            painted ones too: 1 changes nothing, more makes the map starker, less makes it flatter.
        suppression: in [0, 1]. Share by which the cells that nobody painted go down to `LOW`.
        scope: blocks, heads, queries and offset of the edit; change it with `set_scope`.
    """

    def __init__(self, session: Any, index: int = 0) -> None:
        self.session = session
        self.strength, self.sharpness, self.suppression = OFF
        self.block: int = session.depth - 1
        # Centred: with the paper's offset, all cells of a pretrained model read about 0.97.
        self.scope = {"blocks": "last", "heads": "all", "queries": "cls", "offset": "centred"}
        self._histories: dict[int, tuple[list[_Step], int]] = {}  # steps, position of the current
        # The fingerprint is part of each key: after teaching, the model is another one.
        self._sigmoid = lru_cache(CACHED)(lambda _, *asked: session.sigmoid(*asked))
        self._unedited = lru_cache(CACHED)(lambda _, index: session.outcome(index))
        self._edited: tuple[tuple[str, int, Edit], Any] | None = None
        self.open(index)

    def open(self, index: int) -> None:
        """Opens a picture, with its own history. Raises IndexError where there is none."""
        count = len(self.session)
        if not 0 <= index < count:
            raise IndexError(f"picture {index} is asked for; there are {count}, from 0 on")
        self.shown = self.session.open(index)
        self.index = index
        empty = np.full(self.session.grid, np.nan, dtype=np.float32)
        empty.flags.writeable = False
        self._histories.setdefault(index, ([_Step(empty)], 0))

    def set_scope(
        self,
        blocks: str | Sequence[int] | None = None,
        heads: str | Sequence[int] | None = None,
        queries: str | None = None,
        offset: str | None = None,
    ) -> None:
        """Changes which part of the model is edited; None keeps what was set.

        Raises FeedbackError (a ValueError) for a word or an index that the model does not have.
        """
        named = {"blocks": blocks, "heads": heads, "queries": queries, "offset": offset}
        scope = self.scope | {name: value for name, value in named.items() if value is not None}
        checked = self._edit_of(np.full(self.session.grid, np.nan), **scope)
        for name, count in (("blocks", self.session.depth), ("heads", self.session.num_heads)):
            indices = getattr(checked, name)
            for k in () if isinstance(indices, str) else indices:
                if not -count <= k < count:
                    raise FeedbackError(f"{name} holds {k}, but the model has {count} {name}")
        self.scope = {name: getattr(checked, name) for name in scope}

    # -- what is shown and asked for

    @property
    def painted(self) -> np.ndarray:
        """What a person painted, float32 [gh, gw], NaN where nothing; read-only."""
        steps, position = self._histories[self.index]
        return steps[position].painted

    @property
    def own(self) -> np.ndarray:
        """The model's own map in the shown block, float32 [gh, gw], mean of the chosen heads."""
        heads, offset = self.scope["heads"], self.scope["offset"]
        fingerprint = self.session.fingerprint
        return self._sigmoid(fingerprint, self.index, self.block, heads, offset)

    @property
    def base(self) -> np.ndarray:
        """`asked` if nothing were painted."""
        return self._asked(np.full(self.session.grid, np.nan, dtype=np.float32))

    @property
    def asked(self) -> np.ndarray:
        """The map after the edit, float32 [gh, gw] in [0, 1]."""
        return self._asked(self.painted)

    def _asked(self, painted: np.ndarray) -> np.ndarray:
        own, free = self.own, np.isnan(painted)
        wanted = np.where(free, own, painted)
        if self.sharpness != 1:
            wanted = sharpened(wanted, self.sharpness)
        wanted = np.where(free, wanted + self.suppression * (LOW - wanted), wanted)
        mixed = (1 - self.strength) * own + self.strength * wanted
        return np.clip(mixed, 0, 1).astype(np.float32)

    def edit(self) -> Edit:
        """What is asked of the model: the painted cells, and those that a slider changes."""
        asked = self.asked
        touched = ~np.isnan(self.painted) & (self.strength > 0)
        mask = touched | (np.abs(asked - self.own) > EPS)
        return self._edit_of(np.where(mask, asked, np.nan), **self.scope)

    @staticmethod
    def _edit_of(values: np.ndarray, **scope: Any) -> Edit:
        return Edit(mask=~np.isnan(values), values=np.nan_to_num(values), **scope)

    # -- painting

    def paint(
        self,
        cells: Sequence[tuple[int, int]],
        value: float,
        weights: Sequence[float] | None = None,
    ) -> None:
        """One stroke: `value` on cells (row, column from 0).

        `weights` in [0, 1], one a cell, are a soft edge: the cell moves by this share from what is
        painted there, or from the model's own value.
        """
        rows, columns = self._places(cells)
        painted = self.painted.copy()
        before = np.where(np.isnan(painted), self.own, painted)[rows, columns]
        share = np.ones(len(cells)) if weights is None else np.asarray(weights, dtype=float)
        painted[rows, columns] = (1 - share) * before + share * value
        self._keep(painted)

    def erase(self, cells: Sequence[tuple[int, int]]) -> None:
        """Gives cells (row, column) back to the model."""
        painted = self.painted.copy()
        painted[self._places(cells)] = np.nan
        self._keep(painted)

    def rectangle(self, r0: int, c0: int, r1: int, c1: int, value: float) -> None:
        """`value` from corner (r0, c0) to corner (r1, c1), both included, in any order."""
        rows = range(min(r0, r1), max(r0, r1) + 1)
        columns = range(min(c0, c1), max(c0, c1) + 1)
        self.paint([(r, c) for r in rows for c in columns], value)

    def fill(self, value: float) -> None:
        """`value` on every cell."""
        self._keep(np.full(self.session.grid, value))

    def only_here(self, low: float = LOW) -> None:
        """`low` on every cell that is not painted."""
        self._keep(np.where(np.isnan(self.painted), low, self.painted))

    def copy_human(self) -> None:
        """Paints the human map of the picture; NaN, unknown, stays free. ValueError without one."""
        self._copy(self.shown.human, "human map")

    def copy_box(self) -> None:
        """Paints the share of each cell that the box covers. ValueError without a box."""
        self._copy(self.shown.box, "box")

    def reset(self) -> None:
        """Back to the model's own map: erases all, switches `OFF` the three sliders."""
        settings = (self.strength, self.sharpness, self.suppression)
        empty = np.full(self.session.grid, np.nan)
        self._keep(empty, switched_off=None if settings == OFF else settings)
        self.strength, self.sharpness, self.suppression = OFF

    def stroke(self, cells: Any, stroke: int) -> None:
        """A version of the painted map, as the browser sends it while a stroke goes on.

        Args:
            cells: gh * gw numbers in [0, 1], row by row; None where nothing is painted.
            stroke: the versions of one stroke have one number, and become one step of the history.

        Raises:
            ValueError: for anything else.
        """
        rows, columns = self.session.grid
        if not isinstance(cells, list | tuple) or len(cells) != rows * columns:
            length = len(cells) if isinstance(cells, list | tuple) else type(cells).__name__
            raise ValueError(f"a painted map holds {length} values, not {rows} x {columns}")
        for value in cells:
            if value is not None and not _is_share(value):
                raise ValueError(f"a painted map holds {value!r}; expected 0 to 1 or None")
        painted = np.array([np.nan if value is None else value for value in cells])
        self._keep(painted.reshape(rows, columns), stroke)

    def _places(self, cells: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Row and column indices; raises ValueError for a cell outside the grid."""
        places = np.asarray(cells, dtype=int).reshape(-1, 2)
        if (places < 0).any() or (places >= self.session.grid).any():
            rows, columns = self.session.grid
            raise ValueError(f"a cell outside the grid of {rows} x {columns} is named")
        return places[:, 0], places[:, 1]

    def _copy(self, values: np.ndarray | None, what: str) -> None:
        if values is None:
            raise ValueError(f"picture {self.shown.image_id} has no {what}; paint by hand")
        self._keep(np.asarray(values))

    # -- history

    @property
    def can_undo(self) -> bool:
        return self._histories[self.index][1] > 0

    @property
    def can_redo(self) -> bool:
        steps, position = self._histories[self.index]
        return position < len(steps) - 1

    def undo(self) -> None:
        """One step back; nothing where there is none."""
        if self.can_undo:
            steps, position = self._histories[self.index]
            if steps[position].switched_off:
                self.strength, self.sharpness, self.suppression = steps[position].switched_off
            self._histories[self.index] = (steps, position - 1)

    def redo(self) -> None:
        """One step forward again; nothing where there is none."""
        if self.can_redo:
            steps, position = self._histories[self.index]
            if steps[position + 1].switched_off:
                self.strength, self.sharpness, self.suppression = OFF
            self._histories[self.index] = (steps, position + 1)

    def _keep(
        self,
        painted: np.ndarray,
        stroke: int | None = None,
        switched_off: tuple[float, ...] | None = None,
    ) -> None:
        """Makes a painted map the current one; what was undone is gone."""
        painted = painted.astype(np.float32)
        wrong = (painted < 0) | (painted > 1)
        if wrong.any():
            raise ValueError(f"{painted[wrong][0]:g} is painted; sigmoid attention is from 0 to 1")
        if np.array_equal(painted, self.painted, equal_nan=True) and not switched_off:
            return
        painted.flags.writeable = False
        steps, position = self._histories[self.index]
        same_stroke = stroke is not None and stroke == steps[position].stroke
        kept = steps[: position + (not same_stroke)]
        kept.append(_Step(painted, stroke, switched_off))
        self._histories[self.index] = (kept, len(kept) - 1)

    # -- what it leads to

    def outcome(self) -> tuple[Any, Any]:
        """The session's `Outcome` before and after the edit; computed once for each edit."""
        fingerprint, edit = self.session.fingerprint, self.edit()
        before = self._unedited(fingerprint, self.index)
        if edit.is_empty:
            return before, before
        key = (fingerprint, self.index, edit)
        if self._edited is None or self._edited[0] != key:
            self._edited = (key, self.session.outcome(self.index, edit))
        return before, self._edited[1]

    def moved(self) -> float:
        """Share of the shown block's attention that went elsewhere, in [0, 1].

        Half the sum of absolute differences, over patches and class token, mean of the heads.
        """
        before, after = self.outcome()
        cells = np.abs(after.attention[self.block] - before.attention[self.block]).sum()
        kept = abs(after.class_token[self.block] - before.class_token[self.block])
        return float(cells + kept) / 2

    def summary(self) -> str:
        """One or two sentences; not escaped for HTML."""
        before, after = self.outcome()
        first, now = int(before.probabilities.argmax()), int(after.probabilities.argmax())
        name, true = self.session.classes[first], self.shown.label
        if self.edit().is_empty:
            right = "that is right" if first == true else f"it is {self.shown.class_name}"
            return f"The model says {name} ({before.probabilities[first]:.2f}); {right}."
        share = f"{self.moved():.2f} of the attention moved."
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

    def ladder(self) -> list[dict[str, Any]]:
        """The same edit in more and more of the model, a row a rung; see LiveSession.ladder."""
        return self.session.ladder(self.index, self.edit())

    # -- keeping it

    def correction(self, author: str, note: str = "") -> Correction:
        """The edit with its picture, made now. Raises ValueError where nothing is edited."""
        edit, shown = self.edit(), self.shown
        if edit.is_empty:
            raise ValueError("nothing is edited, so there is nothing to save; paint first")
        fingerprint = self.session.fingerprint
        return Correction.now(shown.image_id, edit, fingerprint, author, shown.class_name, note)

    def save(self, folder: str | Path, author: str, note: str = "") -> Path:
        """Saves the correction and a preview beside it; see `feedback.save_correction`."""
        correction = self.correction(author, note)
        preview = map_over_picture(self.shown.image, self.asked, correction.edit.mask)
        return save_correction(correction, folder, png(preview))


def sharpened(values: np.ndarray, sharpness: float) -> np.ndarray:
    """sigmoid(sharpness * logit(values)), values clamped to EPS and 1 - EPS."""
    inside = np.clip(np.asarray(values, dtype=np.float64), EPS, 1 - EPS)
    return 1 / (1 + ((1 - inside) / inside) ** sharpness)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


# ----------------------------------------------------------------------------------------- brushes


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
            widgets.IntRangeSlider(description=text, value=(1, 1), min=1, max=1, **_wide())
            for text in ("Rows", "Columns")
        )
        self.brush_value = _slider("Value", 0.9, 1.0)
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
        super().__init__([self._picture, *ranges, _row(buttons)])

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
        _outline(picture, chosen, "red", 3)
        self._picture.value = png(picture)

    def _rectangle(self, controller: EditorController) -> None:
        controller.paint(self.cells, self.brush_value.value)


# -------------------------------------------------------------------------------------------- HTML


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


def heat_url(values: np.ndarray) -> str:
    """A map scaled to its own maximum, one pixel a cell, to lie over a picture."""
    opacity = np.full((*values.shape, 1), round(255 * 0.75), dtype=np.uint8)
    heat = coloured(values / max(float(values.max()), EPS))
    return data_url(png(np.concatenate([heat, opacity], axis=-1)))


def table_html(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a small table."""
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row.values()))}</tr>" for row in rows)
    return f'<table class="ae-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"<td>{escape(shown)}</td>"


# ---------------------------------------------------------------------------------------- the tool


def _wide() -> dict[str, Any]:
    """Style of a control that fills its column, labels aligned."""
    layout = widgets.Layout(width="auto", min_width="0")
    return {"layout": layout, "style": {"description_width": "84px"}}


def _slider(text: str, value: float, top: float, step: float = 0.01) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value, description=text, min=0, max=top, step=step, readout_format=".2f", **_wide()
    )


def _row(children: Iterable[widgets.Widget], name: str = "ae-row") -> widgets.HBox:
    row = widgets.HBox(list(children))
    row.add_class(name)
    return row


def _column(children: Iterable[widgets.Widget], name: str) -> widgets.VBox:
    column = widgets.VBox(list(children))
    column.add_class(name)
    return column


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
        self._laddered: Edit | None = None  # the edit that the shown ladder belongs to
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
            _column([self.paint, *self._paint_buttons()], "ae-left"),
            _column([self._html["result"]], "ae-result"),
            _column(self._settings(), "ae-settings"),
            _column(self._keeping(), "ae-keeping"),
        ]
        children = [self._header(), self._error_line(), _row(parts, "ae-columns")]
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
        return _row([previous, number, following, self._html["title"]], "ae-header")

    def _error_line(self) -> widgets.Widget:
        dismiss = self._button("dismiss", "Dismiss", self._dismiss)
        self._error_row = _row([self._html["error"], dismiss], "ae-error")
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
        return [_row(made)]

    def _settings(self) -> list[widgets.Widget]:
        sliders = {
            "strength": _slider("Strength", 1.0, 1.0),
            "sharpness": _slider("Sharpness", 1.0, 4.0, 0.1),
            "suppression": _slider("Background", 0.0, 1.0),
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
            menu = widgets.Dropdown(options=options, description=text, **_wide())
            self._watch(name, menu, callback)
        grid = _row([self.controls[name] for name in menus], "ae-menus")
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
            chips.append(_column([thumb, chip], "ae-head"))
        label = widgets.HTML('<span class="ae-label">Heads</span>')
        return [_row([label, everything, *chips, maps], "ae-heads")]

    def _keeping(self) -> list[widgets.Widget]:
        note = widgets.Text(description="Note", placeholder="why, for the saved file", **_wide())
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
        return [note, _row(buttons), self._html["notice"], self._html["ladder"]]

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
        session: a `lib.live.LiveSession`, or anything like it.
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
    return AttentionEditor(controller, folder, author, on_teach, plain or anywidget is None)

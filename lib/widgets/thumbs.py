"""Pages of small pictures, each a button with a name, made when their page is shown."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Callable, Hashable, Sequence
from threading import Event
from time import monotonic

import ipywidgets as widgets
import numpy as np
from PIL import Image

from lib.widgets.brush import anywidget
from lib.widgets.panel import STATIC, Panel, in_row

SIDE = 144  # pixels of a small picture: sharp at 96 on most screens
KEPT = 1000  # small pictures that are kept, 5 kB each
TELL = 0.3  # seconds between two deliveries to the page


class ArrowKeys(anywidget.AnyWidget if anywidget else widgets.DOMWidget):
    """Lets arrow keys go through the pictures; without anywidget Tab does."""

    _esm = STATIC / "thumbs.js"


class Thumbnails(widgets.VBox):
    """Pages of pictures to choose from.

    Args:
        panel: whose callbacks these are.
        picture: what an item looks like, uint8 [h, w, 3]; None where there is no picture of it. Is
            called in a thread of its own; what it raises becomes a word below the item.
        name: an item in words, as its button has it.
        choose: called with the item that was pressed.
        size: items a page.

    Attributes:
        items: those to page through; set by `show`.
        page: the page that is shown, from 0.
    """

    def __init__(
        self,
        panel: Panel,
        picture: Callable[[Hashable], np.ndarray | None],
        name: Callable[[Hashable], str],
        choose: Callable[[Hashable], object],
        size: int,
    ) -> None:
        super().__init__()
        self.items: Sequence[Hashable] = ()
        self.page, self.size = 0, size
        self._panel, self._picture, self._name = panel, picture, name
        self._chosen: Hashable = None
        self._urls: dict[Hashable, str] = {}  # "": no picture
        self._unread: dict[Hashable, str] = {}  # what reading a picture raised
        self._stop, self._making = Event(), set()  # of the thread, and its items
        self._mark = f"thumbs-{uuid.uuid4().hex[:8]}"  # ties the pictures to these buttons
        self._style, self._words = widgets.HTML(), widgets.HTML()
        self.buttons = [widgets.Button().add_class(f"thumb-{k}") for k in range(size)]
        for k, button in enumerate(self.buttons):
            button.on_click(lambda _, k=k: panel.act(lambda: choose(self.shown[k])))
        grid = widgets.Box(self.buttons).add_class("thumbs-grid")
        self._back = panel.button("earlier", "Earlier", lambda: self.turn(-1), "the page before")
        self._on = panel.button("later", "Later", lambda: self.turn(1), "the next page")
        keys = [ArrowKeys()] if anywidget else []
        self._row = in_row([self._back, self._on, self._words])
        self.children = [self._style, self._row, grid, *keys]
        self.add_class("thumbs").add_class(self._mark)
        self.show(())

    @property
    def shown(self) -> Sequence[Hashable]:
        """The items of the page."""
        return self.items[self.page * self.size : (self.page + 1) * self.size]

    def show(self, items: Sequence[Hashable], chosen: Hashable = None) -> None:
        """Shows other items, or the same with other names; the page stays where it can."""
        self.items, self._chosen = items, chosen
        self.page = min(self.page, max(0, (len(items) - 1) // self.size))
        self._draw()
        self._make()

    def turn(self, by: int) -> None:
        """Shows another page, where there is one."""
        last = max(0, (len(self.items) - 1) // self.size)
        self.page = min(max(self.page + by, 0), last)
        self.show(self.items, self._chosen)

    def _draw(self) -> None:
        shown, rules = self.shown, []
        for k, button in enumerate(self.buttons):
            button.layout.display = None if k < len(shown) else "none"
            if k >= len(shown):
                continue
            item = shown[k]
            name = self._name(item) + self._unread.get(item, "")
            button.description = button.tooltip = name
            (button.add_class if item == self._chosen else button.remove_class)("thumb-chosen")
            if self._urls.get(item):
                place = f".{self._mark} .thumbs-grid .thumb-{k}"
                rules.append(f"{place} {{ background-image: {self._urls[item]} }}")
        self._style.value = f"<style>{' '.join(rules)}</style>"
        last = max(0, (len(self.items) - 1) // self.size)
        self._back.disabled, self._on.disabled = self.page == 0, self.page == last
        self._words.value = f"page {self.page + 1} of {last + 1}"
        self._row.layout.display = None if last else "none"

    def _make(self) -> None:
        """Makes the pictures of the page that are missing."""
        missing = [item for item in self.shown if item not in self._urls]
        if not self._making.issuperset(missing):
            self._stop.set()  # of the page before
            self._making = set(missing)
            self._stop = self._panel.behind(lambda tell, stop: self._work(missing, tell, stop))

    def _work(self, missing: Sequence[Hashable], tell: Callable, stop: Event) -> None:
        made: dict[Hashable, tuple[str, str]] = {}
        told = monotonic()
        for item in missing:
            if stop.is_set():
                break
            try:
                pixels = self._picture(item)
                made[item] = (small_url(pixels) if pixels is not None else "", "")
            except Exception as error:  # of any one picture, which nobody may have asked for
                made[item] = ("", f", not read: {error}")
            if monotonic() - told > TELL:
                tell(lambda made=made: self._take(made))
                made, told = {}, monotonic()
        tell(lambda: self._take(made))

    def _take(self, made: dict[Hashable, tuple[str, str]]) -> None:
        self._making -= made.keys()
        for item, (url, why) in made.items():
            self._urls[item] = url
            if why:
                self._unread[item] = why
        while len(self._urls) > KEPT:
            del self._urls[next(iter(self._urls))]  # the oldest
        self._draw()


def small_url(pixels: np.ndarray) -> str:
    """A small picture as CSS has it, from uint8 [h, w, 3]."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return f"url(data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')})"

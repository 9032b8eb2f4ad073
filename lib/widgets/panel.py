"""What the tools are made of: controls, callbacks whose errors are shown, tables and figures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

STATIC = Path(__file__).parent / "static"


class Panel(widgets.VBox):
    """Controls by name; what their callbacks raise is shown as text and ends in no log.

    Attributes:
        errors: every exception of a callback, in order; the last one is shown in red.
        controls: the sliders, menus and buttons by name.
        follows: whether it is shown anew after each stroke where it is a part of the editor.
    """

    follows = False

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []
        self.controls: dict[str, widgets.Widget] = {}

    def button(
        self, name: str, text: str, callback: Callable[[], object], tooltip: str = ""
    ) -> widgets.Button:
        button = widgets.Button(description=text, tooltip=tooltip)
        button.on_click(lambda _: self.act(callback))
        self.controls[name] = button
        return button

    def act(self, callback: Callable[[], object]) -> None:
        """Calls back; an exception is kept and shown."""
        try:
            callback()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Keeps an exception and shows it."""
        self.errors.append(error)
        text = escape(f"{type(error).__name__}: {error}")
        self.show_error(f'<span role="alert">{text}</span>')

    def show_error(self, html: str) -> None:
        raise NotImplementedError

    def behind(
        self, work: Callable[[Callable[[Callable[[], object]], None], threading.Event], None]
    ) -> threading.Event:
        """Does work in a thread of its own, so that painting goes on; returns what stops it.

        Session and widgets belong to the kernel's own thread: what is to become of a result is told
        to it. Where no kernel's loop runs, as in a script, the work is done at once.

        Args:
            work: called as work(tell, stop); tell(callback) lets the kernel `act` on it, and once
                the event stop is set the work should end.
        """
        stop = threading.Event()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.act(lambda: work(self.act, stop))
            return stop

        def tell(callback: Callable[[], object]) -> None:
            try:
                loop.call_soon_threadsafe(self.act, callback)
            except RuntimeError:  # the kernel has ended, and nobody listens
                stop.set()

        def safely() -> None:
            try:
                work(tell, stop)
            except Exception as error:
                tell(partial(self.fail, error))

        threading.Thread(target=safely, name=type(self).__name__, daemon=True).start()
        return stop


def style_sheet() -> widgets.HTML:
    """The tools' style, where no `PaintWidget` brings it."""
    return widgets.HTML(f"<style>{(STATIC / 'editor.css').read_text(encoding='utf-8')}</style>")


def wide() -> dict[str, Any]:
    """Style of a control that fills its column, labels aligned."""
    layout = widgets.Layout(width="auto", min_width="0")
    return {"layout": layout, "style": {"description_width": "84px"}}


def make_slider(text: str, value: float, top: float, step: float = 0.01) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value, description=text, min=0, max=top, step=step, readout_format=".2f", **wide()
    )


def hint(control: widgets.Widget, words: str) -> None:
    """What is said of a control where the mouse rests on it."""
    # Of ipywidgets 7 (Colab), sliders and menus have the other name.
    setattr(control, "tooltip" if control.has_trait("tooltip") else "description_tooltip", words)


def in_row(children: Iterable[widgets.Widget], name: str = "ae-row") -> widgets.HBox:
    return widgets.HBox(list(children)).add_class(name)


def in_column(children: Iterable[widgets.Widget], name: str) -> widgets.VBox:
    return widgets.VBox(list(children)).add_class(name)


def told(words: str) -> str:
    """Words that are read out when they change."""
    return f'<span role="status">{escape(words)}</span>'


def table_html(head: Iterable[str], rows: Iterable[Iterable[str]], name: str) -> str:
    """A table with the CSS classes `name`; cells are HTML, and the first of a row is its title."""
    titles = "".join(f'<th scope="col">{text}</th>' if text else "<td></td>" for text in head)
    lines = "".join(
        f'<tr><th scope="row">{title}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for title, *cells in rows
    )
    return f'<table class="{name}"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>'


def figure_html(heat: str, what: str, caption: str, picture: str = "") -> str:
    """A small map over the picture; both are addresses, `what` says it without eyes."""
    ground = f' style="background-image:url({picture})"' if picture else ""
    return (
        f'<figure><div class="ae-thumb"{ground}><img src="{heat}" alt="{what}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )

"""What the editor says in HTML, and as a picture where no kernel runs; no state."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from lib import figures
from lib.model.resolution import own_size
from lib.widgets.controller import EditorController
from lib.widgets.panel import figure_html, table_html
from lib.widgets.pixels import data_url, heat_url, map_over_picture, png
from lib.widgets.session import LiveSession, block_name


def verdict_html(controller: EditorController, is_hidden: bool = False) -> str:
    """The sentence, and the true class's probability before and after as two bars.

    Args:
        is_hidden: the class is still to be guessed: neither is said.
    """
    if is_hidden:
        return '<p class="ae-summary">What is it? Guess first.</p><div class="ae-meter"></div>'
    true = next(row for row in controller.score_rows() if row["is_true"])
    numbers = f"{true['before']:.2f} → <b>{true['after']:.2f}</b>"
    parts = f"<span>{escape(true['class'])}</span>{_bars(true)}<span>{numbers}</span>"
    said = f'<p class="ae-summary">{escape(controller.summary())}</p>'
    return f'{said}<div class="ae-meter">{parts}</div>'


def _bars(row: dict[str, Any]) -> str:
    bars = "".join(
        f'<div class="ae-bar ae-{when}" style="width:{100 * row[when]:.1f}%"></div>'
        for when in ("before", "after")
    )
    return f'<div class="ae-bars">{bars}</div>'


def scores_html(rows: Iterable[dict[str, Any]], is_hidden: bool = False) -> str:
    """Class scores as a table with two bars a class; takes `EditorController.score_rows`."""
    lines = []
    for row in rows:
        mark = '<span class="ae-true">true class</span>' if row["is_true"] else ""
        change = f"{row['change']:+.1f}" if abs(row["change"]) >= 0.05 else "0.0"
        numbers = (f"{row['before']:.2f}", f"<b>{row['after']:.2f}</b>", change)
        title = f"{escape(row['class'])} {'' if is_hidden else mark}"
        lines.append((title, _bars(row), *numbers))
    return table_html(("class", "", "before", "after", "points"), lines, "ae-scores")


def attention_html(controller: EditorController) -> str:
    """Softmax maps over the picture, each brightest where it is highest, and their figures."""
    (before, after), block = controller.outcome(), controller.block
    count = controller.session.num_prefix
    maps = {"before": before.attention[block], "after": after.attention[block]}
    parts = "".join(
        figure_html(heat_url(values), f"softmax attention {when} the edit", when)
        for when, values in maps.items()
    )
    kept = (before.prefix[block], after.prefix[block])
    tops = (values.max() for values in maps.values())
    facts = [("class token keeps" if count == 1 else "class and other tokens keep", kept, 2)]
    facts = [*facts * (count > 0), ("highest cell", tops, 3)]
    lines = "".join(
        f'<div class="ae-dim">{what}</div><div>{old:.{digits}f} → <b>{new:.{digits}f}</b></div>'
        for what, (old, new), digits in facts
    )
    title = f"Softmax attention of {block_name(controller.session.layout, block)}"
    return f'<h4>{title}</h4><div class="ae-figures">{parts}<div>{lines}</div></div>'


def as_trained_html(controller: EditorController) -> str:
    """What the model says at its own picture size, where it is asked at another one; else ""."""
    session = controller.session
    own = session.as_trained(controller.index) if isinstance(session, LiveSession) else None
    if own is None:
        return ""
    there, here = int(own.argmax()), controller.outcome()[0].probabilities
    sizes = [f"{h} x {w}" for h, w in (session.image_size, own_size(session.model))]
    said = f"{escape(session.classes[there])} ({own[there]:.2f}, here {here[there]:.2f})"
    is_same = there == int(here.argmax())
    said = f"the same, {said}" if is_same else f"<b>{said}, another class than here</b>"
    return (
        f'<p class="ae-dim">At {sizes[0]} pixels the scores are not those of {sizes[1]}, the '
        f"model's own size: there it says {said}.</p>"
    )


def title_html(controller: EditorController, mark: str, is_hidden: bool) -> str:
    """Names the picture, and gives it to the small maps of the tool with class `mark`."""
    shown = controller.shown
    picture = data_url(png(shown.image))
    name = "?" if is_hidden else shown.class_name
    return (
        f"<style>.{mark} .ae-thumb {{ background-image: url({picture}) }}</style>"
        f"<b>{escape(name)}</b> "
        + ("" if is_hidden else f'<span class="ae-dim">{escape(str(shown.image_id))}</span>')
    )


def ladder_html(rungs: Iterable[dict[str, Any]]) -> str:
    """Takes what `rungs.climb` gives."""
    rows = [
        (escape(rung), escape(prediction), f"{share:.3f}", f"{p_true:.3f}")
        for rung, prediction, share, p_true in map(dict.values, rungs)
    ]
    return table_html(("rung", "prediction", "probability", "true class"), rows, "ae-table")


def state_png(controller: EditorController) -> bytes:
    """The tool's state as a PNG file: for GitHub, and wherever no kernel answers."""
    shown = controller.shown
    edited = ~np.isnan(controller.painted)
    picture = np.asarray(map_over_picture(shown.image, controller.asked, edited))
    rows = controller.score_rows()
    figure = figures.editor_state(shown.image, picture, controller.summary(), rows)
    return figures.as_file(figure, "png", dpi=80)

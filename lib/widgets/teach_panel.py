"""Teach from the notebook: pick saved corrections, train for seconds, compare, take it back.

`TeachPanel` stands beside the attention editor. It teaches a copy of the session's model, in a
thread of its own, so that painting goes on meanwhile. When it is done, the session gets the taught
model, and the editor shows what that one sees.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib.data.corrections import Correction, load_corrections
from lib.data.dataset import BirdDataset
from lib.model.vit import SigmoidViT
from lib.training.teach import Example, TeachConfig, Teacher, TeachReport
from lib.widgets.brush import STATIC
from lib.widgets.pixels import coloured, data_url, heat_url, png
from lib.widgets.session import LiveSession

COUNTS = (1, 5, 25)  # corrections to pick from, beside all of them

# The groups of `Teacher.before_after` in the words of the reader.
GROUPS = {
    "corrected": "corrected pictures",
    "held out, same classes": "held out, same classes",
    "held out, other classes": "held out, other classes",
    "replayed": "replayed training pictures (forgetting)",
}


class TeachPanel(widgets.VBox):
    """Controls of the teaching, and its results.

    Args:
        session: whose model is taught. Its data set holds the pictures that are corrected.
        replay: training pictures without augmentation, so that what the model knew is kept.
        held_out: pictures that the model was never trained on, for the comparison.
        folder: where the corrections were saved.
        config: how to teach; which blocks learn is chosen in the panel.

    Attributes:
        on_change: called when the session has another model, e.g. the editor's `refresh`.
        errors: every exception, in order; the last one is shown in red.
        report, table: of the last teaching; None before it.
        controls: the menus and buttons by name.
    """

    def __init__(
        self,
        session: LiveSession,
        replay: BirdDataset,
        held_out: BirdDataset,
        folder: str | Path,
        config: TeachConfig | None = None,
    ) -> None:
        self.session, self.folder = session, Path(folder)
        self._replay, self._held_out = replay, held_out
        self._config = config or TeachConfig()
        self.on_change: Callable[[], None] = lambda: None
        self.errors: list[Exception] = []
        self.report: TeachReport | None = None
        self.table: pd.DataFrame | None = None
        self._teacher: Teacher | None = None  # keeps the tokens of its frozen blocks
        self._before: list[SigmoidViT] = []  # the session's models before each teaching
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.controls = self._make_controls()
        self._bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="auto"))
        self._words, self._result = widgets.HTML(), widgets.HTML()
        row = widgets.HBox(list(self.controls.values()))
        row.layout.flex_flow = "row wrap"
        style = widgets.HTML(
            f"<style>{(STATIC / 'editor.css').read_text(encoding='utf-8')}</style>"
        )
        super().__init__([style, row, self._bar, self._words, self._result])
        self.add_class("teach-panel")
        self.refresh()

    def _make_controls(self) -> dict[str, widgets.Widget]:
        style = {"description_width": "initial"}
        depth = self.session.depth
        deep = [("the last block", 1), ("the last two blocks", 2), ("all blocks", depth)]
        controls: dict[str, widgets.Widget] = {
            "count": widgets.Dropdown(description="Corrections", style=style),
            "blocks": widgets.Dropdown(
                options=deep, value=self._config.last_blocks, description="Teach", style=style
            ),
        }
        actions = {
            "teach": ("Teach", self.start),
            "cancel": ("Cancel", self._stop.set),
            "undo": ("Undo teaching", self.undo),
        }
        for name, (text, action) in actions.items():
            button = widgets.Button(description=text, disabled=name != "teach")
            button.on_click(lambda _, action=action: self._guarded(action))
            controls[name] = button
        controls["teach"].button_style = "primary"
        return controls

    def refresh(self) -> None:
        """Counts the saved corrections again."""
        count = len(self._corrections())
        options = [(f"all {count} saved", 0)]
        options += [("the newest" + f" {k}" * (k > 1), k) for k in COUNTS if k <= count]
        chosen = self.controls["count"].value
        self.controls["count"].options = options
        # ipywidgets 8 leaves a menu blank that had no options before
        self.controls["count"].value = chosen if chosen in dict(options).values() else 0

    def start(self) -> None:
        """Teaches in a thread; what the button does."""
        if self._thread is not None and self._thread.is_alive():
            return
        corrections, teacher = self._prepare()
        # Session and widgets belong to the kernel's own thread: results go back to it.
        loop = asyncio.get_event_loop()

        def work() -> None:
            try:
                done = self._work(corrections, teacher)
            except Exception as error:
                loop.call_soon_threadsafe(self._fail, error)
            else:
                loop.call_soon_threadsafe(self._guarded, lambda: self._finish(teacher, *done))

        self._thread = threading.Thread(target=work, name="teach", daemon=True)
        self._thread.start()

    def teach(self) -> TeachReport:
        """Teaches now and returns when it is done: for a notebook cell."""
        corrections, teacher = self._prepare()
        try:
            self._finish(teacher, *self._work(corrections, teacher))
        finally:
            self._free()
        return self.report

    def undo(self) -> None:
        """The model before the last teaching, up to the first."""
        self.session.replace_model(self._before.pop())
        self._teacher = None  # its model is not the session's any more
        self._words.value, self._result.value = "Taken back: the model is as before.", ""
        self._free()
        self.on_change()

    # -- one teaching

    def _corrections(self) -> list[Correction]:
        return load_corrections(self.folder)[0] if self.folder.is_dir() else []

    def _prepare(self) -> tuple[list[Correction], Teacher]:
        self.refresh()
        found = self._corrections()
        if not found:
            raise ValueError(f"{self.folder} has no corrections yet; paint and save one first")
        config = replace(self._config, last_blocks=self.controls["blocks"].value)
        if self._teacher is None or self._teacher.config != config:
            model = copy.deepcopy(self.session.model)
            self._teacher = Teacher(model, self._replay, config, self.session.dataset)
        self._stop.clear()
        for name in ("teach", "cancel", "undo"):
            self.controls[name].disabled = name != "cancel"
        self._bar.max, self._bar.value, self._result.value = config.steps, 0, ""
        count = self.controls["count"].value
        return (found[-count:] if count else found), self._teacher

    def _work(
        self, corrections: list[Correction], teacher: Teacher
    ) -> tuple[TeachReport, pd.DataFrame | None, list[Example]]:
        report = teacher.teach(corrections, self._progress, self._stop.is_set)
        if report.cancelled:
            return report, None, []
        table = teacher.before_after(self._held_out, progress=self._comparing)
        return report, table, teacher.examples(self._held_out)

    def _comparing(self, step: int, steps: int, losses: dict[str, float]) -> None:
        self._words.value = f"taught; comparing, {losses['pictures']:.0f} pictures left"

    def _progress(self, step: int, steps: int, losses: dict[str, float]) -> None:
        self._bar.value = step
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in losses.items())
        self._words.value = f"step {step} of {steps}: {told}"

    def _finish(
        self,
        teacher: Teacher,
        report: TeachReport,
        table: pd.DataFrame | None,
        examples: list[Example],
    ) -> None:
        self.report = report
        if table is None:
            self._words.value = "Cancelled: the model is as before."
            self._free()
            return
        self.table = table
        self._before.append(self.session.model)
        self.session.replace_model(copy.deepcopy(teacher.model))
        left_out = [f"picture {image} left out: {reason}" for image, reason in report.skipped]
        told = f"taught {len(report.used)} correction(s) in {report.seconds:.1f} s"
        self._words.value = escape("; ".join([told, *left_out]))
        self._result.value = table_html(table) + examples_html(examples)
        self._free()
        self.on_change()

    def _free(self) -> None:
        for name, enabled in (("teach", True), ("cancel", False), ("undo", bool(self._before))):
            self.controls[name].disabled = not enabled

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.errors.append(error)
        text = escape(f"{type(error).__name__}: {error}")
        colour = "var(--jp-error-color1, #b00020)"
        self._words.value = f'<span role="alert" style="color: {colour}">{text}</span>'
        self._free()


def table_html(table: pd.DataFrame) -> str:
    """`Teacher.before_after` with one cell a measure: before → after."""
    measures = [name.removesuffix(" before") for name in table if name.endswith(" before")]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["", "pictures", *measures])
    lines = []
    for group, row in table.iterrows():
        cells = [f"<td>{int(row['pictures'])}</td>"]
        for name in measures:
            before, after = row[f"{name} before"], row[f"{name} after"]
            known = not (np.isnan(before) or np.isnan(after))
            cells.append(f"<td>{before:.2f} → <b>{after:.2f}</b></td>" if known else "<td></td>")
        lines.append(f'<tr><th scope="row">{escape(GROUPS[group])}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="ae-scores teach-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def examples_html(examples: list[Example]) -> str:
    """What was asked for and the softmax attention before and after, a row of figures a group."""
    parts = []
    for group in dict.fromkeys(example.group for example in examples):
        cards = "".join(_card(example) for example in examples if example.group == group)
        drawn = "" if group == "corrected" else ", drawn at random"
        parts.append(
            f"<h4>{escape(GROUPS[group])}{drawn}: softmax attention of the last block</h4>"
            f'<div class="teach-cards">{cards}</div>'
        )
    return "".join(parts)


def _card(example: Example) -> str:
    ground = f"background-image:url({data_url(png(example.image))})"

    def figure(heat: str, what: str, caption: str) -> str:
        return (
            f'<figure><div class="ae-thumb" style="{ground}"><img src="{heat}" alt="{what}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    figures = []
    if example.edit is not None:  # only what was painted lies over the picture
        opacity = np.where(example.edit.mask, 215, 0).astype(np.uint8)[..., None]
        asked = data_url(png(np.concatenate([coloured(example.edit.values), opacity], axis=-1)))
        figures.append(figure(asked, "the painted cells", "painted"))
    for when in ("before", "after"):
        said = example.predicted[when]
        mark, verdict = ("✓", "right") if said == example.class_name else ("✗", "wrong")
        caption = f'{when}<br><span class="teach-{verdict}">{mark} {escape(said)}</span>'
        heat = heat_url(example.attention[when])
        figures.append(figure(heat, f"softmax attention {when} teaching", caption))
    return (
        f'<div class="teach-card"><b>{escape(example.class_name)}</b> '
        f'<span class="ae-dim">{escape(example.image_id)}</span>'
        f'<div class="ae-figures">{"".join(figures)}</div></div>'
    )

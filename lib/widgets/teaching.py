"""Training in a notebook: curves that move meanwhile, and teaching by saved corrections.

`TeachPanel` stands beside the attention editor: pick corrections, train for seconds, compare, take
it back. It teaches a copy of the session's model, in a thread of its own, so that painting goes on
meanwhile. When it is done, the session gets the taught model, and the editor shows what that sees.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display

from lib import figures
from lib.data.corrections import Correction, load_corrections
from lib.data.dataset import BirdDataset
from lib.model.vit import SigmoidViT
from lib.training.state import Progress
from lib.training.taught import Example, own_copy
from lib.training.teach import TeachConfig, Teacher, TeachReport
from lib.widgets.panel import Panel, figure_html, style_sheet, table_html
from lib.widgets.pixels import coloured, data_url, heat_url, png
from lib.widgets.session import LiveSession

COUNTS = (1, 5, 25)  # corrections to pick from, beside all of them

# Groups of `Teacher.before_after` in the words of the reader, where those are others.
GROUPS = {
    "corrected": "corrected pictures",
    "replayed": "replayed training pictures (forgetting)",
}


class LiveCurves:
    """Draws loss and accuracy while a model trains: `train_run(..., watch=LiveCurves())`.

    Args:
        seconds: least time between two drawings; the end of an epoch is always drawn.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self._epochs, self._drawn, self._handle = 0, float("-inf"), None

    def __call__(self, progress: Progress) -> None:
        """Draws what there is, in the place of what was drawn before."""
        steps, history = progress.steps, progress.history
        if len(history) == self._epochs and time.monotonic() - self._drawn < self.seconds:
            return
        self._epochs, self._drawn = len(history), time.monotonic()
        figure = figures.training_curves(pd.DataFrame(steps), pd.DataFrame(history))
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        elif self._handle:
            self._handle.update(figure)
        figures.plt.close(figure)  # else the notebook draws it once more at the end of the cell


class TeachPanel(Panel):
    """Controls of the teaching, and its results.

    Args:
        session: whose model is taught. Its data set holds the pictures that are corrected.
        replay: training pictures without augmentation, so that what the model knew is kept.
        held_out: pictures that the model was never trained on, for the comparison.
        folder: where the corrections were saved.
        config: how to teach; which blocks learn is chosen in the panel.

    Attributes:
        on_change: called when the session has another model, e.g. the editor's `refresh`.
        report, table: of the last teaching; None before it.
        errors, controls: see `Panel`.
    """

    def __init__(
        self,
        session: LiveSession,
        replay: BirdDataset,
        held_out: BirdDataset,
        folder: str | Path,
        config: TeachConfig | None = None,
    ) -> None:
        super().__init__()
        self.session, self.folder = session, Path(folder)
        self._replay, self._held_out = replay, held_out
        self._config = config or TeachConfig()
        self.on_change: Callable[[], None] = lambda: None
        self.report: TeachReport | None = None
        self.table: pd.DataFrame | None = None
        self._teacher: Teacher | None = None  # keeps the tokens of its frozen blocks
        self._before: list[SigmoidViT] = []  # the session's models before each teaching
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        style = {"description_width": "initial"}
        deep = [("the last block", 1), ("the last two blocks", 2), ("all blocks", session.depth)]
        self.controls["count"] = widgets.Dropdown(description="Corrections", style=style)
        self.controls["blocks"] = widgets.Dropdown(
            options=deep, value=self._config.last_blocks, description="Teach", style=style
        )
        self.button("teach", "Teach", self.start).button_style = "primary"
        self.button("cancel", "Cancel", self._stop.set)
        self.button("undo", "Undo teaching", self.undo)
        self._bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="auto"))
        self._words, self._result = widgets.HTML(), widgets.HTML()
        row = widgets.HBox(list(self.controls.values()))
        row.layout.flex_flow = "row wrap"
        self.children = [style_sheet(), row, self._bar, self._words, self._result]
        self.add_class("teach-panel")
        self._enable(busy=False)
        self.refresh()

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
        corrections = self._prepare()
        # Session and widgets belong to the kernel's own thread: results go back to it.
        loop = asyncio.get_event_loop()

        def work() -> None:
            try:
                done = self._work(corrections)
            except Exception as error:
                loop.call_soon_threadsafe(self.fail, error)
            else:
                loop.call_soon_threadsafe(self.act, lambda: self._finish(*done))

        self._thread = threading.Thread(target=work, name="teach", daemon=True)
        self._thread.start()

    def teach(self) -> TeachReport:
        """Teaches now and returns when it is done: for a notebook cell."""
        corrections = self._prepare()
        try:
            self._finish(*self._work(corrections))
        finally:
            self._enable(busy=False)
        return self.report

    def undo(self) -> None:
        """The model before the last teaching, up to the first."""
        self.session.replace_model(self._before.pop())
        self._teacher = None  # its model is not the session's any more
        self._words.value, self._result.value = "Taken back: the model is as before.", ""
        self._enable(busy=False)
        self.on_change()

    # -- one teaching

    def _corrections(self) -> list[Correction]:
        return load_corrections(self.folder)[0] if self.folder.is_dir() else []

    def _prepare(self) -> list[Correction]:
        """The corrections to teach; the teacher and the controls are ready for it."""
        self.refresh()
        found = self._corrections()
        if not found:
            raise ValueError(f"{self.folder} has no corrections yet; paint and save one first")
        config = replace(self._config, last_blocks=self.controls["blocks"].value)
        if self._teacher is None or self._teacher.config != config:
            model = own_copy(self.session.model, config.last_blocks)
            self._teacher = Teacher(model, self._replay, config, self.session.dataset)
        self._stop.clear()
        self._enable(busy=True)
        self._bar.max, self._bar.value, self._result.value = config.steps, 0, ""
        count = self.controls["count"].value
        return found[-count:] if count else found

    def _work(
        self, corrections: list[Correction]
    ) -> tuple[TeachReport, pd.DataFrame | None, list[Example]]:
        teacher = self._teacher
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
        self, report: TeachReport, table: pd.DataFrame | None, examples: list[Example]
    ) -> None:
        self.report = report
        if table is None:
            self._words.value = "Cancelled: the model is as before."
            self._enable(busy=False)
            return
        self.table = table
        self._before.append(self.session.model)
        taught = own_copy(self._teacher.model, self._teacher.config.last_blocks)
        self.session.replace_model(taught)
        left_out = [f"picture {image} left out: {reason}" for image, reason in report.skipped]
        told = f"taught {len(report.used)} correction(s) in {report.seconds:.1f} s"
        self._result.value = comparison_html(table) + examples_html(examples)
        # After the table: who reads the sentence finds it.
        self._words.value = escape("; ".join([told, *left_out]))
        self._enable(busy=False)
        self.on_change()

    def _enable(self, busy: bool) -> None:
        usable = {"teach": not busy, "cancel": busy, "undo": bool(self._before) and not busy}
        for name, enabled in usable.items():
            self.controls[name].disabled = not enabled

    def show_error(self, html: str) -> None:
        self._words.value = html
        self._enable(busy=False)


def comparison_html(table: pd.DataFrame) -> str:
    """`Teacher.before_after` with one cell a measure: before → after."""
    measures = [name.removesuffix(" before") for name in table if name.endswith(" before")]
    lines = []
    for group, row in table.iterrows():
        cells = [escape(GROUPS.get(group, group)), str(int(row["pictures"]))]
        for name in measures:
            before, after = row[f"{name} before"], row[f"{name} after"]
            known = not (np.isnan(before) or np.isnan(after))
            cells.append(f"{before:.2f} → <b>{after:.2f}</b>" if known else "")
        lines.append(cells)
    head = ["", "pictures", *map(escape, measures)]
    return table_html(head, lines, "ae-scores teach-table")


def examples_html(examples: list[Example]) -> str:
    """What was asked for and the softmax attention before and after, a row of figures a group."""
    parts = []
    for group in dict.fromkeys(example.group for example in examples):
        name = escape(GROUPS.get(group, group))
        cards = "".join(_card(example) for example in examples if example.group == group)
        drawn = "" if group == "corrected" else ", drawn at random"
        parts.append(
            f"<h4>{name}{drawn}: softmax attention of the last block</h4>"
            f'<div class="teach-cards">{cards}</div>'
        )
    return "".join(parts)


def _card(example: Example) -> str:
    picture = data_url(png(example.image))
    parts = []
    if example.edit is not None:  # only what was painted lies over the picture
        opacity = np.where(example.edit.mask, 215, 0).astype(np.uint8)[..., None]
        asked = data_url(png(np.concatenate([coloured(example.edit.values), opacity], axis=-1)))
        parts.append(figure_html(asked, "the painted cells", "painted", picture))
    for when in ("before", "after"):
        said = example.predicted[when]
        mark, verdict = ("✓", "right") if said == example.class_name else ("✗", "wrong")
        caption = f'{when}<br><span class="teach-{verdict}">{mark} {escape(said)}</span>'
        what = f"softmax attention {when} teaching"
        parts.append(figure_html(heat_url(example.attention[when]), what, caption, picture))
    return (
        f'<div class="teach-card"><b>{escape(example.class_name)}</b> '
        f'<span class="ae-dim">{escape(example.image_id)}</span>'
        f'<div class="ae-figures">{"".join(parts)}</div></div>'
    )

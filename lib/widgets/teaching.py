"""Training in a notebook: curves that move meanwhile, and teaching by saved corrections.

`TeachPanel` stands beside the attention editor: pick corrections, train for seconds, compare, take
it back. It teaches a copy of the session's model, in a thread of its own, so that painting goes on
meanwhile. When it is done, the session gets the taught model, and the editor shows what that sees.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display

from lib import figures
from lib.data.corrections import REPLACED, Correction, on_grid
from lib.data.dataset import BirdDataset
from lib.model.vit import SigmoidViT
from lib.training.state import Progress
from lib.training.taught import Example, own_copy
from lib.training.teach import TeachConfig, Teacher, TeachReport
from lib.widgets.controller import EditorController
from lib.widgets.panel import Panel, figure_html, style_sheet, table_html, told
from lib.widgets.pixels import coloured, data_url, heat_url, png
from lib.widgets.session import LiveSession, blocks_in_words
from lib.widgets.shelf import CorrectionFolder

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
        session: whose model is taught. Its data set holds the pictures that are corrected; no test
            pictures, which are kept to measure.
        replay: training pictures without augmentation, so that what the model knew is kept.
        held_out: pictures that the model was never trained on, for the comparison; those that were
            corrected are left out of it.
        folder: where the corrections were saved.
        config: how to teach; which blocks learn is chosen in the panel.

    Attributes:
        on_change: called when the session has another model, e.g. the editor's `refresh`.
        controller: of the editor that the panel belongs to. After teaching, it lays aside what was
            painted: that was asked of the model as it was before.
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
        if session.dataset.part == "test":
            raise ValueError(
                "the session shows test pictures, which are kept to measure; make it with training "
                "or validation pictures"
            )
        super().__init__()
        self.session, self.folder = session, Path(folder)
        self._saved = CorrectionFolder(folder, session)
        self._replay, self._held_out = replay, held_out
        self._config = config or TeachConfig()
        self.on_change: Callable[[], None] = lambda: None
        self.controller: EditorController | None = None
        self.report: TeachReport | None = None
        self.table: pd.DataFrame | None = None
        self._teacher: Teacher | None = None  # keeps the tokens of its frozen blocks
        self._before: list[SigmoidViT] = []  # the session's models before each teaching
        self._stop = threading.Event()
        self._busy = False
        self._steps = ("", 0)  # what the bar counts, and up to what
        style = {"description_width": "initial"}
        words = partial(blocks_in_words, session.layout)
        deep = [(words("last"), 1), (words("last2"), 2), (words("all"), session.layout.depth)]
        self.controls["count"] = widgets.Dropdown(description="Corrections", style=style)
        self.controls["blocks"] = widgets.Dropdown(
            options=deep, value=self._config.last_blocks, description="Teach", style=style
        )
        self.button("teach", "Teach", self.start).button_style = "primary"
        self.button("cancel", "Cancel", lambda: self._stop.set())
        self.button("undo", "Undo teaching", self.undo)
        self._bar = widgets.IntProgress(min=0, max=1, layout=widgets.Layout(width="auto"))
        self._words, self._result = widgets.HTML(), widgets.HTML()
        self._left_out = widgets.HTML()
        row = widgets.HBox(list(self.controls.values()))
        row.layout.flex_flow = "row wrap"
        shown = [row, self._left_out, self._bar, self._words, self._result]
        self.children = [style_sheet(), *shown]
        self.add_class("teach-panel")
        self.refresh()

    def attach(self, controller: EditorController, changed: Callable[[], None]) -> None:
        """Makes it a part of an editor: `changed` then shows there what the taught model sees."""
        self.controller, self.on_change = controller, changed

    def refresh(self) -> None:
        """Counts the saved corrections again, and names those that do not teach."""
        count = len(self._corrections())
        options = [(f"all {count} saved" if count else "none is saved yet", 0)]
        options += [("the newest" + f" {k}" * (k > 1), k) for k in COUNTS if k <= count]
        menu = self.controls["count"]
        if menu.options != tuple(options):
            chosen = menu.value
            menu.options = options
            # ipywidgets 8 leaves a menu blank that had no options before
            menu.value = chosen if chosen in dict(options).values() else 0
        left = [one for one in self._saved.entries() if one.reason]
        left = [one for one in left if not one.reason.startswith(REPLACED)]
        lines = "".join(f"<li>{escape(f'{one.path.name}: {one.reason}')}</li>" for one in left)
        words = f"{len(left)} saved file{'s' * (len(left) != 1)} cannot teach"
        rows, columns = grid = self.session.model.grid
        finer = [one for one in self._saved.entries() if not one.reason]
        finer = sum(one.correction.edit.grid != grid for one in finer)
        said = f"{finer} painted on finer cells, and taught on the model's own {rows} x {columns}"
        words = f"{words}:<ul>{lines}</ul>" if left else ""
        self._left_out.value = words + (f"<p>{said}</p>" if finer else "")
        self._enable()

    def start(self) -> None:
        """Teaches in a thread; what the button does."""
        if self._busy:
            return
        corrections = self._prepare()
        self._stop = self.behind(lambda tell, stop: self._teach(corrections, tell, stop))

    def teach(self) -> TeachReport:
        """Teaches now and returns when it is done: for a notebook cell."""
        corrections = self._prepare()
        self._stop.clear()
        try:
            self._finish(*self._work(corrections, self._stop))
        finally:  # an interrupt from the keyboard too
            self._free()
        return self.report

    def undo(self) -> None:
        """The model before the last teaching, up to the first."""
        self.session.replace_model(self._before.pop())
        self._teacher = None  # its model is not the session's any more
        self._words.value = told("Taken back: the model is as before.")
        self._result.value = ""
        self._enable()
        self.on_change()

    # -- one teaching

    def _corrections(self) -> list[Correction]:
        """Those that teach, on the model's own grid."""
        grid = self.session.model.grid
        return [on_grid(one.correction, grid) for one in self._saved.entries() if not one.reason]

    def _prepare(self) -> list[Correction]:
        """The corrections to teach; the teacher and the controls are ready for it."""
        self.refresh()
        found = self._corrections()
        if not found:
            raise ValueError(
                f"{self.folder} has no corrections yet that can teach; paint and save one first"
            )
        config = replace(self._config, last_blocks=self.controls["blocks"].value)
        if self._teacher is None or self._teacher.config != config:
            model = own_copy(self.session.model, config.last_blocks)
            self._teacher = Teacher(model, self._replay, config, self.session.dataset)
        self._busy, self._result.value = True, ""
        self._enable()
        count = self.controls["count"].value
        chosen = found[-count:] if count else found
        self._count("preparing", 1, 0)
        self._words.value = told(f"preparing pictures for {len(chosen)} correction(s)")
        return chosen

    def _teach(
        self,
        corrections: list[Correction],
        tell: Callable[[Callable[[], object]], None],
        stop: threading.Event,
    ) -> None:
        done = self._work(corrections, stop)
        tell(lambda: self._finish(*done))

    def _work(
        self, corrections: list[Correction], stop: threading.Event
    ) -> tuple[TeachReport, pd.DataFrame | None, list[Example]]:
        teacher = self._teacher
        report = teacher.teach(corrections, self._progress, stop.is_set)
        if report.cancelled:
            return report, None, []
        self._count("comparing", 1, 0)
        self._words.value = "taught; comparing before and after"
        table = teacher.before_after(self._held_out, progress=self._comparing)
        return report, table, teacher.examples(self._held_out)

    def _comparing(self, step: int, steps: int, losses: dict[str, float]) -> None:
        self._pass("comparing", losses["pictures"], "taught; comparing: {} of {} pictures")

    def _progress(self, step: int, steps: int, losses: dict[str, float]) -> None:
        if "pictures" in losses:
            return self._pass("preparing", losses["pictures"], "preparing {} of {} pictures")
        self._count("teaching", steps, step)
        parts = (f"{name.replace('_', ' ')} {value:.3g}" for name, value in losses.items())
        self._words.value = f"step {step} of {steps}: {', '.join(parts)}"

    def _pass(self, what: str, left: float, words: str) -> None:
        """Tells of pictures that pass the trunk, `left` of them are still to do."""
        name, total = self._steps
        if name != what or left > total - self._bar.value:  # the first part of other pictures
            total = int(left)
        self._count(what, total, total - int(left))
        self._words.value = words.format(self._bar.value, total)

    def _count(self, what: str, total: int, done: int) -> None:
        self._steps = (what, total)
        self._bar.max, self._bar.value = total, done

    def _finish(
        self, report: TeachReport, table: pd.DataFrame | None, examples: list[Example]
    ) -> None:
        self.report, self._busy = report, False
        self._enable()
        if table is None:
            self._count("", 1, 0)
            self._words.value = told("Cancelled: the model is as before.")
            return
        self.table = table
        self._before.append(self.session.model)
        taught = own_copy(self._teacher.model, self._teacher.config.last_blocks)
        self.session.replace_model(taught)
        left_out = [f"picture {image} left out: {reason}" for image, reason in report.skipped]
        words = f"taught {len(report.used)} correction(s) in {report.seconds:.1f} s"
        validating = self._validating(report.used)
        where = blocks_in_words(self.session.layout, "last")
        self._result.value = comparison_html(table, validating) + examples_html(examples, where)
        # After the table: who reads the sentence finds it.
        self._count("done", 1, 1)
        self._words.value = told("; ".join([words, *left_out]))
        self._enable()  # now there is something to undo
        if self.controller is not None:
            self.controller.lay_aside()
        self.on_change()

    def _validating(self, used: Sequence[Correction]) -> int:
        """How many of the corrected pictures are validation pictures."""
        dataset = self.session.dataset
        table = dataset.table
        parts = table.get("part", pd.Series(dataset.part, index=table.index))
        ids = table["image_id"].astype(str)
        return int((ids.isin([one.image_id for one in used]) & (parts == "val")).sum())

    def _free(self) -> None:
        self._busy = False
        self._enable()

    def _enable(self) -> None:
        busy = "it is being taught now" if self._busy else ""
        self._bar.layout.display = None if busy else "none"
        none = "" if self._corrections() else "paint and save a correction first"
        why = {"teach": busy or none, "cancel": "" if busy else "nothing is being taught"}
        why["undo"] = busy or ("" if self._before else "nothing was taught yet")
        for name, reason in why.items():
            self.controls[name].disabled, self.controls[name].tooltip = bool(reason), reason

    def show_error(self, html: str) -> None:
        self._words.value = html
        self._free()


def comparison_html(table: pd.DataFrame, validating: int = 0) -> str:
    """`Teacher.before_after` with one cell a measure: before → after.

    `validating` of the corrected pictures are validation pictures: that is said below.
    """
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
    shown = table_html(head, lines, "ae-scores teach-table")
    # On a narrow page it is moved sideways, by keyboard too.
    region = (
        'class="teach-scroll" tabindex="0" role="region" aria-label="before and after teaching"'
    )
    shown = f"<div {region}>{shown}</div>"
    if not validating:
        return shown
    which = "is a validation picture" if validating == 1 else "are validation pictures"
    return (
        f"{shown}<p>{validating} of the corrected pictures {which}, and no longer held out. "
        "Measure this model without them, as the held-out rows above do; a model that is chosen "
        "by validation must not be chosen with them.</p>"
    )


def examples_html(examples: list[Example], where: str) -> str:
    """What was asked for and the softmax attention before and after, a row of figures a group.

    `where` names the block whose attention it is.
    """
    parts = []
    for group in dict.fromkeys(example.group for example in examples):
        name = escape(GROUPS.get(group, group))
        cards = "".join(_card(example) for example in examples if example.group == group)
        drawn = "" if group == "corrected" else ", drawn at random"
        parts.append(
            f"<h4>{name}{drawn}: softmax attention of {where}</h4>"
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

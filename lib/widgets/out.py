"""What leaves the editor: figures, tables, code, masks and maps that other programs read.

Pixels are those of the picture as the model sees it, `Shown.image`: it was squeezed to that size.
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from lib import figures
from lib.files import claimed, file_name, make_folder, write_bytes
from lib.widgets.controller import EditorController
from lib.widgets.panel import Panel, in_column, in_row, told
from lib.widgets.pixels import outlines, png, run_lengths, to_pixels
from lib.widgets.session import LiveSession, Outcome, block_name
from lib.widgets.snapshots import LISTED, SnapshotList, SnapshotPanel

FRAMES = 21  # of the animation: strength 0, .05, ..., 1
FRAME_MS, LAST_MS = 120, 1500  # how long a frame is shown, and the last one
FAST = Image.Quantize.FASTOCTREE  # keeps small areas of a colour of their own, too
LINKED = 3_000_000  # bytes of a file that is handed to the browser as well, as a link

# What can be exported, by its words in the menu: its key, and the suffix of its file.
EXPORTS = {
    "figure of all snapshots (PNG)": ("figure", ".png"),
    "figure of all snapshots (SVG)": ("figure", ".svg"),
    "table of all snapshots (CSV)": ("table", ".csv"),
    "this edit as code": ("code", ".py"),
    "this edit as JSON, a correction": ("correction", ".json"),
    "this map (PNG)": ("map", ".png"),
    "this map (NPY)": ("map", ".npy"),
    "painted cells (COCO RLE)": ("rle", ".json"),
    "painted cells (COCO polygons)": ("polygons", ".json"),
    "strength from 0 to 1 (GIF)": ("strength", ".gif"),
}

# `clipboard` is there on https and on this machine only; else the code is selected for Ctrl-C.
COPY = (
    "navigator.clipboard ? navigator.clipboard.writeText(this.nextElementSibling.textContent)"
    ".then(() => { this.textContent = 'Copied'; })"
    " : getSelection().selectAllChildren(this.nextElementSibling)"
)


def as_code(controller: EditorController) -> str:
    """A notebook cell that makes the present edit again, and prints the five highest scores.

    It asks the `session` that the tool was made with.
    """
    edit, index = controller.edit(), controller.index
    cells = np.where(edit.mask, edit.values, np.nan).astype(np.float32)
    lines = "\n".join(f"    [{', '.join(map(str, row))}]," for row in cells)
    scope = "\n".join(f"    {name}={value!r}," for name, value in edit.scope.items())
    session = controller.session
    at_size = (
        f"session.see_at({session.image_size})  # height and width in pixels\n"
        if isinstance(session, LiveSession) and session.now.model is not session.model
        else ""
    )
    return f"""\
import numpy as np

from lib import AttentionEdit

nan = np.nan  # cells that are not edited
values = np.float32([  # the sigmoid attention that is asked for, a row of patches a line
{lines}
])
edit = AttentionEdit(
    ~np.isnan(values),
    np.nan_to_num(values),
{scope}
)
# `session`: the LiveSession of the attention editor
{at_size}assert session.open({index}).image_id == {controller.shown.image_id!a}
if session.fingerprint != {controller.session.fingerprint!r}:
    print("These are other weights than those of the editor.")
probabilities = session.outcome({index}, edit).probabilities
for label in np.argsort(-probabilities)[:5]:
    print(f"{{probabilities[label]:.4f}} {{session.classes[label]}}")
"""


def snapshot_figure(kept: SnapshotList, suffix: str) -> bytes:
    """All snapshots of the open picture as one figure, a PNG or SVG file."""
    controller = kept.controller
    classes, true, block = controller.session.classes, controller.shown.label, controller.block
    shots = {}
    for one in kept.judged():
        top = np.argsort(-one.after.probabilities, kind="stable")[:LISTED].tolist()
        scores = {
            classes[k]: float(one.after.probabilities[k]) for k in dict.fromkeys([*top, true])
        }
        shots[one.name] = (one.after.attention[block], one.edit.mask.numpy(), scores)
    shown = controller.shown
    title = (
        f"{figures.label(shown.class_name, 60)}, picture {figures.label(shown.image_id, 60)}:\n"
        f"softmax attention of {block_name(controller.session.layout, block)}, "
        "edited cells outlined"
    )
    figure = figures.snapshot_sheet(shown.image, shots, classes[true], title)
    return figures.as_file(figure, suffix[1:], dpi=150)


def strength_animation(
    controller: EditorController, progress: Callable[[int, int], None] = lambda done, of: None
) -> bytes:
    """The present edit from strength 0 to 1 as a GIF: picture, attention, true class's bar.

    Every frame is what the model says. Raises ValueError where nothing is edited.
    """
    work = controller.work
    if controller.edit_of(replace(work, strength=1.0)).is_empty:
        raise ValueError("nothing is edited, so strength changes nothing; paint first")
    frames = []
    for k in range(FRAMES):
        progress(k, FRAMES)
        strength = k / (FRAMES - 1)
        frames.append(
            _frame(controller, controller.outcome_of(replace(work, strength=strength)), strength)
        )
    buffer = io.BytesIO()
    times = [FRAME_MS] * (FRAMES - 1) + [LAST_MS]
    frames[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=times,
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()


def _frame(controller: EditorController, outcome: Outcome, strength: float) -> Image.Image:
    classes, true = controller.session.classes, controller.shown.label
    listed = dict.fromkeys([int(outcome.probabilities.argmax()), true])
    scores = {classes[k]: float(outcome.probabilities[k]) for k in listed}
    attention = outcome.attention[controller.block]
    figure = figures.strength_frame(
        controller.shown.image, attention, strength, scores, classes[true]
    )
    try:
        figure.canvas.draw()
        frame = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        return frame.quantize(palette=frame.quantize(256, FAST))  # with a palette, it is dithered
    finally:
        figures.plt.close(figure)


def painted_cells(controller: EditorController, kind: str) -> dict[str, object]:
    """The painted cells as a COCO annotation's segmentation; `kind` is "rle" or "polygons".

    Raises ValueError where nothing is painted.
    """
    cells, shown = ~np.isnan(controller.painted), controller.shown
    if not cells.any():
        raise ValueError("no cell is painted; paint first")
    size = shown.image.shape[:2]
    mask = kind == "rle"
    return {
        "image_id": shown.image_id,
        "file_name": shown.file,
        "height": size[0],
        "width": size[1],
        "iscrowd": int(mask),  # COCO's word for a segmentation that is an RLE
        "segmentation": run_lengths(to_pixels(cells, size)) if mask else outlines(cells, size),
    }


class ExportPanel(Panel):
    """A menu of what can leave the editor, a button, and where it lies then.

    Args:
        kept: the snapshots, and the controller whose edit is exported.
        folder: that of the corrections; exports lie beside it, in `<its name>-exports`.
        author: for the correction.

    Attributes:
        folder: of the exports; made when needed.
        errors, controls: see `Panel`.
    """

    def __init__(self, kept: SnapshotList, folder: str | Path, author: str) -> None:
        super().__init__()
        folder = Path(folder)
        self.kept, self.folder = kept, folder.with_name(f"{folder.name}-exports")
        self._author, self._exported = author, kept.controller.index
        menu = widgets.Dropdown(options=list(EXPORTS), description="Export")
        self.controls["what"] = menu
        button = self.button("export", "Export", lambda: self.export(menu.value))
        button.tooltip = f"to the folder {self.folder}"
        self._said = widgets.HTML()
        self.children = [in_row([menu, button]), self._said]

    def refresh(self) -> None:
        """What was said of another picture is gone."""
        if self._exported != self.kept.controller.index:
            self._exported, self._said.value = self.kept.controller.index, ""

    def show_error(self, html: str) -> None:
        self._said.value = html

    def export(self, what: str) -> Path:
        """Writes one of `EXPORTS`, shows where it lies and, where it is small, hands it over.

        Raises:
            ValueError: there is nothing to export.
            StorageError: it could not be written; names the file and the remedy.
        """
        self._say("working ...")
        kind, suffix = EXPORTS[what]
        controller = self.kept.controller
        if kind == "correction":
            path = controller.save(self.folder, self._author, controller.note)
            content = path.read_bytes()
        else:
            content = self._made(kind, suffix)
            make_folder(self.folder)
            stem = file_name(f"{controller.shown.image_id}-{kind}", 80)
            names = (self.folder / f"{stem}{f'-{k}' * (k > 0)}{suffix}" for k in range(10_000))
            with claimed(names) as path:
                write_bytes(path, content)
        height, width = controller.shown.image.shape[:2]
        words = ""
        if kind in ("map", "rle", "polygons"):
            words = f" {width} x {height} pixels, as the model sees the picture; cells are exact."
        self._said.value = _handed_over(path, content, words)
        return path

    def _made(self, kind: str, suffix: str) -> bytes:
        controller = self.kept.controller
        if kind == "figure":
            return snapshot_figure(self.kept, suffix)
        if kind == "table":
            return self.kept.to_frame().to_csv(index=False).encode()
        if kind == "code":
            return as_code(controller).encode()
        if kind == "strength":
            return strength_animation(
                controller, lambda done, of: self._say(f"frame {done + 1} of {of} ...")
            )
        if kind == "map":
            values = to_pixels(controller.asked, controller.shown.image.shape[:2])
            if suffix == ".png":
                return png(np.rint(255 * values).astype(np.uint8))
            buffer = io.BytesIO()
            np.save(buffer, values)
            return buffer.getvalue()
        return json.dumps(painted_cells(controller, kind)).encode()

    def _say(self, words: str) -> None:
        self._said.value = told(words)


def _handed_over(path: Path, content: bytes, words: str) -> str:
    """Where a file lies; a link to it, and what it shows, where it is small."""
    said = f"Saved as {escape(str(path))}.{words}"
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    shown = ""
    if len(content) <= LINKED:
        address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
        said += f' <a download="{escape(path.name)}" href="{address}">Download</a>'
        if path.suffix in (".png", ".gif", ".svg"):
            shown = f'<img class="cp-shown" src="{address}" alt="what was exported">'
        if path.suffix == ".py":
            code = escape(content.decode())
            shown = (
                f'<button class="jupyter-button" onclick="{escape(COPY)}">Copy</button>'
                f'<pre class="cp-code" tabindex="0">{code}</pre>'
            )
    return f'<p role="status">{said}</p>{shown}'


class ComparePanel(Panel):
    """The snapshots, and what leaves the editor: the fold "Compare and export".

    Args:
        controller: of the editor.
        changed: called when the panel has changed the controller, to show it.
        folder: of the corrections; exports lie beside it. author: for an exported correction.

    Attributes:
        kept, out: the two parts, a `SnapshotPanel` and an `ExportPanel`; they share `errors`.
    """

    follows = True

    def __init__(
        self,
        controller: EditorController,
        changed: Callable[[], None],
        folder: str | Path,
        author: str,
    ) -> None:
        super().__init__()
        self.kept = SnapshotPanel(controller, changed)
        self.out = ExportPanel(self.kept.kept, folder, author)
        for part in (self.kept, self.out):
            part.errors = self.errors
            self.controls |= part.controls
        self.children = [self.kept, in_column([self.out], "cp-out")]
        self.add_class("cp-panel")

    def refresh(self) -> None:
        """Shows the controller, after it or the session's model was changed."""
        self.kept.refresh()
        self.out.refresh()

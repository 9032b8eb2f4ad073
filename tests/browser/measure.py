"""How fast the editor answers in a real browser: `python tests/browser/measure.py`.

A ViT-S/16 at 224 pixels with random weights; one stroke over the patches, a pointer event a patch,
each after the answer to the one before. Times are those of the page, from the time stamp of the
pointer event:

- drawn: until the map with the stroke is on the canvas
- frame: until the frame with it has been rendered
- scores: until the class scores in the page have changed
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Lab, Notebook, chromium, jupyter_lab, notebook_of

EVENTS = 60  # of each stroke, after WARM others
WARM = 5
GRID = 14
PAUSE = 100  # ms from an answer to the next event

TOOL = """
import timm, torch
from lib.config import DataConfig
from lib.data.dataset import make_dataset
from lib.widgets.editor import attention_editor
from lib.widgets.session import LiveSession
from lib.model.vit import SigmoidViT

torch.manual_seed(0)
model = SigmoidViT(timm.create_model("vit_small_patch16_224", num_classes=8))
config = DataConfig(image_size=(224, 224), toy_test=1)
data = make_dataset(config, "test", model.grid, *model.normalisation)
tool = attention_editor(LiveSession(model, data))
tool
"""

PYTHON = """
import time
def times(n=30):
    found = []
    for _ in range(n):
        tool.controller._edited.cache_clear()
        start = time.perf_counter()
        tool.controller.outcome()
        found.append(1000 * (time.perf_counter() - start))
    return sorted(found)
print(times()[15])
"""

PROBE = """
() => {
  const probe = (window.probe = { event: null, drawn: [], frame: [], scores: [] });
  const open = {}; // which times of the last event are still to come
  const take = (name, event) => {
    if (event !== probe.event || !open[name]) return;
    open[name] = false;
    probe[name].push(performance.now() - event);
  };
  const begin = (event) => {
    probe.event = event.timeStamp;
    open.drawn = open.frame = open.scores = true;
  };
  document.addEventListener("pointermove", begin, true);
  const canvas = CanvasRenderingContext2D.prototype;
  const put = canvas.putImageData;
  canvas.putImageData = function (...args) {
    put.apply(this, args);
    const { event } = probe;
    if (event === null) return;
    take("drawn", event);
    requestAnimationFrame(() => setTimeout(() => take("frame", event)));
  };
  const scores = document.querySelector(".ae-scores").closest(".widget-html");
  const changed = new MutationObserver(() => take("scores", probe.event));
  changed.observe(scores, { subtree: true, childList: true, characterData: true });
}
"""


def stroke(page: Any) -> dict[str, np.ndarray]:
    """Paints row by row, there and back; milliseconds of each event."""
    canvas = page.locator(".ae-tool").get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    rows, columns = np.divmod(np.arange(1 + WARM + EVENTS), GRID)
    columns = np.where(rows % 2, GRID - 1 - columns, columns)
    xs = box["x"] + (columns + 0.5) / GRID * box["width"]
    ys = box["y"] + (rows + 0.5) / GRID * box["height"]
    page.mouse.move(xs[0], ys[0])
    page.mouse.down()
    page.wait_for_timeout(1000)
    page.evaluate(PROBE)
    for count, (x, y) in enumerate(zip(xs[1:], ys[1:], strict=True), start=1):
        page.mouse.move(x, y)
        page.wait_for_function(f"probe.scores.length === {count}", timeout=10_000)
        page.wait_for_timeout(PAUSE)
    page.mouse.up()
    return {
        name: np.array(page.evaluate(f"probe.{name}"))[WARM:]
        for name in ("drawn", "frame", "scores")
    }


def measure(browser: Any, lab: Lab, blocks: str) -> tuple[dict[str, np.ndarray], float]:
    """Times of one stroke, and the milliseconds that Python computes for one of its edits."""
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        page = context.new_page()
        notebook = Notebook(page, lab, notebook_of(TOOL))
        notebook.run_all()
        notebook.widget(".ae-summary")
        tool = page.locator(".ae-tool")
        tool.get_by_role("slider", name="Brush size", exact=True).fill("1")
        tool.get_by_role("combobox", name="Edit in").select_option(blocks)
        page.wait_for_timeout(1000)
        found = stroke(page)
        return found, float(notebook.python(PYTHON))


def main() -> None:
    print(f"ViT-S/16, 224 pixels, {EVENTS} pointer events, milliseconds p50 / p95")
    print(
        f"{'server':<10}{'edit in':<12}",
        *(f"{n:>12}" for n in ("drawn", "frame", "scores")),
        end="",
    )
    print(f"{'model p50':>12}{'load':>8}")
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser:
        for server in ("stock", "no delay"):
            with jupyter_lab(Path(folder) / server, server == "no delay") as lab:
                for blocks in ("last block", "all blocks"):
                    found, model = measure(browser, lab, blocks)
                    spans = [np.percentile(times, [50, 95]) for times in found.values()]
                    cells = (f"{p50:.0f} / {p95:.0f}" for p50, p95 in spans)
                    print(f"{server:<10}{blocks:<12}", *(f"{cell:>12}" for cell in cells), end="")
                    print(f"{model:>12.1f}{os.getloadavg()[0]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()

"""The attention editor in a real JupyterLab: what a person does, and what the page then shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from lib.data.corrections import load_corrections

from .conftest import Notebook, opened, watched

pytestmark = pytest.mark.browser

CORRECTIONS = 'ROOT / "corrections"'  # the folder in the notebook
STUDY = "## Does it help on other pictures?"  # its last section
NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "06_attention_editor.ipynb"

# Random weights: what the scores are does not matter here, only that they follow the edit.
MODEL = """
import ipywidgets, timm, torch
from lib.config import DataConfig
from lib.data.dataset import BirdDataset, read_records
from lib.widgets.editor import attention_editor
from lib.widgets.session import LiveSession
from lib.model.vit import SigmoidViT

torch.manual_seed(0)
sizes = dict(img_size=64, patch_size=8, depth=3, embed_dim=32, num_heads=4, num_classes=8)
vit = timm.create_model("vit_tiny_patch16_224", **sizes)
for parameter in vit.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.3)
model = SigmoidViT(vit)
config = DataConfig(toy_test=4)
records, _ = read_records(config, "test")
classes = [f"<b class='injected'>Bird {k}</b> & Co" for k in range(8)]
data = BirdDataset(records, classes, config, model.grid, *model.normalisation)"""
TOOL = """
if "tool" in globals():
    # Those of the test before, but none that an import has only just opened: JupyterLab 4.6 then
    # sends the answers of the next ones to a subshell that it has given up, and they are lost.
    ipywidgets.Widget.close_all()
session = LiveSession(model, data)
tool = attention_editor(session, folder="corrections", author="Ada")
tool.paint.view = "heat"  # the map on every cell
tool
"""
GRID = 8
UNEDITED = "The model says"
EDITED = "of the attention moved"


class Tool:
    """The editor in the page."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook, self.page = notebook, notebook.page
        self.element = notebook.widget(".ae-tool")
        self.canvas = self.element.get_by_role("application")
        self.summary = self.element.locator(".ae-summary")
        self.scores = self.element.locator(".ae-scores tbody")

    def button(self, name: str) -> Any:
        return self.element.get_by_role("button", name=name, exact=True)

    def press(self, name: str) -> None:
        self.button(name).click()

    def slider(self, name: str) -> Any:
        return self.element.get_by_role("slider", name=name, exact=True)

    def says(self, text: str) -> str:
        """Waits for all answers and for `text` in the sentence, and returns the sentence."""
        self.summary.filter(has_text=text).wait_for()
        self.settle()
        return self.summary.inner_text()

    def settle(self) -> None:
        """Waits until everything that was painted has reached Python, and its answer the page.

        The page sends its next message when the last is answered: one quiet round is too few.
        """
        shown, quiet = "", 0
        while quiet < 2:
            self.notebook.python("")  # comes back after the answers to all that was sent
            self.page.wait_for_timeout(100)
            before, shown = shown, self.element.inner_html()
            quiet = quiet + 1 if shown == before else 0

    def pick(self, tool: str) -> None:
        # the radio button itself is there for the keyboard; its label is what one sees
        self.element.locator(".ae-tools label", has_text=tool).click()

    def at(self, row: float, column: float) -> tuple[float, float]:
        """The middle of a cell (from 0) in the page."""
        self.canvas.scroll_into_view_if_needed()
        box = self.canvas.bounding_box()
        x = box["x"] + (column + 0.5) / GRID * box["width"]
        return x, box["y"] + (row + 0.5) / GRID * box["height"]

    def drag(self, *cells: tuple[float, float], steps: int = 5) -> None:
        """One stroke through the middles of these cells."""
        self.page.mouse.move(*self.at(*cells[0]))
        self.page.mouse.down()
        for cell in cells[1:]:
            self.page.mouse.move(*self.at(*cell), steps=steps)
        self.page.mouse.up()

    def drawn(self) -> np.ndarray:
        """What the page shows of the map: colours, uint8 [gh, gw, 3]."""
        pixels = self.element.locator("canvas.ae-heat").evaluate(
            "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )
        return np.array(pixels, dtype=np.uint8).reshape(GRID, GRID, 4)[..., :3]

    def painted(self) -> np.ndarray:
        """What Python has been told was painted: float [gh, gw], NaN where nothing."""
        code = "import json; print(json.dumps(tool.controller.painted.tolist()))"
        return np.array(json.loads(self.notebook.python(code)))

    def cells(self) -> set[tuple[int, int]]:
        return {(int(r), int(c)) for r, c in np.argwhere(~np.isnan(self.painted()))}

    def errors(self) -> str:
        return self.notebook.python("print(*tool.errors)").strip()


@pytest.fixture(scope="module")
def notebook(lab: Any, browser: Any) -> Iterator[Notebook]:
    with opened(browser, lab(), MODEL, TOOL) as notebook:
        yield notebook


@pytest.fixture
def tool(notebook: Notebook, lab: Any, request: pytest.FixtureRequest) -> Iterator[Tool]:
    """A fresh editor; an error in the page or in a callback fails the test."""
    shutil.rmtree(lab().folder / "corrections", ignore_errors=True)
    with watched(notebook.page, request.node):
        notebook.run_all()
        tool = Tool(notebook)
        tool.says(UNEDITED)
        yield tool
        errors = tool.errors()
        red = tool.element.get_by_role("alert").is_visible()
    assert not errors and not red, errors


def test_a_stroke_with_the_mouse_moves_the_prediction(tool):
    before, map_before, scores = tool.says(UNEDITED), tool.drawn(), tool.scores.inner_text()
    tool.drag((1, 1), (1, 6))
    after = tool.says(EDITED)
    row = {(1, c) for c in range(1, 7)}
    assert row <= tool.cells() <= {(r, c) for r in (0, 1, 2) for c in range(8)}
    assert tool.painted()[1, 1:7] == pytest.approx(0.9)
    # the page drew the same cells, and no other
    changed = (tool.drawn() != map_before).any(axis=2)
    assert {(int(r), int(c)) for r, c in np.argwhere(changed)} == tool.cells()
    assert tool.scores.inner_text() != scores
    assert tool.element.locator(".ae-scores .ae-true").count() == 1

    tool.press("Undo")
    assert tool.says(UNEDITED) == before
    assert (tool.drawn() == map_before).all() and tool.scores.inner_text() == scores
    assert tool.button("Undo").is_disabled()
    tool.press("Redo")
    assert tool.says(EDITED) == after
    assert tool.button("Redo").is_disabled()


def test_many_fast_strokes_are_all_there_and_can_all_be_undone(tool):
    first = tool.drawn()
    tool.slider("Brush size").fill("1")
    for row in range(GRID):
        tool.drag((row, 0), (row, 7), (row, 2), steps=25)
    tool.settle()
    assert len(tool.cells()) == GRID * GRID
    assert len({tuple(colour) for colour in tool.drawn().reshape(-1, 3)}) == 1
    for _ in range(GRID):
        tool.press("Undo")
    tool.says(UNEDITED)
    assert (tool.drawn() == first).all() and not tool.cells()


def test_tools_paint_what_they_promise(tool):
    tool.pick("Rectangle")
    tool.drag((5, 4), (2, 6))
    tool.settle()
    assert tool.cells() == {(r, c) for r in range(2, 6) for c in range(4, 7)}
    tool.pick("Erase")
    tool.slider("Brush size").fill("1")
    tool.drag((3, 5), (4, 5))
    tool.settle()
    hole = {(3, 5), (4, 5)}
    assert tool.cells() == {(r, c) for r in range(2, 6) for c in range(4, 7)} - hole
    tool.pick("Fill")
    tool.drag((3, 5))
    tool.settle()
    assert tool.cells() == {(r, c) for r in range(2, 6) for c in range(4, 7)}
    tool.press("Reset")
    tool.says(UNEDITED)
    assert not tool.cells()


def test_a_soft_brush_fades_out(tool):
    tool.slider("Brush size").fill("5")
    tool.slider("Soft edge").fill("1")
    tool.slider("Brush value").fill("0.99")
    tool.drag((3, 3))
    tool.settle()
    painted = tool.painted()
    assert painted[3, 3] == pytest.approx(0.99) and np.nanmin(painted) < 0.9


def test_everything_works_from_the_keyboard(tool):
    press = tool.page.keyboard.press
    tool.element.get_by_role("radio", name="Brush").focus()
    for _ in range(10):  # the lens, the value, and then the map
        if tool.canvas.evaluate("(canvas) => canvas === document.activeElement"):
            break
        press("Tab")
    else:
        pytest.fail("Tab does not reach the map")
    for key in ("[", "ArrowDown", "ArrowRight", "ArrowRight"):  # a brush of one cell
        press(key)
    press("Space")
    tool.says(EDITED)
    assert tool.painted()[1, 2] == pytest.approx(0.9) and len(tool.cells()) == 1
    live = tool.element.locator("[aria-live]")
    live.filter(has_text="row 2, column 3, value 0.90, painted").wait_for(state="attached")
    for key in ("-", "ArrowDown", "Space"):
        press(key)
    tool.settle()
    assert tool.painted()[2, 2] == pytest.approx(0.85)
    press("u")
    press("u")
    tool.says(UNEDITED)
    press("r")
    tool.says(EDITED)
    assert tool.cells() == {(1, 2)}
    press("ArrowUp")
    press("Delete")
    tool.says(UNEDITED)
    # The notebook has commands on the same keys: a cell above (a), a text cell (m), and so on.
    press("a")
    press("m")
    cells = tool.page.evaluate("[...lab.panel().content.model.cells].map((cell) => cell.type)")
    assert cells == ["code", "code"]


def test_sliders_move_by_keyboard_and_the_prediction_follows(tool):
    press = tool.page.keyboard.press
    value = tool.slider("Brush value")
    value.focus()
    for _ in range(10):
        press("ArrowLeft")
    tool.drag((4, 3), (4, 5))
    full = tool.says(EDITED)
    assert tool.painted()[4, 4] == pytest.approx(0.8)

    tool.press("More settings")
    sliders = tool.element.locator(".ae-settings [role=slider]")
    strength, sharpness, background = (sliders.nth(k) for k in range(3))
    strength.focus()
    press("Home")
    tool.says(UNEDITED)
    press("End")
    assert tool.says(EDITED) == full
    for slider, name in ((sharpness, "sharpness"), (background, "suppression")):
        slider.focus()
        start = tool.drawn()
        for _ in range(5):
            press("ArrowRight")
        tool.settle()
        assert float(tool.notebook.python(f"print(tool.controller.{name})")) > 0
        assert (tool.drawn() != start).any()
    tool.press("Reset")
    tool.says(UNEDITED)
    texts = [row.inner_text() for row in tool.element.locator(".widget-hslider").all()]
    assert [text.split() for text in texts] == [
        ["Strength", "1.00"],
        ["Sharpness", "1.00"],
        ["Background", "0.00"],
    ]


def test_a_correction_is_saved_and_loads_again(tool, lab):
    save = tool.button("Save correction")
    assert save.is_disabled() and "nothing to save" in save.get_attribute("title")
    assert tool.button("Only here").is_disabled()
    tool.drag((2, 2), (2, 4))
    tool.says(EDITED)
    painted = tool.cells()
    tool.press("Only here")
    tool.element.get_by_role("button", name="Undo").wait_for()
    tool.settle()
    assert len(tool.cells()) == GRID * GRID
    tool.element.get_by_role("textbox", name="Note").fill("the <i>wing</i>")
    tool.press("Save correction")
    tool.element.get_by_text("Saved as").wait_for()

    folder = lab().folder / "corrections"
    (correction,), skipped = load_corrections(folder, grid=(GRID, GRID))
    assert not skipped
    assert correction.author == "Ada" and correction.note == "the <i>wing</i>"
    assert correction.edit.mask.all() and correction.edit.heads == "mean"
    high = {(int(r), int(c)) for r, c in (correction.edit.values > 0.5).argwhere()}
    assert high == painted
    np.testing.assert_allclose(correction.edit.values, tool.painted(), atol=1e-4)
    assert correction.model == tool.notebook.python("print(session.fingerprint)").strip()
    (preview,) = folder.glob("*.png")
    assert max(Image.open(preview).size) == 448


def test_more_cells_are_painted_in_the_page_and_the_former_ones_come_back(tool):
    tool.drag((1, 1), (1, 3))
    before = tool.says(EDITED)
    painted = tool.cells()
    tool.press("More settings")
    cells = tool.element.get_by_role("combobox", name="Cells")
    cells.wait_for()
    own, finer, _ = cells.locator("option").all_inner_texts()
    assert "the model's own" in own.replace("\xa0", " ") and "x the time" in finer.replace(
        "\xa0", " "
    )
    cells.select_option(index=1)
    tool.element.get_by_text("At 128 x 128 pixels the scores are not those of 64 x 64").wait_for()
    tool.says(EDITED)
    brought = tool.cells()
    assert brought == {(2 * r + i, 2 * c + j) for r, c in painted for i in (0, 1) for j in (0, 1)}
    heat = tool.element.locator("canvas.ae-heat")
    assert heat.evaluate("(c) => [c.width, c.height]") == [2 * GRID, 2 * GRID]
    tool.slider("Brush size").fill("1")
    tool.drag((5.75, 1), (5.75, 4))  # in cells of the model's own grid
    tool.settle()
    assert tool.cells() - brought == {(12, c) for c in range(2, 10)}
    cells.select_option(index=0)
    assert tool.says(EDITED) == before and tool.cells() == painted
    assert heat.evaluate("(c) => [c.width, c.height]") == [GRID, GRID]


def test_each_picture_keeps_its_own_strokes(tool):
    title = tool.element.locator(".ae-header .widget-html")
    number = tool.element.get_by_role("spinbutton", name="Picture")
    first, picture = title.inner_text(), tool.element.locator(".ae-picture").get_attribute("src")
    tool.drag((1, 1), (3, 3))
    edited = tool.says(EDITED)
    painted = tool.cells()
    tool.press("Next")
    tool.says(UNEDITED)
    assert number.input_value() == "1" and title.inner_text() != first
    assert tool.element.locator(".ae-picture").get_attribute("src") != picture
    assert not tool.cells() and tool.button("Undo").is_disabled()
    tool.press("Previous")
    assert tool.says(EDITED) == edited
    assert tool.cells() == painted and title.inner_text() == first
    tool.press("Previous")  # from the first to the last
    tool.says(UNEDITED)
    assert number.input_value() == "3"
    number.fill("0")
    number.press("Enter")
    assert tool.says(EDITED) == edited


def test_the_ladder_makes_the_same_edit_in_more_of_the_model(tool):
    tool.drag((4, 2), (4, 6))
    tool.says(EDITED)
    tool.press("Ladder")
    rungs = tool.element.locator(".ae-table tbody tr")
    rungs.nth(4).wait_for()
    table = [row.locator("th, td").all_inner_texts() for row in rungs.all()]
    assert [row[0] for row in table] == [
        *("no edit", "last block", "last two", "all blocks", "all blocks, all rows")
    ]
    assert len({row[2] for row in table}) > 2  # probabilities of the predictions
    tool.drag((0, 0), (0, 1))  # another edit: the table would belong to the one before
    rungs.first.wait_for(state="detached")


def test_blocks_and_heads_change_what_is_shown_and_edited(tool):
    tool.drag((4, 2), (4, 6))
    last = tool.says(EDITED)
    edit_in = tool.element.get_by_role("combobox", name="Edit in")
    wider = "all blocks" if edit_in.input_value() == "last block" else "last block"
    edit_in.select_option(wider)
    tool.settle()
    assert tool.says(EDITED) != last
    edit_in.select_option("all blocks")
    tool.press("More settings")
    own = tool.drawn()
    tool.element.get_by_role("combobox", name="Shown block").select_option("0")
    tool.element.get_by_text("Softmax attention of block 0").wait_for()
    tool.settle()
    assert (tool.drawn() != own).any()
    tool.element.get_by_role("button", name="maps").click()
    tool.element.locator(".ae-headmap").nth(3).wait_for()
    assert tool.element.locator(".ae-headmap").count() == 4
    tool.press("head 1")
    tool.press("head 3")
    tool.settle()
    scope = tool.notebook.python("print(tool.controller.scope)")
    assert "'heads': (1, 3)" in scope and "'blocks': 'all'" in scope
    tool.press("each")
    tool.settle()
    assert "'heads': 'all'" in tool.notebook.python("print(tool.controller.scope)")


def test_html_in_a_name_is_text(tool):
    tool.drag((4, 2), (4, 6))
    tool.says(EDITED)
    tool.press("Ladder")
    tool.element.locator(".ae-table tbody tr").nth(4).wait_for()
    for place in (".ae-header", ".ae-summary", ".ae-scores", ".ae-table"):
        assert "<b class='injected'>Bird" in tool.element.locator(place).inner_text()
    assert tool.page.locator(".injected").count() == 0


def test_what_goes_wrong_is_said_at_the_button_until_the_next_action(tool):
    tool.notebook.python("import pathlib; pathlib.Path('corrections').write_text('in the way')")
    tool.drag((4, 2), (4, 6))
    tool.says(EDITED)
    tool.press("Save correction")
    alert = tool.element.get_by_role("alert")
    alert.wait_for()
    assert "corrections" in alert.inner_text()
    assert not tool.element.get_by_text("Saved as").count()
    above = tool.button("Save correction").bounding_box()
    assert 0 < alert.bounding_box()["y"] - above["y"] < 80
    tool.drag((2, 2), (2, 6))  # the tool still works, and what it said is not of this stroke
    alert.wait_for(state="hidden")
    tool.notebook.python("tool.errors.clear(); pathlib.Path('corrections').unlink()")


def test_a_class_guesses_first(tool):
    name = tool.element.locator(".ae-header b")
    bird = name.inner_text()
    for key in ("Guess first", "Present"):
        tool.press(key)
    name.filter(has_text="?").wait_for()
    assert bird not in tool.summary.inner_text() and "true class" not in tool.scores.inner_text()
    assert not tool.button("Compare and export").is_visible()
    tool.canvas.focus()
    tool.page.keyboard.press("g")
    name.filter(has_text=bird).wait_for()
    for example in ("A mistake", "Unsure", "Sure"):  # of four pictures there is not each of them
        tool.press(example)
        tool.settle()
    tool.press("Present")
    tool.notebook.python("tool.errors.clear(); tool.controller.open(0); tool.refresh()")
    tool.press("Next")


def test_every_control_has_a_name(tool):
    """What a screen reader says: a role and a name for whatever can have the focus."""
    nameless = []
    for role in ("button", "slider", "spinbutton", "checkbox", "radio", "combobox", "textbox"):
        for control in tool.element.get_by_role(role).all():
            if (
                control.aria_snapshot()
                .strip()
                .removeprefix("- ")
                .lstrip("'")
                .startswith((f'{role} "',))
            ):
                continue
            nameless.append(control.evaluate("(e) => e.outerHTML"))
    assert not nameless
    assert tool.canvas.get_attribute("aria-label") == (
        "Attention map to paint on, 8 rows and 8 columns"
    )


def test_a_page_that_is_loaded_again_shows_the_same(tool):
    tool.drag((1, 1), (3, 3))
    edited = tool.says(EDITED)
    drawn, painted = tool.drawn(), tool.cells()
    tool.notebook.reload()
    again = Tool(tool.notebook)
    assert again.says(EDITED) == edited
    assert (again.drawn() == drawn).all()
    again.drag((6, 1), (6, 3))
    again.settle()
    assert again.cells() > painted
    again.press("Undo")
    again.settle()
    assert again.cells() == painted


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="notebook 06 is not there")
def test_notebook_06_paints_saves_and_teaches(lab, page, tmp_path):
    copy = nbformat.read(NOTEBOOK, as_version=4)
    # The last sections train six models, or show photographs: nbval runs them.
    last = next(k for k, cell in enumerate(copy.cells) if cell.source.startswith(STUDY))
    copy.cells = copy.cells[:last]
    places = [cell for cell in copy.cells if CORRECTIONS in cell.source]
    assert len(places) == 1
    # what the reader saved stays as it is
    places[0].source = f"from pathlib import Path\n{places[0].source}".replace(
        CORRECTIONS, f"Path({str(tmp_path)!r})"
    )
    notebook = Notebook(page, lab(), copy)
    notebook.run_all(600)

    tool = Tool(notebook)
    tool.says(UNEDITED)  # teaching has laid the edit aside
    tool.drag((2, 2), (5, 5), steps=20)
    tool.says(EDITED)
    saved = len(list(tmp_path.rglob("*.json")))
    tool.press("Save correction")
    tool.element.get_by_text("Saved as").wait_for()
    assert len(list(tmp_path.rglob("*.json"))) == saved + 1

    tool.press("Teach")
    panel = notebook.widget(".teach-panel")
    weights = notebook.python("print(session.fingerprint)")
    panel.get_by_role("button", name="Teach", exact=True).click()
    panel.get_by_text("correction(s) in").wait_for(timeout=120_000)
    assert panel.locator("table.teach-table tbody tr").count() > 0
    assert panel.locator(".teach-card figure").count() > 0
    assert notebook.python("print(session.fingerprint)") != weights
    panel.get_by_role("button", name="Undo teaching").click()
    panel.get_by_text("Taken back").wait_for()
    assert notebook.python("print(session.fingerprint)") == weights
    assert not tool.errors() and not notebook.python("print(*panel.errors)").strip()
    assert page.get_by_role("alert").count() == 0

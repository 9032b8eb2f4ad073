"""Compare and export in a real JupyterLab: snapshots side by side, files, one rule for many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import Notebook, opened, watched
from .test_editor import MODEL

pytestmark = pytest.mark.browser

GRID = 8
TOOL = """
if "tool" in globals():
    ipywidgets.Widget.close_all()
session = LiveSession(model, data)
tool = attention_editor(session, folder="corrections", author="Ada")
tool
"""
# Whether the beak's card stands at a place, and has the focus.
MOVED = """(place) => {
  const card = [...document.querySelectorAll(".cp-card:has(input)")][place];
  return card?.querySelector("input").value === "the <i>beak</i>"
    && card.contains(document.activeElement);
}"""
NAMED = """(names) => JSON.stringify(names) === JSON.stringify(
  [...document.querySelectorAll(".cp-card input")].map((field) => field.value))"""
WIDE = "(e) => [e.scrollWidth, e.clientWidth]"


class Tool:
    """The editor in the page, with the part that is open."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook, self.page = notebook, notebook.page
        self.element = notebook.widget(".ae-tool")
        self.part = self.element.locator(".ae-part")
        self.cards = self.part.locator(".cp-card")

    def button(self, name: str) -> Any:
        return self.element.get_by_role("button", name=name, exact=True)

    def press(self, name: str) -> None:
        self.button(name).click()

    def python(self, code: str) -> str:
        return self.notebook.python(code).strip()

    def says(self, words: str) -> None:
        self.part.get_by_role("status").filter(has_text=words).wait_for()

    def paint(self, row: int, first: int, last: int) -> None:
        """A stroke along a row of cells, and waits until its outcome is shown."""
        canvas = self.element.get_by_role("application")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        x = [box["x"] + (column + 0.5) / GRID * box["width"] for column in (first, last)]
        y = box["y"] + (row + 0.5) / GRID * box["height"]
        before = self.python("print(len(tool.controller._history))")
        self.page.mouse.move(x[0], y)
        self.page.mouse.down()
        self.page.mouse.move(x[1], y, steps=8)
        self.page.mouse.up()
        for _ in range(100):
            self.page.wait_for_timeout(50)
            if self.python("print(len(tool.controller._history))") != before:
                return
        pytest.fail("the stroke did not reach Python")

    def named(self, *names: str) -> None:
        """Waits until the cards have these names, after "before"."""
        self.page.wait_for_function(NAMED, arg=list(names))

    def export(self, what: str, shows: str) -> str:
        self.part.get_by_label("Export", exact=True).select_option(what)
        self.press("Export")
        self.part.locator(".cp-out").get_by_text(shows).wait_for()
        return self.part.locator(".cp-out").inner_html()


@pytest.fixture(scope="module")
def notebook(lab: Any, browser: Any) -> Iterator[Notebook]:
    allowed = ["clipboard-read", "clipboard-write"]
    with opened(browser, lab(), MODEL, TOOL, allowed=allowed) as notebook:
        yield notebook


@pytest.fixture
def tool(notebook: Notebook, lab: Any, request: pytest.FixtureRequest) -> Iterator[Tool]:
    for name in ("corrections", "corrections-exports"):
        shutil.rmtree(lab().folder / name, ignore_errors=True)
    notebook.page.set_viewport_size({"width": 1280, "height": 1000})
    with watched(notebook.page, request.node):
        notebook.run_all()
        tool = Tool(notebook)
        yield tool
        code = "print(*tool.errors, *(e for p in tool.parts.values() for e in p.errors))"
        errors = tool.python(code)
    assert not errors, errors


def test_edits_are_kept_side_by_side_and_come_back(tool):
    tool.press("Compare and export")
    tool.cards.first.wait_for()
    assert tool.cards.count() == 1 and tool.button("Keep this edit").is_disabled()
    assert "paint first" in tool.button("Keep this edit").get_attribute("title")
    tool.paint(1, 1, 5)
    tool.press("Keep this edit")
    tool.says("Kept as A.")
    first = tool.python("print(tool.controller.painted.tolist())")
    tool.paint(6, 0, 7)
    tool.press("Keep this edit")
    tool.says("Kept as B.")
    tool.part.get_by_label("Ready-made").select_option("box")
    tool.press("Add")
    tool.cards.nth(3).wait_for()
    tool.named("A", "B", "box")
    verdicts = tool.part.locator(".cp-verdict").all_inner_texts()
    assert all(words.startswith(("✓ right", "✗ wrong")) for words in verdicts)
    text = tool.cards.nth(1).inner_text()
    p_true = "o.probabilities[tool.controller.shown.label]"
    p = tool.python(
        f"c = tool.controller; o = c.outcome_of(tool.parts['Compare and export'].kept.kept"
        f".snapshots[0].work); print(f'{{{p_true}:.2f}}', c.shown.class_name)"
    )
    assert (
        p in text
        and "of the attention moved; " in text
        and tool.page.locator(".injected").count() == 0
    )
    # the picture lies below the map, and what was painted is outlined
    ground = "(e) => getComputedStyle(e).backgroundImage.startsWith('url(\"data:image/png')"
    assert tool.part.locator(".cp-map").nth(1).evaluate(ground)
    assert tool.part.locator(".cp-map .cp-line").nth(1).bounding_box()["width"] > 20

    # a press on the picture restores, and one undo takes that back
    tool.part.locator(".cp-map").nth(1).scroll_into_view_if_needed()
    box = tool.part.locator(".cp-map").nth(1).bounding_box()
    tool.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    tool.part.locator(".cp-now").get_by_role("button", name="Restore A", exact=True).wait_for()
    assert tool.python("print(tool.controller.painted.tolist())") == first
    tool.press("Undo")
    tool.part.locator(".cp-now").get_by_role("button", name="Restore B", exact=True).wait_for()

    # names, order and deletion by keyboard alone; the focus goes with what it moves
    press = tool.page.keyboard.press
    tool.part.get_by_label("Name", exact=True).first.focus()
    press("Control+a")
    tool.page.keyboard.type("the <i>beak</i>")
    press("Enter")
    tool.button("Restore the <i>beak</i>").wait_for()
    right = tool.cards.nth(1).get_by_role("button", name="→")
    right.focus()
    for place in (1, 2):
        press("Space")
        tool.page.wait_for_function(MOVED, arg=place)
    tool.named("B", "box", "the <i>beak</i>")
    tool.cards.nth(2).get_by_role("button", name="Delete").focus()
    press("Enter")
    tool.says("Deleted box.")
    tool.named("B", "the <i>beak</i>")
    tool.press("Bring back")
    tool.cards.nth(3).wait_for()
    tool.named("B", "box", "the <i>beak</i>")

    tool.press("Next")
    tool.cards.nth(1).wait_for(state="detached")
    tool.press("Previous")
    tool.cards.nth(3).wait_for()
    tool.named("B", "box", "the <i>beak</i>")
    tool.press("No edit")
    tool.element.get_by_text("The model says").first.wait_for()


def test_many_snapshots_wrap_and_nothing_is_cut_off(tool):
    tool.press("Compare and export")
    tool.python(
        "c, part = tool.controller, tool.parts['Compare and export']\n"
        "for k in range(1, 15):\n"
        "    c.paint([(k // 8, k % 8)], 0.9)\n"
        "    part.kept.kept.keep('a name without an end ' * (k % 3))\n"
        "part.refresh()"
    )
    tool.cards.nth(14).wait_for()
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        tool.page.evaluate(
            "(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme
        )
        for width, columns in ((1280, 4), (900, 2), (390, 2)):
            tool.page.set_viewport_size({"width": width, "height": 1000})
            if width == 390:  # the sidebar would leave nothing
                tool.page.evaluate("jupyterapp.shell.collapseLeft()")
            tool.page.wait_for_timeout(200)
            for place in (tool.part, tool.part.locator(".cp-cards"), *tool.cards.all()[:3]):
                scrolled, shown = place.evaluate(WIDE)
                assert scrolled <= shown + 1, (width, place)
            tops = [card.bounding_box()["y"] for card in tool.cards.all()]
            assert columns <= tops.count(tops[0]) < 15
            for button in tool.cards.nth(1).get_by_role("button").all():
                box = button.bounding_box()
                assert box["width"] >= 24 and box["height"] >= 24
            tool.page.evaluate("jupyterapp.shell.expandLeft()")
        ratio = tool.part.locator(".cp-verdict").first.evaluate(CONTRAST)
        assert ratio >= 4.5, theme


# Of an element's text with the first ground behind it that is not transparent.
CONTRAST = """(element) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  let behind = element;
  const ground = () => numbers(getComputedStyle(behind).backgroundColor);
  while (ground()[3] === 0) behind = behind.parentElement;
  const text = light(numbers(getComputedStyle(element).color));
  const [less, more] = [text, light(ground())].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
}"""


def test_what_is_exported_lies_in_a_folder_and_in_the_page(tool, lab):
    folder = lab().folder / "corrections-exports"
    tool.press("Compare and export")
    tool.paint(2, 2, 4)
    tool.press("Keep this edit")
    tool.says("Kept as A.")
    tool.export("figure of all snapshots (PNG)", "-figure.png")
    picture = tool.part.locator(".cp-shown")
    assert picture.evaluate("async (i) => { await i.decode(); return i.naturalWidth; }") > 300
    with tool.page.expect_download() as download:
        tool.part.get_by_role("link", name="Download").click()
    (figure,) = folder.glob("*-figure.png")
    assert download.value.suggested_filename == figure.name
    assert Image.open(download.value.path()).size == Image.open(figure).size

    tool.export("this edit as code", "AttentionEdit(")
    tool.press("Copy")
    tool.button("Copied").wait_for()
    code = tool.page.evaluate("navigator.clipboard.readText()")
    printed = tool.python(code)
    after = tool.python("print(*sorted(-tool.controller.outcome()[1].probabilities)[:5])")
    scores = [float(line.split()[0]) for line in printed.splitlines()]
    assert scores == pytest.approx([-float(p) for p in after.split()], abs=1e-4)

    tool.export("painted cells (COCO RLE)", "-rle.json")
    (rle,) = folder.glob("*-rle.json")
    counts = json.loads(rle.read_text())["segmentation"]["counts"]
    painted = np.array(json.loads(tool.python(
        "import json; print(json.dumps(tool.controller.painted.tolist()))"
    )))  # fmt: skip
    assert sum(counts[1::2]) == (~np.isnan(painted)).sum() * GRID * GRID
    tool.export("strength from 0 to 1 (GIF)", "-strength.gif")
    (animation,) = folder.glob("*-strength.gif")
    assert 2 <= Image.open(animation).n_frames <= 21

    # The folder cannot be written: that is said at the button, and nothing else is lost.
    shutil.rmtree(folder)
    folder.write_text("in the way")
    tool.press("Export")
    alert = tool.part.get_by_role("alert")
    alert.wait_for()
    assert "cannot be made" in alert.inner_text()
    tool.named("A")
    box, button = alert.bounding_box(), tool.button("Export").bounding_box()
    assert 0 < box["y"] - button["y"] < 80
    folder.unlink()
    tool.python("tool.parts['Compare and export'].errors.clear()")


def test_a_rule_is_applied_to_many_pictures(tool):
    tool.press("Many pictures")
    tool.part.get_by_label("Rule", exact=True).select_option("all of them")
    tool.press("Apply")
    tool.part.get_by_text("control: random cells").first.wait_for()
    tool.says("4 pictures, all.")
    rows = tool.part.locator("tbody tr")
    table = [rows.nth(k).locator("th, td").all_inner_texts() for k in range(rows.count())]
    assert [row[0] for row in table if not row[0].startswith("control")] == [
        *("border to 0", "decoy to 0", "outside the box low", "people's map")
    ]
    assert all(int(cell) <= 4 for row in table for cell in row[1:6])
    for width in (1280, 390):
        tool.page.set_viewport_size({"width": width, "height": 1000})
        if width == 390:
            tool.page.evaluate("jupyterapp.shell.collapseLeft()")
        tool.page.wait_for_timeout(200)
        scrolled, shown = tool.part.evaluate(WIDE)
        assert scrolled <= shown + 1
    tool.page.evaluate("jupyterapp.shell.expandLeft()")
    image = tool.part.locator(".cp-wide img")
    assert image.evaluate("async (i) => { await i.decode(); return i.naturalWidth; }") > 600

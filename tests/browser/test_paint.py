"""The brush in a real JupyterLab: two pages, late and dead kernels, views, zoom, touch, keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from .conftest import START, Notebook, opened, watched
from .test_editor import EDITED, GRID, MODEL, UNEDITED, Tool

pytestmark = pytest.mark.browser

TOOL = """
if "tool" in globals():
    ipywidgets.Widget.close_all()
tool = attention_editor(LiveSession(model, data), folder="corrections")
tool
"""
BUSY = "lab.kernel().requestExecute({ code: 'import time; time.sleep(3)' }); null"


@pytest.fixture(scope="module")
def notebook(lab: Any, browser: Any) -> Iterator[Notebook]:
    with opened(browser, lab(), MODEL, TOOL) as notebook:
        yield notebook


@pytest.fixture
def tool(notebook: Notebook, request: pytest.FixtureRequest) -> Iterator[Tool]:
    """A fresh editor; an error in the page or in a callback fails the test."""
    with watched(notebook.page, request.node):
        notebook.page.set_viewport_size({"width": 1280, "height": 1000})
        notebook.page.evaluate("localStorage.clear()")
        notebook.run_all()
        tool = Tool(notebook)
        tool.says(UNEDITED)
        yield tool
        assert not tool.errors()


def outlined(tool: Tool) -> set[tuple[int, int]]:
    """The cells that the page shows as painted: in colour, where all others show the picture."""
    alpha = tool.element.locator("canvas.ae-heat").evaluate(
        "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    found = np.array(alpha).reshape(GRID, GRID, 4)[..., 3]
    return {(int(r), int(c)) for r, c in np.argwhere(found)}


def other_page(tool: Tool) -> Tool:
    """The same notebook in another tab, on the same kernel."""
    tool.page.evaluate("lab.save()")
    page = tool.page.context.new_page()
    page.set_default_timeout(90_000)
    page.add_init_script(tool.notebook_library)
    page.goto(tool.page.url)
    page.wait_for_function("lab.idle()", timeout=1000 * START)
    page.evaluate("lab.listen()")
    notebook = object.__new__(Notebook)
    notebook.page = page
    return Tool(notebook)


def press(tool: Tool, row: float, column: float) -> None:
    tool.page.mouse.move(*tool.at(row, column))
    tool.page.mouse.down()


def test_two_tabs_add_to_each_other_at_once(tool, lab):
    tool.notebook_library = lab().frontend.library
    other = other_page(tool)
    tool.slider("Brush size").fill("1")
    other.slider("Brush size").fill("1")
    other.drag((1, 1), (1, 5))
    other.settle()
    tool.settle()
    row = {(1, c) for c in range(1, 6)}
    assert outlined(tool) == outlined(other) == tool.cells() == row
    # The hand of one is down while the other paints; both go on.
    press(tool, 4, 0)
    tool.page.mouse.move(*tool.at(4, 3), steps=4)
    other.drag((4, 2), (6, 2))
    other.settle()
    tool.page.mouse.move(*tool.at(4, 6), steps=4)
    tool.page.mouse.up()
    tool.settle()
    other.settle()
    both = row | {(4, c) for c in range(7)} | {(r, 2) for r in (4, 5, 6)}
    assert outlined(tool) == outlined(other) == tool.cells() == both
    tool.pick("Erase")
    tool.drag((1, 1), (1, 1))
    tool.settle()
    other.settle()
    assert outlined(other) == both - {(1, 1)}
    other.press("Undo")
    other.settle()
    tool.settle()
    assert outlined(tool) == outlined(other) == both
    other.page.close()


def test_a_stroke_stays_on_its_picture_and_a_busy_kernel_is_seen(tool):
    page = tool.page
    tool.slider("Brush size").fill("1")
    tool.settle()
    below = "(e) => e.getBoundingClientRect().y - e.closest('.ae-tool').getBoundingClientRect().y"
    stage = tool.element.locator(".ae-stage")
    place = stage.evaluate(below)
    page.evaluate(BUSY)
    tool.press("Next")
    tool.drag((0, 0), (0, 3))  # finished before the other picture comes
    assert outlined(tool) == {(0, c) for c in range(4)}
    press(tool, 2, 0)
    page.mouse.move(*tool.at(2, 2), steps=3)
    tool.element.get_by_text("working…").wait_for()
    assert stage.evaluate(below) == place  # and nothing jumps
    number = tool.element.get_by_role("spinbutton", name="Picture")
    page.wait_for_function("(e) => e.value === '1'", arg=number.element_handle())
    page.wait_for_function("!document.querySelector('.ae-working:not([hidden])')")
    page.mouse.move(*tool.at(7, 7), steps=6)  # the hand is still down
    page.mouse.up()
    tool.settle()
    assert not tool.cells() and not outlined(tool)
    tool.press("Previous")
    tool.settle()
    expected = {(0, c) for c in range(4)} | {(2, c) for c in range(3)}
    assert tool.cells() == outlined(tool) == expected
    tool.press("Undo")
    tool.settle()
    assert tool.cells() == {(0, c) for c in range(4)}


@pytest.mark.parametrize("end", ["restart", "shutdown"])
def test_a_dead_kernel_is_said_and_what_was_painted_is_offered_to_the_next(tool, lab, end):
    page = tool.page
    tool.slider("Brush size").fill("1")
    tool.drag((1, 1), (1, 4))
    tool.says(EDITED)
    column = tool.element.locator(".ae-result").bounding_box()
    if end == "restart":
        page.evaluate("lab.kernel().restart()")
    else:
        page.evaluate("lab.panel().sessionContext.shutdown()")
    banner = tool.element.locator(".ae-banner")
    banner.get_by_text("Not connected: what you painted is kept here.").wait_for()
    save = tool.button("Save correction")
    assert save.is_disabled() and "Not connected" in save.get_attribute("title")
    assert tool.element.locator(".ae-result").bounding_box()["width"] == column["width"]
    chains = "(e) => getComputedStyle(e, '::before').content"
    lost = tool.element.locator(".jupyter-widgets-disconnected").all()
    assert {one.evaluate(chains) for one in lost[:5]} <= {"none"}
    tool.drag((3, 1), (3, 2))
    cells = {(1, c) for c in range(1, 5)} | {(3, 1), (3, 2)}
    assert outlined(tool) == cells
    page.wait_for_timeout(600)
    if end == "shutdown":
        page.evaluate("lab.panel().sessionContext.changeKernel({ name: 'python3' })")
    page.wait_for_timeout(500)
    tool.notebook.wait_idle()
    page.evaluate("lab.listen()")
    tool.notebook.run_all()
    again = Tool(tool.notebook)
    again.says(UNEDITED)
    offer = again.element.locator(".ae-banner")
    offer.get_by_text("Draft of 6 cells from before:").wait_for()
    again.slider("Brush size").fill("1")
    again.drag((7, 7), (7, 7))
    again.settle()
    offer.get_by_role("button", name="Restore").click()
    again.settle()
    assert again.cells() == outlined(again) == cells | {(7, 7)}
    assert not offer.is_visible() or offer.inner_text() == ""
    again.press("Undo")  # one stroke
    again.settle()
    assert again.cells() == {(7, 7)}


def test_the_map_is_shown_as_one_likes_and_values_are_odds(tool):
    read = tool.element.locator(".ae-readout")
    value = tool.element.locator(".ae-value output")
    assert value.inner_text() == "0.90 = 9 × the average patch"
    assert tool.slider("Brush value").get_attribute("max") == "0.99"
    below = tool.element.locator(".ae-below").bounding_box()
    assert read.inner_text() == "Nothing is painted." and not outlined(tool)
    lines = tool.element.locator(".ae-marks").evaluate(INKED)
    assert lines > 0  # contours
    tool.drag((2, 2), (2, 4))
    tool.settle()
    painted = outlined(tool)
    assert painted == tool.cells() != set()
    page = tool.page
    page.mouse.move(*tool.at(2, 3))
    read.filter(has_text="row 3, column 4, value 0.90, painted").wait_for()
    assert "9 × the average patch" in read.inner_text()
    assert tool.element.locator(".ae-below").bounding_box()["y"] == below["y"]  # nothing moves
    colours = tool.drawn()[2, 3]
    for view in ("Heat map", "Dimming"):
        tool.pick(view)
        tool.settle()
        assert (tool.drawn()[2, 3] == colours).all()  # exactly, in every view
        assert len(outlined(tool)) > len(painted)
    tool.pick("Contours")
    original = tool.element.get_by_role("button", name="Original")
    heat = tool.element.locator(".ae-heat")
    original.hover()
    page.mouse.down()
    assert heat.is_hidden() and tool.element.locator(".ae-marks").evaluate(INKED) == 0
    page.mouse.up()
    assert heat.is_visible()
    tool.button("Redo").evaluate("(e) => e.closest('.ae-tool').querySelector('select').focus()")
    tool.canvas.focus()
    page.keyboard.down("o")
    assert heat.is_hidden()
    page.keyboard.up("o")
    assert heat.is_visible()
    tool.notebook.python("tool.controller.set_scope(offset='none'); tool.refresh()")
    page.wait_for_function("(e) => e.textContent === '0.90'", arg=value.element_handle())
    assert "×" not in tool.element.locator(".ae-ticks").inner_text()
    page.mouse.move(*tool.at(2, 3))
    read.filter(has_text="value 0.90").wait_for()
    assert "average" not in read.inner_text()


INKED = """(canvas) => new Promise((done) => setTimeout(() => {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  done(data.filter((value, k) => k % 4 === 3 && value > 0).length);
}, 100))"""


def test_zoomed_and_moved_one_paints_where_one_points(tool):
    page = tool.page
    tool.slider("Brush size").fill("1")
    sheet = tool.element.locator(".ae-sheet")
    x, y = tool.at(2, 5)
    assert tool.button("Zoom out").is_disabled()
    page.mouse.move(x, y)
    scrolled = page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollTop")
    page.keyboard.down("Control")
    for _ in range(12):
        page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    assert page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollTop") == scrolled
    assert page.evaluate("visualViewport.scale") == 1
    wide = sheet.bounding_box()["width"] / tool.canvas.bounding_box()["width"]
    assert wide == pytest.approx(8, rel=0.01) and tool.button("Zoom in").is_disabled()
    page.mouse.down()
    page.mouse.up()
    tool.settle()
    assert tool.cells() == {(2, 5)}  # the place under the pointer stayed
    tool.button("Fit").click()
    assert sheet.bounding_box()["width"] == pytest.approx(tool.canvas.bounding_box()["width"])
    for _ in range(2):
        tool.button("Zoom in").click()
    zoom = 1.5**2
    box = tool.canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down(button="middle")
    page.mouse.move(middle[0] + 5000, middle[1] + 5000, steps=3)  # to the top left corner
    page.mouse.up(button="middle")
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.up()
    tool.settle()
    assert tool.cells() == {(2, 5), (0, 0)}
    page.keyboard.down(" ")  # the mouse was used last: it moves the picture
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 5000, middle[1], steps=3)
    page.mouse.up()
    page.keyboard.up(" ")
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.up()
    tool.settle()
    assert tool.cells() == {(2, 5), (0, 0), (0, 7)}
    for key in ("f", "z", "z", "z"):
        page.keyboard.press(key)
    for _ in range(8):
        page.keyboard.press("ArrowDown")  # the cursor stays in view
    place = sheet.bounding_box()
    assert place["y"] + place["height"] == pytest.approx(box["y"] + box["height"], abs=2)
    assert place["width"] == pytest.approx(box["width"] * zoom * 1.5, rel=0.01)
    page.keyboard.press("f")
    assert tool.cells() == {(2, 5), (0, 0), (0, 7)}


def test_one_finger_paints_and_two_zoom(tool):
    page = tool.page
    page.set_viewport_size({"width": 390, "height": 844})
    tool.slider("Brush size").fill("1")
    tool.settle()
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        session.send(
            "Input.dispatchTouchEvent",
            {
                "type": kind,
                "touchPoints": [{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(points)],
            },
        )

    first = tool.at(2, 1)
    touch("touchStart", first)
    for column in (2, 3, 4):
        touch("touchMove", tool.at(2, column))
    touch("touchEnd")
    tool.settle()
    painted = tool.cells()
    assert painted == {(2, c) for c in range(1, 5)}
    left, right = tool.at(5, 3), tool.at(5, 4)
    touch("touchStart", left)
    assert len(outlined(tool)) == 5  # at once
    touch("touchStart", left, right)
    for k in range(1, 6):
        touch("touchMove", (left[0] - 12 * k, left[1]), (right[0] + 12 * k, right[1]))
    touch("touchEnd", (left[0] - 60, left[1]))
    touch("touchMove", (left[0], left[1] - 40))  # one finger is still there
    touch("touchEnd")
    tool.settle()
    sheet = tool.element.locator(".ae-sheet").bounding_box()
    assert sheet["width"] > 1.5 * tool.canvas.bounding_box()["width"]
    assert page.evaluate("visualViewport.scale") == 1
    assert tool.cells() == painted == outlined(tool)
    tool.press("Undo")
    tool.settle()
    assert not tool.cells()  # the pinch was no step
    assert page.locator(".ae-marks").evaluate("(e) => getComputedStyle(e).touchAction") == "none"


def test_undo_works_wherever_the_focus_is_in_the_tool(tool):
    page = tool.page
    tool.drag((1, 1), (1, 4))
    tool.says(EDITED)
    for focus in (tool.button("Reset"), tool.slider("Brush size"), tool.slider("Strength")):
        focus.focus()
        page.keyboard.press("Control+z")
        tool.says(UNEDITED)
        page.keyboard.press("r")
        tool.says(EDITED)
    page.keyboard.press("u")
    tool.says(UNEDITED)
    page.keyboard.press("Control+Shift+z")
    tool.says(EDITED)
    note = tool.element.locator(".ae-note input")
    note.fill("a route")
    note.press("Control+z")
    note.press("u")
    tool.settle()
    assert tool.cells() and note.input_value() != "a route"
    kinds = page.evaluate("[...lab.panel().content.model.cells].map((cell) => cell.type)")
    assert kinds == ["code", "code"]
    # Outside the tool the keys are the notebook's.
    page.evaluate("lab.panel().content.node.focus()")
    page.keyboard.press("u")
    tool.settle()
    assert tool.cells()


def listeners(page: Any) -> int:
    session = page.context.new_cdp_session(page)
    window = session.send("Runtime.evaluate", {"expression": "window"})["result"]["objectId"]
    found = session.send("DOMDebugger.getEventListeners", {"objectId": window})["listeners"]
    return len(found)


def test_listeners_go_with_the_view_and_every_control_is_named_and_large(tool):
    page = tool.page
    before = listeners(page)
    for _ in range(2):
        tool.notebook.run_all()
        again = Tool(tool.notebook)
        again.says(UNEDITED)
    assert listeners(page) == before
    again.button("More settings").click()
    head = again.element.get_by_role("button", name="head 1", exact=True)
    head.wait_for()
    page.wait_for_timeout(500)
    assert head.get_attribute("aria-pressed") == "false"
    head.click()
    again.settle()
    assert head.get_attribute("aria-pressed") == "true"
    readouts = again.element.locator(".widget-readout").all()
    assert readouts
    for readout in readouts:
        assert readout.get_attribute("tabindex") == "-1"
        assert "as a number" in readout.get_attribute("aria-label")
    small = """(root) => [...root.querySelectorAll(
      ".ae-tools label, .ae-lens button, .ae-slider input, .ae-check, summary, .noUi-handle")]
      .map((e) => [e.className || e.textContent, e.getBoundingClientRect()])
      .filter(([, { width, height }]) => width && (width < 24 || height < 24))
      .map(([name, { width, height }]) => `${name}: ${width} x ${height}`)"""
    wider = """(root) => [...root.querySelectorAll("*")].filter((e) => !e.closest(".ae-stage")
      && e.getBoundingClientRect().right > root.getBoundingClientRect().right + 1)
      .map((e) => `${e.tagName} ${e.className} ${e.textContent}`)"""
    page.evaluate("window.jupyterapp.shell.collapseLeft()")
    for width in (1280, 900, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert again.element.evaluate(small) == []
        assert again.element.locator(".ae-paint").evaluate(wider) == []
        stage = again.element.locator(".ae-stage").bounding_box()
        assert stage["width"] == pytest.approx(stage["height"], abs=2)

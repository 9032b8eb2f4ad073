"""The editor in other frontends than JupyterLab 4, and in JupyterLab without its brush.

Notebook 7; the classic notebook with ipywidgets 7.7.1 and anywidget 0.9.21, as near to Colab as a
test can get; and the plain tool, asked for or because anywidget cannot be imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from test_editor import run

from .conftest import ROOT, Notebook, notebook_of
from .test_editor import EDITED, MODEL, TOOL, UNEDITED, Tool

VERSIONS = {"ipywidgets": "7.7.1", "anywidget": "0.9.21", "ipykernel": "6.17.1"}
PANEL = """
from lib.widgets.teaching import TeachPanel
from lib.training.teach import TeachConfig

quick = TeachConfig(steps=3, replay=4, batch_size=4)
panel = TeachPanel(session, data, data, "corrections", quick)
panel.attach(tool.controller, tool.refresh)
tool.add_part("Teach", lambda: panel)
"""
PLAIN = """
session = LiveSession(model, data)
tool = attention_editor(session, plain=PLAIN)
tool
"""
ABSENT = """
import sys
sys.modules["anywidget"] = None  # to import it is an ImportError now
"""


@pytest.mark.browser
@pytest.mark.parametrize("frontend", ["notebook_7", "classic"])
def test_paint_undo_move_a_slider_and_teach(frontend, page, request):
    notebook = Notebook(page, request.getfixturevalue(frontend), notebook_of(MODEL, TOOL, PANEL))
    notebook.run_all()
    tool = Tool(notebook)
    before, drawn, scores = tool.says(UNEDITED), tool.drawn(), tool.scores.inner_text()
    tool.press("More settings")
    block = tool.element.get_by_role("combobox", name="Shown block")
    assert block.evaluate("(menu) => menu.selectedIndex") == 2  # the last
    tool.drag((1, 1), (1, 6))
    after = tool.says(EDITED)
    assert {(1, c) for c in range(1, 7)} <= tool.cells()
    assert tool.scores.inner_text() != scores and (tool.drawn() != drawn).any()
    tool.press("Undo")
    assert tool.says(UNEDITED) == before and not tool.cells()
    assert (tool.drawn() == drawn).all() and tool.scores.inner_text() == scores
    tool.press("Redo")
    assert tool.says(EDITED) == after

    strength = tool.slider("Strength")
    strength.focus()
    page.keyboard.press("Home")
    tool.says(UNEDITED)
    assert float(strength.get_attribute("aria-valuenow")) == 0
    page.keyboard.press("End")
    assert tool.says(EDITED) == after

    tool.press("Save correction")
    tool.element.get_by_text("Saved as").wait_for()
    tool.press("Teach")
    panel = notebook.widget(".teach-panel")
    panel.get_by_role("button", name="Teach", exact=True).click()
    panel.get_by_text("taught 1 correction(s)").wait_for()
    count = panel.get_by_role("combobox", name="Corrections")
    assert count.evaluate("(menu) => menu.selectedIndex") == 0  # all, not blank
    panel.get_by_role("button", name="Undo teaching").click()
    panel.get_by_text("Taken back").wait_for()
    tool.says(UNEDITED)  # teaching laid the edit aside
    tool.press("Undo")
    assert tool.says(EDITED) == after
    assert not tool.errors() and not notebook.python("print(*panel.errors)").strip()
    red = page.locator(":is(.ae-tool, .teach-panel) [role=alert]")
    assert red.count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("absent", [False, True], ids=["asked for", "anywidget absent"])
def test_the_plain_tool_paints_by_sliders(absent, lab, page):
    start = [ABSENT] if absent else []
    plain = PLAIN.replace("PLAIN", str(not absent))
    notebook = Notebook(page, lab(), notebook_of(*start, MODEL, plain))
    notebook.run_all()
    tool = Tool(notebook)
    picture = tool.element.locator(".ae-left img")
    before, shown = tool.says(UNEDITED), picture.get_attribute("src")
    for name in ("Rows", "Columns"):
        slider = tool.element.locator(".widget-hslider", has_text=name)
        slider.get_by_role("slider").last.focus()
        for _ in range(2):
            page.keyboard.press("ArrowRight")
    tool.settle()  # a press overtakes what a slider has yet to say
    tool.press("Paint")
    tool.says(EDITED)
    assert tool.cells() == {(r, c) for r in range(3) for c in range(3)}
    assert picture.get_attribute("src") != shown
    columns = tool.element.locator(".ae-columns")
    assert columns.evaluate("(e) => getComputedStyle(e).display") == "grid"  # the style is there
    tool.press("Undo")
    assert tool.says(UNEDITED) == before and not tool.cells()
    assert tool.element.get_by_role("application").count() == 0  # no canvas
    assert not tool.errors()


# --- without a browser --------------------------------------------------------------------------


@pytest.fixture
def colab_kernel(colab_python, tmp_path, monkeypatch) -> Iterator[Any]:
    """A client of a kernel of Colab's stack."""
    spec = tmp_path / "kernels" / "colab"
    spec.mkdir(parents=True)
    argv = [colab_python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": argv, "display_name": "Colab", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(described))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)])
    manager = KernelManager(kernel_name="colab", kernel_spec_manager=specs)
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_message_through_a_kernel_of_colabs_stack(colab_kernel):
    """What the browser sends reaches the tool, and the scores follow, in the older widgets too."""
    ask = lambda code: run(colab_kernel, colab_kernel.execute(code))  # noqa: E731
    stack = f"import {', '.join(VERSIONS)}\n" + "\n".join(
        f"assert {name}.__version__ == {version!r}" for name, version in VERSIONS.items()
    )
    opened = {}  # what the browser knows of each widget
    for message in ask(stack + MODEL + TOOL):
        if message["msg_type"] in ("comm_open", "comm_msg"):
            comm, data = message["content"]["comm_id"], message["content"]["data"]
            opened.setdefault(comm, {}).update(data.get("state", {}))
    (paint,) = [comm for comm, state in opened.items() if "painted" in state]
    (summary,) = [c for c, state in opened.items() if "ae-summary" in str(state.get("value"))]
    assert UNEDITED in opened[summary]["value"]

    cells = [[cell, 0.9] for cell in range(8)]
    said = {"page": "one", "n": 1, "subject": 0, "action": "", "number": 1, "cells": cells}
    update = {"method": "custom", "content": said}
    message = colab_kernel.session.msg("comm_msg", {"comm_id": paint, "data": update})
    colab_kernel.shell_channel.send(message)
    answers = {}
    for answer in run(colab_kernel, message["header"]["msg_id"]):
        if answer["msg_type"] == "comm_msg":
            state = answer["content"]["data"].get("state", {})
            answers.setdefault(answer["content"]["comm_id"], {}).update(state)
    assert answers[paint]["answered"] == {"one": 1}
    assert EDITED in answers[summary]["value"]

    # the plain tool, and teaching, in the same kernel
    ask(
        "assert tool.errors == [] and tool.controller.can_undo\n"
        "tool.controls['save'].click()\n"
        f"{PANEL}\n"
        "assert len(panel.teach().used) == 1 and panel.errors == []\n"
        "panel.undo()\n"
        "plain = attention_editor(session, plain=True)\n"
        "plain.controller.paint([(0, 0)], 0.9)\n"
        "plain.controls['only_here'].click()\n"
        "assert plain.errors == [] and plain.controller.can_undo"
    )

"""The harness itself: a click in the browser reaches Python, and the answer reaches the page."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler

from lib.widgets.nodelay import NoDelayConnection

from .conftest import Notebook, jupyter_lab, notebook_of, watched

EVENTS = 60

COUNTER = '''
import anywidget, traitlets

class Counter(anywidget.AnyWidget):
    clicks = traitlets.Int().tag(sync=True)
    answer = traitlets.Int().tag(sync=True)
    _esm = """
    export default {
      render({ model, el }) {
        const button = document.createElement("button");
        button.className = "counter";
        const show = () => { button.textContent = `Python says ${model.get("answer")}`; };
        const click = () => { model.set("clicks", model.get("clicks") + 1); model.save_changes(); };
        button.addEventListener("click", click);
        model.on("change:answer", show);
        button.roundTrip = () => new Promise((resolve) => {
          const start = performance.now();
          const answered = () => {
            model.off("change:answer", answered);
            resolve(performance.now() - start);
          };
          model.on("change:answer", answered);
          click();
        });
        show();
        el.append(button);
      },
    };
    """

    @traitlets.observe("clicks")
    def _on_click(self, change):
        self.answer = 10 * change.new

counter = Counter()
counter
'''

MEASURE = """
async (button, events) => {
  const times = [];
  for (let k = 0; k < events; k++) {
    times.push(await button.roundTrip());
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return times;
}
"""


@pytest.mark.browser
@pytest.mark.parametrize("nodelay", [False, True], ids=["stock", "nodelay"])
def test_a_click_reaches_python_and_its_answer_the_page(lab, page, nodelay, record_property):
    notebook = Notebook(page, lab(nodelay), notebook_of(COUNTER))
    notebook.run_all()
    button = notebook.widget("button.counter")
    assert button.inner_text() == "Python says 0"
    button.click()
    page.get_by_text("Python says 10", exact=True).wait_for()
    assert notebook.python("print(counter.clicks)") == "1\n"

    times = button.evaluate(MEASURE, EVENTS)
    assert notebook.python("print(counter.clicks)") == f"{1 + EVENTS}\n"
    p50, p95 = np.percentile(times, [50, 95])
    name = "without delay" if nodelay else "stock server"
    record_property(f"round trip, {name}", f"p50 {p50:.0f} ms, p95 {p95:.0f} ms ({EVENTS} events)")


@pytest.mark.browser
def test_an_error_in_a_cell_fails_the_run(lab, page):
    notebook = Notebook(page, lab(), notebook_of("print(1)", "1 / 0", "print(2)"))
    with pytest.raises(AssertionError, match="ZeroDivisionError: division by zero"):
        notebook.run_all()


@pytest.mark.browser
def test_a_notebook_gets_a_kernel_of_its_own_in_folders_of_its_own(lab, page):
    server = lab()
    Notebook(page, server, notebook_of()).python("x = 1")
    notebook = Notebook(page, server, notebook_of())
    with pytest.raises(Exception, match="NameError"):
        notebook.python("x")
    shown = notebook.python("import pathlib; print(pathlib.Path.cwd(), pathlib.Path.home())")
    assert shown.split() == [str(server.folder), str(server.folder.parent / "home")]


@pytest.mark.browser
def test_an_error_in_the_page_is_noticed_and_kept(lab, browser, request, tmp_path, monkeypatch):
    monkeypatch.setattr("browser.conftest.FAILURES", tmp_path / "failures")
    page = browser.new_page()
    watch = pytest.raises(AssertionError, match="a broken widget")
    with watch, watched(page, request.node):
        page.set_content("<p>before</p>")
        page.evaluate("setTimeout(() => { throw new Error('a broken widget') })")
        page.wait_for_timeout(100)
    page.close()
    kept = {path.suffix: path.read_bytes() for path in (tmp_path / "failures").iterdir()}
    assert kept[".png"].startswith(b"\x89PNG") and b"<p>before</p>" in kept[".html"]


@pytest.mark.browser
def test_what_a_callback_raises_is_noticed(lab, browser, request, tmp_path, monkeypatch):
    monkeypatch.setattr("browser.conftest.FAILURES", tmp_path)
    raising = COUNTER.replace("self.answer = 10 * change.new", "raise ValueError('no answer')")
    page = browser.new_page()
    with pytest.raises(AssertionError, match="no answer"), watched(page, request.node):
        notebook = Notebook(page, lab(), notebook_of(raising))
        notebook.run_all()
        with page.expect_console_message(lambda message: message.type == "error"):
            notebook.widget("button.counter").click()
    page.close()


@pytest.mark.browser
def test_nothing_is_left_running(browser, page, tmp_path):
    with pytest.raises(KeyError), jupyter_lab(tmp_path / "lab") as server:
        notebook = Notebook(page, server, notebook_of())
        kernel, parent = map(
            int, notebook.python("import os; print(os.getpid(), os.getppid())").split()
        )
        page.goto("about:blank")
        raise KeyError  # a test that fails
    time.sleep(0.5)
    for process in (kernel, parent):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_socket_of_a_kernel_gets_no_delay(monkeypatch):
    """Without a browser: the class asks for it, and connects as the stock class does."""
    asked = []
    monkeypatch.setattr(KernelWebsocketHandler, "set_nodelay", lambda _, on: asked.append(on))
    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "connect", lambda _: "connected")
    handler = KernelWebsocketHandler.__new__(KernelWebsocketHandler)
    assert NoDelayConnection(websocket_handler=handler).connect() == "connected"
    assert asked == [True]

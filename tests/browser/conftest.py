"""A real JupyterLab and a real Chromium for the tests in this folder.

Each of the two can be used without pytest as well, as a context manager: see measure.py. Nothing of
the user is touched or read: notebooks are copied to a temporary folder, and HOME and all folders of
Jupyter, IPython and Chromium are temporary.

The tests skip where Playwright or Chromium is absent; with REQUIRE_BROWSER=1 they fail instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

FAILURES = Path(__file__).resolve().parent / "failures"
FAILED = pytest.StashKey[bool]()
START = 60  # seconds for a server, a page or a kernel to be there
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox",  # a container's root has no other way
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LAB_APP = {
    "expose_app_in_browser": True,  # as window.jupyterapp
    "extension_manager": "readonly",
    "news_url": None,  # a command line cannot say None
    "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
}
NEWS = {"checkForUpdates": False, "fetchNews": "false"}  # or it asks on every first visit


class BrowserMissing(RuntimeError):
    """Playwright or Chromium is not installed."""


# --- the server ---------------------------------------------------------------------------------


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str  # ends in /
    folder: Path  # its working folder
    log: Path  # what the server and its kernels wrote

    def api(self, method: str, path: str) -> Any:
        """The JSON answer of Jupyter's REST interface, None where it has no body."""
        request = urllib.request.Request(f"{self.url}api/{path}", method=method)
        with urllib.request.urlopen(request, timeout=START) as answer:
            return json.loads(answer.read() or "null")

    def stop_kernels(self) -> None:
        """A notebook that is opened again would get its old kernel."""
        for session in self.api("GET", "sessions"):
            self.api("DELETE", f"sessions/{session['id']}")


@contextmanager
def jupyter_lab(folder: Path, nodelay: bool = False, **environment: str) -> Iterator[Lab]:
    """Starts JupyterLab on a free port of 127.0.0.1, and stops it and its kernels afterwards.

    `folder` is empty or new; `environment` is set for the server and its kernels.
    """
    folder = folder.resolve()
    work, home, log = folder / "work", folder / "home", folder / "lab.log"
    work.mkdir(parents=True)
    _write_settings(home / "config")
    runtime = home / "runtime"
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        "--ServerApp.disable_check_xsrf=True",  # for Lab.api
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={work}",
    ]
    if nodelay:
        name = "lib.nodelay.NoDelayConnection"
        command.append(f"--ServerApp.kernel_websocket_connection_class={name}")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=_clean_environment(home) | {"JUPYTER_RUNTIME_DIR": str(runtime)} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for pytest, which then stops it here
        )
    try:
        lab = Lab(_wait_for_server(process, runtime, log), work, log)
        yield lab
    finally:
        _stop(process)


def _write_settings(config: Path) -> None:
    extension = config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    extension.mkdir(parents=True)
    (extension / "notification.jupyterlab-settings").write_text(json.dumps(NEWS))
    (config / "jupyter_lab_config.json").write_text(json.dumps({"LabApp": LAB_APP}))


def _clean_environment(home: Path) -> dict[str, str]:
    """This process's environment without the user's folders."""
    foreign = re.compile(r"(JUPYTER|IPYTHON|XDG_|MPLCONFIGDIR)")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}
    return kept | {"HOME": str(home)} | {k: str(home / v) for k, v in folders.items()}


def _wait_for_server(process: subprocess.Popen, runtime: Path, log: Path) -> str:
    """The server's address, once it answers."""
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        for found in runtime.glob("jpserver-*.json"):
            try:
                url = json.loads(found.read_text())["url"]
                urllib.request.urlopen(f"{url}api/status", timeout=5).close()
                return url
            except (ValueError, urllib.error.URLError):  # half written, or not listening yet
                pass
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen) -> None:
    """On SIGTERM the server stops its kernels; a kernel whose server was killed ends by itself."""
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- the browser --------------------------------------------------------------------------------


@contextmanager
def chromium(home: Path) -> Iterator[Any]:
    """A headless Chromium of Playwright; raises BrowserMissing with the remedy."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise BrowserMissing("Playwright is missing: pip install playwright") from error
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            raise BrowserMissing(
                "Chromium is missing: apt-get install chromium, or playwright install chromium"
            )
        environment = _clean_environment(home)
        browser = playwright.chromium.launch(
            executable_path=path, args=list(CHROMIUM_FLAGS), env=environment
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watch:
    """What went wrong in a page."""

    problems: list[str] = field(default_factory=list)

    def console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def exception(self, error: Any) -> None:
        self.problems.append(f"exception: {error}")


@contextmanager
def watched(page: Any, node: pytest.Item) -> Iterator[None]:
    """Fails the test on an error of the page, and keeps what it shows when the test fails."""
    watch = Watch()
    page.on("console", watch.console)
    page.on("pageerror", watch.exception)
    try:
        yield
    finally:
        page.remove_listener("console", watch.console)
        page.remove_listener("pageerror", watch.exception)
        if watch.problems or node.stash.get(FAILED, False):
            keep(page, node.name)
    assert not watch.problems, "\n".join(watch.problems)


def keep(page: Any, name: str) -> None:
    """Puts a screenshot and the HTML of a page into tests/browser/failures/."""
    FAILURES.mkdir(exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", name)
    page.screenshot(path=FAILURES / f"{stem}.png")
    (FAILURES / f"{stem}.html").write_text(page.content())


# --- a notebook in the browser ------------------------------------------------------------------

# What the tests ask of the notebook in front.
LIBRARY = """
window.lab = {
  panel: () => window.jupyterapp.shell.currentWidget,
  kernel: () => lab.panel().sessionContext.session.kernel,
  idle: () => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return Boolean(panel?.context?.isReady && panel.sessionContext.isReady
      && panel.sessionContext.session?.kernel?.status === "idle");
  },
  // The command resolves false on an error, and does not throw.
  run: () => {
    lab.ran = null;
    const done = window.jupyterapp.commands.execute("notebook:run-all-cells");
    done.then((fine) => { lab.ran = Boolean(fine); });
  },
  errors: () => [...lab.panel().content.model.cells].flatMap(
    (cell) => (cell.toJSON().outputs ?? []).filter((out) => out.output_type === "error")
      .map((out) => `${out.ename}: ${out.evalue}`)),
  execute: async (code) => {
    const future = lab.kernel().requestExecute({ code, store_history: false });
    let text = "";
    future.onIOPub = ({ header, content }) => {
      if (header.msg_type === "stream" && content.name === "stdout") text += content.text;
    };
    const { content } = await future.done;
    if (content.status !== "ok") throw new Error(`${content.ename}: ${content.evalue}`);
    return text;
  },
  // What a callback raises reaches no cell; as an error of the page it fails the test.
  listen: () => lab.kernel().anyMessage.connect((_, { msg, direction }) => {
    const { header, content, parent_header: parent } = msg;
    if (direction !== "recv" || !parent.msg_type?.startsWith("comm")) return;
    const text = header.msg_type === "error" ? `${content.ename}: ${content.evalue}`
      : header.msg_type === "stream" && content.name === "stderr" ? content.text : "";
    // JupyterLab asks for the kernel's widgets at once, before anybody has imported ipywidgets.
    if (text && !text.startsWith("No such comm")) console.error(`in a callback: ${text}`);
  }),
};
"""


class Notebook:
    """A copy of a notebook, open in a page of JupyterLab, with a kernel of its own."""

    def __init__(self, page: Any, lab: Lab, notebook: Path | NotebookNode) -> None:
        self.page = page
        page.goto("about:blank")  # a page that is still open would miss its kernel
        lab.stop_kernels()
        name = f"{uuid.uuid4().hex[:8]}.ipynb"
        if isinstance(notebook, Path):
            notebook = nbformat.read(notebook, as_version=4)
        nbformat.write(notebook, lab.folder / name)
        page.add_init_script(LIBRARY)
        page.goto(f"{lab.url}lab/tree/{name}?reset", timeout=1000 * START)
        self.wait_idle()
        page.evaluate("lab.listen()")

    def reload(self) -> None:
        """Saves, and loads the page again; the kernel goes on."""
        self.page.evaluate("jupyterapp.commands.execute('docmanager:save')")
        self.page.reload()
        self.wait_idle()
        self.page.evaluate("lab.listen()")

    def wait_idle(self, seconds: float = START) -> None:
        self.page.wait_for_function("lab.idle()", timeout=1000 * seconds)

    def run_all(self, seconds: float = 300) -> None:
        """Runs all cells and waits for the kernel; an AssertionError says which errors came."""
        self.page.evaluate("lab.run()")
        self.page.wait_for_function("lab.ran !== null", timeout=1000 * seconds)
        errors = self.page.evaluate("lab.errors()")
        assert self.page.evaluate("lab.ran") and not errors, errors
        self.wait_idle()

    def python(self, code: str) -> str:
        """Runs code in the kernel, unseen, and returns what it prints; throws what it raises."""
        return self.page.evaluate("(code) => lab.execute(code)", code)

    def widget(self, selector: str) -> Any:
        """The one element of an output that `selector` names, scrolled into view."""
        found = self.page.locator(f".jp-OutputArea-output {selector}")
        found.wait_for()
        found.scroll_into_view_if_needed()
        return found


def notebook_of(*cells: str) -> NotebookNode:
    """A notebook of these code cells."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    return made


# --- fixtures -----------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


# Of package scope, not session: Playwright keeps an event loop running in the main thread as long
# as it lives, and tests elsewhere start their own.
@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            yield stack.enter_context(chromium(tmp_path_factory.mktemp("chromium")))
        except BrowserMissing as missing:
            if os.environ.get("REQUIRE_BROWSER") == "1":
                pytest.fail(f"{missing} (REQUIRE_BROWSER=1)")
            pytest.skip(str(missing))


@pytest.fixture(scope="package")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lab]]:
    """`lab(nodelay=False)`: a running JupyterLab, stock or without delay; started on first use."""
    started: dict[bool, Lab] = {}
    with ExitStack() as stack:

        def get(nodelay: bool = False) -> Lab:
            if nodelay not in started:
                folder = tmp_path_factory.mktemp("lab")
                started[nodelay] = stack.enter_context(jupyter_lab(folder, nodelay))
            return started[nodelay]

        yield get


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh page, 1280 x 900; an error in it fails the test."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(90_000)
        with watched(page, request.node):
            yield page

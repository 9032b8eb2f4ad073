"""A real Jupyter and a real Chromium for the tests in this folder.

Each of the two can be used without pytest as well, as a context manager: see measure.py. Nothing of
the user is touched or read: notebooks are copied to a temporary folder, and HOME and all folders of
Jupyter, IPython and Chromium are temporary.

A `Frontend` is what shows the notebook: JupyterLab, Notebook 7, and the classic notebook with the
packages of Colab, which the tests install into a folder of their own (colab.txt).

The tests skip where Playwright, Chromium or those packages are absent; with REQUIRE_BROWSER=1 they
fail instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
COLAB = Path(__file__).resolve().parent / "colab.txt"
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
EXPOSED = {"expose_app_in_browser": True}  # as window.jupyterapp
LAB_APP = EXPOSED | {
    "extension_manager": "readonly",
    "news_url": None,  # a command line cannot say None
    "check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
}
NEWS = {"checkForUpdates": False, "fetchNews": "false"}  # or it asks on every first visit


class Missing(RuntimeError):
    """What the tests need and this machine does not have: Playwright, Chromium, Colab's stack."""


# --- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frontend:
    """A program that shows notebooks in a browser."""

    module: str  # python -m module
    app: str  # the server's class, which takes its settings
    token: str  # and the setting of its password
    page: str  # address of a notebook's page on the server
    library: str  # what the tests ask of the page, in JavaScript
    python: str = sys.executable


@dataclass
class Lab:
    """A running JupyterLab, or another `Frontend`."""

    frontend: Frontend
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
def jupyter_lab(
    folder: Path, nodelay: bool = False, frontend: Frontend | None = None, **environment: str
) -> Iterator[Lab]:
    """Starts JupyterLab on a free port of 127.0.0.1, and stops it and its kernels afterwards.

    `folder` is empty or new; `environment` is set for the server and its kernels; `frontend` is
    started instead of JupyterLab.
    """
    frontend = frontend or JUPYTERLAB
    folder = folder.resolve()
    work, home, log = folder / "work", folder / "home", folder / "lab.log"
    work.mkdir(parents=True)
    _write_settings(home / "config")
    runtime = home / "runtime"
    command = [
        *(frontend.python, "-m", frontend.module, "--no-browser", "--allow-root"),
        f"--{frontend.app}.ip=127.0.0.1",
        f"--{frontend.app}.port={_free_port()}",
        f"--{frontend.app}.disable_check_xsrf=True",  # for Lab.api
        f"--{frontend.token}=",
    ]
    if nodelay:
        name = "lib.widgets.nodelay.NoDelayConnection"
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
        yield Lab(frontend, _wait_for_server(process, runtime, log), work, log)
    finally:
        _stop(process)


def _free_port() -> int:
    """The classic notebook, started on port 0, does not say which one it got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write_settings(config: Path) -> None:
    extension = config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    extension.mkdir(parents=True)
    (extension / "notification.jupyterlab-settings").write_text(json.dumps(NEWS))
    settings = {"LabApp": LAB_APP, "JupyterNotebookApp": EXPOSED}
    (config / "jupyter_config.json").write_text(json.dumps(settings))


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
        for found in runtime.glob("*server-*.json"):
            try:
                url = json.loads(found.read_text())["url"]
                urllib.request.urlopen(f"{url}api/status", timeout=5).close()
                return url
            except (ValueError, urllib.error.URLError):  # half written, or not listening yet
                pass
        time.sleep(0.1)
    raise RuntimeError(f"The server did not start:\n{log.read_text()[-3000:]}")


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
    """A headless Chromium of Playwright; raises Missing with the remedy."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Missing("Playwright is missing: pip install playwright") from error
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            raise Missing(
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


BADGE = '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>'


@dataclass
class Watch:
    """What went wrong in a page."""

    problems: list[str] = field(default_factory=list)

    def console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def exception(self, error: Any) -> None:
        # Notebook 7.6 throws this on every page, an empty notebook's too, while it loads settings.
        if "reading 'schema'" in str(error) and "/static/notebook/" in (error.stack or ""):
            return
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


# --- frontends ----------------------------------------------------------------------------------

# What the tests ask of the notebook in front, in JupyterLab and in Notebook 7.
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
  save: () => window.jupyterapp.commands.execute("docmanager:save"),
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

# The same of the classic notebook. The extensions of a page come after its kernel.
CLASSIC_LIBRARY = """
window.lab = {
  kernel: () => Jupyter.notebook.kernel,
  idle: () => Boolean(window.Jupyter?.notebook?.kernel?.widget_manager
    && requirejs.defined("nbextensions/anywidget/extension")
    && lab.kernel().is_connected() && !Jupyter.notebook.kernel_busy),
  run: () => {
    lab.ran = null;
    Jupyter.notebook.execute_all_cells();
    // It comes back after them, and is given up after an error.
    lab.execute("").then(() => { lab.ran = true; }, () => { lab.ran = false; });
  },
  save: () => Jupyter.notebook.save_notebook(),
  errors: () => Jupyter.notebook.get_cells().flatMap(
    (cell) => (cell.output_area?.outputs ?? []).filter((out) => out.output_type === "error")
      .map((out) => `${out.ename}: ${out.evalue}`)),
  execute: (code) => new Promise((resolve, reject) => {
    let [text, content, idle] = ["", null, false];
    const done = () => {
      if (!content || !idle) return;
      if (content.status === "ok") resolve(text);
      else reject(new Error(`${content.ename ?? content.status}: ${content.evalue ?? ""}`));
    };
    const iopub = {
      output: (msg) => { if (msg.content.name === "stdout") text += msg.content.text; },
      status: (msg) => { idle ||= msg.content.execution_state === "idle"; done(); },
    };
    const shell = { reply: (msg) => { content = msg.content; done(); } };
    lab.kernel().execute(code, { iopub, shell }, { silent: false, store_history: false });
  }),
  listen: async () => {
    // The page asks for the kernel's widgets, in two questions. Cells that run meanwhile would
    // have theirs opened twice, and shown not at all.
    for (let k = 0; k < 3; k++) await lab.execute("");
    const kernel = lab.kernel();
    const handle = kernel._handle_iopub_message;
    kernel._handle_iopub_message = function (msg) {
      const { header, content, parent_header: parent } = msg;
      const text = header.msg_type === "error" ? `${content.ename}: ${content.evalue}`
        : header.msg_type === "stream" && content.name === "stderr" ? content.text : "";
      if (text && parent.msg_type?.startsWith("comm")) console.error(`in a callback: ${text}`);
      return handle.call(this, msg);
    };
  },
};
"""

TOKEN = "IdentityProvider.token"
JUPYTERLAB = Frontend("jupyterlab", "ServerApp", TOKEN, "lab/tree/{}?reset", LIBRARY)
NOTEBOOK_7 = Frontend("notebook", "ServerApp", TOKEN, "notebooks/{}", LIBRARY)
CLASSIC = Frontend(
    "notebook", "NotebookApp", "NotebookApp.token", "notebooks/{}", CLASSIC_LIBRARY
)  # its python is that of `colab_stack`


def colab_stack(folder: Path) -> str:
    """Installs Colab's packages (colab.txt) into a new folder, and returns its interpreter.

    All others are those of the tests' own interpreter: PyTorch is not installed twice. Raises
    Missing where no package index is reached.
    """
    venv = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(venv, check=True, capture_output=True)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(folder / scripts / "python")
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True)
    # Folders that a .pth file names come last on the path.
    project = sysconfig.get_path("purelib")
    (Path(found.stdout.strip()) / "project.pth").write_text(f"{project}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q"]
    install += ["--ignore-installed"]  # by the project, whose own .pth files have no effect in here
    install += ["--disable-pip-version-check", "--retries=1", "--timeout=20", "-r", str(COLAB)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"The packages of {COLAB.name} were not installed: {done.stderr[-1000:]}")
    return python


# --- a notebook in the browser ------------------------------------------------------------------


class Notebook:
    """A copy of a notebook, open in a page of a server, with a kernel of its own."""

    def __init__(self, page: Any, lab: Lab, notebook: Path | NotebookNode) -> None:
        self.page = page
        page.goto("about:blank")  # a page that is still open would miss its kernel
        lab.stop_kernels()
        name = f"{uuid.uuid4().hex[:8]}.ipynb"
        if isinstance(notebook, Path):
            notebook = nbformat.read(notebook, as_version=4)
        nbformat.write(notebook, lab.folder / name)
        page.add_init_script(lab.frontend.library)
        page.goto(lab.url + lab.frontend.page.format(name), timeout=1000 * START)
        self.wait_idle()
        page.evaluate("lab.listen()")

    def reload(self) -> None:
        """Saves, and loads the page again; the kernel goes on."""
        self.page.evaluate("lab.save()")
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
        found = self.page.locator(f":is(.jp-OutputArea-output, .output_subarea) {selector}")
        found.wait_for()
        found.scroll_into_view_if_needed()
        return found


@contextmanager
def opened(browser: Any, lab: Lab, *cells: str, allowed: Sequence[str] = ()) -> Iterator[Notebook]:
    """A notebook of these cells in a page of its own, where what is `allowed` is granted."""
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.grant_permissions(list(allowed))
        page = context.new_page()
        page.set_default_timeout(90_000)
        yield Notebook(page, lab, notebook_of(*cells))


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


@contextmanager
def required() -> Iterator[None]:
    """Skips, or with REQUIRE_BROWSER=1 fails, where something is missing."""
    try:
        yield
    except Missing as missing:
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(f"{missing} (REQUIRE_BROWSER=1)")
        pytest.skip(str(missing))


# Of package scope, not session: Playwright keeps an event loop running in the main thread as long
# as it lives, and tests elsewhere start their own.
@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:
        with required():
            made = stack.enter_context(chromium(tmp_path_factory.mktemp("chromium")))
        yield made


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


@pytest.fixture(scope="package")
def colab_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of Colab's older stack."""
    with required():
        return colab_stack(tmp_path_factory.mktemp("colab") / "stack")


@pytest.fixture(scope="package")
def notebook_7(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with jupyter_lab(tmp_path_factory.mktemp("notebook"), frontend=NOTEBOOK_7) as server:
        yield server


@pytest.fixture(scope="package")
def classic(
    browser: Any, colab_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """The classic notebook with Colab's packages; `lib` is this checkout's."""
    frontend = replace(CLASSIC, python=colab_python)
    folder = tmp_path_factory.mktemp("classic")
    with jupyter_lab(folder, frontend=frontend, PYTHONPATH=str(ROOT)) as server:
        yield server


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A fresh page, 1280 x 900; an error in it fails the test."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        # The badge at the top of every notebook comes from Colab, which tests do without.
        context.route(
            "https://colab.research.google.com/assets/*",
            lambda route: route.fulfill(content_type="image/svg+xml", body=BADGE),
        )
        page = context.new_page()
        page.set_default_timeout(90_000)
        with watched(page, request.node):
            yield page

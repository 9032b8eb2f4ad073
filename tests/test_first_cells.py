"""The first cell of the notebooks: nothing at home; on Colab and Kaggle, the project made ready."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from IPython.core.error import UsageError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import first_cells  # noqa: E402
import hosted  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME = "sigmoid-attention-vit"
OF_HOSTS = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "PYTHONPATH", "RUNS_DIR", "DATA_DIR")
OF_HOSTS += ("WANDB_API_KEY", "WANDB_MODE")


def git(folder: Path, *words: str | Path) -> str:
    """Runs git as somebody who has never told it a name."""
    me = ["-c", "user.name=A Student", "-c", "user.email=student@example.org"]
    done = subprocess.run(
        ["git", "-C", folder, *me, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """This checkout, committed or not, as it would be published: its branch main, no tag."""
    folder = tmp_path_factory.mktemp("origin")
    for name in ("lib", "tools", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "As it is")
    return folder


@pytest.fixture
def at_home(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """An empty folder and no host; what a cell does to this process is undone."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in OF_HOSTS:
        monkeypatch.setenv(name, "")  # so that it is undone, should a cell set it
        monkeypatch.delenv(name)
    return monkeypatch


def source_of(address: Path | str, content: Path) -> str:
    """The first cell, of a repository at `address`, on a host that keeps things in `content`."""
    source = first_cells.cell(str(address), VERSION)
    for place in ("/content", "/kaggle/working"):
        source = source.replace(f'"{place}"', f'"{content.as_posix()}"')
    return source


@pytest.fixture
def colab(at_home, origin, tmp_path, capsys) -> Callable[..., str]:
    """`colab(address)` runs the cell on Colab in this process; returns what it printed."""
    at_home.setenv("COLAB_RELEASE_TAG", "release-colab-external")

    def run(address: Path | str = origin, **switches: bool) -> str:
        # An address, not a path: git copies a path whole, whatever depth it is asked for.
        address = address.as_uri() if isinstance(address, Path) else address
        source = source_of(address, tmp_path)
        for name, on in switches.items():
            source = source.replace(f"{name} = False", f"{name} = {on}")
        exec(source, {})
        return capsys.readouterr().out

    return run


@pytest.fixture
def source(origin, tmp_path) -> Path:
    """A copy of `origin` that a test may change."""
    return Path(shutil.copytree(origin, tmp_path / "source"))


def commit(folder: Path, name: str) -> None:
    (folder / name).write_text("new")
    git(folder, "add", name)
    git(folder, "commit", "-q", "-m", f"Adds {name}")


# ---------------------------------------------------------------------------------- the notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_the_same_first_cell(path):
    text = path.read_text(encoding="utf-8")
    assert text == first_cells.rendered(text, path.name), "run `python tools/first_cells.py`"


def test_a_notebook_gets_both_once_and_keeps_the_rest():
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": ["1"]}
    code |= {"execution_count": 1, "outputs": [{"output_type": "x", "execution_count": 1}]}
    prose = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title"]}
    cells = [prose, code, {**code, "execution_count": 2}]
    once = first_cells.rendered(json.dumps({"cells": cells, "metadata": {}}), "01 a.ipynb")
    assert first_cells.rendered(once, "01 a.ipynb") == once
    made = json.loads(once)["cells"]
    assert [cell.get("execution_count") for cell in made] == [None, 1, 2, 3]
    assert made[2]["outputs"][0]["execution_count"] == 2
    assert "".join(made[0]["source"]).endswith("ipynb)\n\n# Title")
    later = once.replace('"execution_count": 3', '"execution_count": 9')  # somebody ran it again
    assert later != once and first_cells.rendered(later, "01 a.ipynb") == later
    moved = first_cells.rendered(once, "02.ipynb")
    assert moved.count("Open in Colab") == 1 and "notebooks/02.ipynb" in moved


def test_a_fork_writes_its_address_with_one_command(monkeypatch, tmp_path, capsys):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(first_cells, "ROOT", tmp_path)
    monkeypatch.setattr(first_cells, "PROJECT", tmp_path / "pyproject.toml")

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["first_cells.py", *words])
        return first_cells.main()

    with pytest.raises(SystemExit) as refused:
        command("--repository", "https://example.org/me/mine")
    assert refused.value.code == 2 and "github.com/OWNER/NAME" in capsys.readouterr().err
    assert (tmp_path / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()
    assert command("--repository", "https://github.com/me/my.fork.git") == 0
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Repository": "https://github.com/me/my.fork"}
    for path in NOTEBOOKS:
        text = (tmp_path / "notebooks" / path.name).read_text()
        assert f"/github/me/my.fork/blob/main/notebooks/{path.name})" in text
        assert 'ADDRESS, VERSION = \\"https://github.com/me/my.fork\\"' in text
    assert command("--check") == 0
    (tmp_path / "notebooks" / path.name).write_text(text.replace("@param", "@parameter"))
    assert command("--check") == 1 and path.name in capsys.readouterr().out


def test_elsewhere_the_cell_does_nothing_and_takes_no_time(at_home):
    run = compile(first_cells.cell("nowhere", VERSION), "cell", "exec")
    before, times, space = set(sys.modules), [], {}
    for _ in range(20):
        start = time.perf_counter()
        exec(run, space)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3 and set(sys.modules) == before
    assert set(space) == {"__builtins__", "os", "DRIVE", "WANDB", "ADDRESS", "VERSION"}


# -------------------------------------------------------------------------------------- the hosts

# Runs the cell three times and says what it did, as a kernel would meet it.
IN_A_KERNEL = """
import json, os, sys
from importlib import metadata

versions = lambda: {one.name: one.version for one in metadata.distributions()}
before, source, space = versions(), open(sys.argv[1]).read(), {}
os.environ["PIP_NO_INDEX"] = "1"
try:
    exec(source, space)
except Exception as error:
    refused = [type(error).__name__, str(error), versions() == before]
del os.environ["PIP_NO_INDEX"]
exec(source, space)
start = sum(os.times()[:4])  # of it and its children: the machine may be busy
exec(source, space)
again = sum(os.times()[:4]) - start
after = versions()
import lib.config
import tyro

where = [lib.__file__, str(lib.config.preset().runs), os.getcwd(), tyro.__file__]
print(json.dumps([refused, before, after, again, where]))
"""


@pytest.fixture(scope="module")
def without_tyro(tmp_path_factory) -> Path:
    """An environment of its own that sees every package of the tests' but tyro."""
    folder = tmp_path_factory.mktemp("host")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout
    (folder / "others").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("tyro", "__editable__", "sigmoid")):
            (folder / "others" / path.name).symlink_to(path)
    Path(own.strip(), "others.pth").write_text(f"{folder / 'others'}\n")
    return python


def test_what_is_missing_is_installed_and_nothing_else(without_tyro, origin, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cell.py").write_text(source_of(origin, tmp_path))
    environment = {name: value for name, value in os.environ.items() if name not in OF_HOSTS}
    environment |= {"COLAB_RELEASE_TAG": "release-colab-external"}

    def run(*command: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [without_tyro, *command],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
        )

    done = run("-c", IN_A_KERNEL, tmp_path / "cell.py")
    if done.returncode and run("-m", "pip", "download", "--no-deps", "tyro").returncode:
        assert os.environ.get("REQUIRE_BROWSER") != "1", "no package index (REQUIRE_BROWSER=1)"
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    refused, before, after, again, where = json.loads(last)
    assert refused[0] == "UsageError" and refused[2]
    assert "tyro>=1.0 could not be installed" in refused[1] and "internet" in refused[1]
    assert "tyro" not in before and {**before, "tyro": after["tyro"]} == after
    assert [line for line in said if line.startswith("Installed")] == [
        f"Installed: tyro {after['tyro']}; all other packages are as they were."
    ]
    clone = tmp_path / NAME
    assert where[:3] == [str(clone / "lib/__init__.py"), str(clone / "runs/toy"), str(clone)]
    assert Path(where[3]).is_relative_to(without_tyro.parents[1])
    assert again < 2


def test_a_package_that_is_too_old_is_named(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda words, **_: (
            called.append((words, Path(words[words.index("-c") + 1]).read_text()))
            or types.SimpleNamespace(returncode=0, stderr="")
        ),
    )
    hosted.install([hosted.Requirement("numpy>=99"), hosted.Requirement("pip")])
    said = capsys.readouterr().out
    assert "numpy" in said and ">=99" in said and "newer runtime" in said and not called
    hosted.install([hosted.Requirement("numpy>=99"), hosted.Requirement("tqdm>=99")])
    assert ">=99, which is needed: it is replaced" in capsys.readouterr().out
    ((words, held),) = called
    assert words[-1] == "tqdm>=99" and "numpy==" in held and "tqdm==" not in held


def test_a_clone_follows_the_repository_and_what_a_person_changed_stays(colab, source, tmp_path):
    clone = tmp_path / NAME
    git(source, "commit", "-q", "--allow-empty", "-m", "So that there is a past")
    assert f"no tag v{VERSION}: this is the branch main" in colab(source)
    commit(source, "later")
    said = colab(source)
    assert (clone / "later").exists() and said.count("branch main") == 1
    assert git(clone, "rev-parse", "--is-shallow-repository") == "true"
    assert "restart the session" in said  # the tests have imported lib
    git(source, "tag", f"v{VERSION}", "HEAD~")
    assert "tag" not in colab(source) and not (clone / "later").exists()
    commit(source, "after_the_tag")
    said = colab(source)
    assert "tag" not in said and "restart" not in said
    assert not (clone / "after_the_tag").exists()
    readme = clone / "README.md"
    readme.write_text(text := readme.read_text() + "mine")
    assert "changes of yours" in colab(source) and readme.read_text() == text
    git(clone, "commit", "-q", "-a", "-m", "Mine")
    assert "changes of yours" in colab(source) and readme.read_text() == text
    git(clone, "checkout", "-q", "--detach", f"v{VERSION}")
    fork = Path(shutil.copytree(source, tmp_path / "fork"))
    commit(fork, "of_the_fork")
    git(fork, "tag", "-f", f"v{VERSION}")  # not the same tag
    assert "restart" in colab(fork) and (clone / "of_the_fork").exists()
    assert "does not answer" in colab(tmp_path / "nowhere")
    shutil.rmtree(clone / ".git")
    assert "no clone" in colab(fork)


def test_a_notebook_of_a_tag_needs_nothing_of_main(colab, source):
    git(source, "tag", f"v{VERSION}")
    git(source, "rm", "-q", "tools/hosted.py")  # what comes later may be made in another way
    git(source, "commit", "-q", "-m", "Later")
    assert f"version {VERSION}.\n" in colab(source)


def test_what_cannot_be_fetched_is_one_sentence(colab, tmp_path):
    with pytest.raises(UsageError, match=r"_owner_/sigmoid.*repository's own address"):
        colab("https://github.com/_owner_/sigmoid-attention-vit")
    with pytest.raises(UsageError, match=r"nowhere.*was not fetched: fatal.* Is the inte") as told:
        colab(str(tmp_path / "nowhere"))
    assert str(told.value).count("fatal") == 1
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "half").touch()
    with pytest.raises(UsageError, match="half made, delete it"):
        colab()


def test_on_kaggle_there_are_sliders(colab, at_home):
    at_home.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    version = metadata.version

    def without_anywidget(name: str) -> str:
        if name == "anywidget":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    at_home.setattr(metadata, "version", without_anywidget)
    said = colab(DRIVE=True)
    assert "sliders" in said and "Installed" not in said
    assert "Save version" in said and "Accelerator" in said
    assert {"anywidget"} == {
        one.name
        for one in hosted.wanted(kaggle=False, wandb=False)
        if one not in hosted.wanted(kaggle=True, wandb=False)
    }


def test_drive_and_the_secret(colab, at_home, tmp_path):
    def refuse(*_: str) -> None:
        raise ValueError("Nobody is there")

    drive = types.SimpleNamespace(mount=refuse)
    userdata = types.SimpleNamespace(get=refuse)
    google = types.SimpleNamespace(drive=drive, userdata=userdata)
    at_home.setitem(sys.modules, "google.colab", google)
    with pytest.raises(UsageError, match=r"Nobody is there.*DRIVE = False"):
        colab(DRIVE=True)
    assert "RUNS_DIR" not in os.environ
    said = colab(WANDB=True)
    assert "No WANDB_API_KEY (Nobody is there)" in said and "offline" in said
    assert "WANDB_API_KEY" not in os.environ and "WANDB_MODE" not in os.environ
    drive.mount, userdata.get = lambda folder: print("at", folder), lambda name: f"my {name}"
    os.environ["DATA_DIR"] = "here"
    said = colab(DRIVE=True, WANDB=True)
    runs = tmp_path / "drive" / "MyDrive" / NAME / "runs"
    assert f"at {tmp_path / 'drive'}\n" in said and runs.is_dir()
    assert f"go to {runs}, data are looked for in here" in said
    assert (os.environ["RUNS_DIR"], os.environ["DATA_DIR"]) == (str(runs), "here")
    assert (os.environ["WANDB_API_KEY"], os.environ["WANDB_MODE"]) == ("my WANDB_API_KEY", "online")
    assert "my WANDB" not in said


def test_the_gpu_is_named_and_run_times_are_those_of_the_readme(monkeypatch):
    times = hosted.run_times()
    assert all(f"{path.name[:2]}: " in times for path in NOTEBOOKS) and "GPU" in times
    assert "Change runtime type" in hosted.machine(kaggle=False)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: types.SimpleNamespace(returncode=0, stdout="Tesla T4, 15360 MiB\n"),
    )
    assert hosted.machine(kaggle=False) == "GPU: Tesla T4, 15360 MiB."

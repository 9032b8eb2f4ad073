"""The house in order: who imports whom, one source of dependencies, notebooks fit for readers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Imports run downward only: each file may import those it lists, directly.
MAY_IMPORT = {
    "attention": set(),
    "metrics": set(),
    "gaze": set(),
    "toybirds": set(),
    "splits": {"files"},
    "cache": set(),
    "download": set(),
    "feedback": set(),
    "nodelay": set(),
    "editor": {"feedback"},
    "plots": set(),
    "config": set(),
    "files": set(),
    "losses": {"attention"},
    "model": {"attention", "files"},
    "optim": {"attention", "config", "model"},
    "tokens": {"config", "data", "files", "model", "optim"},
    "checkpoint": {"files", "model", "optim"},
    "weights": {"model"},
    "readers": {"gaze", "toybirds", "config", "splits", "feedback"},
    "data": {"gaze", "config", "readers", "cache"},
    "check": {"gaze", "config", "readers"},
    "live": {"attention", "model", "data", "feedback", "gaze"},
    "teach": {"attention", "model", "data", "feedback", "gaze", "losses", "metrics", "config"}
    | {"train", "optim", "evaluate"},
    "train": {"model", "losses", "metrics", "config", "optim", "tokens", "checkpoint", "files"},
    "runs": {"train", "checkpoint", "tokens", "data", "model", "config", "files", "optim"}
    | {"supervision"},
    "supervision": {"config", "data"},
    "ablations": set(),
    "pretrain": {"toybirds", "model", "config"},
    "curves": {"checkpoint", "plots"},
    "panel": {"data", "editor", "feedback", "live", "model", "teach"},
    "bench": {"model", "config", "train", "data", "readers", "live", "attention"}
    | {"checkpoint", "jobs", "optim", "runs", "tokens"},
    "evaluate": {"train", "runs", "tokens", "data", "model", "metrics", "config"} | {"attention"},
    "causal": {"attention", "data", "losses", "metrics", "model"},
    "artefacts": {"data", "metrics", "model", "plots"},
    "sweep": {
        "ablations",
        "attention",
        "checkpoint",
        "config",
        "evaluate",
        "files",
        "jobs",
        "losses",
    }
    | {"optim", "runs", "supervision", "train"},
    "jobs": set(),
    "statistics": set(),
    "summary": {"files"},
    "gallery": {"data", "evaluate", "files", "metrics", "model", "plots"},
    "report": {"config", "data", "evaluate", "files", "gallery", "plots", "runs", "statistics"}
    | {"summary", "train", "probes"},
    "probes": {"artefacts", "causal", "data", "evaluate", "files", "model", "plots", "train"},
    "__main__": {
        "evaluate",
        "probes",
        "report",
        "summary",
        "sweep",
        "runs",
        "train",
        "bench",
        "pretrain",
        "teach",
        "config",
        "check",
        "download",
    }
    | {"download", "readers", "splits", "weights", "files"},
    "__init__": set(),
}
NOTEBOOK_ONLY = {"IPython", "ipywidgets", "anywidget", "jupyter", "jupyterlab", "notebook"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Names of lib files, and of other packages, that a file imports."""
    lib, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
            if node.module == "lib":
                found = [f"lib.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            head, _, rest = name.partition(".")
            if head == "lib":
                lib.add(rest.partition(".")[0])
            else:
                others.add(head)
    return lib, others


@pytest.mark.parametrize("path", sorted((ROOT / "lib").glob("*.py")), ids=lambda p: p.stem)
def test_imports_run_downward(path):
    assert path.stem in MAY_IMPORT, f"say in this test what lib/{path.name} may import"
    assert imports(path)[0] <= MAY_IMPORT[path.stem]


def test_a_bare_gpu_server_can_import_the_training_path():
    names = ("train", "model", "data", "evaluate", "pretrain", "bench", "live", "teach")
    names += ("sweep", "causal", "artefacts", "report")
    forbidden = sorted(NOTEBOOK_ONLY | {"tyro"})
    # None in sys.modules makes an import fail; one process, as each would load PyTorch again.
    code = f"import sys; sys.modules.update(dict.fromkeys({forbidden}))\n"
    code += "".join(f"import lib.{name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_environment_yml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["notebooks"]}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    given = next(part["pip"] for part in environment if isinstance(part, dict))
    assert set(given) - {"-e ."} == wanted
    assert f"python{project['requires-python']}" in environment


def test_constraints_satisfy_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    pinned = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    as_tuple = lambda text: tuple(int(part) for part in re.findall(r"\d+", text))  # noqa: E731
    for requirement in [*project["dependencies"], *(one for part in extras for one in part)]:
        name, least = requirement.split(",")[0].split(">=")
        assert as_tuple(pinned[name]) >= as_tuple(least), requirement


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_fit_for_readers(path):
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 15 <= len(code) <= 35
    lengths = sorted(len(source.splitlines()) for source in code)
    assert lengths[len(lengths) // 2] < 10 and lengths[-1] <= 40
    kinds = "".join(cell["cell_type"][0] for cell in cells)
    assert "cccc" not in kinds, "more than three code cells without prose between them"
    assert "widgets" not in notebook["metadata"]
    assert any("assert " in source for source in code)
    assert "What this does not show" in "".join(cells[-1]["source"]) + "".join(cells[-2]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_executed_and_without_errors(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "run `make notebooks`"
            assert not [out for out in cell["outputs"] if out["output_type"] == "error"]
            assert not [out for out in cell["outputs"] if out.get("name") == "stderr"]


def test_nothing_in_git_names_this_machine_or_weighs_too_much():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 10_000_000, name
        if path.suffix not in (".safetensors", ".png"):
            text = path.read_text(encoding="utf-8")
            assert str(ROOT) + "/" not in text and str(Path.home()) + "/" not in text, name

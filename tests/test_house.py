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
FILES = sorted((ROOT / "lib").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The wings of lib, floor by floor: each imports its own files and lower floors only.
FLOORS = (
    {"config", "files", "figures", "edit"},
    {"model", "data"},  # which do not know each other
    {"losses"},
    {"evaluation"},  # measures; never trains
    {"training"},
    {"experiments", "widgets"},
    {"cli"},
    {"__main__", "__init__"},
)
FLOOR_OF = {wing: number for number, floor in enumerate(FLOORS) for wing in floor}
NOTEBOOK_ONLY = {"IPython", "ipywidgets", "anywidget", "jupyter", "jupyterlab", "notebook"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Wings of lib, and other packages, that a file imports."""
    wings, others = set(), set()
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
                wings.add(rest.partition(".")[0])
            else:
                others.add(head)
    return wings, others


def wing_of(path: Path) -> str:
    return path.relative_to(ROOT / "lib").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "lib")))
def test_imports_run_downward(path):
    wing = wing_of(path)
    for other in imports(path)[0] - {wing}:
        assert FLOOR_OF[other] < FLOOR_OF[wing], f"{wing} imports {other}"


def test_a_bare_gpu_server_can_import_the_training_path():
    wings = ("model", "data", "evaluation", "training", "experiments")
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in FILES
        if wing_of(path) in wings
    ]
    forbidden = sorted(NOTEBOOK_ONLY | {"tyro"})
    # None in sys.modules makes an import fail; one process, as each would load PyTorch again.
    code = f"import sys; sys.modules.update(dict.fromkeys({forbidden}))\n"
    code += "".join(f"import {name}\n" for name in names)
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

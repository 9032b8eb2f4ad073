"""Where people are: a container for VS Code and Codespaces, a Debian of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


def test_the_container_is_made_of_what_is_there():
    folder = ROOT / ".devcontainer"
    container = json.loads((folder / "devcontainer.json").read_text(encoding="utf-8"))
    recipe = (folder / container["build"]["dockerfile"]).read_text(encoding="utf-8")
    python = re.search(r"^FROM python:(3\.\d+)$", recipe, flags=re.MULTILINE)[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.99")
    assert re.search(rf"^RUN useradd .* {container['remoteUser']}$", recipe, flags=re.MULTILINE)

    # make, and nothing else, knows how the project is installed; and where its Python is then.
    make, target = container["postCreateCommand"].split()
    rules = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    assert make == "make" and f"\n{target}:" in rules
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == f"${{workspaceFolder}}/{Path(target).parent}/bin/python"


@pytest.mark.parametrize("folder", ["/", "full"])
def test_a_debian_of_ones_own_is_never_made_over_something_else(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    command = [ROOT / "tools" / "debian13.sh", tmp_path / folder, "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "name a" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.tex"]

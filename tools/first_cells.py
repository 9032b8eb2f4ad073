"""The badge and the first code cell of every notebook: `python tools/first_cells.py`

With them a notebook opens on Colab or Kaggle without any preparation: the cell fetches the project
at the notebook's version, and hosted.py of what was fetched does the rest. Address and version are
those of pyproject.toml. `make notebooks` writes both as well.

--check              writes nothing; exits with 1 where a notebook differs
--repository URL     for a fork: writes its address into pyproject.toml, then into all notebooks
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"

ID = "first-cell"
# Colab shows a form with two switches; JupyterLab and VS Code show one folded line.
METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}}
# Kaggle's image is made from Colab's and has the variables of both. A UsageError is shown as one
# line, without a traceback, and stops "Run all". What stands between two @ is filled in.
CELL = """\
# @title Fetch the project on Colab or Kaggle; anywhere else, this cell does nothing
DRIVE = False  # @param {type:"boolean"}
WANDB = False  # @param {type:"boolean"}
ADDRESS, VERSION = "@address@", "@version@"
import os

if "COLAB_RELEASE_TAG" in os.environ or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    import runpy
    import subprocess

    from IPython.core.error import UsageError

    folder = "/kaggle/working" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "/content"
    folder, said = f"{folder}/sigmoid-attention-vit", "write the repository's own address there"
    if not os.path.exists(f"{folder}/tools/hosted.py") and "_owner_" not in ADDRESS:
        clone = f"git clone -q --depth=1 '{ADDRESS}' '{folder}' -b"
        # The branch where there is no such tag.
        said = subprocess.getoutput(f"{clone} v{VERSION} 2>/dev/null || {clone} main")
        said += f" Is the internet on (Kaggle: Settings)? If {folder} is half made, delete it."
    if not os.path.exists(f"{folder}/tools/hosted.py"):
        raise UsageError(f"{ADDRESS} (ADDRESS in this cell) was not fetched: {said}")
    runpy.run_path(f"{folder}/tools/hosted.py")["set_up"](ADDRESS, VERSION, DRIVE, WANDB)
"""
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{}/blob/main/notebooks/{})\n\n"
)
OLD_BADGE = re.compile(r"\A\[!\[Open in Colab\].*\n+")
ADDRESS = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
IN_PROJECT = re.compile(r'(?<=^Repository = ").*(?="$)', re.MULTILINE)


def cell(address: str, version: str) -> str:
    """The source of the first code cell; `address` is anything that git clones."""
    return CELL.replace("@address@", address).replace("@version@", version).rstrip("\n")


def rendered(text: str, name: str) -> str:
    """A notebook (its JSON) called `name`, with badge and first cell in place of older ones.

    A notebook that was executed stays one: outside of Colab and Kaggle the cell computes nothing,
    so it only counts, and the cells behind it count from 2.

    Raises ValueError where pyproject.toml names no repository on GitHub: Colab opens no others.
    """
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    notebook = json.loads(text)
    old = next((one for one in notebook["cells"] if one.get("id") == ID), None)
    cells = [one for one in notebook["cells"] if one is not old]
    prose = next(one for one in cells if one["cell_type"] == "markdown")
    words = OLD_BADGE.sub("", "".join(prose["source"]))
    prose["source"] = (BADGE.format(account(address), name) + words).splitlines(keepends=True)
    first = {
        "cell_type": "code",
        "execution_count": old and old["execution_count"],
        "id": ID,
        "metadata": METADATA,
        "outputs": [],
        "source": cell(address, project["version"]).splitlines(keepends=True),
    }
    counted = [one for one in cells if one.get("execution_count")]
    if counted and not old:
        for number, one in enumerate([first, *counted], start=1):
            one["execution_count"] = number
            for output in one["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = number
    place = next(n for n, one in enumerate(cells) if one["cell_type"] == "code")
    notebook["cells"] = [*cells[:place], first, *cells[place:]]
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def account(address: str) -> str:
    """OWNER/NAME of an address on GitHub; ValueError for any other."""
    found = ADDRESS.fullmatch(address)
    if not found:
        raise ValueError(f"{address} is not like https://github.com/OWNER/NAME, which Colab opens")
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    parser.add_argument("--repository", metavar="URL", help="write a fork's address everywhere")
    given = parser.parse_args()
    if given.repository:
        try:
            address = f"https://github.com/{account(given.repository)}"
        except ValueError as error:
            parser.error(str(error))
        text = PROJECT.read_text(encoding="utf-8")
        PROJECT.write_text(IN_PROJECT.sub(address, text), encoding="utf-8", newline="\n")
    differ = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        wanted = rendered(text, path.name)
        if text != wanted:
            differ.append(path.name)
            if not given.check:
                path.write_text(wanted, encoding="utf-8", newline="\n")
    if given.check and differ:
        print(f"{', '.join(differ)}: run `python tools/first_cells.py`")
    return int(given.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())

"""Executes notebooks in place and tidies them: `python tools/execute_notebooks.py NOTEBOOK...`

With --check they are run and left as they are: whether they run on pictures of your own, say, with
PRESET=folder and DATA_DIR.

What is committed is what a reader sees: outputs, but no progress bars, warnings on stderr, widget
state, timings or machine-specific metadata; and no output of a cell tagged "photographs", whose
pictures belong to their authors. The first cell is that of first_cells.py.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import nbformat
from first_cells import ID, rendered
from nbclient import NotebookClient
from nbformat import NotebookNode

WIDGET = "application/vnd.jupyter.widget-view+json"
# Threads of several kernels would wait for each other by spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def execute(path: Path, check: bool = False) -> None:
    """Runs one notebook from a fresh kernel in its folder; unless `check`, writes it, tidied."""
    text = rendered(path.read_text(encoding="utf-8"), path.name)
    notebook = nbformat.reads(text, as_version=4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    start = time.perf_counter()
    client.execute()
    if not check:
        tidy(notebook)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(rendered(nbformat.writes(notebook), path.name), encoding="utf-8")
        os.replace(temporary, path)
    kilobytes = path.stat().st_size // 1000
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {kilobytes} kB", flush=True)


def tidy(notebook: NotebookNode) -> None:
    """Drops what is not for a reader."""
    cells = [cell for cell in notebook.cells if cell.id != ID]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"  # stable from run to run: small diffs
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            keep = "photographs" not in cell.metadata.get("tags", [])
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # beside a tool, the picture of its state
                    output.data.pop(WIDGET, None)
            cell.outputs = [out for out in cell.outputs if keep and _is_for_readers(out)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _is_for_readers(output: NotebookNode) -> bool:
    return WIDGET not in output.get("data", {}) and output.get("name") != "stderr"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="run them, write nothing")
    given = parser.parse_args()
    for notebook in given.notebooks:
        execute(notebook, given.check)

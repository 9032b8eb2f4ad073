"""The pages of docs/ and the API, from docstrings, as HTML below build/docs: `make docs`.

pdoc renders both, so that they share navigation and search: a page is shown as the docstring of a
module that has nothing else. Links between pages are rewritten; one that leads nowhere is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
import types
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "docs"
# The pages, in the order in which they are listed, and the name of each one's HTML file.
PAGES = {
    "README.md": "index",
    "docs/install.md": "install",
    "docs/hosted.md": "hosted",
    "docs/commands.md": "commands",
    "docs/training.md": "training",
    "docs/cluster.md": "cluster",
    "docs/models.md": "families",
    "docs/evidence.md": "evidence",
    "docs/original.md": "original",
    "docs/cub2011/README.md": "cub2011",
    "datasets/README.md": "datasets",
    "models/README.md": "models",
    "docs/glossary.md": "glossary",
    "docs/troubleshooting.md": "troubleshooting",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
# ](target) or ](target#part) of a link or picture; addresses with a scheme and "#part" are left.
LINK = re.compile(r"\]\(([^):#\s]+)(#[^)\s]*)?\)")


def page(path: Path) -> types.ModuleType:
    """A module whose docstring is the page. Files that it links to are copied to `OUT`.

    Raises:
        FileNotFoundError: for a link to what is not there.
    """

    def html_link(match: re.Match) -> str:
        target, part = match[1], match[2] or ""
        file = (path.parent / target).resolve()
        if not file.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} links to {target}: nothing is there")
        name = file.relative_to(ROOT).as_posix()
        if name in PAGES:
            return f"]({PAGES[name]}.html{part})"
        if file.is_file():
            (OUT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, OUT / name)
        return f"]({name}{part})"

    module = types.ModuleType(PAGES[path.relative_to(ROOT).as_posix()])
    text = path.read_text(encoding="utf-8").replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    module.__doc__ = LINK.sub(html_link, text)
    module.__docformat__ = "markdown"
    return module


def modules() -> dict[str, pdoc.doc.Module]:
    """Every module of lib by name; the page of a folder lists what is in it."""
    names = {"lib"}
    for file in (ROOT / "lib").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if not parts[-1].startswith("__"):  # wings have no __init__.py, so their names are added
            names |= {".".join(parts[:end]) for end in range(2, len(parts) + 1)}
    names = sorted(names)
    found = {name: pdoc.doc.Module.from_name(name) for name in names}
    about = {name: shown.obj.__doc__ or "" for name, shown in found.items()}
    for folder in names:
        inside = [name for name in names if name.startswith(f"{folder}.")]
        lines = [
            # pdoc makes a link of the name
            f"{'    ' * (name.count('.') - folder.count('.') - 1)}* `{name}` "
            + about[name].strip().split("\n\n")[0].replace("\n", " ")
            for name in inside
        ]
        if inside:
            found[folder].obj.__doc__ = "\n".join([about[folder], "", *lines])
    return found


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sys.path.insert(0, str(ROOT))
    pdoc.render.configure(
        docformat="google", template_directory=Path(__file__).with_name("docs_template")
    )
    pages = {PAGES[name]: pdoc.doc.Module(page(ROOT / name)) for name in PAGES}
    titles = {name: shown.obj.__doc__.split("\n")[0].lstrip("# ") for name, shown in pages.items()}
    pdoc.render.env.globals["titles"] = titles
    everything = pages | modules()
    for name, shown in everything.items():
        file = OUT / f"{name.replace('.', '/')}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(pdoc.render.html_module(shown, everything), encoding="utf-8")
    (OUT / "search.js").write_text(pdoc.render.search_index(everything), encoding="utf-8")
    print(f"{len(pages)} pages, {len(everything) - len(pages)} modules: {OUT / 'index.html'}")


if __name__ == "__main__":
    main()

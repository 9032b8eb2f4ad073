"""Pages for readers: every link leads somewhere, every command exists, the first one is short."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from lib.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs").glob("*/README.md"),
        *(ROOT / name / "README.md" for name in ("datasets", "models")),
    ]
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Parts of a page that a link can name, spelt as GitHub spells them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?://", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not part or part in anchors(file), target


@pytest.fixture(scope="module")
def commands() -> set[str]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"[\w-]+", told.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_exist(page, commands):
    text = text_of(page)
    assert set(re.findall(r"-m lib ([a-z][\w-]*)", text)) <= commands
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
    for tool in re.findall(r"tools/\w+\.(?:py|sh)", text):
        assert (ROOT / tool).is_file(), tool


def test_the_first_page_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 170


def test_every_page_is_built():
    built = (ROOT / "tools" / "make_docs.py").read_text(encoding="utf-8")
    assert not [p for p in PAGES if f'"{p.relative_to(ROOT).as_posix()}"' not in built]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["version"] == project["version"]
    assert {"message", "title", "authors", "preferred-citation"} <= set(citation)

"""Many pictures in a real JupyterLab: found, opened, saved, kept in order, and taught."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from lib.data.corrections import TRASH, load_corrections

from .conftest import Notebook, opened, watched

pytestmark = pytest.mark.browser

# Random weights: they are wrong about most birds.
MODEL = """
import ipywidgets, timm, torch
from lib.config import DataConfig
from lib.data.dataset import make_dataset
from lib.data.joined import JoinedDataset
from lib.model.vit import SigmoidViT
from lib.training.teach import TeachConfig
from lib.widgets.browser import PictureBrowser
from lib.widgets.editor import attention_editor
from lib.widgets.session import LiveSession
from lib.widgets.shelf import CorrectionShelf
from lib.widgets.teaching import TeachPanel

torch.manual_seed(0)
sizes = dict(img_size=64, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=8)
vit = timm.create_model("vit_tiny_patch16_224", **sizes)
for parameter in vit.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.3)
config = DataConfig(toy_train=60, toy_val=16, toy_test=16)
form = ((8, 8), (0.5,) * 3, (0.5,) * 3)
train, val, test = (make_dataset(config, part, *form) for part in ("train", "val", "test"))
model = SigmoidViT(vit)
"""
TOOL = """
if "tool" in globals():
    ipywidgets.Widget.close_all()
session = LiveSession(model, JoinedDataset(train, val))
tool = attention_editor(session, folder="corrections", author="Ada")
place = tool.controller, tool.refresh, "corrections"
panel = TeachPanel(session, train, test, "corrections", TeachConfig(steps=5))
panel.attach(tool.controller, tool.refresh)
tool.add_part("Pictures", lambda: PictureBrowser(*place))
tool.add_part("Saved", lambda: CorrectionShelf(*place))
tool.add_part("Teach", lambda: panel)
tool
"""


class Pictures:
    """The editor in the page, with its parts."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook, self.page = notebook, notebook.page
        self.element = notebook.widget(".ae-tool")
        self.part = self.element.locator(".teach-panel")
        self.grid = self.part.locator(".thumbs-grid button:visible")
        self.status = self.part.get_by_role("status")

    def press(self, name: str) -> None:
        self.element.get_by_role("button", name=name, exact=True).click()

    def open_part(self, name: str) -> None:
        opener = self.element.get_by_role("button", name=name, exact=True).first
        opener.click()
        self.part.wait_for()

    def python(self, code: str) -> str:
        return self.notebook.python(code).strip()

    def says(self, words: str) -> None:
        self.status.filter(has_text=words).wait_for()

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.innerText").strip()

    def drawn(self, at: int) -> bool:
        """Whether a picture lies in a button, and not only its name."""
        look = "(b) => getComputedStyle(b).backgroundImage.startsWith('url(\"data:image/jpeg')"
        return self.grid.nth(at).evaluate(look)


@pytest.fixture(scope="module")
def notebook(lab: Any, browser: Any) -> Iterator[Notebook]:
    with opened(browser, lab(), MODEL, TOOL) as notebook:
        yield notebook


@pytest.fixture
def pictures(notebook: Notebook, lab: Any, request: pytest.FixtureRequest) -> Iterator[Pictures]:
    shutil.rmtree(lab().folder / "corrections", ignore_errors=True)
    notebook.page.set_viewport_size({"width": 1280, "height": 1000})
    with watched(notebook.page, request.node):
        notebook.run_all()
        pictures = Pictures(notebook)
        yield pictures
        code = "print(*tool.errors, *(e for p in tool.parts.values() for e in p.errors))"
        errors = pictures.python(code)
    assert not errors, errors


def test_pictures_are_found_and_opened_with_mouse_and_keyboard(pictures):
    pictures.open_part("Pictures")
    pictures.says("76 pictures")
    assert pictures.grid.count() == 24
    pictures.page.wait_for_function(
        "[...document.querySelectorAll('.thumbs-grid button')].every((b) => "
        "getComputedStyle(b).backgroundImage.startsWith('url'))"
    )
    menu = pictures.part.get_by_label("Show", exact=True)
    menu.select_option("wrong, nearly right first")
    pictures.says("all 76 looked at")
    first = pictures.grid.first
    assert "wrong: " in first.inner_text() and pictures.drawn(0)
    assert first.get_attribute("title").split() == first.inner_text().split()  # whatever is cut
    first.click()
    pictures.notebook.wait_idle()
    opened = pictures.python("c = tool.controller; print(c.shown.class_name, c.shown.image_id)")
    assert first.inner_text().replace("\n", " ").startswith(opened)
    assert "thumb-chosen" in first.get_attribute("class")

    names = [pictures.grid.nth(k).inner_text() for k in range(24)]
    tops = [pictures.grid.nth(k).bounding_box()["y"] for k in range(24)]
    columns = tops.count(tops[0])
    for key, at in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", 23),
        ("ArrowRight", 23),
        ("Home", 0),
    ):
        pictures.page.keyboard.press(key)
        assert pictures.focused() == names[at].strip(), key
    pictures.page.keyboard.press("Tab")
    assert pictures.focused() == names[1].strip()
    pictures.page.keyboard.press("Enter")
    pictures.page.locator(".thumb-1.thumb-chosen").wait_for()
    assert pictures.focused() == names[1].strip()  # and goes on from there
    pictures.press("Later")
    pictures.part.get_by_text("page 2 of").wait_for()
    second = pictures.grid.first.inner_text()
    assert second not in names


@pytest.mark.parametrize("width", [1280, 900, 390])
def test_nothing_is_cut_off(pictures, width):
    pictures.page.set_viewport_size({"width": width, "height": 900})
    if width < 900:  # the sidebar would leave nothing
        pictures.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    pictures.open_part("Pictures")
    pictures.says("76 pictures")
    menus = pictures.part.locator("select:visible, button:visible")
    for k in range(menus.count()):
        box = menus.nth(k).bounding_box()
        assert box["width"] >= 24 and box["height"] >= 24
    wide = "(e) => [e.scrollWidth, e.clientWidth]"
    for name in ("Pictures", "Saved", "Teach"):
        if name != "Pictures":
            pictures.open_part(name)
        scrolled, shown = pictures.part.evaluate(wide)
        assert scrolled <= shown + 1, name
    if width < 900:
        pictures.page.evaluate("window.jupyterapp.shell.expandLeft()")


def test_saved_corrections_are_opened_named_deleted_and_taught(pictures, lab):
    folder = lab().folder / "corrections"
    pictures.open_part("Teach")
    count = pictures.part.get_by_label("Corrections").locator("option")
    count.filter(has_text="none is saved yet").wait_for(state="attached")
    assert pictures.part.get_by_role("button", name="Teach", exact=True).is_disabled()
    pictures.python(
        "c = tool.controller\n"
        "for index in (2, 70):\n"
        "    c.open(index); c.paint([(0, 0), (1, 1)], 0.0); c.save('corrections', 'Ada', 'sky')\n"
        "tool.refresh()"
    )
    count.filter(has_text="all 2 saved").wait_for(state="attached")
    pictures.open_part("Saved")
    pictures.grid.nth(1).wait_for()
    pictures.page.wait_for_function(
        "getComputedStyle(document.querySelector('.thumb-1')).backgroundImage.startsWith('url')"
    )
    chosen = pictures.grid.filter(has_text=" 2, 20")  # the id, and the year
    chosen.click()
    pictures.part.get_by_text("by Ada").wait_for()
    note = pictures.part.get_by_label("Note")
    assert note.input_value() == "sky"
    note.fill("the <b>sky</b>")
    pictures.press("Save note")
    pictures.says("The note is saved.")
    assert "the <b>sky</b>" in chosen.inner_text()
    assert {one.note for one in load_corrections(folder)[0]} == {"sky", "the <b>sky</b>"}
    pictures.press("Delete")
    pictures.says("Deleted")
    assert len(load_corrections(folder)[0]) == 1 and len(list((folder / TRASH).iterdir())) == 2
    pictures.press("Undo delete")
    pictures.says("Brought back")
    assert len(load_corrections(folder)[0]) == 2
    pictures.python("tool.controller.reset(); tool.controller.open(5); tool.refresh()")
    pictures.press("Open in the editor")
    pictures.says("Opened.")
    code = "print(c.index, (~np.isnan(c.painted)).sum(), c.note)"
    assert pictures.python(f"import numpy as np; {code}") == "2 2 the <b>sky</b>"

    pictures.open_part("Teach")
    pictures.part.get_by_role("button", name="Teach", exact=True).click()
    pictures.says("taught 2 correction(s)")
    pictures.page.set_viewport_size({"width": 390, "height": 900})
    pictures.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    scrolled, shown = pictures.part.evaluate("(e) => [e.scrollWidth, e.clientWidth]")
    assert scrolled <= shown + 1
    pictures.page.evaluate("window.jupyterapp.shell.expandLeft()")
    pictures.page.set_viewport_size({"width": 1280, "height": 1000})
    assert "1 of the corrected pictures is a validation picture" in pictures.part.inner_text()
    pictures.notebook.wait_idle()
    assert pictures.python(f"import numpy as np; {code}").startswith("2 0 ")
    assert pictures.python("print(c.can_undo, len(panel.table))") == "True 4"
    pictures.press("Undo teaching")
    pictures.says("Taken back")

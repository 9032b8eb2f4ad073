"""What leaves the editor, read back by other means: masks, code, files."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from test_editor import NASTY, FakeSession, shown_text

from lib import figures
from lib.data.corrections import load_corrections
from lib.widgets import out
from lib.widgets.controller import EditorController
from lib.widgets.out import EXPORTS, ComparePanel, as_code
from lib.widgets.pixels import loops_around, outlines, run_lengths, to_pixels
from lib.widgets.session import LiveSession

# --------------------------------------------------------------------------------- cells and pixels

grids = arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7)))
sizes = st.tuples(st.integers(8, 40), st.integers(8, 40))
RING = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=bool)


def of_run_lengths(rle):
    """A mask from COCO's uncompressed RLE, as its own decoder reads it: runs down the columns."""
    height, width = rle["size"]
    mask, at, value = [0] * (height * width), 0, 0
    for count in rle["counts"]:
        for _ in range(count):
            mask[at] = value
            at += 1
        value = 1 - value
    assert at == height * width
    return np.array([[mask[x * height + y] for x in range(width)] for y in range(height)], bool)


def inside(polygon, height, width):
    """Which pixels have their middle in a polygon: a ray to the right crosses it an odd time."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    y, x = np.mgrid[:height, :width] + 0.5
    odd = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            odd ^= (
                (min(y0, y1) < y) & (y < max(y0, y1)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            )
    return odd


@given(grids, sizes)
@example(RING, (16, 16))
def test_masks_are_read_back_as_they_were(cells, size):
    pixels = to_pixels(cells, size)
    rle = run_lengths(pixels)
    assert (of_run_lengths(rle) == pixels).all()
    assert all(count > 0 for count in rle["counts"][1:])
    found = [inside(polygon, *size) for polygon in outlines(cells, size)]
    assert (np.sum(found, axis=0) == pixels).all()  # each pixel in one polygon, and no other in any
    assert all(len(polygon) >= 8 for polygon in outlines(cells, size))


def test_masks_by_hand():
    cells = np.array([[1, 0], [1, 1]], dtype=bool)
    assert run_lengths(cells) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    assert outlines(cells, (4, 6)) == [[0, 0, 3, 0, 3, 2, 6, 2, 6, 4, 0, 4]]
    assert run_lengths(~cells)["counts"] == [2, 1, 1]
    assert outlines(~RING & False, (16, 16)) == []
    # one piece, two holes that meet in a corner; cut where the upper one begins
    assert len(outlines(RING, (16, 16))) == 2
    assert len(loops_around({(0, 0), (1, 1)})) == 2


@given(grids, st.integers(1, 4))
def test_a_map_at_a_multiple_of_its_size_repeats_its_cells(cells, times):
    size = (cells.shape[0] * times, cells.shape[1] * times)
    assert (to_pixels(cells, size) == cells.repeat(times, 0).repeat(times, 1)).all()


# ----------------------------------------------------------------------------------------- exports


@pytest.fixture
def panel(toy, tmp_path):
    controller = EditorController(LiveSession(*toy))
    made = ComparePanel(controller, lambda: made.refresh(), tmp_path / "toy", "Ada")
    controller.paint([(0, 1), (1, 1), (2, 2)], 0.9)
    made.refresh()
    return made


def written(panel, what):
    """What the button has written."""
    before = {*panel.out.folder.glob("*")}
    panel.controls["what"].value = what
    panel.controls["export"].click()
    assert not panel.errors
    (path,) = (p for p in {*panel.out.folder.glob("*")} - before if p.suffix == EXPORTS[what][1])
    assert f"Saved as {path}." in shown_text(panel.out._said.value)[0]
    return path


@pytest.mark.parametrize("edited", [True, False])
def test_the_code_makes_the_same_edit_and_prints_the_same_scores(panel, edited, capsys):
    controller = panel.kept.controller
    controller.set_scope(blocks=(0, 2), heads=(1,), queries="all")
    controller.strength, controller.sharpness, controller.suppression = 0.6, 1.5, 0.2
    if not edited:
        controller.reset()
    code = written(panel, "this edit as code").read_text(encoding="utf-8")
    found = {"session": controller.session}
    exec(code, found)
    assert found["edit"] == controller.edit()
    after = controller.outcome()[1].probabilities
    assert (found["probabilities"] == after).all()
    lines = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [float(p) for p, _ in lines] == pytest.approx(-np.sort(-after)[:5], abs=5e-5)
    assert lines[0][1] == controller.session.classes[after.argmax()]
    assert max(map(len, code.splitlines())) < 100


def test_the_code_refuses_another_picture_and_tells_of_other_weights(panel, capsys):
    code = as_code(panel.kept.controller)
    session = panel.kept.controller.session
    moved = SimpleNamespace(open=lambda index: session.open(index + 1))
    with pytest.raises(AssertionError):
        exec(code, {"session": moved})
    other = SimpleNamespace(
        open=session.open, outcome=session.outcome, classes=session.classes, fingerprint="other"
    )
    exec(code, {"session": other})
    assert capsys.readouterr().out.startswith("These are other weights")


def test_names_in_code_stay_text(capsys):
    controller = EditorController(FakeSession())
    exec(as_code(controller), {"session": controller.session})
    assert "nan, nan, nan" in as_code(controller) and NASTY in capsys.readouterr().out


def test_the_json_is_a_correction_and_loads_again(panel):
    panel.kept.controller.note = "the wing"
    path = written(panel, "this edit as JSON, a correction")
    (correction,), skipped = load_corrections(panel.out.folder)
    assert not skipped and correction.author == "Ada" and correction.note == "the wing"
    edit = panel.kept.controller.edit()
    assert (correction.edit.mask == edit.mask).all() and correction.edit.heads == "mean"
    assert path.parent.name == "toy-exports"


def test_the_map_and_the_cells_have_the_pictures_size(panel):
    controller = panel.kept.controller
    size, asked = controller.shown.image.shape[:2], controller.asked
    values = np.load(written(panel, "this map (NPY)"))
    assert values.shape == size and values.dtype == np.float32
    corners = np.arange(4) * size[0] // 4
    assert (values[np.ix_(corners, corners)] == asked).all()
    grey = np.asarray(Image.open(written(panel, "this map (PNG)")))
    assert grey.shape == size and (grey == np.rint(255 * values)).all()
    assert f"{size[1]} x {size[0]} pixels" in panel.out._said.value
    cells = to_pixels(~np.isnan(controller.painted), size)
    rle = json.loads(written(panel, "painted cells (COCO RLE)").read_text())
    assert (of_run_lengths(rle["segmentation"]) == cells).all() and rle["iscrowd"] == 1
    polygons = json.loads(written(panel, "painted cells (COCO polygons)").read_text())
    found = [inside(polygon, *size) for polygon in polygons["segmentation"]]
    assert (np.sum(found, axis=0) == cells).all() and len(found) == 2 and polygons["iscrowd"] == 0
    assert (polygons["height"], polygons["width"]) == size
    assert polygons["image_id"] == controller.shown.image_id


def test_figure_and_table_hold_every_snapshot(panel):
    panel.controls["keep"].click()
    panel.controls["ready"].value = "box"
    panel.controls["add"].click()
    table = pd.read_csv(written(panel, "table of all snapshots (CSV)"))
    assert table["name"].tolist() == ["before", "A", "box"]
    assert table["p_true"].tolist() == pytest.approx(panel.kept.kept.to_frame()["p_true"].tolist())
    picture = Image.open(written(panel, "figure of all snapshots (PNG)"))
    assert picture.width > picture.height
    assert "<img" in panel.out._said.value and "download=" in panel.out._said.value
    drawing = written(panel, "figure of all snapshots (SVG)").read_text(encoding="utf-8")
    assert drawing.count("<image") >= 3
    assert not figures.plt.get_fignums()


def test_the_animation_is_what_the_model_says_at_every_strength(panel, monkeypatch):
    controller, asked = panel.kept.controller, []
    frame = figures.strength_frame

    def drawn(image, attention, strength, scores, true):
        asked.append((strength, attention, scores))
        return frame(image, attention, strength, scores, true)

    monkeypatch.setattr(figures, "strength_frame", drawn)
    work = controller.work
    animation = Image.open(written(panel, "strength from 0 to 1 (GIF)"))
    assert controller.work is work
    assert [strength for strength, *_ in asked] == pytest.approx(np.linspace(0, 1, 21))
    for strength, attention, scores in asked[::5]:
        after = controller.outcome_of(replace(work, strength=strength))
        assert (attention == after.attention[2]).all()
        assert scores[controller.shown.class_name] == after.probabilities[controller.shown.label]
    # Frames that look alike are one, shown longer.
    times = []
    for k in range(animation.n_frames):
        animation.seek(k)
        times.append(animation.info["duration"])
    assert 2 <= len(times) <= 21 and sum(times) == 20 * 120 + 1500


@pytest.mark.parametrize(
    "what, message",
    [
        ("painted cells (COCO RLE)", "no cell is painted"),
        ("this edit as JSON, a correction", "nothing is edited"),
        ("strength from 0 to 1 (GIF)", "nothing is edited"),
    ],
)
def test_where_there_is_nothing_to_export_it_is_said_at_the_button(panel, what, message):
    panel.kept.controller.reset()
    panel.controls["what"].value = what
    panel.controls["export"].click()
    assert message in panel.out._said.value and 'role="alert"' in panel.out._said.value
    assert len(panel.errors) == 1 and not panel.out.folder.exists()


def test_a_failed_export_says_so_and_loses_nothing(panel):
    first = written(panel, "this map (NPY)")
    second = written(panel, "this map (NPY)")
    assert first != second and first.read_bytes() == second.read_bytes()
    panel.controls["keep"].click()
    for path in panel.out.folder.iterdir():
        path.unlink()
    panel.out.folder.rmdir()
    panel.out.folder.write_text("in the way")
    panel.controls["export"].click()
    assert "Saved" not in panel.out._said.value and "cannot be made" in panel.out._said.value
    assert len(panel.kept.kept.snapshots) == 1
    panel.out.folder.unlink()
    panel.errors.clear()
    written(panel, "this map (NPY)")
    panel.kept.controller.open(1)
    panel.refresh()
    assert panel.out._said.value == ""  # of another picture


def test_a_large_file_is_not_sent_to_the_browser(panel, monkeypatch):
    monkeypatch.setattr(out, "LINKED", 10)
    written(panel, "this map (NPY)")
    assert "download" not in panel.out._said.value

"""The attention editor without a browser: controller, messages of the widget, the whole tool."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib.data.corrections import load_corrections
from lib.edit import LOW, Layout
from lib.widgets import brush
from lib.widgets.brush import _listed
from lib.widgets.controller import EditorController
from lib.widgets.editor import attention_editor
from lib.widgets.history import SLIDERS
from lib.widgets.panel import Panel
from lib.widgets.pixels import COLOURS, OPACITY, coloured
from lib.widgets.rungs import blocks_to_begin_with, wider

ROOT = Path(__file__).resolve().parents[1]
NASTY = "<img src=x onerror=alert(1)>"

needs_anywidget = pytest.mark.skipif(brush.anywidget is None, reason="anywidget is absent")


@dataclass(frozen=True)
class FakeOutcome:
    probabilities: np.ndarray
    attention: np.ndarray
    prefix: np.ndarray


class FakeSession:
    """Five pictures on 2 x 3 cells, two blocks of two heads, and outcomes that a hand can check.

    Unedited: probabilities .6, .3, .1; every cell gets attention .1, the class token keeps .4.
    Edited: the masked cells share .9 evenly, the class token keeps .1, in the edited blocks; the
    second class wins (.2, .7, .1) where the mean of the asked values is above one half.
    """

    grid, layout, num_prefix = (2, 3), Layout((2, 2), (0, 1)), 1

    def __init__(self):
        self.classes = ["owl", NASTY, "wren"]
        self.fingerprint = "0123456789abcdef"
        self.outcomes = 0  # how often the model was asked
        self.broken = False
        self.moves = None  # how far an edit moves a probability, by blocks

    def __len__(self):
        return 5

    def open(self, index):
        return SimpleNamespace(
            index=index,
            image_id=f"{index}/{NASTY}",
            image=np.full((20, 30, 3), 40 * index, dtype=np.uint8),
            label=1,
            class_name=NASTY,
            file=NASTY,
            human=None if index == 1 else np.float32([[0, 0.5, 1], [np.nan, 0, 0]]),
            box=None if index == 1 else np.float32([[0, 1, 1], [0, 0.5, 0.5]]),
        )

    def sigmoid(self, index, block, offset):
        cells = np.arange(6, dtype=np.float32).reshape(2, 3)
        level = 0.5 if offset == "none" else 0.1
        return np.stack([level + 0.1 * h + 0.05 * block + 0.02 * cells for h in range(2)])

    def seen_together(self, index, block, offset):
        return self.sigmoid(index, block, offset).mean(axis=0)

    def outcome(self, index, edit=None):
        if self.broken:
            raise RuntimeError(f"the model is gone {NASTY}")
        self.outcomes += 1
        attention, class_token = np.full((2, 2, 3), 0.1), np.full(2, 0.4)
        probabilities = np.array([0.6, 0.3, 0.1])
        if edit is not None and self.moves:
            probabilities = probabilities + self.moves[edit.blocks] * np.array([-1, 1, 0])
        elif edit is not None:
            blocks = {"last": [1], "last2": [0, 1], "all": [0, 1]}.get(edit.blocks, edit.blocks)
            attention[list(blocks)] = 0.9 * edit.mask / edit.mask.sum()
            class_token[list(blocks)] = 0.1
            if edit.values[edit.mask].mean() > 0.5:
                probabilities = np.array([0.2, 0.7, 0.1])
        return FakeOutcome(probabilities, attention, class_token)


@pytest.fixture
def controller():
    return EditorController(FakeSession())


def shown_text(html):
    """What a browser shows of HTML, and the names of its tags."""
    texts, tags = [], []
    parser = HTMLParser()
    parser.handle_data = texts.append
    parser.handle_starttag = lambda tag, _: tags.append(tag)
    parser.feed(html)
    return " ".join(" ".join(texts).split()), tags


# -------------------------------------------------------------------------------------- controller

cells = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=4)
shares = st.floats(0, 1)
operations = st.one_of(
    st.tuples(st.just("paint"), cells, shares),
    st.tuples(st.just("erase"), cells),
    st.tuples(st.just("fill"), shares),
    st.tuples(st.just("only_here")),
    st.tuples(st.just("copy_human")),
    st.tuples(st.just("copy_box")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("stroke"), st.dictionaries(st.integers(0, 5), st.none() | shares),
              st.integers(1, 3)),
    st.tuples(st.just("strength"), shares),
    st.tuples(st.just("sharpness"), st.floats(0, 4)),
    st.tuples(st.just("suppression"), shares),
    st.tuples(st.just("set_scope"), st.sampled_from(["last", "all"])),
)  # fmt: skip
knobs = st.tuples(shares, st.floats(0, 4), shares)


def state(controller):
    work = controller.work
    values = controller.edit().values.numpy().tobytes()
    return work.painted.tobytes(), values, tuple(work.sliders.items()), work.scope["blocks"]


def operate(controller, name, *arguments):
    """One operation; what cannot be done on this picture changes nothing."""
    if name in SLIDERS:
        setattr(controller, name, *arguments)
    elif name == "set_scope":
        controller.set_scope(blocks=arguments[0])
    elif name == "only_here" and np.isnan(controller.painted).all():
        with pytest.raises(ValueError, match="nothing is painted yet"):
            controller.only_here()
    else:
        getattr(controller, name)(*arguments)


@given(st.lists(operations, max_size=12))
def test_undo_and_redo_are_inverse_for_any_sequence(sequence):
    controller = EditorController(FakeSession())
    states = [state(controller)]
    for name, *arguments in sequence:
        steps = len(controller._history)
        operate(controller, name, *arguments)
        if len(controller._history) > steps:
            states.append(state(controller))
        else:  # nothing changed, or another version of the same stroke or slider
            states[-1] = state(controller)
    for expected in states[-2::-1]:
        assert controller.can_undo
        controller.undo()
        assert state(controller) == expected
    assert not controller.can_undo
    controller.undo()
    assert state(controller) == states[0]
    for expected in states[1:]:
        assert controller.can_redo
        controller.redo()
        assert state(controller) == expected
    assert not controller.can_redo


@given(st.lists(operations, max_size=8), knobs)
def test_values_stay_in_range_and_arrays_that_were_handed_out_stay_as_they_were(sequence, sliders):
    controller = EditorController(FakeSession())
    handed_out = []
    for name, *arguments in sequence:
        operate(controller, name, *arguments)
        controller.strength, controller.sharpness, controller.suppression = sliders
        edit = controller.edit()
        mask, asked = edit.mask.numpy(), edit.values.numpy()
        for values in (controller.asked, controller.base, asked):
            assert values.min() >= 0 and values.max() <= 1 and values.dtype == np.float32
        assert not asked[~mask].any()
        for array in (controller.painted, controller.own, controller.asked, mask, asked):
            handed_out.append((array, array.copy()))
    for array, copy in handed_out:
        np.testing.assert_array_equal(array, copy)
    assert not controller.painted.flags.writeable


@given(st.lists(operations, max_size=6), knobs)
def test_strength_0_is_no_edit_and_asks_the_model_nothing(sequence, sliders):
    controller = EditorController(FakeSession())
    for name, *arguments in sequence:
        operate(controller, name, *arguments)
    _, controller.sharpness, controller.suppression = sliders
    controller.strength = 0
    assert controller.edit().is_empty
    before, after = controller.outcome()
    assert before is after and controller.moved() == 0 and controller.session.outcomes == 1


def test_nothing_is_asked_at_the_start_and_after_erasing(controller):
    assert controller.edit().is_empty
    assert controller.scope == {
        "blocks": "last", "heads": "mean", "queries": "cls", "offset": "centred",
    }  # fmt: skip
    controller.paint([(0, 1)], 0.9)
    assert controller.edit().mask.tolist() == [[False, True, False], [False] * 3]
    controller.erase([(0, 1)])
    assert controller.edit().is_empty and controller.can_undo


def test_painting_the_models_own_value_is_an_edit(controller):
    # The shown value is a mean of heads: to ask for it is to ask something of each of them.
    controller.paint([(1, 2)], float(controller.own[1, 2]))
    assert controller.edit().mask.sum() == 1


def test_the_operations_paint_what_they_say(controller):
    controller.paint([(0, 1), (0, 2), (1, 1), (1, 2)], 0.7)
    expected = np.float32([[np.nan, 0.7, 0.7], [np.nan, 0.7, 0.7]])
    np.testing.assert_array_equal(controller.painted, expected)
    controller.only_here()
    np.testing.assert_array_equal(
        controller.painted, np.float32([[LOW, 0.7, 0.7], [LOW, 0.7, 0.7]])
    )
    odds = controller.own / (1 - controller.own)
    controller.copy_human()  # 0, .5, 1, not known, 0, 0: .3 is their mean
    asked = np.array([[LOW, 0.5 / 0.3, 1 / 0.3], [np.nan, LOW, LOW]]) * np.delete(odds, 3).mean()
    np.testing.assert_allclose(controller.painted, asked / (1 + asked), rtol=1e-5)
    controller.copy_box()  # 0, 1, 1, 0, .5, .5: .5 is their mean
    asked = np.array([[LOW, 2, 2], [LOW, 1, 1]]) * odds.mean()
    np.testing.assert_allclose(controller.painted, asked / (1 + asked), rtol=1e-5)
    controller.fill(0.25)
    assert (controller.painted == 0.25).all()
    controller.reset()
    assert np.isnan(controller.painted).all() and controller.edit().is_empty


def test_sharpness_and_suppression_and_strength_by_hand(controller):
    own = controller.own.astype(float)
    controller.paint([(0, 0)], 0.8)
    controller.sharpness = 2
    # sigmoid(2 logit v) = v^2 / (v^2 + (1 - v)^2)
    twice = own**2 / (own**2 + (1 - own) ** 2)
    twice[0, 0] = 0.64 / 0.68
    np.testing.assert_allclose(controller.asked, twice, rtol=1e-5)
    assert controller.edit().mask.all()
    controller.sharpness, controller.suppression = 1, 0.5
    expected = (own + LOW) / 2
    expected[0, 0] = 0.8
    np.testing.assert_allclose(controller.asked, expected, rtol=1e-5)
    controller.strength = 0.25  # of the way between the logits
    far, near = expected / (1 - expected), own / (1 - own)
    odds = near**0.75 * far**0.25
    np.testing.assert_allclose(controller.asked, odds / (1 + odds), rtol=1e-5)
    edit = controller.edit()
    np.testing.assert_allclose(edit.values, expected, rtol=1e-5)
    assert edit.strength == 0.25


def test_reset_switches_the_sliders_off_and_undo_brings_them_back(controller):
    controller.strength, controller.sharpness = 0.5, 3
    controller.reset()
    assert controller.edit().is_empty and (controller.strength, controller.sharpness) == (1, 1)
    controller.undo()
    assert (controller.strength, controller.sharpness) == (0.5, 3)
    controller.redo()
    assert (controller.strength, controller.sharpness) == (1, 1)


def test_versions_of_a_stroke_are_one_step(controller):
    for k in range(5):
        controller.stroke(dict.fromkeys(range(k + 1), k / 10), stroke=("page", 7))
    controller.stroke({0: 0.5, 4: None}, stroke=("page", 8))
    np.testing.assert_allclose(
        controller.painted.ravel(), [0.5, *[0.4] * 3, np.nan, np.nan], rtol=1e-6
    )
    controller.undo()
    np.testing.assert_allclose(controller.painted.ravel(), [0.4] * 5 + [np.nan], rtol=1e-6)
    controller.undo()
    assert not controller.can_undo and np.isnan(controller.painted).all()


def test_a_stroke_belongs_to_the_picture_on_which_it_began(controller):
    controller.open(1)
    controller.stroke({2: 0.9}, stroke=1, index=3)
    assert not controller.can_undo and np.isnan(controller.painted).all()
    controller.open(3)
    assert controller.painted[0, 2] == np.float32(0.9) and controller.can_undo


def test_work_and_notes_belong_to_their_picture(controller):
    controller.fill(0.3)
    controller.strength, controller.note = 0.5, "why"
    controller.set_scope(blocks="all")
    kept = controller.work
    controller.open(2)
    assert (controller.strength, controller.note) == (1.0, "")
    assert controller.scope["blocks"] == "all" and not controller.can_undo
    controller.restore(kept)
    assert controller.work.equals(kept)
    controller.undo()
    assert controller.edit().is_empty
    controller.redo()
    controller.lay_aside()
    for index in (0, 2):
        controller.open(index)
        assert controller.edit().is_empty and controller.can_undo
        controller.undo()
        assert controller.work.equals(kept)


def test_each_picture_keeps_its_own_history(controller):
    controller.fill(0.3)
    controller.open(2)
    assert not controller.can_undo and controller.edit().is_empty
    controller.fill(0.6)
    controller.open(0)
    assert (controller.painted == np.float32(0.3)).all()
    controller.undo()
    controller.open(2)
    assert (controller.painted == np.float32(0.6)).all() and controller.can_undo


def test_the_scope_reaches_the_edit_and_the_shown_map(controller):
    controller.paint([(0, 0)], 0.9)
    controller.block = 0
    controller.set_scope(blocks=[1, 0], heads=[1], queries="all", offset="none")
    edit = controller.edit()
    assert (edit.blocks, edit.heads, edit.queries, edit.offset) == ((0, 1), (1,), "all", "none")
    assert controller.own[0, 0] == np.float32(0.6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.set_scope(blocks="first"), "blocks"),
        (lambda c: c.set_scope(blocks=(2,)), r"block 2 is named, but the model has 2 blocks"),
        (lambda c: c.set_scope(heads=(0, 5)), r"heads holds 5, but block 1 has 2 heads"),
        (lambda c: c.fill(1.5), r"1.5 is painted; sigmoid attention is from 0 to 1"),
        (lambda c: c.paint([(0, 3)], 0.5), "outside the grid of 2 x 3"),
        (lambda c: c.erase([(-1, 0)]), "outside the grid"),
        (lambda c: c.correction("me"), "nothing is edited"),
        (lambda c: (c.open(1), c.copy_human()), "has no human map"),
        (lambda c: (c.open(1), c.copy_box()), "has no box"),
        (lambda c: c.only_here(), "nothing is painted yet"),
        (lambda c: c.copy_map(np.zeros((2, 3))), "one above 0"),
        (lambda c: c.copy_map(-np.ones((2, 3))), "numbers from 0"),
        (lambda c: setattr(c, "strength", 1.5), "strength is 1.5; give 0 to 1"),
        (lambda c: setattr(c, "sharpness", float("nan")), "sharpness is nan"),
        (lambda c: c.stroke({6: 0.5}, 1), "names cell 6 of 6"),
        (lambda c: c.stroke({-1: 0.5}, 1), "names cell -1"),
        (lambda c: c.stroke({"1": 0.5}, 1), "names cell '1'"),
        (lambda c: c.stroke({1: "0.5"}, 1), "holds '0.5'"),
        (lambda c: c.stroke({0: 0.2, 1: float("nan")}, 1), "holds nan"),
        (lambda c: c.stroke({1: 1.01}, 1), "holds 1.01"),
        (lambda c: c.stroke({1: True}, 1), "holds True"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(controller, call, message):
    with pytest.raises(ValueError, match=message):
        call(controller)
    assert controller.edit().is_empty and not controller.can_undo
    assert controller.scope["blocks"] == "last" and controller.scope["heads"] == "mean"


def test_a_picture_that_is_not_there(controller):
    with pytest.raises(IndexError, match="picture 5 is asked for; there are 5"):
        controller.open(5)
    assert controller.index == 0


def test_scores_and_words_by_hand(controller):
    assert controller.summary() == f"The model says owl (0.60); it is {NASTY}."
    controller.paint([(0, 0)], 0.4)
    # Before: six cells of .1 and .4 kept. After: .9 in one cell and .1 kept.
    # Half of (.8 + 5 * .1 + .3) is .8.
    assert controller.moved() == pytest.approx(0.8)
    assert controller.summary() == "The prediction stays owl (0.60); 0.80 of the attention moved."
    controller.paint(
        [(0, 0), (0, 1), (0, 2)], 0.9
    )  # three cells of .3: half of (3 * .2 + 3 * .1 + .3)
    assert controller.summary() == (
        f"The prediction changed from owl to {NASTY}; 0.60 of the attention moved. It is right now."
    )
    rows = controller.score_rows(k=1)
    assert [row["class"] for row in rows] == [NASTY, "owl"]  # the former prediction is added
    assert [row["before"] for row in rows] == [0.3, 0.6]
    assert [row["after"] for row in rows] == [0.7, 0.2]
    assert [row["change"] for row in rows] == pytest.approx([40, -40])
    assert [row["is_true"] for row in rows] == [True, False]
    controller.block = 0  # not edited
    assert controller.moved() == 0


def test_the_true_class_is_added_to_the_scores(controller):
    rows = controller.score_rows(k=1)
    assert [row["class"] for row in rows] == ["owl", NASTY]
    assert len(controller.score_rows(k=5)) == 3


def test_an_outcome_is_computed_once_and_anew_for_another_model(controller):
    session = controller.session
    controller.fill(0.9)
    for _ in range(3):
        controller.summary(), controller.score_rows(), controller.moved()
    assert session.outcomes == 2
    controller.fill(0.8)
    controller.summary()
    assert session.outcomes == 3  # the unedited one is not asked for again
    session.fingerprint = "another model"
    controller.summary()
    assert session.outcomes == 5


def test_a_saved_correction_is_read_again(controller, tmp_path):
    controller.paint([(0, 0), (0, 1)], 0.75)
    controller.set_scope(blocks="all", heads=(1,))
    path = controller.save(tmp_path / "new", "me", "a note")
    (found,), skipped = load_corrections(tmp_path / "new", grid=(2, 3))
    assert not skipped and found.edit == controller.edit() and found.model == "0123456789abcdef"
    assert (found.image_id, found.class_name) == (f"0/{NASTY}", NASTY)
    assert (found.author, found.note) == ("me", "a note")
    preview = Image.open(path.with_suffix(".png"))
    assert preview.size == (448, 299)
    # black under viridis(0.75) at OPACITY; cell (0, 0) is about 149 pixels wide
    expected = OPACITY * coloured(np.array(0.75)).astype(float)
    np.testing.assert_allclose(preview.convert("RGB").getpixel((60, 60)), expected, atol=2)
    assert preview.getpixel((75, 149)) == (255, 255, 255)  # the line below the painted cells


def test_the_colours_are_those_of_viridis():
    viridis = pytest.importorskip("matplotlib").colormaps["viridis"]
    exact = 255 * viridis(np.arange(256))[:, :3]
    assert np.abs(COLOURS - exact).max() < 10
    brightness = COLOURS @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > -0.8).all()  # in order, whatever a reader's colour vision


# ------------------------------------------------------------- messages, as the browser sends them


def comm_message(widget, data):
    """A message through the comm, as the kernel delivers it."""
    widget.comm.handle_msg({"content": {"data": data}, "buffers": []})


def browser_sets(widget, **state):
    comm_message(widget, {"method": "update", "state": state})


def browser_says(widget, content):
    comm_message(widget, {"method": "custom", "content": content})


def paints(widget, painted, page="one", **others):
    """A stroke of a page: numbered anew, on the open picture, unless `others` say so."""
    n = widget.answered.get(page, 0) + 1
    said = {"page": page, "n": n, "subject": widget.subject, "action": "", "number": n}
    browser_says(widget, said | {"cells": list(painted.items())} | others)


@pytest.fixture
def tool(tmp_path):
    if brush.anywidget is None:
        pytest.skip("anywidget is absent")
    made = attention_editor(FakeSession(), folder=tmp_path / "corrections", author="me")
    assert made.errors == []
    return made


def result(tool):
    return shown_text(tool._html["verdict"].value + tool._html["result"].value)[0]


def test_a_stroke_reaches_controller_scores_and_every_page(tool):
    assert "The model says owl" in result(tool)
    paints(tool.paint, {0: 0.9, 1: 0.9}, number=1)
    np.testing.assert_array_equal(
        tool.controller.painted, np.float32([[0.9, 0.9, np.nan], [np.nan] * 3])
    )
    assert tool.paint.painted == [0.9, 0.9, None, None, None, None]
    assert tool.paint.answered == {"one": 1}
    assert "The prediction changed from owl" in result(tool)
    assert "owl 0.60 0.20 -40.0" in result(tool)
    assert tool.paint.sentence == tool.controller.summary()
    paints(tool.paint, {2: 0.8}, number=1)
    assert tool.paint.answered == {"one": 2} and len(tool.controller._history) == 2
    assert tool.errors == [] and not tool.controls["undo"].disabled


def test_two_pages_paint_on_one_map(tool):
    paints(tool.paint, {0: 0.9, 1: 0.9}, page="one", number=1)
    paints(tool.paint, {1: 0.5, 5: 0.5}, page="two", number=1)
    paints(tool.paint, {0: None, 2: 0.9}, page="one", number=1)
    assert tool.paint.painted == [None, 0.5, 0.9, None, None, 0.5]
    assert tool.paint.answered == {"one": 2, "two": 1}
    for expected in ([0.9, 0.5, None, None, None, 0.5], [0.9, 0.9] + [None] * 4, [None] * 6):
        tool.controls["undo"].click()
        assert tool.paint.painted == expected
    for page in range(40):  # pages come and go
        paints(tool.paint, {0: 0.5}, page=f"page {page}")
    assert len(tool.paint.answered) == brush.PAGES and tool.paint.answered["page 39"] == 1
    assert tool.errors == []


def test_undo_of_the_browser_and_of_the_button(tool):
    for number in (1, 2, 3):
        paints(tool.paint, dict.fromkeys(range(6), number / 10))
    paints(tool.paint, {}, action="undo")
    assert tool.paint.painted == [0.2] * 6
    tool.controls["undo"].click()
    assert tool.paint.painted == [0.1] * 6
    paints(tool.paint, {}, action="redo")
    assert tool.paint.painted == [0.2] * 6
    paints(tool.paint, {}, action="undo", subject=1)  # meant for another picture
    assert tool.paint.painted == [0.2] * 6
    assert tool.paint.answered == {"one": 6} and tool.errors == []


def test_a_stroke_lands_on_the_picture_on_which_it_began(tool):
    tool.controls["next"].click()
    paints(tool.paint, {0: 0.9}, subject=0)
    assert tool.paint.answered == {"one": 1} and tool.paint.painted == [None] * 6
    assert tool.controller.edit().is_empty
    tool.controls["previous"].click()
    assert tool.paint.painted == [0.9] + [None] * 5 and tool.errors == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cells": [[6, 0.5]]}, "names cell 6 of 6"),
        ({"cells": [[0, 0.5], [1, "<b>"]]}, "&lt;b&gt;"),
        ({"cells": [[0, float("nan")]]}, "nan"),
        ({"cells": [[0, 1.5]]}, "expected 0 to 1"),
        ({"cells": "0.5"}, "dictionary"),
        ({"cells": None}, "iterable"),
        ({"subject": 99}, "picture 99 of 5"),
        ({"subject": "<b>"}, "&lt;b&gt;"),
        ({"action": "explode"}, "explode"),
    ],
)
def test_garbage_is_shown_and_does_not_break_the_tool(tool, said, message):
    paints(tool.paint, dict.fromkeys(range(5), 0.25))
    paints(tool.paint, {0: 0.5}, **said)
    (error,) = tool.errors
    shown = tool._html["notice"].value
    assert message in shown and type(error).__name__ in shown and "<b>" not in shown
    assert tool.paint.painted == [0.25] * 5 + [None]
    assert tool.paint.answered == {"one": 2}  # or the page would wait for ever
    paints(tool.paint, {5: 0.5})
    assert tool.paint.painted == [0.25] * 5 + [0.5] and len(tool.errors) == 1


@pytest.mark.parametrize("said", ["<b>", None, {}, {"page": "one", "n": 1}])
def test_what_is_no_message_is_an_error(tool, said):
    browser_says(tool.paint, said)
    assert len(tool.errors) == 1 and tool.controller.edit().is_empty
    assert "<b>" not in tool._html["notice"].value


def test_a_brush_value_beyond_what_means_anything_is_refused(tool):
    for value in (1.0, "<b>"):
        browser_sets(tool.paint, brush_value=value)
    assert len(tool.errors) == 2 and "<b>" not in tool._html["notice"].value
    browser_sets(tool.paint, brush_value=0.99, view="heat")
    assert tool.paint.brush_value == 0.99 and tool.paint.view == "heat"


def test_an_exception_in_a_callback_is_kept_and_shown_as_text(tool):
    tool.controller.session.broken = True
    paints(tool.paint, dict.fromkeys(range(6), 0.5))
    assert tool.paint.answered == {"one": 1}
    tool.controls["suppression"].value = 0.5
    tool.controls["ladder"].click()
    assert [str(error) for error in tool.errors] == [f"the model is gone {NASTY}"] * 4
    text, tags = shown_text(tool._html["notice"].value)
    assert text == f"RuntimeError: the model is gone {NASTY}" and tags == ["span"]
    tool.controller.session.broken = False
    tool.controls["suppression"].value = 0.6  # the next action: what was said of the last one goes
    assert tool._html["notice"].value == ""
    assert "of the attention moved" in result(tool)


# ---------------------------------------------------------------------------------------- the tool


def test_class_names_and_ids_with_html_are_text(tool):
    tool.controller.fill(0.9)
    tool.refresh()
    tool.controls["ladder"].click()
    tool.controls["save"].click()
    for name in ("title", "verdict", "result", "ladder", "notice"):
        html = tool._html[name].value
        text, tags = shown_text(html)
        assert NASTY in text or name == "notice"
        assert "onerror" not in "".join(tag for tag in tags) and tags.count("img") == (
            2 if name == "result" else 0
        )
    assert "true class" in result(tool) and tool.errors == []


def test_the_controls_lead_to_the_controller(tool):
    controls, controller = tool.controls, tool.controller
    controls["strength"].value, controls["sharpness"].value = 0.5, 2.0
    controls["suppression"].value = 0.25
    assert (controller.strength, controller.sharpness, controller.suppression) == (0.5, 2, 0.25)
    assert tool.paint.base == _listed(controller.base) and tool.paint.strength == 0.5
    controls["reset"].click()
    assert controls["strength"].value == 1 and controls["sharpness"].value == 1
    controls["undo"].click()
    assert controls["sharpness"].value == 2
    controls["block"].value = 0
    controls["blocks"].value = "shown"
    assert controller.block == 0 and controller.scope["blocks"] == (0,)
    controls["block"].value = 1
    assert controller.scope["blocks"] == (1,) and controls["blocks"].value == "shown"
    controls["queries"].value, controls["offset"].value = "all", "none"
    assert (controller.scope["queries"], controller.scope["offset"]) == ("all", "none")
    controller.set_scope(blocks=(0, 1))
    tool.refresh()
    assert controls["blocks"].value == "all"  # of two blocks
    controller.set_scope(blocks=(0,))
    tool.refresh()
    assert controls["blocks"].value is None and tool.errors == []


def test_heads_are_chosen_by_chips(tool):
    controls, controller = tool.controls, tool.controller
    assert controls["heads_mean"].value
    controls["head_1"].value = True
    assert controller.scope["heads"] == (1,) and not controls["heads_mean"].value
    controls["head_0"].value = True
    assert controller.scope["heads"] == (0, 1)
    controls["head_0"].value = controls["head_1"].value = False
    assert controller.scope["heads"] == "mean" and controls["heads_mean"].value
    controls["head_1"].value = True
    controls["heads_all"].value = True
    assert controller.scope["heads"] == "all" and not controls["head_1"].value
    controls["undo"].click()
    assert controller.scope["heads"] == "mean"  # one step for all of the chips in a row
    assert tool._thumbs[0].layout.display == "none"
    controls["head_maps"].value = True
    assert all("<img" in thumb.value for thumb in tool._thumbs)
    assert tool._thumbs[0].value != tool._thumbs[1].value and tool.errors == []


def test_pictures_go_round_and_buttons_follow_what_is_there(tool):
    tool.controls["previous"].click()
    assert tool.controller.index == 4 and tool.controls["picture"].value == 4
    assert tool.paint.subject == 4 and "4/&lt;img" in tool._html["title"].value
    tool.controller.open(3)
    tool.refresh()
    assert tool.controls["picture"].value == 3 and "3/&lt;img" in tool._html["title"].value
    tool.controls["picture"].value = 1
    assert tool.controls["copy_human"].disabled and tool.controls["copy_box"].disabled
    tool.controls["next"].click()
    assert not tool.controls["copy_human"].disabled
    assert tool.controls["only_here"].disabled and "nothing is painted" in tip(tool, "only_here")
    tool.controls["copy_human"].click()
    assert tool.controller.strength == 0.5 and tool.paint.painted[3] is None
    tool.controls["only_here"].click()
    assert tool.paint.painted[3] == LOW and tool.errors == []
    tool.controls["note"].value = "why"
    tool.controls["next"].click()
    assert tool.controls["note"].value == "" and tool.controls["strength"].value == 1
    tool.controls["previous"].click()
    assert tool.controls["note"].value == "why" and tool.controls["strength"].value == 0.5


def tip(tool, name):
    """What is said of a control where the mouse rests on it."""
    control = tool.controls[name]
    return control.tooltip if control.has_trait("tooltip") else control.description_tooltip


def test_the_ladder_is_shown_until_the_edit_changes(tool):
    tool.controls["copy_box"].click()
    tool.controls["ladder"].click()
    assert "0.300" in tool._html["ladder"].value
    tool.refresh()
    assert tool._html["ladder"].value
    tool.controls["strength"].value = 0.25
    assert not tool._html["ladder"].value and tool.errors == []
    tool.controls["ladder"].click()
    tool.controller.session.fingerprint = "another model"
    tool.refresh()
    assert not tool._html["ladder"].value and tool.errors == []


def test_saving(tool, tmp_path, monkeypatch):
    assert tool.controls["save"].disabled and "nothing to save" in tip(tool, "save")
    tool.controls["save"].click()  # from a page that does not know it yet
    assert "nothing to save" in tool._html["notice"].value
    assert not (tmp_path / "corrections").exists()
    tool.controls["copy_box"].click()
    tool.controls["note"].value = "look at the bird"
    tool.controls["save"].click()
    (found,), _ = load_corrections(tmp_path / "corrections")
    assert found.note == "look at the bird" and found.author == "me"
    assert "Saved as" in tool._html["notice"].value and len(tool.errors) == 1
    monkeypatch.setattr("lib.files.os.fsync", refuse)
    tool.controls["save"].click()
    assert "Saved" not in tool._html["notice"].value and "full" in tool._html["notice"].value
    assert len(load_corrections(tmp_path / "corrections")[0]) == 1
    paints(tool.paint, dict.fromkeys(range(6), 0.5))
    assert tool._html["notice"].value == ""


def refuse(_):
    raise OSError(28, "the disk is full")


def test_where_an_edit_does_something():
    session = FakeSession()
    session.moves = {"last": 0.02, "last2": 0.05, "all": 0.6}  # of the probability that moves most
    controller = EditorController(session)
    assert blocks_to_begin_with(controller) == "all"
    controller.begin_in("all")
    assert controller.scope["blocks"] == "all" and not controller.can_undo
    controller.open(2)
    assert controller.scope["blocks"] == "last"  # it was chosen for the first picture
    controller.fill(0.9)
    controller.begin_in("all")
    assert controller.scope["blocks"] == "last"  # something has been done here
    blocks, words = wider(controller)
    assert blocks == "all" and "In all blocks the same edit does more" in words
    controller.set_scope(blocks="all")
    assert wider(controller) == ("", "")
    session.moves = {"last": 0.3, "last2": 0.3, "all": 0.35}
    other = EditorController(session)
    assert blocks_to_begin_with(other) == "last" and wider(other) == ("", "")
    other.fill(0.2)
    assert wider(other) == ("", "")


def test_what_is_to_be_guessed_is_not_said(tool):
    tool.controls["guess"].value = tool.controls["present"].value = True
    said = tool._html["title"].value + tool._html["verdict"].value + tool._html["result"].value
    assert "true class" not in said and shown_text(tool._html["title"].value)[0].endswith("?")
    assert tool.paint.sentence == "" and tool._openers.layout.display == "none"
    assert "The model says" not in said and "ae-present" in tool._dom_classes
    tool.controls["guess"].value = False
    assert "true class" in result(tool) and "The model says" in result(tool)
    assert tool.errors == []


def test_parts_below_are_made_when_they_are_opened(tool):
    made = []

    class Part(Panel):
        def __init__(self):
            super().__init__()
            made.append(self)
            self.refreshed = 0

        def refresh(self):
            self.refreshed += 1

    tool.add_part("Compare", Part)
    tool.add_part("Pictures", Part)
    assert not made
    tool.controls["part Compare"].value = True
    assert tool._below.children == (made[0],)
    tool.controls["part Pictures"].value = True
    assert tool._below.children == (made[1],) and not tool.controls["part Compare"].value
    tool.controls["part Pictures"].value = False
    assert not tool._below.children and len(made) == 2 and tool.errors == []
    tool.refresh()
    assert [part.refreshed for part in made] == [2, 2]  # when it was opened, and now


@needs_anywidget
def test_a_picture_of_the_state_stands_beside_the_widget(tool):
    paints(tool.paint, dict.fromkeys(range(6), 0.9))
    bundle = tool._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert Image.open(io.BytesIO(bundle["image/png"])).size[0] > 600
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_every_control_has_a_label(tool):
    for name, control in tool.controls.items():
        assert control.description or control.placeholder, name


@pytest.mark.parametrize("plain", [pytest.param(False, marks=needs_anywidget), True])
def test_the_style_is_there_and_pictures_are_not_sent_with_every_stroke(plain):
    tool = attention_editor(FakeSession(), plain=plain)
    if plain:
        assert ".ae-scores" in tool.children[0].value
    else:
        assert ".ae-scores" in str(tool.paint._css) and "Store" in str(tool.paint._esm)
    assert "background-image" in tool._html["title"].value
    assert "background-image" not in tool._html["result"].value
    assert len(tool._html["result"].value) < 8000


def test_the_tool_without_a_brush_from_the_browser():
    tool = attention_editor(FakeSession(), plain=True)
    before = Image.open(io.BytesIO(tool.paint._picture.value))
    assert before.size == (448, 299)
    tool.paint.row_range.value, tool.paint.column_range.value = (1, 2), (2, 3)
    tool.paint.brush_value.value = 0.75
    press = {button.description: button.click for button in buttons_of(tool.paint)}
    press["Paint"]()
    expected = np.float32([[np.nan, 0.75, 0.75], [np.nan, 0.75, 0.75]])
    np.testing.assert_array_equal(tool.controller.painted, expected)
    assert "The prediction changed from owl" in result(tool)
    after = Image.open(io.BytesIO(tool.paint._picture.value))
    assert after.getpixel((300, 60)) != before.getpixel((300, 60))
    tool.paint.row_range.value = (1, 1)
    press["Erase"]()
    assert np.isnan(tool.controller.painted[0]).all()
    press["Fill"]()
    assert (tool.controller.painted == 0.75).all()
    for _ in range(3):
        tool.controls["undo"].click()
    assert tool.controller.edit().is_empty and tool.errors == []


def buttons_of(box):
    found = []
    for child in getattr(box, "children", ()):
        found += [child] if isinstance(child, widgets.Button) else buttons_of(child)
    return found


def test_without_anywidget_the_plain_tool_is_built():
    code = (
        "import sys; sys.modules['anywidget'] = None\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_editor import FakeSession\n"
        "from lib.widgets.brush import PlainPaint\n"
        "from lib.widgets.editor import attention_editor\n"
        "tool = attention_editor(FakeSession())\n"
        "assert isinstance(tool.paint, PlainPaint)\n"
        "tool.controls['copy_box'].click()\n"
        "assert tool.errors == [], tool.errors\n"
        "print(tool.controller.summary())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The prediction stays owl (0.60); 0.30 of the attention moved.\n"
    assert not done.stderr


# ------------------------------------------------------------------------------------ a real kernel


@needs_anywidget
def test_a_message_through_a_real_kernel():
    """Construct, display, send what the browser sends, and read what the browser would get."""
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    try:
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
            "from test_editor import FakeSession\n"
            "from lib.widgets.editor import attention_editor\n"
            "tool = attention_editor(FakeSession())\n"
            "tool"
        )
        answers = run(client, client.execute(code))
        opened = {}  # what the browser knows of each widget
        for message in answers:
            if message["msg_type"] in ("comm_open", "comm_msg"):
                comm, data = message["content"]["comm_id"], message["content"]["data"]
                opened.setdefault(comm, {}).update(data.get("state", {}))
        (paint,) = [comm for comm, state in opened.items() if "painted" in state]
        assert opened[paint]["answered"] == {} and opened[paint]["painted"] == [None] * 6
        assert opened[paint]["picture"].startswith("data:image/png;base64,")
        shown = [m["content"]["data"] for m in answers if m["msg_type"] == "execute_result"]
        shown += [m["content"]["data"] for m in answers if m["msg_type"] == "display_data"]
        assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)

        cells = [[cell, 0.9] for cell in range(6)]
        said = {"page": "one", "n": 1, "subject": 0, "action": "", "number": 1, "cells": cells}
        data = {"method": "custom", "content": said}
        message = client.session.msg("comm_msg", {"comm_id": paint, "data": data})
        client.shell_channel.send(message)
        states = [
            (message["content"]["comm_id"], message["content"]["data"].get("state", {}))
            for message in run(client, message["header"]["msg_id"])
            if message["msg_type"] == "comm_msg"
        ]
        # in one message: a page must not see the answer before the map
        (answer,) = [state for comm, state in states if comm == paint and "painted" in state]
        assert answer["answered"] == {"one": 1} and answer["painted"] == [0.9] * 6
        panels = [state["value"] for _, state in states if "value" in state]
        assert any("The prediction changed from owl" in shown_text(html)[0] for html in panels)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def run(client, message_id):
    """Every answer to a message, until the kernel is idle again."""
    answers = []
    while True:
        answer = client.get_iopub_msg(timeout=30)
        if answer["parent_header"].get("msg_id") != message_id:
            continue
        assert answer["msg_type"] not in ("error", "stream"), answer["content"]
        if answer["content"].get("execution_state") == "idle":
            return answers
        answers.append(answer)


# ---------------------------------------------------------------- the browser's half, without DOM

NODE = shutil.which("node")
HARNESS = """
import { Store, asked, contour, covered, filled, oddsText } from "./editor.mjs";
class Model {
  constructor(state) { this.state = { ...state }; this.sent = []; }
  get(name) { return this.state[name]; }
  send(message) { this.sent.push(structuredClone(message)); }
}
const nothing = Array(6).fill(null);
const state = { subject: 0, rows: 2, columns: 3, painted: nothing, own: Array(6).fill(0.2),
  answered: {}, draft_key: "picture", run: "now" };
const disk = new Map();
globalThis.localStorage = { getItem: (key) => disk.get(key) ?? null,
  setItem: (key, value) => disk.set(key, value), removeItem: (key) => disk.delete(key) };
const model = new Model(state);
const store = new Store(model);
const python = (changes, to = store) => { Object.assign(to.model.state, changes); to.update(); };
// Python's answer to the message on its way: its map, or another one.
const answer = (changes = {}) => {
  const { n, page, cells } = model.sent.at(-1);
  const painted = [...model.state.painted];
  for (const [cell, value] of cells) painted[cell] = value;
  python({ painted, answered: { [page]: n }, ...changes });
};
const say = (value) => console.log(JSON.stringify(value));
const dab = (cells, value, to = store) => {
  const stroke = to.begin();
  to.set(stroke, cells.map((cell) => [cell, value]));
  to.end(stroke);
};
"""


@pytest.fixture
def node(tmp_path):
    if NODE is None:
        pytest.skip("node is absent")
    shutil.copy(ROOT / "lib" / "widgets" / "static" / "editor.js", tmp_path / "editor.mjs")

    def run_script(script, *arguments):
        path = tmp_path / "script.mjs"
        path.write_text(f"{HARNESS}{script}\nprocess.exit(0);")
        done = subprocess.run([NODE, path, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run_script


def test_the_browser_shows_what_the_controller_asks(node):
    controller = EditorController(FakeSession())
    cases, expected = [], []
    for value in (0.0, 0.02, 0.5, 0.9, 1.0):
        for strength, sharpness in ((1, 1), (0.5, 1), (0.3, 2.5), (1, 0)):
            controller.fill(value)
            controller.strength, controller.sharpness = strength, sharpness
            expected.append(float(controller.asked[1, 2]))
            cases.append([value, float(controller.own[1, 2]), strength, sharpness])
    (found,) = node(f"say({json.dumps(cases)}.map((one) => asked(...one)));")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_brush_covers_its_path_without_gaps(node):
    small, dot, soft, path = node("""
    say(covered([0.5, 0.5], [0.5, 0.5], { size: 1, soft: 0 }, 2, 3));
    say(covered([2.99, 1.99], [2.99, 1.99], { size: 1, soft: 1 }, 2, 3));
    say(covered([0.5, 0.5], [0.5, 0.5], { size: 4, soft: 1 }, 2, 3));
    say(covered([0.1, 0.5], [29.9, 0.5], { size: 1, soft: 0 }, 1, 30));
    """)
    assert small == [[0, 1]]
    assert [5, 1] in dot  # the cell under the pointer, always
    # radius 2, fading from the middle: 1 - distance / 2
    expected = {0: 1, 1: 0.5, 3: 0.5, 4: 1 - 2**0.5 / 2}
    assert dict(soft) == pytest.approx(expected)
    assert [cell for cell, _ in path] == list(range(30))


def test_a_fill_stays_in_its_region(node):
    everything, left, wall = node("""
    const W = 0.9, O = null;
    say(filled([O, O, O, O, O, O], 0, 2, 3).sort());
    say(filled([O, W, O, O, W, O], 3, 2, 3).sort());
    say(filled([O, W, O, O, W, O], 1, 2, 3).sort());
    """)
    assert (everything, left, wall) == ([0, 1, 2, 3, 4, 5], [0, 3], [1, 4])


def test_one_message_is_on_its_way_and_the_end_arrives(node):
    first, waiting, last, after = node("""
    const stroke = store.begin();
    for (let k = 0; k < 30; k++) store.set(stroke, [[k % 6, k / 100]]);
    say(model.sent);
    store.end(stroke);
    say(model.sent.length);
    answer();
    say(model.sent[1]);
    answer(); python({});
    say([model.sent.length, store.queue.length, store.painted]);
    """)
    (message,) = first
    assert message.pop("page") and waiting == 1
    sent = {"n": 1, "subject": 0, "action": "", "number": 1, "of": 6, "cells": [[0, 0]]}
    assert message == sent
    assert sorted(last["cells"]) == [[k, (24 + k) / 100] for k in range(6)] and last["number"] == 1
    assert after == [2, 0, [(24 + k) / 100 for k in range(6)]]


def test_strokes_that_wait_stay_strokes_of_their_own_and_undo_waits_its_turn(node):
    first, second, *messages = node("""
    for (let k = 0; k < 3; k++) {
      const stroke = store.begin();
      store.set(stroke, [[k, 0.5]]);
      store.set(stroke, [[k, 0.7]]);
      store.end(stroke);
    }
    store.act("undo"); store.act("undo");
    for (let k = 0; k < 4; k++) answer();
    answer({ painted: [0.7, 0.7, null, null, null, null] });
    say(store.painted);
    answer({ painted: [0.7, null, null, null, null, null] });
    say(store.painted);
    for (const message of model.sent) say(message);
    """)
    steps = [(m.get("number"), m["action"], m["cells"]) for m in messages]
    n = None
    assert (first, second) == ([0.7, 0.7, n, n, n, n], [0.7, n, n, n, n, n])
    assert steps == [
        (1, "", [[0, 0.5]]),
        (1, "", [[0, 0.7]]),
        (2, "", [[1, 0.7]]),
        (3, "", [[2, 0.7]]),
        (None, "undo", []),
        (None, "undo", []),
    ]


def test_what_others_paint_is_there_at_once_and_what_is_not_answered_stays_over_it(node):
    theirs, given_back, again, ends = node("""
    const stroke = store.begin();
    store.set(stroke, [[0, 0.5], [1, 0.5]]);               // on its way
    store.set(stroke, [[2, 0.5], [3, 0.5]]);               // waits
    python({ painted: [0.1, null, null, 0.1, 0.1, null] }); // another page
    say(store.painted);
    store.set(stroke, [[3, null], [2, null]]);  // as a rectangle that becomes smaller gives back
    answer();
    say([store.painted, model.sent.length]);
    // In mid-stroke another page paints over cell 0: that is the later stroke.
    python({ painted: [0.9, 0.5, null, 0.1, 0.1, null] });
    store.set(stroke, [[5, 0.5]]);
    say([store.painted, stroke.before]);
    store.end(stroke);
    say(model.sent.at(-1).cells);
    """)
    n = None
    assert theirs == [0.5, 0.5, 0.5, 0.5, 0.1, n]
    assert given_back == [[0.5, 0.5, n, 0.1, 0.1, n], 1]  # theirs is not erased
    painted, before = again
    assert painted == [0.9, 0.5, n, 0.1, 0.1, 0.5] and before[:2] == [0.9, None]
    assert ends == [[5, 0.5]]


def test_what_is_painted_does_not_move_to_another_picture(node):
    shown, sent, after, back = node("""
    const stroke = store.begin();
    store.set(stroke, [[0, 0.5]]);
    store.set(stroke, [[1, 0.5]]);
    python({ painted: nothing, subject: 1 });
    store.set(stroke, [[2, 0.5]]);              // the hand is still down
    say(store.painted);
    answer({ painted: nothing });
    say(model.sent.map((message) => [message.subject, message.cells]));
    store.end(stroke);
    answer({ painted: nothing });
    dab([5], 0.5);
    say(model.sent.at(-1));
    python({ painted: [0.5, 0.5, null, null, null, null], subject: 0 });
    say([store.painted, model.sent.length]);
    """)
    n = None
    assert shown == [n] * 6 and sent == [[0, [[0, 0.5]]], [0, [[1, 0.5]]]]
    assert (after["subject"], after["number"], after["cells"]) == (1, 2, [[5, 0.5]])
    assert back == [[0.5, 0.5, n, n, n, n], 3]


def test_a_pinch_takes_back_what_the_first_finger_painted(node):
    held, cancelled, late = node("""
    const finger = store.begin({ held: true });
    store.set(finger, [[0, 0.5]]);
    say([store.painted[0], model.sent.length]);
    store.cancel(finger);
    say([store.painted[0], model.sent.length, store.queue.length]);
    const other = store.begin({ held: true });
    store.set(other, [[0, 0.5]]);
    store.release(other);
    store.cancel(other);
    answer(); answer();
    say([store.painted[0], model.sent.map((message) => message.cells)]);
    """)
    assert held == [0.5, 0] and cancelled == [None, 0, 0]
    assert late == [None, [[[0, 0.5]], [[0, None]]]]


PAIR = """
// Two pages and a Python between them; everything arrives late, and in any order between pages.
let seed = Number(process.argv[2]);
const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
for (let round = 0; round < 60; round++) {
  const maps = [nothing, nothing].map((map) => [...map]);
  let shown = 0;
  const log = [];
  const answered = {};
  const pages = [0, 1].map(() => {
    const one = new Model(state);
    return { store: new Store(one), model: one, inbox: [], read: 0, stroke: null };
  });
  const publish = () => {
    const news = { painted: [...maps[shown]], subject: shown, answered: { ...answered } };
    for (const page of pages) page.inbox.push(news);
  };
  const steps = {
    begin: (page) => { page.stroke ??= page.store.begin(); },
    paint: (page) => {
      if (!page.stroke) return;
      const value = [null, 0.25, 0.5, 0.75][random(4)];
      const cell = random(6);
      page.store.set(page.stroke, [[cell, value]]);
      if (!page.stroke.over && page.store.painted[cell] !== value) throw Error("not at once");
    },
    end: (page) => { if (page.stroke) page.store.end(page.stroke); page.stroke = null; },
    python: (page) => {
      if (page.read === page.model.sent.length) return false;
      const message = page.model.sent[page.read++];
      if (page.read !== page.model.sent.length) throw Error("more than one on its way");
      for (const [cell, value] of message.cells) maps[message.subject][cell] = value;
      answered[message.page] = message.n;
      log.push(message);
      publish();
    },
    browser: (page) => {
      if (!page.inbox.length) return false;
      python(page.inbox.shift(), page.store);
    },
    open: () => { shown = 1 - shown; log.push({ open: shown }); publish(); },
    reset: () => { maps[shown].fill(null); log.push({ reset: true }); publish(); },
  };
  const often = ["begin", "paint", "paint", "paint", "end", "python", "browser", "browser"];
  const names = [...often, ...often, ...often, "open", "reset"];
  for (let k = 0; k < 80; k++) steps[names[random(names.length)]](pages[random(2)]);
  for (const page of pages) steps.end(page);
  const work = () => pages.some((page) => steps.python(page) !== false
    || steps.browser(page) !== false);
  while (work());
  say({ log, maps, shown, painted: pages.map((page) => page.store.painted),
    left: pages.map((page) => page.store.queue.length) });
}
"""


@pytest.mark.parametrize("seed", [1, 20261127])
def test_two_pages_and_python_agree_whatever_the_order(node, seed):
    for one in node(PAIR, str(seed)):
        assert one["left"] == [0, 0] and one["painted"] == [one["maps"][one["shown"]]] * 2
        tool = attention_editor(FakeSession())  # and the real Python makes the same of it
        for message in one["log"]:
            if "open" in message:
                tool.controller.open(message["open"])
                tool.refresh()
            elif "reset" in message:
                tool.controls["reset"].click()
            else:
                browser_says(tool.paint, message)
        for index, expected in enumerate(one["maps"]):
            tool.controller.open(index)
            tool.refresh()
            assert tool.paint.painted == expected
        assert tool.errors == []


def test_a_kernel_that_is_late_or_gone_is_said_and_painting_goes_on(node):
    states, painted, sent, late, silent = node("""
    const real = globalThis.setTimeout;
    let due = [];
    globalThis.setTimeout = (react, wait) => { due.push([wait, react]); };
    const pass = (time) => { for (const [wait, react] of due) if (wait === time) react(); };
    dab([0], 0.5);
    const states = [store.state];
    pass(150); states.push(store.state);
    pass(15000); states.push(store.state);
    answer(); states.push(store.state);
    due = [];
    store.onKernel(false, true); states.push(store.state);  // busy with something else
    pass(150); states.push(store.state);
    store.onKernel(false, false); states.push(store.state);
    store.onKernel(true, false); store.onKernel(false, true);  // another kernel does not know us
    states.push(store.state);
    say(states);
    dab([1], 0.5); store.act("undo");
    say(store.painted);
    say(model.sent.length);
    store.saveDraft();
    say([...disk.values()].map((text) => JSON.parse(text)));
    say(new Store(new Model({ ...state, run: "after" })).offer);
    """)
    w = "working"
    assert states == ["", w, "silent", "", "", w, "", "gone"]
    assert painted[:3] == [0.5, 0.5, None] and sent == 1
    draft = {"run": "now", "cells": [[0, 0.5], [1, 0.5]]}
    assert late == [draft] and silent == draft


def test_a_draft_is_offered_to_another_kernel_only_and_restored_in_one_stroke(node):
    same, offered, united, restored, one_stroke, done, discarded = node("""
    dab([0, 1], 0.5); answer();
    store.saveDraft();
    say(new Store(new Model(state)).offer);             // another page on the same kernel
    const shown = [null, 0.5, null, null, 0.9, null];
    const second = new Model({ ...state, run: "second", painted: shown });
    const after = new Store(second);
    say(after.offer.cells);
    dab([5], 0.25, after);                              // before anything was answered
    after.saveDraft();
    say(new Store(new Model({ ...state, run: "second" })).offer.cells);
    after.answerOffer(true);
    say([after.painted, after.offer]);
    python({ painted: after.painted, answered: { [after.page]: 1 } }, after);
    say(second.sent.map((message) => [message.number, message.cells]));
    say(new Store(new Model({ ...state, run: "second" })).offer);
    const third = new Store(new Model({ ...state, run: "third" }));
    third.answerOffer(false);
    say([third.painted, third.model.sent, disk.size]);
    """)
    assert same is None and offered == [[0, 0.5], [1, 0.5]]
    assert sorted(united) == [[0, 0.5], [1, 0.5], [4, 0.9], [5, 0.25]]
    assert restored == [[0.5, 0.5, None, None, 0.9, 0.25], None]
    assert one_stroke == [[1, [[5, 0.25]]], [2, [[0, 0.5]]]] and done is None
    assert discarded == [[None] * 6, [], 0]


def test_a_browser_without_storage_or_with_garbage_in_it_paints(node):
    garbage, absent = node("""
    const texts = ["{", "3", '{"cells": 3}', '{"cells": [[9, 0.5], ["<b>", 1], [0, 7]]}'];
    say(texts.map((text) => {
      disk.set("sigmoid-attention draft: picture", text);
      return new Store(new Model(state)).offer;
    }));
    const full = () => { throw new Error("full"); };
    globalThis.localStorage = { getItem: full, setItem: full, removeItem: full };
    dab([0], 0.5); store.saveDraft();
    delete globalThis.localStorage;
    const other = new Store(new Model(state));
    dab([1], 0.5, other); other.saveDraft();
    say([store.painted[0], other.painted[1]]);
    """)
    assert garbage == [None] * 4 and absent == [0.5, 0.5]


def test_values_are_said_as_odds(node):
    values = [0, 0.02, 0.1, 0.4, 0.5, 0.505, 0.6, 0.9, 0.99, 1]
    (said,) = node(f"say({values}.map(oddsText));")
    assert said == [
        "nothing",
        "1/49 of the average patch",
        "1/9 of the average patch",
        "1/1.5 of the average patch",
        "as the average patch",
        "as the average patch",
        "1.5 × the average patch",
        "9 × the average patch",
        "99 × the average patch",
        "all there is",
    ]


def test_contours_go_around_what_is_higher(node):
    lines, joined, parted, flat = node("""
    const peak = Array(9).fill(0.1); peak[4] = 0.9;
    say(contour(peak, 3, 3, 0.5));
    // Of four cells two are high, across: one region, or two.
    say(contour([0.9, 0.4, 0.4, 0.9], 2, 2, 0.5));
    say(contour([0.9, 0.0, 0.0, 0.9], 2, 2, 0.5));
    say(contour(Array(9).fill(0.5), 3, 3, 0.5));
    """)
    ends = [tuple(point) for line in lines for point in line]
    assert len(lines) == 4 and all(ends.count(point) == 2 for point in ends)  # one closed line
    assert set(ends) == {(1.5, 1.0), (2.0, 1.5), (1.5, 2.0), (1.0, 1.5)}
    assert [[1.3, 0.5], [1.5, 0.7]] in joined  # around the low corner at the top right
    assert [[17 / 18, 0.5], [0.5, 17 / 18]] in [sorted(line, reverse=True) for line in parted]
    assert flat == []


def test_a_soft_stroke_does_not_depend_on_how_often_it_passes(node):
    once, often = node("""
    for (const passes of [1, 5]) {
      store.painted.fill(null);
      store.painted[1] = 0.6;
      const stroke = store.begin();
      for (let k = 0; k < passes; k++) {
        store.brush(stroke, [0.5, 0.5], [0.5, 0.5], { size: 4, soft: 1 }, 1);
      }
      say(store.painted);
    }
    """)
    # half of the way from .6 (painted) and from .2 (the model's own) to 1, beside the middle
    assert once == often and once[:2] == [1, 0.8] and once[3] == 0.6

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
from lib.edit import LOW
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
    class_token: np.ndarray


class FakeSession:
    """Five pictures on 2 x 3 cells, two blocks of two heads, and outcomes that a hand can check.

    Unedited: probabilities .6, .3, .1; every cell gets attention .1, the class token keeps .4.
    Edited: the masked cells share .9 evenly, the class token keeps .1, in the edited blocks; the
    second class wins (.2, .7, .1) where the mean of the asked values is above one half.
    """

    grid, depth, num_heads, num_prefix = (2, 3), 2, 2, 1

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
        steps = len(controller._histories[0])
        operate(controller, name, *arguments)
        if len(controller._histories[0]) > steps:
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
        (lambda c: c.set_scope(blocks=(2,)), r"blocks holds 2, but the model has 2 blocks"),
        (lambda c: c.set_scope(heads=(0, 5)), r"heads holds 5, but the model has 2 heads"),
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


def browser_says(widget, **state):
    """An update message through the comm, as the kernel delivers it."""
    message = {"content": {"data": {"method": "update", "state": state}}, "buffers": []}
    widget.comm.handle_msg(message)


@pytest.fixture
def tool(tmp_path):
    if brush.anywidget is None:
        pytest.skip("anywidget is absent")
    made = attention_editor(FakeSession(), folder=tmp_path / "corrections", author="me")
    assert made.errors == []
    return made


def result(tool):
    return shown_text(tool._html["verdict"].value + tool._html["result"].value)[0]


def test_a_stroke_reaches_controller_scores_and_browser(tool):
    assert "The model says owl" in result(tool)
    revision = tool.paint.revision
    painted = [0.9, 0.9, None, None, None, None]
    browser_says(tool.paint, painted=painted, stroke=1)
    np.testing.assert_array_equal(
        tool.controller.painted, np.float32([[0.9, 0.9, np.nan], [np.nan] * 3])
    )
    assert tool.paint.ack == 1 and tool.paint.revision == revision  # it need not take ours
    assert "The prediction changed from owl" in result(tool)
    assert "owl 0.60 0.20 -40.0" in result(tool)
    assert tool.paint.sentence == tool.controller.summary()
    browser_says(tool.paint, painted=[0.8, *painted[1:]], stroke=1)
    assert tool.paint.ack == 2 and len(tool.controller._histories[0]) == 2
    assert tool.errors == [] and not tool.controls["undo"].disabled


def test_undo_of_the_browser_and_of_the_button(tool):
    for number in (1, 2, 3):
        browser_says(tool.paint, painted=[number / 10] * 6, stroke=number)
    sent = {"n": 1, "subject": 0, "revision": tool.paint.revision, "action": "undo"}
    browser_says(tool.paint, sent=sent)
    assert tool.paint.painted == [0.2] * 6 and tool.paint.revision == sent["revision"] + 1
    tool.controls["undo"].click()
    assert tool.paint.painted == [0.1] * 6 and tool.paint.revision == sent["revision"] + 2
    browser_says(tool.paint, sent={**sent, "n": 2, "action": "redo"})  # pressed before it came
    assert tool.paint.painted == [0.2] * 6
    browser_says(tool.paint, sent={**sent, "n": 3, "subject": 1})  # meant for another picture
    assert tool.paint.painted == [0.2] * 6
    assert tool.paint.ack == 6 and tool.errors == []


def test_a_stroke_on_an_older_map_is_answered_but_not_used(tool):
    sent = {"n": 1, "revision": tool.paint.revision, "action": ""}
    tool.controls["next"].click()
    browser_says(tool.paint, painted=[0.9] * 6, stroke=1, sent=sent, brush_value=0.25)
    assert (
        tool.paint.brush_value == 0.25
        and tool.controller.index == 1
        and tool.controller.edit().is_empty
    )
    assert tool.paint.ack == 1 and tool.paint.painted == [None] * 6
    tool.controls["previous"].click()
    assert tool.controller.edit().is_empty and tool.errors == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"painted": [0.5] * 5, "stroke": 2}, "5 values"),
        ({"painted": ["<b>"] * 6, "stroke": 2}, "&lt;b&gt;"),
        ({"painted": [float("nan")] * 6, "stroke": 2}, "nan"),
        ({"painted": "0.5", "stroke": 2}, "painted"),
        ({"painted": [0.5] * 6, "stroke": "two"}, "stroke"),
        ({"painted": [0.5] * 6, "stroke": 2, "sent": 3}, "has no attribute"),
        ({"sent": {"action": "explode"}}, "explode"),
        ({"brush_value": "<b>"}, "brush_value"),
    ],
)
def test_garbage_is_shown_and_does_not_break_the_tool(tool, state, message):
    good = [0.25] * 5 + [None]
    browser_says(tool.paint, painted=good, stroke=1)
    browser_says(tool.paint, **state)
    (error,) = tool.errors
    shown = tool._html["notice"].value
    assert message in shown and type(error).__name__ in shown and "<b>" not in shown
    assert tool.paint.painted == good and tool.paint.brush_value == 0.9
    assert tool.paint.ack == (1 if "brush_value" in state else 2)
    browser_says(tool.paint, painted=[0.5] * 6, stroke=3)
    assert (tool.controller.painted == 0.5).all() and len(tool.errors) == 1


def test_an_exception_in_a_callback_is_kept_and_shown_as_text(tool):
    tool.controller.session.broken = True
    browser_says(tool.paint, painted=[0.5] * 6, stroke=1)
    assert tool.paint.ack == 1
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
    browser_says(tool.paint, painted=[0.5] * 6, stroke=1)
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
    browser_says(tool.paint, painted=[0.9] * 6, stroke=1)
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
        assert opened[paint]["ack"] == 0 and opened[paint]["painted"] == [None] * 6
        assert opened[paint]["picture"].startswith("data:image/png;base64,")
        shown = [m["content"]["data"] for m in answers if m["msg_type"] == "execute_result"]
        shown += [m["content"]["data"] for m in answers if m["msg_type"] == "display_data"]
        assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)

        update = {"method": "update", "state": {"painted": [0.9] * 6, "stroke": 1}}
        message = client.session.msg("comm_msg", {"comm_id": paint, "data": update})
        client.shell_channel.send(message)
        states = [
            (message["content"]["comm_id"], message["content"]["data"].get("state", {}))
            for message in run(client, message["header"]["msg_id"])
            if message["msg_type"] == "comm_msg"
        ]
        assert [state["ack"] for comm, state in states if comm == paint and "ack" in state] == [1]
        panels = [state["value"] for _, state in states if "value" in state]
        assert any("The prediction changed from owl" in shown_text(html)[0] for html in panels)
        assert not any("painted" in state for _, state in states)  # no echo
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
import { Store, asked, covered, filled } from "./editor.mjs";
class Model {
  constructor(state) { this.state = state; this.saved = []; this.changes = {}; }
  get(name) { return this.state[name]; }
  set(name, value) { this.state[name] = value; this.changes[name] = value; }
  save_changes() { this.saved.push(structuredClone(this.changes)); this.changes = {}; }
}
const model = new Model({ stroke: 4, ack: 0, subject: 0, revision: 1, rows: 2, columns: 3,
  painted: Array(6).fill(null), own: Array(6).fill(0.2) });
const store = new Store(model);
const python = (state) => Object.assign(model.state, state);
const answer = (state = {}) => {
  python({ ...state, ack: model.state.ack + 1 });
  store.update();
};
const say = (value) => console.log(JSON.stringify(value));
"""


@pytest.fixture
def node(tmp_path):
    if NODE is None:
        pytest.skip("node is absent")
    shutil.copy(ROOT / "lib" / "widgets" / "static" / "editor.js", tmp_path / "editor.mjs")

    def run_script(script):
        path = tmp_path / "script.mjs"
        path.write_text(HARNESS + script)
        done = subprocess.run([NODE, path], capture_output=True, text=True)
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


def test_one_message_is_on_its_way_and_the_last_version_arrives(node):
    first, waiting, last, after = node("""
    const stroke = store.begin();
    for (let k = 0; k < 30; k++) store.set(stroke, [[k % 6, k / 100]]);
    say(model.saved);
    store.end(stroke);
    say(model.saved.length);
    answer();
    say(model.saved[1]);
    answer(); answer();
    say([model.saved.length, store.queue.length]);
    """)
    assert len(first) == 1 and waiting == 1
    assert first[0]["painted"] == [0.0, None, None, None, None, None] and first[0]["stroke"] == 5
    assert first[0]["sent"] == {"n": 1, "subject": 0, "revision": 1, "action": ""}
    assert last["painted"] == [0.24, 0.25, 0.26, 0.27, 0.28, 0.29]
    assert after == [2, 0]


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
    answer({ revision: 2, painted: [0.7, 0.7, null, null, null, null] });
    say(store.painted);
    answer({ revision: 3, painted: [0.7, null, null, null, null, null] });
    answer();
    say(store.painted);
    for (const message of model.saved) say(message);
    """)
    steps = [(m.get("stroke"), m["sent"]["action"], m.get("painted")) for m in messages]
    n = None
    assert (first, second) == ([0.7, 0.7, n, n, n, n], [0.7, n, n, n, n, n])
    assert [m["sent"]["revision"] for m in messages] == [1, 1, 1, 1, 1, 2]
    assert steps == [
        (5, "", [0.5, n, n, n, n, n]),
        (5, "", [0.7, n, n, n, n, n]),
        (6, "", [0.7, 0.7, n, n, n, n]),
        (7, "", [0.7, 0.7, 0.7, n, n, n]),
        (None, "undo", None),
        (None, "undo", None),
    ]


def test_strokes_that_python_has_not_seen_outlive_its_own_changes(node):
    dropped, kept, sent, again = node("""
    const seen = store.begin();
    store.set(seen, [[0, 0.5]]);
    answer();
    store.set(seen, [[1, 0.5]]);                 // a second version, on its way
    const unseen = store.begin();
    store.end(seen);
    store.set(unseen, [[4, 0.9], [5, 0.9]]);     // waits
    store.set(unseen, [[5, null]]);              // taken back, so nothing to keep
    python({ painted: [null, null, null, 0.1, null, 0.1], revision: 2 });  // undo, in Python
    store.update();
    say(store.painted);
    answer();                                    // of the second version: not used by Python
    say(model.saved.at(-1));
    answer();
    say([store.queue.length, unseen.taken]);
    store.set(unseen, [[0, 0.3]]); answer(); answer();
    say(store.painted);
    """)
    n = None
    assert dropped == [n, n, n, 0.1, 0.9, 0.1]
    assert kept["painted"] == dropped and kept["sent"]["revision"] == 2
    assert sent == [1, True] and again[0] == 0.3


def test_strokes_do_not_move_to_another_picture(node):
    painted, messages, after = node("""
    const stroke = store.begin();
    store.set(stroke, [[0, 0.5]]);
    store.set(stroke, [[1, 0.5]]);
    python({ painted: Array(6).fill(null), revision: 2, subject: 1 });
    store.update();
    say(store.painted);
    answer(); answer();
    say(model.saved.length);
    store.set(stroke, [[2, 0.5]]);  // the hand is still down: a new stroke on the new picture
    say(model.saved.at(-1));
    """)
    assert painted == [None] * 6 and messages == 1
    assert after["painted"] == [None, None, 0.5, None, None, None] and after["stroke"] == 6


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

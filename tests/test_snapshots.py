"""Snapshots: state, table and cards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from test_editor import NASTY, FakeSession, shown_text

from lib.model.vit import SigmoidViT
from lib.widgets.controller import EditorController
from lib.widgets.session import LiveSession
from lib.widgets.snapshots import READY, SnapshotList, SnapshotPanel


@pytest.fixture
def controller(toy):
    return EditorController(LiveSession(*toy))


@pytest.fixture
def kept(controller):
    return SnapshotList(controller)


@pytest.fixture
def panel(controller):
    made = SnapshotPanel(controller, lambda: made.refresh())
    yield made
    assert not made.errors


def names(kept):
    return [one.name for one in kept.snapshots]


# ------------------------------------------------------------------------------------------ state


def test_a_snapshot_says_what_the_controller_says_and_is_restored_in_one_step(controller, kept):
    controller.paint([(0, 0), (1, 2)], 0.9)
    controller.set_scope(blocks="all")
    controller.strength = 0.7
    work, outcome, moved = controller.work, controller.outcome()[1], controller.moved()
    kept.keep()
    controller.reset()
    controller.paint([(3, 3)], 0.1)
    controller.set_scope(blocks="last", heads="all")
    second = controller.work
    kept.restore(0)
    assert controller.work.equals(work)
    controller.undo()
    assert controller.work.equals(second)
    before, one = kept.judged()
    assert before.name == "before" and before.edit.is_empty and before.before is before.after
    assert (one.after.probabilities == outcome.probabilities).all()
    assert moved > 0
    assert one.edit.strength == 0.7 and one.edit.blocks == "all"
    kept.restore(None)
    assert controller.edit().is_empty
    controller.undo()
    assert controller.work.equals(second)


def test_the_table(controller, kept):
    controller.paint([(0, 0), (1, 2)], 0.95)
    kept.keep("the sky")
    table = kept.to_frame()
    before, after = (one.probabilities for one in controller.outcome())
    true, classes = controller.shown.label, controller.session.classes
    assert table["name"].tolist() == ["before", "the sky"]
    assert table["prediction"].tolist() == [classes[before.argmax()], classes[after.argmax()]]
    assert table["p_true"].tolist() == [before[true], after[true]]
    assert table["change"].tolist() == pytest.approx([0, 100 * (after[true] - before[true])])
    assert table["right"].tolist() == [p.argmax() == true for p in (before, after)]
    assert table["moved"].tolist() == [0, controller.moved()]
    assert table["cells"].tolist() == [0, 2]
    assert (
        table[["blocks", "heads", "queries", "offset"]] == ["last", "mean", "cls", "centred"]
    ).all(axis=None)


def test_each_picture_has_snapshots_of_its_own(controller, kept):
    controller.paint([(0, 0)], 0.9)
    kept.keep()
    controller.open(1)
    assert names(kept) == []
    controller.paint([(0, 1)], 0.9)
    kept.keep("second")
    controller.open(0)
    assert names(kept) == ["A"]
    assert kept.judged()[1].edit.mask[0, 0]


@given(
    st.lists(
        st.tuples(st.sampled_from(["keep", "move", "delete", "back"]), st.integers(0, 9)),
        max_size=20,
    )
)
def test_names_are_unique_and_nothing_is_lost_whatever_is_done(actions):
    controller = EditorController(FakeSession())
    kept, made, gone = SnapshotList(controller), 0, []
    for action, number in actions:
        count = len(kept.snapshots)
        if action == "keep":
            controller.paint([(0, 0)], (made + 1) / 100)
            kept.keep()
            made += 1
        elif action == "move" and count:
            one = kept.snapshots[number % count]
            place = kept.move(number % count, 1 - number % 3)
            assert kept.snapshots[place] is one
        elif action == "delete" and count:
            gone.append(kept.delete(number % count).work)
        elif action == "back" and kept.can_bring_back:
            kept.bring_back()
            assert any(one.work is gone[-1] for one in kept.snapshots)
            gone.pop()
        assert len(set(names(kept))) == len(kept.snapshots) == made - len(gone)


def test_letters_go_on_after_z(kept, controller):
    for k in range(28):
        controller.paint([(0, 0)], (k + 1) / 100)
        kept.keep()
    assert names(kept)[0] == "A" and names(kept)[25:] == ["Z", "AA", "AB"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda kept: kept.keep(), "kept already, as A"),
        (lambda kept: (kept.controller.reset(), kept.keep()), "nothing is edited"),
        (lambda kept: kept.rename(0, "  "), "needs a name"),
        (lambda kept: kept.rename(0, "before"), '"before" is taken'),
        (lambda kept: kept.rename(0, "B"), '"B" is taken'),
    ],
)
def test_what_makes_no_sense_is_one_sentence(kept, controller, call, message):
    controller.paint([(0, 1)], 0.9)
    kept.keep()
    controller.paint([(0, 2)], 0.9)
    kept.keep()
    controller.undo()
    with pytest.raises(ValueError, match=message):
        call(kept)
    assert names(kept) == ["A", "B"]


def test_ready_made_maps_are_asked_of_what_the_heads_see_together(controller, kept):
    controller.set_scope(blocks="all", heads="all")
    controller.strength = 0.5
    for name in READY:
        kept.keep_ready_made(name)
    assert names(kept) == [*READY]
    by_name = {one.name: one for one in kept.judged()}
    for name in READY:
        edit = by_name[name].edit
        assert (edit.heads, edit.offset, edit.blocks, edit.strength) == (
            "mean",
            "centred",
            "all",
            0.5,
        )
    # the odds of people's map are its distribution: P * h / sum(h)
    human = controller.shown.human
    values = by_name["people's map"].edit.values.numpy()
    wanted = np.maximum(human / human.mean(), 0.02)
    np.testing.assert_allclose(values / (1 - values), wanted, rtol=1e-3)
    np.testing.assert_allclose(by_name["uniform"].edit.values, 0.5, atol=1e-5)
    maps = controller.session.dataset.maps[0].numpy().mean(axis=0)
    values = by_name["mean map"].edit.values.numpy()
    np.testing.assert_allclose(values / (1 - values), maps / maps.mean(), rtol=1e-3)
    # at full strength the heads together see what was asked for
    controller.strength, controller.block = 1.0, 2
    controller.set_scope(blocks="last")
    with pytest.raises(ValueError, match="kept already"):
        kept.keep_ready_made("box")
        kept.keep_ready_made("box")
    box = controller.shown.box
    seen = kept.judged()[-1].after.attention[2]
    np.testing.assert_allclose(
        seen / seen.sum(), np.maximum(box / box.mean(), 0.02) / 16, atol=0.002
    )
    assert controller.work.sliders["strength"] == 1 and np.isnan(controller.painted).all()


def test_what_a_picture_does_not_have_is_said():
    controller = EditorController(FakeSession(), index=1)
    kept = SnapshotList(controller)
    for name, why in (("people's map", "has no people's map"), ("box", "has no box"),
                      ("mean map", "data set has no human maps")):  # fmt: skip
        assert why in kept.ready_made(name)[1]
        with pytest.raises(ValueError, match=why):
            kept.keep_ready_made(name)
    kept.keep_ready_made("uniform")
    controller.open(0)  # partly known: what is not stays free
    kept.keep_ready_made("people's map")
    assert not kept.judged()[1].edit.mask[1, 0] and kept.judged()[1].edit.mask.sum() == 5


# ------------------------------------------------------------------------------------------ cards


def cards(panel):
    return [shown_text(" ".join(w.value for w in find_html(box)))[0] for box in panel._row.children]


def find_html(box):
    if hasattr(box, "children"):
        return [found for child in box.children for found in find_html(child)]
    return [box] if type(box).__name__ == "HTML" else []


def card(panel, place):
    return panel._cards[place]


def test_the_panel_keeps_shows_renames_moves_deletes_and_restores(panel):
    controller, said = panel.controller, lambda: shown_text(panel._said.value)[0]
    assert panel.controls["keep"].disabled and "paint first" in panel.controls["keep"].tooltip
    assert len(cards(panel)) == 1
    controller.paint([(1, 1), (1, 2)], 0.95)
    panel.refresh()
    panel.controls["keep"].click()
    assert said() == "Kept as A."
    controller.set_scope(blocks="all")
    panel.refresh()
    panel.controls["keep"].click()
    first, a, b = cards(panel)
    mark = (
        "✓ right"
        if controller.outcome()[0].probabilities.argmax() == controller.shown.label
        else "✗"
    )
    assert first.startswith("before") and mark in first and "moved" not in first
    assert "of the attention moved; last block, mean of the heads" in a and "all blocks" in b
    p = controller.outcome()[1].probabilities[controller.shown.label]
    assert f"{p:.2f} {controller.shown.class_name} true" in b
    assert "cp-now" in panel._row.children[2]._dom_classes  # the present edit

    card(panel, 0).name.value = "beak"
    assert names(panel.kept) == ["beak", "B"]
    card(panel, 0).moves[1].click()
    assert names(panel.kept) == ["B", "beak"] and card(panel, 1).name.value == "beak"
    assert card(panel, 0).moves[-1].disabled and "first already" in card(panel, 0).moves[-1].tooltip
    card(panel, 1).restore.click()
    assert controller.scope["blocks"] == "last"
    assert "cp-now" in panel._row.children[2]._dom_classes
    card(panel, 1).delete.click()
    assert said() == "Deleted beak." and names(panel.kept) == ["B"] and len(cards(panel)) == 2
    assert panel.controls["bring_back"].layout.display is None
    panel.controls["bring_back"].click()
    assert names(panel.kept) == ["B", "beak"]
    assert panel.controls["bring_back"].layout.display == "none"
    panel._first.restore.click()
    assert controller.edit().is_empty and "cp-now" in panel._row.children[0]._dom_classes

    controller.open(1)
    panel.refresh()
    assert len(cards(panel)) == 1
    controller.open(0)
    panel.refresh()
    assert len(cards(panel)) == 3


def test_a_mistake_is_told_at_the_buttons_and_gone_with_the_next_action(panel):
    panel.controller.paint([(1, 1)], 0.95)
    panel.refresh()
    panel.controls["keep"].click()
    panel.controls["keep"].click()
    assert "kept already, as A" in panel._said.value and 'role="alert"' in panel._said.value
    card(panel, 0).name.value = "before"
    assert "taken" in panel._said.value and card(panel, 0).name.value == "A"
    card(panel, 0).name.value = "wing"
    assert panel._said.value == "" and names(panel.kept) == ["wing"]
    assert len(panel.errors) == 2
    panel.errors.clear()


def test_another_model_judges_anew_and_it_is_said(panel):
    panel.controller.paint([(1, 1)], 0.95)
    panel.refresh()
    panel.controls["keep"].click()
    shown, table = cards(panel), panel.kept.to_frame()
    session = panel.controller.session
    with torch.no_grad():
        other = SigmoidViT(tiny_vit(classes=8, seed=3))
    other.classes = session.model.classes
    session.replace_model(other)
    panel.refresh()
    assert "another one now: all outcomes were computed anew" in panel._said.value
    again = panel.kept.to_frame()
    assert (again["p_true"] != table["p_true"]).all()
    assert all(old != new for old, new in zip(shown, cards(panel), strict=True))
    panel.controls["bring_back"].click()  # the next action
    assert panel._said.value == ""


def test_names_are_text_and_cards_are_made_once():
    session = FakeSession()
    controller = EditorController(session)
    panel = SnapshotPanel(controller, lambda: None)
    controller.paint([(0, 0)], 0.9)
    panel.refresh()
    panel.controls["keep"].click()
    card(panel, 0).name.value = NASTY
    assert NASTY in cards(panel)[1]  # a class, shown as text
    markup = " ".join(w.value for w in find_html(panel))
    assert "<img src=x" not in markup
    asked, texts = session.outcomes, dict(panel._texts)
    controller.paint([(0, 1)], 0.9)
    panel.refresh()
    assert all(panel._texts[name][2] is texts[name][2] for name in texts)
    assert session.outcomes == asked  # the present edit alone is asked for, by the editor
    assert names(panel.kept) == [NASTY] and not panel.errors

"""One rule for many pictures in the editor, without a browser."""

from __future__ import annotations

import asyncio
import re
from copy import copy

import numpy as np
import pytest
from test_editor import shown_text

from lib.evaluation import many
from lib.widgets import many_panel
from lib.widgets.controller import EditorController
from lib.widgets.many_panel import ManyPanel
from lib.widgets.session import LiveSession


@pytest.fixture
def panel(toy):
    made = ManyPanel(EditorController(LiveSession(*toy)))
    yield made
    assert not made.errors


def said(panel):
    return shown_text(panel._words.value)[0]


def apply(panel, meanwhile=lambda: None):
    """Presses Apply in a running loop, as in a kernel, and waits for the thread."""

    async def press():
        panel.controls["apply"].click()
        meanwhile()
        while panel._busy:
            await asyncio.sleep(0.01)

    asyncio.run(press())


def test_a_rule_is_applied_beside_its_controls(panel):
    controller = panel.controller
    controller.set_scope(blocks="all")
    controller.strength = 0.5
    assert panel.controls["set"].options == ("test (24)",)
    panel.controls["rule"].value = "people's map"
    apply(panel)
    session = controller.session
    rules = [many.make_rules(session.dataset)["people's map"]]
    scope = {"blocks": "all", "heads": "mean", "offset": "centred", "strength": 0.5}
    frame = many.edit_many(session.model, session.dataset, rules, None, {"": scope})
    wanted = many.count_changes(frame)
    counts = ["pictures", "right", "right_to_wrong", "wrong_to_right", "changed", "p_change"]
    assert (panel.table[counts] == wanted[counts]).all(axis=None)
    assert panel.table["control"].tolist() == ["own", *many.CONTROLS]
    text, tags = shown_text(panel._result.value)
    assert "Edited: all blocks, mean of the heads, strength 0.50." in text and "img" in tags
    row = panel.table.iloc[0]
    assert f"people's map 24 {row['right']} {row['right_to_wrong']} {row['wrong_to_right']}" in text
    assert "control: random cells 24" in text
    assert said(panel) == "24 pictures, test." and not panel.controls["apply"].disabled


def test_this_edit_and_all_rules_on_some_of_the_pictures(panel, monkeypatch):
    monkeypatch.setattr(many_panel, "HOW_MANY", (5,))
    panel = ManyPanel(panel.controller)
    panel.controls["number"].value = 5
    panel.controls["rule"].value = "this edit"
    panel.controls["apply"].click()
    assert "nothing is edited" in panel._words.value and not panel._busy
    panel.controller.paint([(0, 0), (1, 1)], 0.9)
    seen = []
    counted = many_panel.count_changes
    monkeypatch.setattr(many_panel, "count_changes", lambda f: seen.append(f) or counted(f))
    apply(panel)
    assert sorted(set(seen[0]["index"])) == np.linspace(0, 23, 5).round().tolist()
    own = seen[0].query("control == 'own'").set_index("index")
    for index in (0, 23):
        panel.controller.session.open(index)
        after = panel.controller.session.outcome(index, panel.controller.edit()).probabilities
        assert own.loc[index, "p_true"] == pytest.approx(after[own.loc[index, "label"]], abs=1e-4)
    panel.controls["rule"].value = "all of them"
    apply(panel)
    assert panel.table["rule"].unique().tolist() == [*many_panel.OFFERED]
    assert len(panel.errors) == 1


def test_the_bar_moves_at_once_and_cancel_keeps_what_was_done(panel, monkeypatch):
    monkeypatch.setattr(many, "PER_BATCH", 4)
    shown = []
    panel._words.observe(lambda change: shown.append(change["new"]), "value")

    def cancel():
        assert re.search(r"<progress [^>]*max=\"24\"></progress> 0 of 24", panel._words.value)
        assert panel.controls["apply"].disabled and not panel.controls["cancel"].disabled
        panel.start()  # a second press does nothing
        panel._progress = stop_at_8

    def stop_at_8(done, of):
        ManyPanel._progress(panel, done, of)
        if done == 8:
            panel.controls["cancel"].click()

    apply(panel, cancel)
    assert any('value="4" max="24"' in words for words in shown)
    match = re.fullmatch(r"Cancelled after (\d+) pictures; what they say is below\.", said(panel))
    assert 8 <= int(match[1]) < 24 and panel.table["pictures"].max() == int(match[1])
    assert panel.controls["cancel"].disabled and not panel.controls["apply"].disabled


def test_what_goes_wrong_is_told_and_ends_it(panel, monkeypatch):
    session = panel.controller.session
    table = session.dataset.table
    monkeypatch.setattr(session.dataset, "table", table.drop(columns=["x0", "y0", "x1", "y1"]))
    panel.controls["rule"].value = "outside the box low"
    apply(panel)
    assert 'nothing for "outside the box low"; choose another rule' in said(panel)
    assert 'role="alert"' in panel._words.value and not panel.controls["apply"].disabled
    assert panel.table is None and panel._result.value == ""
    panel.errors.clear()


def test_the_pictures_are_chosen_by_their_part(toy):
    model, dataset = toy
    joined = copy(dataset)
    joined.table = dataset.table.assign(part=["train"] * 20 + ["val"] * 4)
    panel = ManyPanel(EditorController(LiveSession(model, joined)))
    panel.controls["set"].value = "validation (4)"
    apply(panel)
    assert said(panel) == "4 pictures, validation." and panel.table["pictures"].max() == 4
    joined.table, joined.part = dataset.table, None  # pictures of anybody's
    panel = ManyPanel(EditorController(LiveSession(model, joined)))
    assert panel.controls["set"].options == ("all (24)",)
    apply(panel)
    assert panel.table["pictures"].max() == 24 and not panel.errors

"""The teaching panel without a browser: by cell, by thread, cancelled, undone, and its mistakes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_vit

from lib.config import DataConfig
from lib.data.corrections import save_correction
from lib.data.dataset import make_dataset
from lib.data.joined import JoinedDataset
from lib.edit import AttentionEdit
from lib.experiments.simulate import simulated_corrections
from lib.model.vit import SigmoidViT
from lib.training.teach import TeachConfig
from lib.widgets.controller import EditorController
from lib.widgets.session import LiveSession
from lib.widgets.teaching import TeachPanel

MEAN, STD = (0.5,) * 3, (0.5,) * 3


@pytest.fixture(scope="module")
def birds():
    config = DataConfig(toy_train=24, toy_val=8, toy_test=16, image_size=(64, 64))
    parts = ("train", "val", "test")
    return {part: make_dataset(config, part, (4, 4), MEAN, STD) for part in parts}


@pytest.fixture
def panel(birds, tmp_path):
    session = LiveSession(SigmoidViT(tiny_vit(classes=8)), birds["train"])
    config = TeachConfig(steps=3, replay=16, batch_size=8)
    return TeachPanel(session, birds["train"], birds["test"], tmp_path / "saved", config)


def save(panel, birds, count=6):
    for one in simulated_corrections(birds["train"], range(count)):
        save_correction(one, panel.folder)


def weights(session):
    return torch.cat([p.detach().flatten() for p in session.model.parameters()])


def test_without_corrections_it_says_what_to_do(panel):
    panel.controls["teach"].click()
    assert "no corrections yet that can teach; paint and save one first" in panel._words.value
    assert isinstance(panel.errors[0], ValueError)
    teach = panel.controls["teach"]
    assert teach.disabled and teach.tooltip == "paint and save a correction first"


def test_teaching_changes_the_sessions_model_and_undo_brings_it_back(panel, birds):
    save(panel, birds)
    changes = []
    panel.on_change = lambda: changes.append(panel.session.fingerprint)
    panel.refresh()
    assert [text for text, _ in panel.controls["count"].options] == [
        "all 6 saved", "the newest", "the newest 5",
    ]  # fmt: skip
    assert panel.controls["count"].label == "all 6 saved"
    first = weights(panel.session)
    report = panel.teach()
    assert len(report.used) == 6 and len(report.history) == 3 and not panel.errors
    assert not torch.equal(weights(panel.session), first)
    assert {"corrected", "replayed"} <= set(panel.table.index)
    assert panel.table.loc["corrected", "pictures"] == 6
    shown = panel._result.value
    row = panel.table.loc["corrected"]
    assert f"{row['NSS before']:.2f} → <b>{row['NSS after']:.2f}</b>" in shown
    assert "nan" not in shown and shown.count('alt="the painted cells"') == 4
    assert shown.count("attention before teaching") == shown.count("attention after teaching") > 4
    panel.controls["count"].value = 5
    panel.controls["blocks"].value = panel.session.layout.depth  # other blocks: another teacher
    assert len(panel.teach().used) == 5
    panel.undo()
    panel.controls["undo"].click()
    assert torch.equal(weights(panel.session), first) and len(changes) == 4
    assert panel.controls["undo"].disabled


def test_the_newest_are_taken(panel, birds):
    save(panel, birds)
    panel.refresh()
    panel.controls["count"].value = 1
    newest = panel._corrections()[-1]
    assert panel.teach().used == (newest,)


def run_button(panel, before_it_ends=lambda: None):
    """Presses Teach in a running event loop, as a kernel has, and waits for the end."""

    async def press():
        panel.controls["teach"].click()
        assert panel._busy and "preparing" in panel._words.value
        before_it_ends()
        while panel._busy:
            await asyncio.sleep(0.01)

    asyncio.run(press())


def test_the_button_teaches_in_a_thread(panel, birds):
    save(panel, birds)
    first = weights(panel.session)
    run_button(panel)
    assert not panel.errors and len(panel.report.used) == 6
    assert not torch.equal(weights(panel.session), first)
    assert panel._bar.value == panel._bar.max


def test_cancel_leaves_the_model_alone(panel, birds):
    save(panel, birds)
    first = weights(panel.session)
    run_button(panel, panel.controls["cancel"].click)
    assert panel.report.cancelled and torch.equal(weights(panel.session), first)
    assert "Cancelled" in panel._words.value and panel.controls["undo"].disabled


def test_names_with_html_are_shown_as_text(panel, birds):
    save(panel, birds, 1)
    bad = simulated_corrections(birds["train"], [1])[0]
    save_correction(type(bad)(**{**vars(bad), "image_id": "<b>x</b>"}), panel.folder)
    panel.teach()
    assert "&lt;b&gt;x" in panel._left_out.value and "<b>" not in panel._left_out.value
    assert np.isfinite(panel.table.loc["corrected", "accuracy after"])


def test_what_cannot_teach_is_named_before_teach_is_pressed(panel, birds):
    save(panel, birds, 2)
    (panel.folder / "broken.json").write_text("?")
    wide = simulated_corrections(birds["train"], [3])[0]
    mask = np.ones((3, 8), bool)
    save_correction(replace(wide, edit=AttentionEdit(mask, 0.0)), panel.folder)
    panel.refresh()
    assert panel.controls["count"].label == "all 2 saved"
    words = panel._left_out.value
    assert words.startswith("2 saved files cannot teach") and "broken.json: it is not JSON" in words
    assert "grid is 3 x 8, but the model has 4 x 4 patches" in words
    save_correction(simulated_corrections(birds["train"], [0])[0], panel.folder)
    panel.refresh()  # the older one of that picture is replaced: nothing is wrong with that
    assert panel._left_out.value == words and panel.controls["count"].label == "all 2 saved"


def test_progress_begins_at_once_and_says_what_it_does(panel, birds, monkeypatch):
    save(panel, birds)
    said = []
    monkeypatch.setattr(panel, "_count", lambda *now: said.append(now))
    panel.start()  # without a loop it is done when it returns
    assert said[0] == ("preparing", 1, 0) and said[1][0] == "preparing"
    assert [what for what, *_ in dict.fromkeys((one[0],) for one in said)] == [
        "preparing", "teaching", "comparing", "done",
    ]  # fmt: skip
    steps = [(total, done) for what, total, done in said if what == "teaching"]
    assert steps == [(3, 1), (3, 2), (3, 3)]


def test_pictures_that_pass_the_trunk_are_counted(panel):
    told = []
    for left in (70, 38, 6, 2, 90, 58):
        panel._pass("preparing", left, "{} of {}")
        told.append((panel._words.value, panel._bar.value, panel._bar.max))
    words = ["0 of 70", "32 of 70", "64 of 70", "68 of 70", "0 of 90", "32 of 90"]
    assert [one[0] for one in told] == words
    assert told[1][1:] == (32, 70)


def test_after_teaching_the_old_edit_is_laid_aside(panel, birds):
    controller, shown = EditorController(panel.session, 0), []
    panel.attach(controller, lambda: shown.append(controller.edit().is_empty))
    for index in (1, 0):
        controller.open(index)
        controller.paint([(1, 1)], 0.9)
    save(panel, birds)
    panel.start()
    assert shown == [True] and controller.can_undo and not panel.errors
    controller.open(1)
    assert np.isnan(controller.painted).all()
    controller.undo()
    assert controller.painted[1, 1] == np.float32(0.9)


def test_corrected_validation_pictures_teach_and_are_said_to(birds, tmp_path):
    both = JoinedDataset(birds["train"], birds["val"])
    session = LiveSession(SigmoidViT(tiny_vit(classes=8)), both)
    config = TeachConfig(steps=3, replay=16, batch_size=8)
    panel = TeachPanel(session, birds["train"], birds["val"], tmp_path, config)
    for one in simulated_corrections(both, [0, 24, 25]):
        save_correction(one, tmp_path)
    report = panel.teach()
    assert len(report.used) == 3 and not report.skipped
    assert "2 of the corrected pictures are validation pictures, and no longer held out" in (
        panel._result.value
    )
    held_out = [name for name in panel.table.index if name.startswith("held out")]
    assert panel.table.loc[held_out, "pictures"].sum() == len(birds["val"]) - 2


def test_test_pictures_are_not_corrected(birds, tmp_path):
    session = LiveSession(SigmoidViT(tiny_vit(classes=8)), birds["test"])
    with pytest.raises(ValueError, match="test pictures, which are kept to measure"):
        TeachPanel(session, birds["train"], birds["test"], tmp_path)

"""The teaching panel without a browser: by cell, by thread, cancelled, undone, and its mistakes."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from conftest import tiny_vit

from lib.config import DataConfig
from lib.data.corrections import save_correction
from lib.data.dataset import make_dataset
from lib.experiments.simulate import simulated_corrections
from lib.model.vit import SigmoidViT
from lib.training.teach import TeachConfig
from lib.widgets.session import LiveSession
from lib.widgets.teaching import TeachPanel

MEAN, STD = (0.5,) * 3, (0.5,) * 3


@pytest.fixture(scope="module")
def birds():
    config = DataConfig(toy_train=24, toy_val=8, toy_test=16, image_size=(64, 64))
    return {part: make_dataset(config, part, (4, 4), MEAN, STD) for part in ("train", "test")}


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
    assert "no corrections yet; paint and save one first" in panel._words.value
    assert isinstance(panel.errors[0], ValueError) and not panel.controls["teach"].disabled


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
    panel.controls["blocks"].value = panel.session.depth  # other blocks: another teacher
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
        assert panel._thread.is_alive()
        before_it_ends()
        while panel.controls["teach"].disabled:
            await asyncio.sleep(0.01)

    asyncio.run(press())


def test_the_button_teaches_in_a_thread(panel, birds):
    save(panel, birds)
    first = weights(panel.session)
    run_button(panel)
    assert not panel.errors and len(panel.report.used) == 6
    assert not torch.equal(weights(panel.session), first)
    assert panel._bar.value == 3


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
    assert "&lt;b&gt;x" in panel._words.value and "<b>" not in panel._words.value
    assert np.isfinite(panel.table.loc["corrected", "accuracy after"])

"""The editor's session: what it says of its model and pictures, against the real model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CUB_UNSEEN, tiny_vit
from test_live import rows_after

from lib.config import DataConfig
from lib.data.dataset import BirdDataset, make_dataset
from lib.data.sources import Record
from lib.edit import AttentionEdit, Layout, sigmoid_attention
from lib.model.live import LiveImage
from lib.model.vit import SigmoidViT
from lib.widgets.controller import EditorController
from lib.widgets.rungs import climb
from lib.widgets.session import KEPT_IMAGES, LiveSession

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def birds() -> BirdDataset:
    return make_dataset(DataConfig(toy_test=12), "test", (4, 4), MEAN, STD)


@pytest.fixture
def bird_model() -> SigmoidViT:
    return SigmoidViT(tiny_vit(classes=8)).train()


@pytest.fixture
def session(bird_model, birds) -> LiveSession:
    return LiveSession(bird_model, birds)


def painted(seed: int = 0, **scope) -> AttentionEdit:
    rng = np.random.default_rng(seed)
    return AttentionEdit(rng.random((4, 4)) < 0.5, rng.random((4, 4)), **scope)


def test_what_a_session_says_of_its_model(session, bird_model, birds):
    assert len(session) == 12 and session.classes == birds.classes
    assert session.grid == (4, 4) and session.image_size == (64, 64) and session.num_prefix == 1
    assert session.layout == Layout(heads=(4, 4, 4), read=(0, 1, 2)) == bird_model.layout
    assert not bird_model.training


def test_open_shows_the_picture_and_its_people(session, birds):
    shown = session.open(3)
    assert shown.index == 3 and shown.image_id == str(birds.table["image_id"][3])
    assert np.array_equal(shown.image, birds.image(3)) and shown.image.dtype == np.uint8
    assert shown.class_name == birds.classes[shown.label] == birds.table["class_name"][3]
    assert np.array_equal(shown.human, birds[3]["human"].view(4, 4)) and shown.human.max() == 1
    corners = birds.table[["x0", "y0", "x1", "y1"]].iloc[3]
    area = (corners["x1"] - corners["x0"]) * (corners["y1"] - corners["y0"])
    assert shown.box.shape == (4, 4) and shown.box.sum() * 16 * 16 == pytest.approx(area, rel=1e-5)


def test_open_says_what_is_not_known(cub, tmp_path):
    model = SigmoidViT(tiny_vit(img_size=(48, 64), classes=2))
    dataset = make_dataset(cub, "train", model.grid, MEAN, STD)
    session = LiveSession(model, dataset)
    opened = {one.image_id: one for one in map(session.open, range(len(dataset)))}
    missing = opened.pop(str(CUB_UNSEEN))
    assert missing.human is None and missing.box.sum() > 0
    assert opened and all(one.human.max() == 1 for one in opened.values())

    half = np.full((48, 64), 0.5, np.float32)
    half[:, :32] = np.nan
    np.save(tmp_path / "half.npy", half)
    pixels = np.zeros((48, 64, 3), np.uint8)
    record = Record(7, 0, pixels, tmp_path / "half.npy", {"": (np.nan,) * 4}, size=(48, 64))
    for one in (record, replace(record, boxes={})):
        data = BirdDataset([one], ["a", "b"], cub, model.grid, MEAN, STD)
        shown = LiveSession(model, data).open(0)
        assert shown.box is None
        assert np.isnan(shown.human[:, :2]).all() and (shown.human[:, 2:] == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("offset", ["none", "centred"])
def test_sigmoid_is_that_of_the_unedited_model(session, bird_model, birds, offset):
    _, rows = bird_model(birds[2]["image"][None], rows="all")
    expected = sigmoid_attention(rows[1][0], offset, 1).view(4, 4, 4)
    heads = session.sigmoid(2, 1, offset)
    assert np.allclose(heads, expected, atol=1e-6) and heads.dtype == np.float32
    session.outcome(2, painted(blocks="all"))  # an edit does not reach it
    assert np.array_equal(session.sigmoid(2, -2, offset), heads)
    together = session.seen_together(2, 1, offset)
    if offset == "centred":  # the mean of the softmax, as multiples of the mean patch
        mean = rows[1][0].double().softmax(-1)[:, 1:].mean(0)
        odds = (mean / mean.mean()).view(4, 4)
        assert np.allclose(together, odds / (1 + odds), atol=1e-6)
    else:
        assert np.allclose(together, expected.mean(0), atol=1e-6)
    controller = EditorController(session, 2)
    controller.block = 1
    controller.set_scope(offset=offset)
    assert np.array_equal(controller.own, together) and together.dtype == np.float32
    controller.set_scope(heads="all")
    assert np.allclose(controller.own, expected.mean(0), atol=1e-6)
    controller.set_scope(heads=(0, 3))
    assert np.allclose(controller.own, expected[[0, 3]].mean(0), atol=1e-6)


@torch.no_grad()
def test_outcome_is_that_of_the_real_model(session, bird_model, birds):
    edit = painted(blocks="all", heads=(1, 2), offset="centred")
    empty = replace(edit, mask=np.zeros((4, 4), bool))
    for wanted, real in ((edit, edit), (empty, None), (None, None)):
        scores, rows = bird_model(birds[1]["image"][None], edit=real, rows="all")
        after = rows_after(bird_model, rows, real) if real else [row[0] for row in rows.values()]
        mass = torch.stack(after).softmax(-1).mean(1)
        outcome = session.outcome(1, wanted)
        assert np.allclose(outcome.probabilities, scores[0].softmax(-1), atol=1e-5)
        assert np.allclose(outcome.attention, mass[:, 1:].view(3, 4, 4), atol=1e-5)
        assert np.allclose(outcome.prefix, mass[:, 0], atol=1e-5)
        assert outcome.probabilities.dtype == outcome.attention.dtype == np.float32


def test_the_ladder_climbs_through_the_model(session, birds):
    controller = EditorController(session, 5)
    controller.set_scope(blocks=(0,), heads=(1,))
    controller.paint(painted().mask.argwhere(), 0.9)
    edit, steps = controller.edit(), climb(controller)
    names = ["no edit", "last block", "last two", "all blocks", "all blocks, all rows"]
    assert [step["rung"] for step in steps] == names
    label = birds.table["label"][5]
    last_two, all_rows = {"blocks": "last2"}, {"blocks": "all", "queries": "all"}
    for number, scope in ((0, None), (2, last_two), (4, all_rows)):
        outcome, step = session.outcome(5, scope and replace(edit, **scope)), steps[number]
        best = outcome.probabilities.argmax()
        assert step["prediction"] == session.classes[best]
        assert step["probability"] == outcome.probabilities[best]
        assert step["p_true"] == outcome.probabilities[label]
    assert len({step["p_true"] for step in steps}) == 5


def test_the_pictures_used_last_are_kept(session, monkeypatch):
    computed = []
    counted = lambda *args: computed.append(1) or LiveImage(*args)  # noqa: E731
    monkeypatch.setattr("lib.widgets.session.LiveImage", counted)
    for index in range(KEPT_IMAGES):
        session.outcome(index)
        session.outcome(np.int64(index), painted())
    assert len(computed) == KEPT_IMAGES
    session.sigmoid(0, 0, "none")  # still there, and now the one used last
    session.outcome(KEPT_IMAGES)  # drops picture 1
    session.outcome(0)
    assert len(computed) == KEPT_IMAGES + 1
    session.outcome(1)
    assert len(computed) == KEPT_IMAGES + 2


def test_another_model_and_changed_weights_are_noticed(session):
    first, before = session.fingerprint, session.outcome(0).probabilities
    other = SigmoidViT(tiny_vit(classes=8, seed=1, depth=2))
    session.replace_model(other)
    assert session.fingerprint != first and session.layout.depth == 2
    assert session.outcome(0).attention.shape == (2, 4, 4)
    same = SigmoidViT(tiny_vit(classes=8))
    session.replace_model(same)
    assert session.fingerprint == first
    assert np.array_equal(session.outcome(0).probabilities, before)
    with torch.no_grad():
        same.vit.head.bias[0] += 1
    session.replace_model(same)
    assert session.fingerprint != first
    assert session.outcome(0).probabilities[0] > before[0]


def test_fingerprints_name_the_weights():
    model = SigmoidViT(tiny_vit())
    seen = [LiveSession(model, no_pictures()).fingerprint]
    assert len(seen[0]) == 16 and int(seen[0], 16) >= 0
    for change in (torch.bfloat16, torch.float16, torch.float32):
        seen.append(LiveSession(model.to(change), no_pictures()).fingerprint)
    assert len(set(seen)) == 4  # the way through float16 rounds


def no_pictures() -> BirdDataset:
    pixels = np.zeros((64, 64, 3), np.uint8)
    config = DataConfig(name="folder", maps="none")
    return BirdDataset([Record(1, 0, pixels)], list("abcde"), config, (4, 4), MEAN, STD)


@pytest.mark.parametrize("index", [-1, 12])
def test_a_picture_that_is_not_there(session, index):
    for ask in (session.open, session.outcome, lambda i: session.sigmoid(i, 0, "none")):
        with pytest.raises(IndexError, match=rf"image {index} is asked for; .* has 0 to 11"):
            ask(index)


def test_what_does_not_fit_is_refused_in_words(session, bird_model):
    small = AttentionEdit(np.ones((2, 3), bool), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"edit is on 2 x 3 patches, but the model has 4 x 4"):
        session.outcome(0, small)
    with pytest.raises(ValueError, match="block 3 is named"):
        session.sigmoid(0, 3, "none")
    with pytest.raises(ValueError, match="head 9 is named"):
        session.outcome(0, painted(heads=(9,)))
    augmented = make_dataset(DataConfig(toy_train=4), "train", (4, 4), MEAN, STD, augment=True)
    with pytest.raises(ValueError, match=r"augmented, .* make it with augment=False"):
        LiveSession(bird_model, augmented)
    before = session.fingerprint, session.outcome(0).probabilities
    with pytest.raises(ValueError, match="the model has 5 classes, but the data set 8"):
        session.replace_model(SigmoidViT(tiny_vit()))
    with pytest.raises(ValueError, match="has 2 x 2 patches, but the data set 4 x 4"):
        session.replace_model(SigmoidViT(tiny_vit(img_size=32, classes=8)))
    assert session.fingerprint == before[0]  # the old model stays
    assert np.array_equal(session.outcome(0).probabilities, before[1])

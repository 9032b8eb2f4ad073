"""The editor on models of other kinds, and on maps finer than a model's own."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from conftest import VITS, tiny_vit

from lib.config import DataConfig
from lib.data.corrections import load_corrections
from lib.data.dataset import BirdDataset, make_dataset
from lib.data.maps import to_grid
from lib.edit import AttentionEdit
from lib.model.resolution import at_size, own_size
from lib.model.vit import SigmoidViT
from lib.training.teach import TeachConfig
from lib.widgets import brush
from lib.widgets.controller import EditorController
from lib.widgets.editor import AttentionEditor, attention_editor
from lib.widgets.out import as_code
from lib.widgets.session import KEPT_IMAGES, LiveSession, blocks_in_words, scope_in_words
from lib.widgets.snapshots import SnapshotList
from lib.widgets.teaching import TeachPanel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ["rotary", "eva", "pooled", "two_kinds", "left_out", "plain"]


def birds(model: SigmoidViT, part: str = "test", count: int = 4) -> BirdDataset:
    config = DataConfig(**{f"toy_{part}": count}, image_size=own_size(model))
    return make_dataset(config, part, model.grid, MEAN, STD)


def session_of(kind: str, **more) -> LiveSession:
    side = 56 if "patch14" in VITS[kind][0] else 64  # drawn birds are square
    model = SigmoidViT(tiny_vit(kind, classes=8, img_size=side))
    return LiveSession(model, birds(model), **more)


@pytest.fixture
def tool_of(tmp_path):
    if brush.anywidget is None:
        pytest.skip("anywidget is absent")

    def make(kind: str) -> AttentionEditor:
        return attention_editor(session_of(kind), 1, tmp_path / "corrections", "me")

    return make


def menu(tool: AttentionEditor, name: str) -> dict[str, object]:
    return dict(tool.controls[name].options)


def text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_edited_and_shown_is_what_the_model_computes(tool_of, kind):
    tool = tool_of(kind)
    controller, session = tool.controller, tool.controller.session
    image = session.dataset[1]["image"][None]
    assert controller.block == session.layout.depth - 1
    tool._stroke(1, {0: 0.9, 3: 0.1}, "one")
    scopes = [{"queries": "cls"}, {"queries": "all"}]
    for scope in [one | {"blocks": name} for one in scopes for name in ("last", "last2", "all")]:
        controller.set_scope(**scope)
        tool.refresh()
        edit = controller.edit()
        scores = session.model(image, edit=edit)[0]
        found = controller.outcome()[1]
        assert np.allclose(found.probabilities, scores.softmax(-1), atol=1e-5), scope
    assert tool.errors == []
    _, rows = session.model(image, rows="all")
    mass = rows[controller.block][0].softmax(-1).mean(0)
    before = session.outcome(1)
    assert np.allclose(before.attention[-1].ravel(), mass[session.num_prefix :], atol=1e-5)
    assert before.prefix[-1] == pytest.approx(mass[: session.num_prefix].sum().item(), abs=1e-5)
    unread = set(range(session.layout.depth)) - set(session.layout.read)
    assert all(np.isnan(before.attention[block]).all() for block in unread)
    for block in unread:
        with pytest.raises(ValueError, match=f"block {block} is named, but without a class token"):
            session.sigmoid(1, block, "centred")


def test_menus_offer_what_does_something_in_the_model(tool_of):
    plain = tool_of("plain")
    words = {"last block": "last", "last two blocks": "last2", "all blocks": "all"}
    assert menu(plain, "blocks") == words | {"the shown block": "shown"}
    assert menu(plain, "block") == {"0": 0, "1": 1, "2 (last)": 2}
    assert menu(plain, "queries") == {"class token": "cls", "all tokens": "all"}

    siglip = tool_of("pooled")
    assert menu(siglip, "blocks") == {"pooling": "last"}
    assert siglip.controls["block"] not in siglip._more.children  # it has the pooling's map only
    assert menu(siglip, "queries") == {"pooling query": "cls", "all tokens": "all"}
    siglip.controls["queries"].value = "all"
    more = {"pooling": "last", "last block and the pooling": "last2", "all blocks": "all"}
    assert menu(siglip, "blocks") == more and siglip.controls["blocks"].value == "last"
    siglip.controls["blocks"].value = "all"
    siglip.controls["queries"].value = "cls"  # all of them are the pooling now
    assert siglip.controls["blocks"].value == "last" and siglip.errors == []

    perception = tool_of("two_kinds")
    assert menu(perception, "blocks") == more | {"the shown block": "shown"}
    assert menu(perception, "block") == {"0": 0, "1": 1, "2": 2, "pool (last)": 3}
    assert "class token and of the pooling query" in perception.controls["queries"].tooltip


def test_heads_are_those_of_the_shown_and_of_the_edited_block(tool_of):
    tool = tool_of("two_kinds")  # blocks of 4 heads, a pooling of 2
    controls, controller = tool.controls, tool.controller

    def shown() -> int:
        return sum(box.layout.display is None for box in tool._head_boxes)

    assert shown() == 2 and len(controller.own_by_head) == 2
    controls["head_maps"].value = True
    assert sum("img" in thumb.value for thumb in tool._thumbs) == 2
    controls["block"].value = 1
    assert shown() == 4 and sum("img" in thumb.value for thumb in tool._thumbs) == 4
    controls["head_3"].value = True  # the edit is one of the pooling, still
    assert "heads holds 3, but the pooling has 2 heads" in tool._html["notice"].value
    assert controller.scope["heads"] == "mean" and not controls["head_3"].value
    tool.errors.clear()
    controls["blocks"].value = "shown"
    controls["head_3"].value = True
    assert controller.scope["heads"] == (3,) and controller.scope["blocks"] == (1,)
    controls["blocks"].value = "all"
    assert "but the pooling has 2 heads" in tool._html["notice"].value
    assert controller.scope["blocks"] == (1,)
    tool.errors.clear()
    controls["block"].value = 3  # follows, and would edit a head that is not there
    assert controller.scope["blocks"] == (1,) and "has 2 heads" in tool._html["notice"].value


def test_words_and_ladder_name_the_pooling(tool_of):
    for kind, rungs in (
        ("pooled", ["no edit", "pooling", "all blocks, all rows"]),
        ("two_kinds", ["no edit", "pooling", "last two", "all blocks", "all blocks, all rows"]),
    ):
        tool = tool_of(kind)
        tool._stroke(1, {0: 0.9}, "one")
        tool.controls["ladder"].click()
        said = text(tool._html["ladder"].value)
        assert [said.find(f" {rung} ") > 0 for rung in rungs] == [True] * len(rungs)
        assert "Softmax attention of the pooling" in tool._html["result"].value
        assert "last block" not in said
        keeps = "class token keeps" in tool._html["result"].value
        assert keeps == (kind == "two_kinds") and tool.errors == []
    layout = tool.controller.session.layout
    assert blocks_in_words(layout, "pool") == blocks_in_words(layout, (3,)) == "the pooling"
    assert blocks_in_words(layout, (0, 2, 3)) == "block 0, 2, the pooling"
    edit = AttentionEdit(np.ones((4, 4), bool), 0.5, blocks="pool", heads=(1,), queries="all")
    assert scope_in_words(edit, layout) == "pooling, head 1, all rows, offset none"
    rotary = tool_of("rotary")
    assert "Softmax attention of block 2" in rotary._html["result"].value
    assert "class and other tokens keep" in rotary._html["result"].value


@pytest.mark.parametrize("kind", ["pooled", "two_kinds", "rotary"])
def test_a_correction_is_saved_and_opened_with_the_name_of_its_block(tool_of, kind):
    tool = tool_of(kind)
    blocks = "last" if kind == "rotary" else "pool"
    tool.controller.set_scope(blocks=blocks)
    tool._stroke(1, {0: 0.75, 5: 0.25}, "one")
    edit = tool.controller.edit()
    tool.controls["save"].click()
    (saved,), _ = load_corrections(tool._folder)
    assert saved.edit == edit and saved.edit.blocks == blocks
    tool.controls["reset"].click()
    tool.controller.set_scope(blocks="last")
    opener = next(one for one in tool._openers.children if one.description == "Saved corrections")
    opener.value = True
    shelf = tool.parts["Saved corrections"]
    shelf._choose(shelf.thumbs.items[0])
    shelf.controls["open"].click()
    assert tool.controller.edit() == edit and shelf.errors == tool.errors == []


def test_a_correction_of_the_pool_is_refused_in_a_model_without(tool_of):
    tool_of("pooled")
    tool = tool_of("plain")
    with pytest.raises(ValueError, match='blocks is "pool", but this model does not pool'):
        tool.controller.set_scope(blocks="pool")


# ------------------------------------------------------------------------------------ finer maps


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_finer_session_is_the_model_at_that_size(kind):
    own, finer = session_of(kind), session_of(kind)
    size = tuple(2 * side for side in own_size(own.model))
    assert session_of(kind, image_size=size).grid == tuple(2 * cells for cells in own.grid)
    finer.see_at(size)
    assert finer.grid == (2 * own.grid[0], 2 * own.grid[1]) and finer.image_size == size
    assert own.model.grid == finer.model.grid and finer.fingerprint == own.fingerprint
    model = at_size(own.model, size)
    shown = finer.open(2)
    assert shown.image.shape == (*size, 3)
    pixels = torch.from_numpy(shown.image).permute(2, 0, 1)[None] / 255
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    edit = AttentionEdit(np.ones(finer.grid, bool), 0.7, heads="mean", offset="centred")
    for one in (None, edit):
        scores = model(images, edit=one)[0].softmax(-1)
        assert np.allclose(finer.outcome(2, one).probabilities, scores, atol=1e-5)
    assert np.array_equal(finer.as_trained(2), own.outcome(2).probabilities) or np.allclose(
        finer.as_trained(2), own.outcome(2).probabilities, atol=1e-6
    )
    assert own.as_trained(2) is None
    finer.see_at(own_size(own.model))
    assert finer.grid == own.grid and finer.now.model is finer.model
    assert np.array_equal(finer.outcome(2).probabilities, own.outcome(2).probabilities)


def test_maps_and_boxes_are_those_of_the_finer_grid():
    session = session_of("plain")
    own = session.open(1)
    session.see_at(256)
    finer = session.open(1)
    assert finer.human.shape == finer.box.shape == (16, 16)
    assert np.allclose(pooled(finer.box), own.box, atol=1e-5)
    assert finer.human.max() == 1
    similar = np.corrcoef(pooled(finer.human).ravel(), own.human.ravel())[0, 1]
    assert similar > 0.98  # as wide in the picture, not in cells
    item = session.now.dataset[1]
    assert item["image"].shape == (3, 256, 256)
    assert item["fixations"].sum() == session.dataset[1]["fixations"].sum()
    maps, valid = session.now.dataset.maps
    assert torch.equal(maps[1].flatten(), item["human"]) and valid[1].all()
    corners = session.now.dataset.corners() / session.dataset.corners()
    assert np.allclose(corners, 4)


def pooled(values: np.ndarray) -> np.ndarray:
    dense = torch.from_numpy(values)
    return to_grid(dense, torch.ones_like(dense), (4, 4))[0].numpy()


def test_what_is_painted_goes_along_and_comes_back():
    controller = EditorController(session_of("plain"), 1)
    controller.paint([(0, 0), (3, 2)], 0.8)
    coarse, kept = controller.work, SnapshotList(controller)
    kept.keep()
    controller.see_at(128)
    assert np.allclose(controller.painted, np.kron(coarse.painted, np.ones((2, 2))), equal_nan=True)
    assert controller.edit().grid == (8, 8) and kept.snapshots == ()
    kept.keep()
    assert [one.edit.grid for one in kept.judged()] == [(8, 8)] * 2
    controller.undo()
    assert np.isnan(controller.painted).all() and not controller.can_undo
    controller.redo()
    controller.paint([(7, 7)], 0.1)
    controller.see_at(64)
    assert controller.work is coarse and len(kept.snapshots) == 1
    controller.see_at(128)
    assert controller.painted[7, 7] == np.float32(0.1)  # as it was left there
    controller.see_at(32)  # coarser, too
    assert controller.edit().grid == (2, 2)
    controller.lay_aside()
    controller.see_at(128)
    assert controller.edit().is_empty


def test_the_menu_says_what_more_cells_cost_and_the_scores_what_they_are(tool_of):
    tool = tool_of("plain")
    entries = menu(tool, "size")
    assert list(entries.values()) == [(64, 64), (128, 128), (256, 256)]
    first, second, _ = entries
    assert first == "4 x 4, the model's own"
    assert re.fullmatch(r"8 x 8: about [\d.]+ x the time, 1 MB a picture", second)
    assert "scores are not those" not in tool._html["result"].value
    tool._stroke(1, {0: 0.9}, "one")
    tool.controls["size"].value = (128, 128)
    assert (tool.paint.rows, tool.paint.columns) == (8, 8) and len(tool.paint.painted) == 64
    assert sum(value is not None for value in tool.paint.painted) == 4
    session = tool.controller.session
    there = session.as_trained(1)
    here = session.outcome(1).probabilities
    said = text(tool._html["result"].value)
    assert "At 128 x 128 pixels the scores are not those of 64 x 64" in said
    name = session.classes[there.argmax()]
    assert f"{name} ({there.max():.2f}, here {here[there.argmax()]:.2f})" in said
    same = there.argmax() == here.argmax()
    assert ("it says the same" in said) == same and ("another class than here" in said) != same
    tool.controls["guess"].value = True
    assert "scores are not those" not in tool._html["result"].value
    tool.controls["guess"].value = False
    assert "session.see_at((128, 128))" in as_code(tool.controller)
    many = next(one for one in tool._openers.children if one.description == "Many pictures")
    many.value = True
    panel = tool.parts["Many pictures"]
    panel.controls["rule"].value = "this edit"
    panel.act(panel.start)
    tool.controls["size"].value = (64, 64)
    assert len(tool.paint.painted) == 16 and tool.errors == []
    with pytest.raises(ValueError, match=r"100 x 100 pixels cannot be cut .* use 96 x 96"):
        tool.controller.see_at(100)
    assert tool.controller.session.image_size == (64, 64)


def test_a_stroke_on_cells_that_are_no_longer_there_is_lost(tool_of):
    tool = tool_of("plain")
    paint = tool.paint
    said = {"page": "one", "subject": 1, "action": "", "number": 1, "cells": [(0, 0.9)]}
    paint._receive(paint, said | {"n": 1, "of": 16}, None)
    tool.controls["size"].value = (128, 128)
    paint._receive(paint, said | {"n": 2, "of": 16, "cells": [(1, 0.9)]}, None)
    assert paint.answered == {"one": 2}
    assert int((~np.isnan(tool.controller.painted)).sum()) == 4  # of the stroke before
    paint._receive(paint, said | {"n": 3, "number": 2, "of": 64, "cells": [(63, 0.9)]}, None)
    assert tool.controller.painted[7, 7] == np.float32(0.9) and tool.errors == []


def test_fewer_large_pictures_are_kept():
    session = session_of("plain")
    for size, kept in ((64, KEPT_IMAGES), (128, KEPT_IMAGES // 4), (256, 1), (32, KEPT_IMAGES)):
        session.see_at(size)
        assert session._live.cache_info().maxsize == kept


@pytest.mark.parametrize("kind", ["plain", "pooled"])
def test_a_finer_correction_teaches_on_the_models_own_grid_and_opens_on_its_own(tool_of, kind):
    tool = tool_of(kind)
    session, folder = tool.controller.session, tool._folder
    size = tuple(2 * side for side in own_size(session.model))
    tool.controls["size"].value = size
    columns = session.grid[1]
    tool._stroke(1, {r * columns + c: 0.9 for r in range(4) for c in range(4)}, "one")
    edit = tool.controller.edit()
    tool.controls["save"].click()
    session.dataset.part = "val"
    train, test = birds(session.model, "train", 8), birds(session.model, "test", 8)
    panel = TeachPanel(session, train, test, folder, TeachConfig(steps=1))
    own = " x ".join(map(str, session.model.grid))
    assert f"1 painted on finer cells, and taught on the model's own {own}" in panel._left_out.value
    (one,) = panel._corrections()
    assert one.edit.grid == session.model.grid and int(one.edit.mask.sum()) == 4
    assert torch.allclose(one.edit.values[one.edit.mask], torch.tensor(0.9))
    panel.attach(tool.controller, tool.refresh)
    report = panel.teach()
    assert len(report.used) == 1 and not panel.errors
    assert session.image_size == size and session.now.model is not session.model
    assert math.prod(session.outcome(1).attention[-1].shape) == math.prod(session.grid)
    tool.controls["size"].value = own_size(session.model)
    opener = next(one for one in tool._openers.children if one.description == "Saved corrections")
    opener.value = True
    shelf = tool.parts["Saved corrections"]
    shelf._choose(shelf.thumbs.items[0])
    shelf.controls["open"].click()
    assert tool.controller.edit() == edit and session.image_size == size
    assert f"Opened at {size[0]} x {size[1]} pixels" in shelf._words.value
    assert shelf.errors == tool.errors == []

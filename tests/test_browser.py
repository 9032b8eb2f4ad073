"""Many pictures at hand: parts joined, pages of small pictures, filters, the saved ones."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_vit

from lib.config import DataConfig
from lib.data.corrections import TRASH, load_corrections, save_correction
from lib.data.dataset import BirdDataset, make_dataset
from lib.data.joined import JoinedDataset
from lib.edit import AttentionEdit
from lib.evaluation.per_image import per_image
from lib.experiments.simulate import simulated_corrections
from lib.model.vit import SigmoidViT
from lib.widgets import browser
from lib.widgets.browser import FILTERS, PAGE, PictureBrowser, promising, worth_opening
from lib.widgets.controller import EditorController
from lib.widgets.session import LiveSession
from lib.widgets.shelf import CorrectionShelf, work_of
from lib.widgets.thumbs import small_url

MEAN, STD = (0.5,) * 3, (0.5,) * 3
CONFIG = DataConfig(toy_train=60, toy_val=12, toy_test=8, image_size=(64, 64), agreement=0.8)


@pytest.fixture(scope="module")
def parts():
    found = ("train", "val", "test")
    return {part: make_dataset(CONFIG, part, (4, 4), MEAN, STD) for part in found}


@pytest.fixture(scope="module")
def birds(parts):
    return JoinedDataset(parts["train"], parts["val"])


@pytest.fixture
def controller(birds):
    torch.manual_seed(0)
    return EditorController(LiveSession(SigmoidViT(tiny_vit(classes=8)), birds))


@pytest.fixture
def shown(controller, tmp_path):
    """Nothing runs in the test's thread: all is known as soon as it is asked for."""
    return PictureBrowser(controller, folder=tmp_path)


@pytest.fixture(scope="module")
def frame(birds):
    torch.manual_seed(0)
    return per_image(SigmoidViT(tiny_vit(classes=8)), birds)


def choose(panel, name, label=-1):
    panel.controls["class"].value = label
    panel.controls["filter"].value = name
    assert not panel.errors
    return list(panel.thumbs.items)


# ------------------------------------------------------------------------------------ joined parts


def test_joined_parts_are_one_data_set(parts, birds):
    first = len(parts["train"])
    assert len(birds) == first + len(parts["val"]) and birds.part is None
    for part, start in (("train", 0), ("val", first)):
        for k in (0, len(parts[part]) - 1):
            ours, theirs = birds[start + k], parts[part][k]
            assert ours.keys() == theirs.keys() and ours["index"] == start + k
            for name in ours.keys() - {"index"}:
                assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
            assert np.array_equal(birds.image(start + k), parts[part].image(k))
            assert birds.table["part"][start + k] == part
    assert birds.cover("d").shape == (len(birds), 16)
    assert birds[-1]["label"] == parts["val"][-1]["label"]


def test_a_part_without_pictures_changes_nothing(parts):
    nothing = BirdDataset([], parts["train"].classes, CONFIG, (4, 4), MEAN, STD)
    alone = JoinedDataset(parts["train"], nothing)
    assert len(alone) == len(parts["train"]) and set(alone.table["part"]) == {"train"}


def test_what_must_not_be_joined_is_refused(parts):
    other = make_dataset(CONFIG, "val", (8, 8), MEAN, STD)
    crops = make_dataset(CONFIG, "val", (4, 4), MEAN, STD, augment=True)
    for part, words in (
        (parts["test"], "kept to measure"),
        (other, "one grid"),
        (crops, "augment=False"),
        (parts["train"], "in two parts"),
    ):
        with pytest.raises(ValueError, match=words):
            JoinedDataset(parts["train"], part)


# ------------------------------------------------------------------------------------- the filters


def test_filters_find_what_a_table_of_all_pictures_says(shown, frame, birds):
    assert choose(shown, "all") == list(range(len(birds)))
    wrong = frame[~frame["top1"]].sort_values("p_true", ascending=False, kind="stable")
    assert choose(shown, "wrong") == wrong.index.tolist() and len(wrong) > PAGE
    assert f"all {len(birds)} looked at: {len(wrong)} wrong" in shown._words.value
    unsure = choose(shown, "unsure")
    assert np.all(np.diff(frame["confidence"][unsure]) >= -1e-6) and len(unsure) == len(birds)
    far = choose(shown, "disagrees")
    assert np.all(np.diff(frame["cc"][far]) >= -1e-5) and len(far) == len(birds)
    np.testing.assert_allclose(shown.seen.cc, frame["cc"], atol=1e-5)
    np.testing.assert_allclose(shown.seen.p_true, frame["p_true"], atol=1e-5)
    assert choose(shown, "conflicting") == frame.index[frame["conflicting"]].tolist()
    label = birds.table["label"][5]
    some = choose(shown, "wrong", label)
    assert set(some) == set(wrong.index[wrong["label"] == label])


def test_corrected_pictures_are_found_and_follow_the_folder(shown, birds, tmp_path):
    assert choose(shown, "corrected") == []
    for one in simulated_corrections(birds, [3, 65]):
        save_correction(one, tmp_path)
    shown.refresh()
    assert list(shown.thumbs.items) == [3, 65]


def test_only_filters_that_make_sense_are_offered(tmp_path):
    config = replace(CONFIG, maps="none")
    plain = make_dataset(config, "train", (4, 4), MEAN, STD)
    plain.table = plain.table.drop(columns="decoy")
    session = LiveSession(SigmoidViT(tiny_vit(classes=8)), plain)
    panel = PictureBrowser(EditorController(session), folder=tmp_path)
    offered = {name for _, name in panel.controls["filter"].options}
    assert offered == FILTERS.keys() - {"disagrees", "conflicting"}


def test_those_that_promise_most_are_asked_first(birds):
    order = promising(birds)
    assert sorted(order) == list(range(len(birds)))
    table = birds.table.iloc[order]
    rank = (table["part"] != "val") * 2 + (table["decoy"] == table["label"])
    assert (np.diff(rank) >= 0).all()
    train = table[table["part"] == "train"]
    agreeing = train[train["decoy"] == train["label"]]["label"].to_numpy()
    assert len(set(agreeing[:8])) > 5  # spread over the eight classes


# ------------------------------------------------------------------------- a picture to begin with


def test_a_wrong_picture_is_found_without_running_all(birds, monkeypatch):
    model, looked = SigmoidViT(tiny_vit(classes=8)), []
    plain = browser.look
    monkeypatch.setattr(browser, "look", lambda *a: looked.extend(a[2]) or plain(*a))
    index, words = worth_opening(model, birds)
    assert words.startswith(f"Picture {birds.table['image_id'][index]}: the model says")
    assert "; it is " in words and len(looked) < len(birds)
    assert not per_image(model, birds)["top1"][index] and index == looked[-browser.BATCH :][0]


def test_where_all_are_right_it_is_the_least_sure_one(birds, monkeypatch):
    labels, confidence = birds.table["label"].to_numpy(), np.linspace(1, 0.5, len(birds))
    monkeypatch.setattr(
        browser,
        "look",
        lambda _, __, k: {"predicted": labels[k], "confidence": confidence[k]},
    )
    index, words = worth_opening(None, birds, most=20)
    first = promising(birds)[:20]
    assert index == first.max() and words.startswith(
        "All 20 pictures that were looked at are right"
    )


# ------------------------------------------------------------------------------- pages and buttons


def test_a_press_opens_the_picture_and_names_say_what_it_is(shown, controller, frame, birds):
    opened = []
    shown.changed = lambda: opened.append(controller.index)
    items = choose(shown, "wrong")
    shown.controls["later"].click()
    assert shown.thumbs.page == 1 and list(shown.thumbs.shown) == items[PAGE : 2 * PAGE]
    button = shown.thumbs.buttons[2]
    index = items[PAGE + 2]
    row = frame.loc[index]
    said = birds.classes[int(row["predicted"])]
    end = f"wrong: {said} {row['confidence']:.2f}"
    assert button.description.startswith(f"{row['class_name']} {row['image_id']}, ")
    assert button.description.endswith(end) and button.tooltip == button.description
    assert ("validation" in button.description) == (birds.table["part"][index] == "val")
    button.click()
    assert opened == [index] and controller.index == index and not shown.errors
    assert "thumb-chosen" in button._dom_classes
    visible = [one for one in shown.thumbs.buttons if one.layout.display != "none"]
    assert len(visible) == len(shown.thumbs.shown)
    assert shown.thumbs._style.value.count("url(data:image/jpeg") == len(visible)
    shown.controls["earlier"].click()
    assert shown.thumbs.page == 0 and shown.controls["earlier"].disabled


def test_a_picture_that_cannot_be_read_is_left_out_and_says_why(controller, tmp_path, monkeypatch):
    dataset = controller.session.dataset
    plain, broken = type(dataset)._squeezed, 7

    def squeezed(self, index):
        if index == broken:
            raise OSError("picture 7 is broken")
        return plain(self, index)

    monkeypatch.setattr(type(dataset), "_squeezed", squeezed)
    panel = PictureBrowser(controller, folder=tmp_path)
    assert "not read: picture 7 is broken" in panel.thumbs.buttons[broken].description
    assert broken not in choose(panel, "unsure") and len(panel.thumbs.items) == len(dataset) - 1
    assert f"all {len(dataset)} looked at" in panel._words.value
    choose(panel, "all")
    panel.thumbs.buttons[broken].click()
    assert isinstance(panel.errors[0], OSError) and "picture 7 is broken" in panel._error.value
    assert controller.index == 0


def in_a_loop(steps):
    asyncio.run(asyncio.wait_for(steps(), 60))


def test_the_kernel_goes_on_while_the_model_is_asked(controller, tmp_path, monkeypatch):
    plain = browser.look
    monkeypatch.setattr(browser, "TELL", 0.0)
    asked = []

    def slow(model, dataset, indices):
        asked.extend(indices)
        gate.acquire()
        return plain(model, dataset, indices)

    gate = threading.Semaphore(0)
    monkeypatch.setattr(browser, "look", slow)

    async def steps():
        panel = PictureBrowser(controller, folder=tmp_path)
        assert len(panel.thumbs.items) == len(controller.session)  # shown before any is asked
        panel.controls["filter"].value = "unsure"
        assert panel._computing and panel.controls["look"].description == "Stop"
        assert "looked at 0 of 72" in panel._words.value
        gate.release()
        while len(panel.thumbs.items) < browser.BATCH:
            await asyncio.sleep(0.01)
        first = list(panel.thumbs.items)
        assert sorted(first) == sorted(promising(panel.dataset)[: browser.BATCH])
        panel.controls["look"].click()
        gate.release(100)
        while len(asked) < 2 * browser.BATCH or panel._computing:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert "stopped" in panel._words.value and len(asked) == 2 * browser.BATCH
        assert list(panel.thumbs.items)[: browser.BATCH] == first  # nothing moves under the hand
        gate.release(100)
        panel.controls["look"].click()
        while panel._computing:
            await asyncio.sleep(0.01)
        assert len(asked) == len(set(asked)) == 72 and not panel.errors
        confidence = panel.seen.confidence[list(panel.thumbs.items)]
        assert (np.diff(confidence) >= 0).all()  # in order, once all are known

    in_a_loop(steps)


def test_another_model_is_asked_anew(controller, tmp_path):
    async def steps():
        panel = PictureBrowser(controller, folder=tmp_path)
        panel.controls["filter"].value = "unsure"
        other, former = SigmoidViT(tiny_vit(classes=8)), panel.seen
        torch.nn.init.normal_(other.vit.head.weight)  # the same weights otherwise
        controller.session.replace_model(other)  # while the first one is being asked
        panel.refresh()
        panel._take(former, [], True)  # its last answer was on its way
        assert panel._computing and not panel.seen.asked.any()
        while panel._computing:
            await asyncio.sleep(0.01)
        assert not panel.errors
        expected = per_image(other, panel.dataset)["confidence"]
        np.testing.assert_allclose(panel.seen.confidence, expected, atol=1e-5)

    in_a_loop(steps)


def test_small_pictures_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (500, 300, 3), dtype=np.uint8)
    assert len(small_url(noise)) < 25_000


# ------------------------------------------------------------------------------- saved corrections


@pytest.fixture
def shelf(controller, tmp_path):
    changes = []
    panel = CorrectionShelf(controller, lambda: changes.append(1), tmp_path / "saved")
    panel.changes = changes
    return panel


def save(shelf, index=3, note="why", **fields):
    controller = shelf.controller
    controller.open(index)
    controller.set_scope(blocks="all", heads="mean", offset="centred")
    controller.paint([(0, 1), (2, 2)], 0.25)
    controller.strength = 0.5
    path = controller.save(shelf.saved.folder, "Ada", note)
    if fields:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    controller.reset()
    shelf.refresh()
    return path


def press(shelf, path):
    at = list(shelf.thumbs.shown).index(path)
    shelf.thumbs.buttons[at].click()
    assert not shelf.errors


def test_a_saved_correction_opens_as_it_was(shelf):
    assert "Nothing is saved" in shelf._words.value
    assert all(shelf.controls[name].tooltip for name in ("open", "rename", "delete", "undo"))
    path = save(shelf)
    controller = shelf.controller
    controller.open(9)
    press(shelf, path)
    name = shelf.thumbs.buttons[0].description
    assert "why" in name and controller.session.open(3).class_name in name
    assert "url(data:image" in shelf.thumbs._style.value  # the saved picture
    for words in (
        "blocks all; heads mean",
        "strength 0.5",
        "by Ada",
        "2 of 4 x 4 cells",
        path.name,
    ):
        assert words in shelf._facts.value
    shelf.controls["open"].click()
    assert controller.index == 3 and controller.note == "why" and shelf.changes
    work = controller.work
    assert work.painted[0, 1] == work.painted[2, 2] == 0.25 and np.isnan(work.painted).sum() == 14
    assert work.strength == 0.5
    assert work.scope == {"blocks": "all", "heads": "mean", "queries": "cls", "offset": "centred"}
    again = controller.save(shelf.saved.folder, "Ada", "why")
    first, second = (json.loads(one.read_text()) for one in (path, again))
    assert first == second | {"time": first["time"]}
    controller.undo()
    assert np.isnan(controller.painted).all()


def test_another_note_deleting_and_undoing_it(shelf):
    path = save(shelf)
    press(shelf, path)
    shelf.controls["note"].value = "<b>better</b>"
    shelf.controls["rename"].click()
    assert load_corrections(path.parent)[0][0].note == "<b>better</b>"
    assert "better" in shelf.thumbs.buttons[0].description
    shelf.controls["delete"].click()
    assert not path.exists() and list(shelf.thumbs.items) == [] and TRASH in shelf._words.value
    assert load_corrections(path.parent)[0] == [] and shelf.controls["delete"].disabled
    assert not shelf.controls["undo"].disabled
    shelf.controls["undo"].click()
    assert (
        path.exists() and path.with_suffix(".png").exists() and list(shelf.thumbs.items) == [path]
    )
    assert shelf.controls["undo"].disabled and not shelf.errors and len(shelf.changes) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_id": "99"}, "its picture, image_id &quot;99&quot;, is not in the data set"),
        ({"class_name": "Auk"}, "it is of the class Auk, that picture of"),
        (
            {"grid": [2, 8]},
            "grid is 2 x 8, but the model has 4 x 4 patches",
        ),
        ({"mask": 3}, "mask is 3; expected a text"),
    ],
)
def test_what_cannot_be_opened_says_why(shelf, fields, reason):
    path = save(shelf, **fields)
    press(shelf, path)
    assert reason in shelf._facts.value
    opens = shelf.controls["open"]
    assert opens.disabled and opens.tooltip.startswith(reason[:20])
    assert not shelf.controls["delete"].disabled
    shelf.controls["delete"].click()
    assert not path.exists() and not shelf.errors


def test_an_edit_of_a_head_that_is_not_there_says_so(shelf):
    path = save(shelf, heads=[7])
    press(shelf, path)
    shelf.controls["open"].click()
    assert "heads holds 7, but block 0 has 4 heads" in shelf._words.value
    assert np.isnan(shelf.controller.painted).all()


def test_replaced_ones_are_listed_newest_first(shelf):
    old = save(shelf, time="2026-01-01T00:00:00Z")
    new = save(shelf)
    (shelf.saved.folder / "x.json").write_text("?")
    shelf.refresh()
    assert list(shelf.thumbs.items) == [new, old, shelf.saved.folder / "x.json"]
    press(shelf, old)
    assert f"replaced by {new.name}" in shelf._facts.value
    assert not shelf.controls["open"].disabled  # it is a correction all the same


def test_a_saved_edit_becomes_the_same_edit_again():
    mask = np.array([[True, False], [False, True]])
    edit = AttentionEdit(mask, np.array([[0.1, 0], [0, 0.8]]), heads=(1,), strength=0.3)
    work = work_of(edit)
    painted = ~np.isnan(work.painted)
    again = AttentionEdit(painted, np.nan_to_num(work.painted), strength=0.3, **work.scope)
    assert again == edit

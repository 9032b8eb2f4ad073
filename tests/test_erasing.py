"""Erasing what a model looks at: the ladder, deletion and insertion, and what is said of them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st

from lib import figures
from lib.data.dataset import decoy_cover
from lib.edit import LADDER, AttentionEdit
from lib.evaluation import erasing, metrics
from lib.losses import REGION
from lib.model.vit import SigmoidViT

OF_MAPS = [erasing.REGION_NAME, erasing.AS_REGION]
WHATS = [erasing.MOST, erasing.SAME_NUMBER, erasing.SAME_MASS, *OF_MAPS]


@pytest.fixture(scope="module")
def erased(toy):
    return erasing.erase(*toy, k=4, images=range(10), batch_size=4)


def test_rungs_are_full_forward_passes_with_the_edit_that_they_name(toy):
    model, test = toy
    masks = decoy_cover(test) > 0
    masks[9] = False  # nothing to edit
    table = erasing.edit_ladder(model, test, masks, batch_size=7)
    assert table["rung"].value_counts().to_dict() == dict.fromkeys(["no edit", *LADDER], len(test))
    table = table.set_index(["index", "rung"])
    for index in (1, 9, 23):
        item = test[index]
        for rung, scope in {"no edit": None, **LADDER}.items():
            edit = scope and AttentionEdit(masks[index], 0.0, **scope)
            with torch.no_grad():
                probability = model(item["image"][None], edit=edit)[0].softmax(0)
            row = table.loc[(index, rung)]
            assert row["p_true"] == pytest.approx(probability[item["label"]].item(), abs=1e-5)
            assert row["predicted"] == probability.argmax().item()


def test_a_model_of_one_block_has_a_ladder_too(toy):
    model = SigmoidViT(tiny_vit(classes=8, depth=1))
    assert list(model.layout.ladder) == ["last block"]
    assert set(erasing.erase(model, toy[1], images=[3], k=2)["rung"]) == {"last block"}
    table = erasing.erase(model, toy[1], images=[3], k=2, rungs=tuple(LADDER))
    most = table[table["what"] == erasing.MOST].set_index("rung")["p_true"]
    assert len(most) == 4 and most.to_numpy() == pytest.approx(most["last block"], abs=1e-6)


def test_what_is_erased_is_what_it_is_called(toy, erased):
    model, test = toy
    batch = torch.utils.data.default_collate([test[i] for i in range(10)])
    with torch.no_grad():
        _, rows = model(batch["image"], rows="last")
    attention = metrics.patch_attention(rows[model.depth - 1], model.num_prefix)
    cells = erasing.cells_to_erase(batch, attention, k=4)
    most = cells[erasing.MOST]
    assert (most.sum(1) == 4).all() and (cells[erasing.SAME_NUMBER].sum(1) == 4).all()
    outside = attention.masked_fill(most, 0).amax(1)
    assert (attention.masked_fill(~most, 1).amin(1) >= outside).all()
    region = cells[erasing.REGION_NAME]
    assert (region == (batch["human"] >= REGION * batch["human"].amax(1, keepdim=True))).all()
    assert not (cells[erasing.SAME_NUMBER] & most).any()
    assert not (cells[erasing.SAME_MASS] & most).any()
    as_region = cells[erasing.AS_REGION]
    assert not (as_region & region).any()
    room = (~region).sum(1)
    assert torch.equal(as_region.sum(1), torch.minimum(region.sum(1), room))
    for what, mask in cells.items():
        rows_ = erased[(erased["what"] == what) & (erased["rung"] == "last two")]
        some = mask.any(1)  # where the region leaves no room, there is nothing to erase outside
        assert rows_["patches"].tolist() == mask.sum(1)[some].tolist()
        assert np.allclose(rows_["mass"], (attention * mask).sum(1)[some], atol=1e-6)


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_random_patches_of_the_same_mass_reach_it_and_no_patch_is_idle(values, k, seed):
    attention = torch.tensor(values)[None]
    k = min(k, attention.shape[1])
    batch = {"index": torch.tensor([seed]), "human": attention, "valid": attention >= 0}
    cells = erasing.cells_to_erase(batch, attention, k, seed)
    most, found = cells[erasing.MOST][0].numpy(), cells[erasing.SAME_MASS][0].numpy()
    order = np.random.default_rng((seed, seed)).permutation(len(values))
    others = order[~most[order]]
    assert found[others[: found.sum()]].all() and not found[most].any()
    wanted, weights = attention[0, most].double().sum(), attention[0].double().numpy()
    if found.sum() < len(others):  # else there are no others left, and they may hold less
        assert weights[found].sum() >= wanted - 1e-12 * k
    assert weights[others[: found.sum() - 1]].sum() < wanted + 1e-12 * k or not found.any()


def test_where_the_others_hold_less_all_of_them_go():
    attention = torch.tensor([[0.6, 0.2, 0.1, 0.1]])
    batch = {"index": torch.tensor([0]), "human": attention, "valid": attention > 0}
    cells = erasing.cells_to_erase(batch, attention, k=1)
    assert cells[erasing.SAME_MASS][0].tolist() == [False, True, True, True]


def test_images_alone_decide_not_their_batch_or_company(toy, erased):
    model, test = toy
    again = erasing.erase(model, test, k=4, images=[7, 2, 5], batch_size=2)
    both = again.merge(erased, on=["index", "what", "rung"], validate="1:1", suffixes=("", "_"))
    assert len(both) == len(again) > 3 * (len(WHATS) - 1) * len(LADDER)
    for name in ("patches", "predicted", "flipped"):
        assert (both[name] == both[f"{name}_"]).all()
    for name in ("p_true", "mass", "p_true_change"):
        assert np.allclose(both[name], both[f"{name}_"], atol=1e-5)
    other = erasing.erase(model, test, k=4, seed=1, images=[7, 2, 5], rungs=["last block"])
    moved = other.merge(erased, on=["index", "what", "rung"], suffixes=("", "_"))
    same = (moved["mass"] - moved["mass_"]).abs().groupby(moved["what"]).max() < 1e-5
    assert same[erasing.MOST] and not same[erasing.SAME_NUMBER]


def test_an_image_without_a_map_takes_part_in_all_but_peoples_region(toy, monkeypatch):
    model, test = toy
    valid = test._valid.clone()
    valid[4] = False
    monkeypatch.setattr(test, "_valid", valid)
    table = erasing.erase(model, test, images=[3, 4], rungs=["last block"])
    assert set(table.loc[table["index"] == 4, "what"]) == set(WHATS) - set(OF_MAPS)
    assert set(table.loc[table["index"] == 3, "what"]) == set(WHATS)
    assert erasing.summary(table).loc[(erasing.REGION_NAME, "last block"), "images"] == 1


def test_flips_and_changes_are_against_the_unedited_prediction(toy, erased):
    model, test = toy
    batch = torch.utils.data.default_collate([test[i] for i in range(10)])
    with torch.no_grad():
        before = model(batch["image"])
    predicted = before.argmax(1).numpy()[erased["index"]]
    was_right = predicted == batch["label"].numpy()[erased["index"]]
    p_true = before.softmax(1).gather(1, batch["label"][:, None])[:, 0].numpy()[erased["index"]]
    assert erased["flipped"].any() and not erased["flipped"].all()
    assert (erased["flipped"] == (erased["predicted"] != predicted)).all()
    assert (erased["fixed"] == (erased["top1"] & ~was_right)).all()
    assert (erased["broken"] == (~erased["top1"] & was_right)).all()
    assert np.allclose(erased["p_true"] - p_true, erased["p_true_change"], atol=1e-6)
    means = erasing.summary(erased)
    part = erased[(erased["what"] == erasing.MOST) & (erased["rung"] == "all blocks")]
    assert means.loc[(erasing.MOST, "all blocks"), "flipped"] == part["flipped"].mean()


def table_of(most: list[float], same_mass: list[float]) -> pd.DataFrame:
    """An `erase` table of two rungs; the last one's changes are given, image by image."""
    rows = []
    for what, changes in ((erasing.MOST, most), (erasing.SAME_MASS, same_mass)):
        for index, change in enumerate(changes):
            for rung, value in (("last block", -0.01), ("all blocks, all rows", change)):
                row = {"index": index, "what": what, "rung": rung, "p_true_change": value}
                row |= {"flipped": change < -0.3 and rung != "last block"}
                row |= {"patches": 26 if what == erasing.MOST else 118}
                row |= {"mass": 0.4 if what == erasing.MOST else 0.38}
                rows.append(row | dict.fromkeys(("top1", "p_true", "fixed", "broken"), 0))
    return pd.DataFrame(rows)


def test_the_sentence_says_what_the_table_shows_in_both_directions():
    low, high = [-0.50, -0.40, -0.20, -0.30], [-0.05, -0.01, 0.0, -0.02]
    assert erasing.sentence(table_of(low, high)) == (
        "Erasing the 26 most attended patches in the last block changes 0 % of the predictions and "
        "the true class's probability by -0.01; in all blocks and rows 50 % and -0.35; 118 other "
        "patches, random ones up to the same attention mass (0.38 against 0.40): 0 % and -0.02. "
        "Where the model looks matters not measurably more or less than such random patches "
        "(+0.000 ± 0.000) in the last block, and more than such random patches (+0.330 ± 0.112) in "
        "all blocks and rows, in probability, on 4 images."
    )
    assert "and less than such random" in erasing.sentence(table_of(high, low))
    assert "and not measurably more" in erasing.sentence(table_of([-0.5, 0.4], [0.4, -0.5]))
    one = table_of([-0.5], [0.0])  # one image proves nothing
    assert "and not measurably more" in erasing.sentence(one) and "1 image." in erasing.sentence(
        one
    )
    rung = table_of(low, high)
    rung = erasing.sentence(rung[rung["rung"] == "all blocks, all rows"])
    assert rung.count("all blocks and rows") == 2 and "last block" not in rung
    with pytest.raises(ValueError, match="2 models"):
        erasing.sentence(pd.concat([one.assign(variant="a"), one.assign(variant="b")]))
    with pytest.raises(ValueError, match='no rows of "random, same mass"'):
        erasing.sentence(one[one["what"] == erasing.MOST])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 17}, "17, but a picture has 16 patches"),
        ({"rungs": ["first block"]}, 'rung "first block" is unknown'),
        ({"images": [24]}, "image 24 is asked for; this split has 0 to 23"),
        ({"images": []}, "names 0"),
        ({"images": [1, 1]}, "names 2, 1 apart"),
    ],
)
def test_bad_questions_are_refused_by_name(toy, change, message):
    with pytest.raises(ValueError, match=message):
        erasing.erase(*toy, **change)


def test_masks_must_fit_the_data_set(toy):
    with pytest.raises(ValueError, match=r"masks or map is \[3, 16\]; .*\[24, 16\]"):
        erasing.edit_ladder(*toy, torch.ones(3, 16, dtype=torch.bool))


def test_curves_start_and_end_where_they_must(toy):
    model, test = toy
    people = torch.stack([test.annotations(i)["human"] for i in range(len(test))])
    images = [6, 1, 17]
    table = erasing.deletion_insertion(model, test, people, 5, images, batch_size=2)
    assert table["fraction"].unique().tolist() == [0, 3 / 16, 6 / 16, 10 / 16, 13 / 16, 1]
    table = table.set_index(["index", "curve", "fraction"])["p_true"]
    for index in images:
        picture, label = test[index]["image"][None], test[index]["label"]
        order = people[index].argsort(descending=True)  # ties are all beyond the first 3
        assert people[index, order[2]] > people[index, order[3]]
        first = erasing.patch_pixels(
            torch.zeros(1, 16, dtype=torch.bool).index_fill(1, order[:3], True), (4, 4), (64, 64)
        )
        blurred = erasing.blur(picture, (16, 16))
        shown = {
            ("deletion", 0): picture,
            ("deletion", 3 / 16): picture.masked_fill(first, 0),
            ("deletion", 1): torch.zeros_like(picture),
            ("insertion", 0): blurred,
            ("insertion", 3 / 16): torch.where(first, picture, blurred),
            ("insertion", 1): picture,
        }
        for key, pixels in shown.items():
            with torch.no_grad():
                p_true = model(pixels)[0].softmax(0)[label].item()
            assert table[(index, *key)] == pytest.approx(p_true, abs=1e-5)


def test_orders_of_deletion(toy):
    model, test = toy
    given_by = {"attention": [], "map": []}
    with torch.no_grad():
        rows = [model(test[i]["image"][None], rows="last")[1] for i in range(len(test))]
    last = model.depth - 1
    maps = torch.cat([metrics.patch_attention(row[last], model.num_prefix) for row in rows])
    given_by = {"attention": "attention", "map": maps, "zero": maps * 0, "random": "random"}
    found = {
        name: erasing.deletion_insertion(model, test, order, 4, [5, 8])["p_true"].to_numpy()
        for name, order in given_by.items()
    }
    assert np.allclose(found["attention"], found["map"], atol=1e-6)
    assert np.allclose(found["zero"], found["random"])
    assert not np.allclose(found["random"], found["map"], atol=1e-3)
    again = erasing.deletion_insertion(model, test, "random", 4, [5, 8], seed=1)["p_true"]
    assert not np.allclose(found["random"], again, atol=1e-3)


@pytest.mark.parametrize(
    ("order", "steps", "message"),
    [
        ("gaze", 4, 'order is "gaze"'),
        (torch.zeros(2, 16), 4, r"\[2, 16\]"),
        (torch.full((24, 16), torch.nan), 4, "has NaN"),
        ("random", 0, "steps is 0"),
        ("random", 17, "steps is 17, but a picture has 16"),
    ],
)
def test_bad_orders_are_refused(toy, order, steps, message):
    with pytest.raises(ValueError, match=message):
        erasing.deletion_insertion(*toy, order, steps)


def test_pixels_of_patches_on_a_grid_that_is_not_square():
    cells = torch.zeros(1, 6, dtype=torch.bool)
    cells[0, 4] = True  # row 1, column 1 of 2 x 3
    pixels = erasing.patch_pixels(cells, (2, 3), (28, 60))  # patches of 14 x 20 pixels
    assert pixels.shape == (1, 1, 28, 60)
    assert pixels[0, 0, 14:, 20:40].all() and pixels.sum() == 14 * 20


def test_blur_keeps_the_mean_and_takes_the_detail_also_of_small_pictures():
    noise = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    blurred = erasing.blur(noise, (14, 14))
    assert blurred.std() < 0.15 * noise.std()
    assert torch.allclose(
        erasing.blur(torch.ones(1, 3, 16, 16), (16, 16)), torch.ones(1, 3, 16, 16)
    )


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_areas_are_between_the_lowest_and_the_highest_probability(values):
    table = pd.DataFrame({"p_true": values, "fraction": np.linspace(0, 1, len(values))})
    area = erasing.areas(table.assign(index=3, curve="deletion"))
    assert area[["index", "curve"]].to_numpy().tolist() == [[3, "deletion"]]
    assert min(values) - 1e-9 <= area["area"][0] <= max(values) + 1e-9
    assert area["area"][0] == pytest.approx(
        np.mean((np.array(values)[1:] + np.array(values)[:-1]) / 2)
    )


def test_figures_show_every_model_and_choice(erased):
    erased = erased[erased["rung"].isin(list(LADDER)[:2])]
    both = pd.concat([erased.assign(variant="before"), erased.assign(variant="after")])
    figure = figures.erasing(both)
    assert [axis.get_title() for axis in figure.axes] == ["before", "after", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == WHATS
    assert "10 images" in figure.get_suptitle()
    assert len(figures.erasing(erased).axes) == 2
    steps = pd.DataFrame({"fraction": [0, 0.5, 1] * 2, "p_true": [1, 0.5, 0, 0, 1, 1]})
    steps = steps.assign(curve=["deletion"] * 3 + ["insertion"] * 3, index=0)
    figure = figures.curves(steps.assign(order="people"), "order")
    labels = [axis.get_legend().get_texts()[0].get_text() for axis in figure.axes]
    assert labels == ["people: area 0.50", "people: area 0.75"]
    two = pd.concat([steps.assign(variant=name) for name in ("before", "after")])
    axes = figures.curves(two).axes  # the lowest row alone says what runs along it
    assert [axis.get_xlabel() for axis in axes] == [
        "", "", "share of patches taken out", "share of patches put in",
    ]  # fmt: skip
    assert [axis.get_ylabel() for axis in axes] == ["p (true class)", ""] * 2
    plt.close("all")

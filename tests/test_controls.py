"""Controls and ablations of the maps: what they change, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.config import DataConfig, HumanConfig
from lib.data.dataset import make_dataset
from lib.training.controls import supervised
from lib.training.runs import bare_model, dataset_for, human_in_the_loop, training_set

TOY = DataConfig(name="toy", toy_train=40, toy_val=16, toy_test=24)
PLAIN = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(params=[False, True], ids=["whole", "crops"])
def birds(request):
    return make_dataset(TOY, "train", (8, 8), *PLAIN, augment=request.param)


def changed(birds, seed=0, **human):
    before = [part.clone() for part in birds.maps]
    found = supervised(birds, HumanConfig(**human), seed)
    assert all(map(torch.equal, birds.maps, before))  # the data set itself is as it was
    assert birds.has_map.all() and len(found) == len(birds)
    assert torch.equal(found[3]["image"], birds[3]["image"]) or birds.augment
    return found


def test_without_a_wish_nothing_changes(birds):
    found = changed(birds)
    assert all(map(torch.equal, found.maps, birds.maps))


def test_shuffled_maps_are_those_of_other_images(birds):
    own, (maps, valid) = birds.maps[0], changed(birds, maps="shuffled").maps
    assert valid.all()
    source = [int((own == one).flatten(1).all(1).nonzero()[0, 0]) for one in maps]
    assert sorted(source) == list(range(len(birds)))  # every map once
    assert all(i != j for i, j in enumerate(source))  # none on its own image
    assert not torch.equal(maps, changed(birds, seed=1, maps="shuffled").maps[0])


def test_the_mean_map_is_the_same_for_all_and_of_all(birds):
    own, maps = birds.maps[0].float(), changed(birds, maps="mean").maps[0].float()
    assert torch.equal(maps, maps[:1].expand_as(maps))
    expected = own.mean(0) / own.mean(0).max()
    assert torch.allclose(maps[0], expected, atol=1e-3)  # half precision where there are crops


def test_the_box_is_filled_and_nothing_else(birds):
    maps = changed(birds, maps="box").maps[0].float()
    box = birds.table.loc[5, ["x0", "y0", "x1", "y1"]].to_numpy(float)
    area = np.prod((box[2:] - box[:2]) / 64) * maps[5].numel()
    assert maps[5].sum().item() == pytest.approx(area, rel=2e-3)
    assert maps[5].max() == 1


def test_a_shifted_map_keeps_its_shape_and_moves_two_patches():
    birds = make_dataset(TOY, "train", (8, 8), *PLAIN)
    own, maps = birds.maps[0], changed(birds, noise="shifted").maps[0]
    moves = set()
    for before, after in zip(own, maps, strict=True):
        dy, dx = found_shift(before, after)
        assert 1.4 <= np.hypot(dy, dx) <= 2.9  # two, rounded along each axis
        moves.add((dy, dx))
    assert len(moves) > 4


def found_shift(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """The shift by which two maps agree in all cells that both show."""
    size = len(before)
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            rows = range(max(0, -dy), min(size, size - dy))
            cells = [(r, c) for r in rows for c in range(max(0, -dx), min(size, size - dx))]
            expected = torch.zeros_like(before)
            for r, c in cells:
                expected[r + dy, c + dx] = before[r, c]
            if torch.equal(expected, after):
                return dy, dx
    raise AssertionError("no shift explains the map")


def test_a_blurred_map_is_flatter_and_stays_where_it_was(birds):
    own, maps = birds.maps[0].float(), changed(birds, noise="blurred").maps[0].float()
    assert torch.allclose(maps.flatten(1).amax(1), torch.ones(len(birds)), atol=1e-3)
    entropy = lambda m: -(m.flatten(1) / m.sum((1, 2))[:, None]).clamp(min=1e-9).log().mean(1)  # noqa: E731
    assert (entropy(maps) < entropy(own)).all()
    peak = own.flatten(1).argmax(1)
    assert maps.flatten(1).gather(1, peak[:, None]).mean() > 0.6


def test_half_of_the_readers_is_another_map_of_the_same_people(birds):
    own, maps = birds.maps[0].float(), changed(birds, noise="half_readers").maps[0].float()
    fewer = birds.render(
        [replace(r, human=r.gaze[: (len(r.gaze) + 1) // 2]) for r in birds.records]
    )[0]
    assert torch.equal(maps, fewer.float()) and not torch.equal(maps, own)


@pytest.mark.parametrize(
    ("annotated", "count"), [("all", 40), ("1", 1), ("5", 5), ("10%", 4), ("1%", 1), ("99", 40)]
)
def test_only_so_many_images_keep_their_map(birds, annotated, count):
    found = changed(birds, annotated=annotated)
    assert found.has_map.sum() == count
    assert found.table["has_map"].sum() == count
    kept = found.has_map.copy()
    assert torch.equal(found.maps[0][kept], birds.maps[0][kept])
    assert not found.maps[1][~kept].any()


def test_a_control_of_few_annotations_has_seen_those_alone(birds):
    found = changed(birds, annotated="4", maps="mean")
    kept = np.flatnonzero(found.has_map)
    own = birds.maps[0].float()[kept].mean(0)
    assert torch.allclose(found.maps[0].float()[kept[0]], own / own.max(), atol=1e-3)


def test_more_annotations_contain_the_fewer(birds):
    few, more = (changed(birds, annotated=n).has_map for n in ("3", "20"))
    assert (more | ~few).all()
    assert not np.array_equal(few, changed(birds, seed=1, annotated="3").has_map)


def test_what_the_data_cannot_give_is_told():
    boxes = make_dataset(replace(TOY, maps="boxes"), "train", (8, 8), *PLAIN)
    with pytest.raises(ValueError, match='"half_readers", but no image has two readers'):
        supervised(boxes, HumanConfig(noise="half_readers"), 0)
    one = supervised(boxes, HumanConfig(annotated="1"), 0)
    with pytest.raises(ValueError, match="which needs two human maps of 1"):
        supervised(one, HumanConfig(maps="shuffled"), 0)
    with pytest.raises(ValueError, match='annotated is "half"; use all, a number'):
        HumanConfig(annotated="half")
    with pytest.raises(ValueError, match='maps is "shufled"; use one of human, shuffled'):
        HumanConfig(maps="shufled")


def test_training_takes_the_changed_maps_and_measuring_does_not(config):
    run = human_in_the_loop(config, "ft-s0", 0, maps="mean", annotated="5")
    model = bare_model(run, num_classes=8)
    train = training_set(model, run)
    assert train.has_map.sum() == 5
    assert (train.maps[0][train.has_map] == train.maps[0][train.has_map][0]).all()
    for part in ("train", "test"):  # what is measured is what people did
        measured, own = (
            dataset_for(
                model, run if changed else human_in_the_loop(config, "ft-s0", 0), part, False
            )
            for changed in (True, False)
        )
        assert torch.equal(measured.maps[0], own.maps[0]) and measured.has_map.all()
    control = human_in_the_loop(config, "ft-s0", 0, lam=0.0, annotated="5")
    assert not training_set(model, control).has_map.any()

"""The check of a data set: every kind of damage, one at a time, on a tiny CUB-200-2011."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import CUB_CLASSES, CUB_UNSEEN
from PIL import Image

from lib.config import DataConfig
from lib.data.check import PROBLEMS, check_data

GRID = (3, 4)


def counts(report) -> dict[str, int]:
    """Problems that were found, and how often."""
    table = report.table()[["train", "val", "test"]].sum(axis=1)
    return table[table > 0].to_dict()


def bird(cub, image):
    """The file of the image with an id."""
    name = f"{CUB_CLASSES[(image - 1) // 10]}/bird_{(image - 1) % 10}.jpg"
    return cub.root / "CUB_200_2011" / "images" / name


def test_a_sound_data_set_has_one_picture_without_gaze(cub):
    report = check_data(cub, GRID)
    assert counts(report) == {"map: none": 1} and not report.stops_training
    assert report.details()["where"].tolist() == [str(bird(cub, CUB_UNSEEN))]
    assert report.balance["pictures"].to_dict() == {"train": 8, "val": 4, "test": 8}
    assert report.balance["with a map"].sum() == 19
    assert report.balance.loc["train", "most a class"] == 4
    assert set(report.table().index) == set(PROBLEMS)
    assert report.examples() == [f"map: none: {bird(cub, CUB_UNSEEN)}"]


def test_toy_birds_have_nothing_to_complain_about():
    config = DataConfig(toy_train=40, toy_val=40, toy_test=40)
    report = check_data(config, (8, 8))
    assert not counts(report) and report.balance["with a map"].tolist() == [40, 40, 40]


def remove(cub):
    bird(cub, 7).unlink()


def cut(cub):
    bird(cub, 7).write_bytes(bird(cub, 7).read_bytes()[:700])


def shrink(cub):
    Image.new("RGB", (40, 30)).save(bird(cub, 7))


def copy_within_a_part(cub):
    shutil.copy(bird(cub, 7), bird(cub, 8))


def copy_from_train_to_test(cub):
    for image in (2, 3, 4, 5, 6, 7):  # whichever of the first six are carved for validation
        shutil.copy(bird(cub, 1), bird(cub, image))


def copy_to_another_class(cub):
    shutil.copy(bird(cub, 7), bird(cub, 17))


def move_a_box(cub):
    path = cub.root / "CUB_200_2011" / "bounding_boxes.txt"
    path.write_text(path.read_text().replace("7 20.0 15.0 40.0", "7 50.0 15.0 40.0", 1))


def look_away(cub):
    path = cub.root / "CUB_GHA" / "data_5runs" / "Fixation_run2.txt"
    path.write_text(path.read_text().replace("7,80,60,12,9,300", "7,80,60,99,9,300", 1))


def cut_a_list(cub):
    path = cub.root / "CUB_200_2011" / "image_class_labels.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))


@pytest.mark.parametrize(
    ("damage", "problem", "stops"),
    [
        (remove, "picture: missing", True),
        (cut, "picture: unreadable", True),
        (shrink, "picture: of another size than its gaze", True),
        (copy_within_a_part, "picture: same file as another", False),
        (copy_from_train_to_test, "picture: same file in train and in another part", False),
        (copy_to_another_class, "picture: same file with another label", False),
        (move_a_box, "box: reaches out of the picture", False),
        (look_away, "gaze: fixations out of the picture", False),
        (cut_a_list, "lists: cannot be used", True),
    ],
)
def test_every_damage_is_found_and_judged(cub, damage, problem, stops):
    damage(cub)
    report = check_data(cub, GRID)
    assert problem in counts(report)
    assert report.stops_training == stops and PROBLEMS[problem] == stops
    found = report.details().query("problem == @problem")
    if damage is copy_from_train_to_test:
        assert str(bird(cub, 7)) in found["where"].tolist()
    elif damage is not cut_a_list:
        later = {copy_within_a_part: 8, copy_to_another_class: 17}.get(damage, 7)
        assert found["where"].tolist() == [str(bird(cub, later))]


def test_pictures_below_the_input_size_are_told(cub):
    report = check_data(replace(cub, image_size=(224, 224)), GRID)
    assert counts(report)["picture: smaller than the model's input"] == 20
    assert not report.stops_training


@pytest.fixture
def bubbles(cub):
    folder = cub.root / "bubbles"
    folder.mkdir()
    for image in range(1, 21):
        values = np.zeros((60, 80), np.uint8)
        values[10:30, 10:30] = 255
        Image.fromarray(values).save(folder / f"{image}.jpg")
    return replace(cub, maps="files", maps_dir=folder)


def test_every_kind_of_bad_map_is_found(bubbles):
    assert not counts(check_data(bubbles, GRID))
    Image.new("L", (60, 80), 9).save(bubbles.maps_dir / "7.jpg")  # turned
    (bubbles.maps_dir / "8.jpg").write_bytes(b"no picture")
    Image.new("L", (80, 60)).save(bubbles.maps_dir / "9.jpg")  # black
    Image.new("RGB", (80, 60), (250, 20, 20)).save(bubbles.maps_dir / "10.jpg")
    (bubbles.maps_dir / "17.jpg").unlink()
    report = check_data(bubbles, GRID)
    assert counts(report) == {
        "map: none": 1,
        "map: unreadable or of another size": 2,
        "map: zeros only": 1,
        "map: in colours, read as brightness": 1,
    }
    assert report.stops_training and report.balance.loc["test", "with a map"] == 4


def test_maps_that_are_all_missing_stop_training(bubbles):
    for path in bubbles.maps_dir.iterdir():
        path.unlink()
    report = check_data(bubbles, GRID)
    assert counts(report)["map: none"] == 20 and report.stops_training
    without = check_data(replace(bubbles, maps="none", maps_dir=None), GRID)
    assert not counts(without) and not without.stops_training

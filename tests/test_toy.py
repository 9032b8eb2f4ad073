"""The drawn birds: the same everywhere, fair where they must be, biased where they say so."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.data.toy.birds import TOY_SPLITS, ToyBirds, make, simulate_gaze
from lib.data.toy.draw import _PAINTED, draw
from lib.data.toy.scene import (
    ATTRIBUTES,
    DECOY_COLOURS,
    HABITATS,
    SPECIES,
    Scene,
    sample_scene,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def birds() -> ToyBirds:
    return make("train", 96, seed=5)


@pytest.fixture(scope="module")
def small() -> dict[str, ToyBirds]:
    """Many images at the smallest size: enough to count labels and decoys."""
    return {split: make(split, 160, size=16) for split in TOY_SPLITS}


def checksum(birds: ToyBirds) -> int:
    gaze = np.concatenate([looks for readers in birds.gaze for looks in readers])
    return zlib.crc32(birds.images.tobytes() + gaze.tobytes() + birds.parts.tobytes())


# ------------------------------------------------------------------------------ species


def test_species_differ_in_one_to_three_marks() -> None:
    assert len(SPECIES) == len(DECOY_COLOURS) == 8
    for a, b in itertools.combinations(SPECIES.values(), 2):
        assert 1 <= sum(x != y for x, y in zip(a, b, strict=True)) <= 3


def test_neither_one_mark_nor_two_identify_the_species() -> None:
    marks = np.array(list(SPECIES.values()))
    for k, values in enumerate(ATTRIBUTES.values()):
        assert (np.bincount(marks[:, k], minlength=len(values)) >= 2).all()
    for pair in itertools.combinations(range(len(ATTRIBUTES)), 2):
        assert len(np.unique(marks[:, pair], axis=0)) < len(SPECIES)


def test_decoy_colours_are_far_apart() -> None:
    for a, b in itertools.combinations(DECOY_COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 95


def test_every_habitat_is_painted_and_no_other() -> None:
    assert tuple(_PAINTED) == HABITATS


# ------------------------------------------------------------------------------ the data set


def test_shapes_and_types(birds: ToyBirds) -> None:
    n, marks = 96, len(ATTRIBUTES)
    expected = {
        "images": ((n, 64, 64, 3), np.uint8),
        "labels": ((n,), np.int64),
        "attributes": ((n, marks), np.int64),
        "decoys": ((n,), np.int64),
        "decoy_boxes": ((n, 4), np.float32),
        "boxes": ((n, 4), np.float32),
        "parts": ((n, marks, 2), np.float32),
    }
    for name, (shape, dtype) in expected.items():
        value = getattr(birds, name)
        assert (value.shape, value.dtype) == (shape, dtype), name
    assert len(birds) == len(birds.gaze) == len(birds.scenes) == n


def test_another_process_draws_the_same_birds() -> None:
    code = (
        "from lib.data.toy.birds import make; from tests.test_toy import checksum;"
        "print(checksum(make('val', 6, seed=3)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(out.stdout) == checksum(make("val", 6, seed=3))


def test_a_longer_split_begins_with_the_shorter_one(birds: ToyBirds) -> None:
    short = make("train", 10, seed=5)
    assert np.array_equal(short.images, birds.images[:10])
    assert short.scenes == birds.scenes[:10]


def test_seeds_and_splits_share_no_image(small: dict[str, ToyBirds]) -> None:
    sets = [*small.values(), make("train", 60, seed=1, size=16)]
    images = [image.tobytes() for one in sets for image in one.images]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("n", [1, 8, 21])
def test_labels_are_balanced(n: int) -> None:
    labels = make("test", n, size=16).labels
    counts = np.bincount(labels, minlength=len(SPECIES))
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1


def test_the_order_is_shuffled(small: dict[str, ToyBirds]) -> None:
    labels = small["train"].labels.reshape(-1, 8)
    assert (np.sort(labels) == np.arange(8)).all()
    assert len(np.unique(labels, axis=0)) > 16


def test_attributes_are_those_of_the_label(small: dict[str, ToyBirds]) -> None:
    marks = np.array(list(SPECIES.values()))
    for split in ("train", "val", "test"):
        assert np.array_equal(small[split].attributes, marks[small[split].labels])


def test_decoy_agrees_as_often_as_promised(small: dict[str, ToyBirds]) -> None:
    for split in ("train", "val"):
        agrees = small[split].decoys == small[split].labels
        assert abs(agrees.mean() - 0.95) < 0.06  # 3.5 standard deviations of 160 draws
    agrees = small["test"].decoys == small["test"].labels
    assert abs(agrees.mean() - 1 / 8) < 0.09
    assert np.bincount(small["test"].decoys, minlength=8).min() > 7


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_extreme_agreement(agreement: float) -> None:
    birds = make("train", 40, size=16, agreement=agreement)
    assert ((birds.decoys == birds.labels) == bool(agreement)).all()
    assert len(np.unique(birds.decoys)) == 8


def test_pretrain_marks_go_with_nothing(small: dict[str, ToyBirds]) -> None:
    birds = small["pretrain"]
    for k, values in enumerate(ATTRIBUTES.values()):
        share = np.bincount(birds.attributes[:, k], minlength=len(values)) / len(birds)
        assert np.abs(share - 1 / len(values)).max() < 0.14
    columns = np.column_stack([birds.attributes, birds.decoys])
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 0.28
    known = {marks: i for i, marks in enumerate(SPECIES.values())}
    expected = [known.get(tuple(row), -1) for row in birds.attributes.tolist()]
    assert birds.labels.tolist() == expected
    assert -1 in expected and max(expected) >= 0


def test_nuisance_does_not_tell_the_species(small: dict[str, ToyBirds]) -> None:
    """Plumage, habitat and direction are about equally common in all species."""
    scenes = small["train"].scenes + small["test"].scenes
    for name in ("plumage", "underside", "habitat", "facing"):
        values = sorted({getattr(s, name) for s in scenes})
        table = np.zeros((len(SPECIES), len(values)))
        for s in scenes:
            table[s.label, values.index(getattr(s, name))] += 1
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        chi2, freedom = ((table - expected) ** 2 / expected).sum(), 7 * (len(values) - 1)
        assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom), name


# ------------------------------------------------------------------------------ geometry


def test_birds_and_decoys_are_inside_the_image(birds: ToyBirds) -> None:
    for boxes in (birds.boxes, birds.decoy_boxes):
        assert (boxes[:, :2] > 0).all() and (boxes[:, 2:] < 64).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    size = birds.boxes[:, 2:] - birds.boxes[:, :2]
    assert size.min() > 24  # large enough to read


def test_parts_are_on_the_bird_and_apart(birds: ToyBirds) -> None:
    inside = (birds.parts > birds.boxes[:, None, :2]) & (birds.parts < birds.boxes[:, None, 2:])
    assert inside.all()
    for a, b in itertools.combinations(range(len(ATTRIBUTES)), 2):
        assert np.linalg.norm(birds.parts[:, a] - birds.parts[:, b], axis=1).min() > 6


def test_decoy_is_at_the_border_and_clear_of_the_bird(birds: ToyBirds) -> None:
    for scene, box, parts in zip(birds.scenes, birds.decoy_boxes, birds.parts, strict=True):
        assert min(box[0], box[1], 64 - box[2], 64 - box[3]) < 4
        assert np.allclose(box[2:] - box[:2], 9.5, atol=0.1)
        bird = 64 * np.concatenate(list(scene.shapes.values()))
        for points in (bird, parts):
            assert not ((points > box[:2]) & (points < box[2:])).all(axis=1).any()
        outside = np.maximum(np.maximum(box[:2] - parts, parts - box[2:]), 0)
        assert np.linalg.norm(outside, axis=1).min() > 3


def test_decoy_visits_all_sides(birds: ToyBirds) -> None:
    box = birds.decoy_boxes
    near = [(box[:, 0] < 4), (box[:, 1] < 4), (box[:, 2] > 60), (box[:, 3] > 60)]
    assert min(side.mean() for side in near) > 0.15


@pytest.mark.parametrize("level", ["anywhere", "flock"])
def test_harder_levels_are_what_they_say(level: str) -> None:
    """Birds of any size and decoys anywhere, on no mark, to be seen, and looked at by nobody."""
    birds, easy = (make("train", 160, seed=5, level=name) for name in (level, "border"))
    for boxes in (birds.boxes, birds.decoy_boxes):
        assert (boxes[:, :2] > 0).all() and (boxes[:, 2:] < 64).all()
    assert [s.label for s in birds.scenes] == birds.labels.tolist() == easy.labels.tolist()
    lengths = np.array([scene.scale for scene in birds.scenes])
    assert lengths.min() < 0.3 and lengths.max() > 0.38 > lengths.max() - 0.1
    middles = [(b[:, :2] + b[:, 2:]) / 2 for b in (birds.boxes, easy.boxes, birds.decoy_boxes)]
    assert (middles[0].std(axis=0) > 1.5 * middles[1].std(axis=0)).all()
    to_border = np.minimum(middles[2], 64 - middles[2]).min(axis=1)
    assert (to_border > 12).mean() > 0.4
    meets = (birds.boxes[:, :2] < birds.decoy_boxes[:, 2:]) & (
        birds.decoy_boxes[:, :2] < birds.boxes[:, 2:]
    )
    assert 0.1 < meets.all(axis=1).mean() < 0.6
    assert 0.3 < np.mean([scene.decoy_behind for scene in birds.scenes]) < 0.7
    looked, at_decoy, at_other, others = 0, 0, 0, 0
    colours = np.array(list(DECOY_COLOURS.values()))
    for i, scene in enumerate(birds.scenes):
        x0, y0, x1, y1 = box = birds.decoy_boxes[i]
        assert not ((birds.parts[i] > box[:2]) & (birds.parts[i] < box[2:])).all(axis=1).any()
        patch = birds.images[i, int(y0) : int(y1) + 1, int(x0) : int(x1) + 1].astype(int)
        assert (np.abs(patch - colours[birds.decoys[i]]).max(axis=2) <= 1).sum() >= 16, i
        looks = np.concatenate(birds.gaze[i])[:, :2]
        looked += len(looks)
        at_decoy += ((looks > box[:2]) & (looks < box[2:])).all(axis=1).sum()
        if scene.other is not None:
            others += 1
            theirs = 64 * np.array(scene.other.box)
            assert scene.other.scale == pytest.approx(0.7 * scene.scale)
            at_other += ((looks > theirs[:2]) & (looks < theirs[2:])).all(axis=1).sum()
    assert at_decoy / looked < 0.02 and at_other / looked < 0.01
    assert others / len(birds) > 0.5 if level == "flock" else others == 0


# ------------------------------------------------------------------------------ pixels


def test_the_decoy_has_its_colour_in_the_pixels(birds: ToyBirds) -> None:
    colours = np.array(list(DECOY_COLOURS.values()))
    middle = ((birds.decoy_boxes[:, :2] + birds.decoy_boxes[:, 2:]) / 2).astype(int)
    for image, (x, y), decoy in zip(birds.images, middle, birds.decoys, strict=True):
        patch = image[y - 1 : y + 2, x - 1 : x + 2].astype(int)
        assert np.abs(patch - colours[decoy]).max() <= 1


def test_without_the_decoy_only_the_decoy_is_gone(birds: ToyBirds) -> None:
    scene = birds.scenes[0]
    bare = dataclasses.replace(scene, decoy=-1)
    assert bare.decoy_box is None
    changed = (np.asarray(draw(bare)) != birds.images[0]).any(axis=2)
    x0, y0, x1, y1 = birds.decoy_boxes[0]
    ys, xs = np.nonzero(changed)
    assert changed.sum() > 60
    assert xs.min() >= x0 - 1 and xs.max() <= x1 + 1 and ys.min() >= y0 - 1 and ys.max() <= y1 + 1


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_mark_changes_the_pixels_around_its_part_alone(birds: ToyBirds, name: str) -> None:
    k = list(ATTRIBUTES).index(name)
    for scene in birds.scenes[:6]:
        images = []
        for value in range(len(ATTRIBUTES[name])):
            marks = (*scene.attributes[:k], value, *scene.attributes[k + 1 :])
            images.append(draw(dataclasses.replace(scene, attributes=marks)))
        for a, b in itertools.combinations(images, 2):
            change = np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max(axis=2)
            ys, xs = np.nonzero(change > 24)
            assert len(ys) >= 16  # about two thirds of a 5 x 5 pixel square, clearly visible
            away = np.hypot(*(np.array([xs, ys]).T / 64 - scene.parts[name]).T)
            assert np.median(away) < 0.16
            assert away.max() < 0.4


def test_a_larger_drawing_is_the_same_picture(birds: ToyBirds) -> None:
    for scene, image in zip(birds.scenes[:8], birds.images, strict=False):
        large = draw(scene, 256)
        assert large.size == (256, 256) and large.mode == "RGB"
        reduced = np.asarray(large.resize((64, 64), Image.Resampling.BOX), dtype=int)
        assert np.abs(reduced - image).mean() < 5


def test_images_are_pleasantly_lit(birds: ToyBirds) -> None:
    brightness = birds.images.mean(axis=(1, 2, 3))
    assert brightness.min() > 80 and brightness.max() < 235
    assert birds.images.std(axis=(1, 2)).min() > 8


# ------------------------------------------------------------------------------ gaze


def test_gaze_is_inside_the_image_and_lasts_plausibly(birds: ToyBirds) -> None:
    for readers in birds.gaze:
        assert len(readers) == 5
        for looks in readers:
            assert looks.dtype == np.float32 and looks.shape[1] == 3 and len(looks) >= 2
            assert looks[:, :2].min() >= 0 and looks[:, :2].max() < 64
            assert looks[:, 2].min() >= 150 and looks[:, 2].max() <= 900


def test_gaze_is_near_the_parts_and_never_at_the_decoy(birds: ToyBirds) -> None:
    near, head, decoy = [], [], 0
    for readers, parts, box in zip(birds.gaze, birds.parts, birds.decoy_boxes, strict=True):
        for looks in readers:
            distance = np.linalg.norm(looks[:, None, :2] - parts[None], axis=2)  # [F, A]
            near.extend(distance.min(axis=1) < 5)
            head.append(distance[:, 0].min() < 6)
            decoy += ((looks[:, :2] > box[:2]) & (looks[:, :2] < box[2:])).all(axis=1).sum()
    assert np.mean(near) > 0.88
    assert np.mean(head) > 0.9
    assert decoy / len(near) < 0.005


def heat(looks: np.ndarray, grid: int = 8, size: int = 64) -> np.ndarray:
    """Duration-weighted Gaussians of one patch on the patch grid, [grid, grid]."""
    x, y = looks[:, :2].T * grid / size
    centres = np.arange(grid) + 0.5
    across = np.exp(-((centres - x[:, None]) ** 2) / 2)
    down = np.exp(-((centres - y[:, None]) ** 2) / 2)
    return np.einsum("f,fy,fx->yx", looks[:, 2], down, across)


def test_one_reader_agrees_with_the_others_well_but_not_perfectly(birds: ToyBirds) -> None:
    values = []
    for readers in birds.gaze:
        maps = [heat(looks).ravel() for looks in readers]
        values += [np.corrcoef(m, sum(maps) - m)[0, 1] for m in maps]
    assert 0.8 < np.mean(values) < 0.9


def test_gaze_scales_with_the_image(birds: ToyBirds) -> None:
    scene = birds.scenes[0]
    small, large = (
        simulate_gaze(scene, np.random.default_rng(0), readers=2, size=size) for size in (64, 320)
    )
    for a, b in zip(small, large, strict=True):
        assert np.allclose(5 * a[:, :2], b[:, :2], atol=0.1)
        assert np.array_equal(a[:, 2], b[:, 2])


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "holdout"}, "holdout.*train, val, test, pretrain"),
        ({"n": 0}, "n is 0.*at least one"),
        ({"agreement": 1.5}, "agreement is 1.5.*0 to 1"),
        ({"agreement": -0.1}, "agreement is -0.1"),
        ({"agreement": float("nan")}, "agreement is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"size": 8}, "size is 8.*16"),
        ({"level": "sky"}, "level is 'sky'; choose one of border, anywhere, flock"),
    ],
)
def test_bad_requests_name_the_value_and_the_remedy(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**{"split": "train", "n": 1} | change)


@pytest.mark.parametrize(
    ("attributes", "label", "decoy", "words"),
    [
        ((0, 0, 0), 0, 0, "attributes is"),
        ((0, 2, 0, 0), 0, 0, "attributes is"),
        ((0, 0, 0, 0), 8, 0, "label is 8"),
        ((0, 0, 0, 0), 0, -2, "decoy is -2"),
    ],
)
def test_bad_scenes(attributes: tuple[int, ...], label: int, decoy: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_scene(np.random.default_rng(0), attributes, label, decoy)


def test_a_bird_without_decoy_or_reader() -> None:
    scene = sample_scene(np.random.default_rng(0), (0, 1, 2, 1), -1, -1)
    assert isinstance(scene, Scene) and scene.decoy_box is None
    assert draw(scene, 32).size == (32, 32)
    with pytest.raises(ValueError, match="readers is 0"):
        simulate_gaze(scene, np.random.default_rng(0), readers=0)

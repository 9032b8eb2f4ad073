"""Readers: folders, the layouts of CUB-200-2010, split files, and every source of human maps."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CUB_CLASSES, CUB_PER_CLASS, CUB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from lib.config import DataConfig, preset
from lib.data import splits
from lib.data.classes import chosen_classes, shown_names
from lib.data.corrections import Correction, save_correction
from lib.data.cub import CUB2010, CUB2011, gaze_files
from lib.data.dataset import make_dataset, read_records
from lib.data.maps import box_map, fixation_map
from lib.data.pictures import picture_size, read_picture
from lib.data.sources import (
    PICTURE_SUFFIXES,
    choose_split,
    list_by_folders,
    map_files,
)
from lib.data.unread import left_out
from lib.edit import AttentionEdit
from lib.files import is_hidden, maps_beside

GRID = (3, 4)
PLAIN = (0.0,) * 3, (1.0,) * 3


def picture(path: Path, seed: int = 0, size=(30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root: Path, names=("ant", "bee", "cat"), count=5) -> Path:
    for k, name in enumerate(names):
        for j in range(count):
            picture(root / name / f"{j}.jpg", seed=100 * k + j)
    return root


def folder_config(root: Path, **changes) -> DataConfig:
    changes.setdefault("maps", "none")
    return DataConfig(name="folder", root=root, image_size=(48, 64), val_share=0.25, **changes)


def paths(config: DataConfig, part: str) -> list[str]:
    records, _ = read_records(config, part)
    return [record.image.relative_to(config.root).as_posix() for record in records]


# -------------------------------------------------------------------------------------- own folder


def test_class_folders_alone_are_split_and_need_no_maps(tmp_path):
    config = folder_config(class_folders(tmp_path))
    found = {part: paths(config, part) for part in ("train", "val", "test")}
    assert {part: len(names) for part, names in found.items()} == {"train": 9, "val": 3, "test": 3}
    assert len({name for names in found.values() for name in names}) == 15
    assert all([name.split("/")[0] for name in found[p]] == ["ant", "bee", "cat"] for p in ("val",))
    dataset = make_dataset(config, "train", GRID, *PLAIN, augment=True)
    assert dataset.classes == ["ant", "bee", "cat"] and dataset.table["label"].max() == 2
    assert not dataset.table["has_map"].any() and not dataset[0]["valid"].any()
    other = folder_config(tmp_path, seed=1)
    assert paths(config, "test") != paths(other, "test")


@pytest.mark.parametrize("with_test", [False, True])
def test_train_and_val_folders_are_kept_apart(tmp_path, with_test):
    for part in ("train", "val", "test") if with_test else ("train", "val"):
        class_folders(tmp_path / part, count=4)
    config = folder_config(tmp_path)
    val, test = paths(config, "val"), paths(config, "test")
    # With two folders, val is what results are reported on: checkpoints are chosen on neither.
    assert {name.split("/")[0] for name in test} == {"test" if with_test else "val"}
    assert {name.split("/")[0] for name in val} == {"val" if with_test else "train"}
    assert len(test) == 12 and not set(val) & set(paths(config, "train"))


def test_ids_count_the_sorted_pictures(tmp_path):
    records, _ = read_records(folder_config(class_folders(tmp_path)), "test")
    order = sorted(f"{name}/{j}.jpg" for name in ("ant", "bee", "cat") for j in range(5))
    for record in records:
        name = record.image.relative_to(tmp_path).as_posix()
        assert record.image_id == order.index(name) + 1


def test_maps_of_a_folder_are_found_by_class_and_name(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", count=2)
    values = np.zeros((30, 40), np.uint8)
    values[:10, :10] = 200
    for name in ("ant/0.png", "train/bee/1.png", "cat/1.png"):
        (tmp_path / "maps" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(tmp_path / "maps" / name)
    config = folder_config(tmp_path, maps="files", maps_dir=tmp_path / "maps")
    with pytest.raises(ValueError, match=r"ant/0.png would be the map of train/ant/0.jpg and of"):
        read_records(config, "train")
    (tmp_path / "val" / "cat" / "1.jpg").unlink()
    (tmp_path / "val" / "ant" / "0.jpg").unlink()
    config.val_share = 0.0
    with pytest.warns(
        UserWarning, match=r"12 of 15 images have no human map \(ids .*\); they take"
    ):
        table = make_dataset(config, "train", GRID, *PLAIN).table
    assert table[table["has_map"]]["path"].str[-9:].tolist() == [
        "ant/0.jpg",
        "bee/1.jpg",
        "cat/1.jpg",
    ]
    assert "maps" not in table["class_name"].tolist()
    with warnings.catch_warnings():  # without maps by intention nothing is told
        warnings.simplefilter("error")
        make_dataset(folder_config(tmp_path), "train", GRID, *PLAIN)


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_without_pictures_is_refused(tmp_path, empty):
    root = tmp_path if empty else tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=r"has no class folders|nowhere is missing"):
        read_records(folder_config(root), "train")


def test_a_class_without_training_pictures_is_refused(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", names=("ant", "dog"))
    with pytest.raises(ValueError, match=r"val/dog is a class that .*train does not have"):
        read_records(folder_config(tmp_path), "train")


def tree(root: Path, *files: str) -> Path:
    """Empty files: a listing opens no picture."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(root: Path) -> tuple[str, list[str]]:
    """Classes, and pictures of the parts, of a listing."""
    listing = list_by_folders(root)
    return " ".join(listing.label_list), [row.path for row in listing.rows]


TRAIN = ("train/ant/0.jpg", "train/bee/0.jpg")


@pytest.mark.parametrize(
    ("files", "classes", "pictures"),
    [
        # what is a part, and what is a class of that name
        (("bus/0.jpg", "train/0.jpg", "val/0.jpg", "maps/z.jpg"), "bus maps train val", 4),
        (("bus/0.jpg", "Train/0.jpg", "Train/old/0.jpg"), "Train bus", 2),
        ((*TRAIN, "test/0.jpg", "valid/a.txt"), "ant bee", 2),  # unlabelled test pictures
        ((*TRAIN, "train/overview.png", "train/ant/more/1.jpg"), "ant bee", 2),
        ((*TRAIN, "VALIDATION/ant/0.jpg", "samples/0.jpg"), "ant bee", 3),
        (("TRAINING/ant/0.JPG", "TRAINING/bee/0.jpg", "Testing/bee/0.jpg"), "ant bee", 3),
        (("train/maps/0.jpg", "train/bee/0.jpg", "val/maps/0.jpg"), "bee maps", 3),
        (("Cat/0.jpg", "cat/0.jpg"), "Cat cat", 2),
        # which files are pictures
        (("ant/0.JFIF", "ant/1.avif", "ant/2.GIF", "bee/0.webp", "bee/1.tif"), "ant bee", 5),
        (
            ("ant/0.jpg", "bee/0.pdf", "bee/0.eps", "bee/0.h5", "cat/0.png"),
            "ant cat",
            2,
        ),
        (("ant/0.jpg", "bee/0.jpg", "ant/._0.jpg", "__MACOSX/a/._0.jpg", ".x/0.jpg"), "ant bee", 2),
        (("ant/0.jpg", "bee/0.jpg", "__MACOSX/0.jpg", "bee/Thumbs.db", "0.jpg"), "ant bee", 2),
        (("ant/0.jpg", "ant/1.jpg/0.png", "bee/a..b.jpg", "bee/...jpg"), "ant bee", 2),
        # human maps
        (("ant/0.jpg", "bee/0.jpg", "maps/ant/0.png"), "ant bee", 2),
        (("ant/0.jpg", "bee/0.jpg", "Maps/ant/0.png", "Maps/legend.png"), "ant bee", 2),
        (("ant/0.jpg", "bee/1.jpg", "maps/0.png", "maps/._1.png", "maps/1.png"), "ant bee", 2),
        (("ant/0.jpg", "bee/0.jpg", "maps/0.npy"), "ant bee", 2),
        (("ant/0.jpg", "bee/0.jpg", "maps/0.jpg", "maps/old/0.jpg"), "ant bee maps", 3),
        ((*TRAIN, "val/ant/0.jpg", "maps/0.png"), "ant bee", 3),
    ],
)
def test_what_a_folder_or_file_is(tmp_path, monkeypatch, files, classes, pictures):
    names, rows = found(tree(tmp_path, *files))
    assert (names, len(set(rows))) == (classes, pictures) and len(rows) == pictures
    # The presets look for the same folder of maps.
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    maps = preset("folder").data.maps_dir
    is_class = "maps" in classes.split()
    assert (maps is None) == (is_class or not any(f.lower().startswith("maps/") for f in files))
    assert maps == maps_beside(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("Train/ant/0.jpg", "train/ant/0.jpg"), "Train and .*train are both for train; put their"),
        ((*TRAIN, "val/ant/0.jpg", "valid/ant/0.jpg"), "val and .*valid are both for val; put"),
        ((*TRAIN, "cat/0.jpg"), r"train holds class folders, and so does .* itself \(cat\); move"),
        (("ant/0.jpg", "Test/ant/0.jpg"), r"Test holds class folders, and so does .*\(ant\); move"),
        (("test/ant/0.jpg",), "has test, but no folder train; put training .* or set DATA_DIR to"),
        (("0.jpg", "1.jpg"), "no class folders .*, but pictures in .*; sort them into one folder"),
        (("train/0.jpg", "val/0.jpg"), "no class folders .*, but pictures in .*train; sort them"),
        (("birds/ant/0.jpg",), "but birds with class folders; set DATA_DIR to .*birds, or call"),
        (
            ("birds/train/ant/0.jpg", "birds/val/ant/0.jpg"),
            "but .*birds has parts .*; set DATA_DIR",
        ),
        (("ant/0.heic", "bee/0.mp4"), r"but files of other kinds .*; pillow-heif reads"),
        (("a.zip",), "has no class folders with pictures in them; set DATA_DIR to"),
        (("ant/0.jpg", "maps/ant/0.png", "Maps/ant/0.png"), "Maps and .*maps both hold human maps"),
        (("caf\u00e9/0.jpg", "cafe\u0301/1.jpg"), "is there twice, in two Unicode forms"),
        (
            ("x/caf\u00e9.jpg", "x/cafe\u0301.jpg", "y/0.jpg"),
            "is there twice, in two Unicode forms",
        ),
    ],
)
def test_folders_that_cannot_be_read_in_one_way_are_one_sentence(tmp_path, files, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        found(tree(tmp_path, *files))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


PARTS = ("train", "Training", "TRAIN", "val", "Valid", "validation", "test", "TESTING")
LAYOUTS = (("",), ("", "maps"), ("train",), ("Train", "valid"), ("TRAINING", "Val", "test"), PARTS)
CLASSES = ("ant", "Ant", "maps", "train", "val", "x", "a..b", " ", "12:30", "\N{BIRD}", ".x")
FILES = ("0.jpg", "p.JPEG", "._0.jpg", "0.png", "notes.txt", "a b.gif", "0.npy", ".png", "x/0.jpg")


@settings(max_examples=150)
@given(st.sampled_from(LAYOUTS), st.data())
def test_every_picture_is_read_once_or_lies_where_none_is_read(tmp_path_factory, layout, data):
    root = tmp_path_factory.mktemp("tree")
    above = st.sampled_from([*(3 * layout), "maps", "__MACOSX", "more/deep"])
    place = st.tuples(above, st.sampled_from((*CLASSES, "")), st.sampled_from(FILES))
    for one in data.draw(st.lists(place, min_size=4, max_size=14)):
        path = root / "/".join(filter(None, one))
        if not path.exists() and not any(p.is_file() for p in path.parents):
            tree(root, path.relative_to(root).as_posix())
    try:
        listing = list_by_folders(root)
    except (FileNotFoundError, ValueError) as error:
        assert str(root) in str(error)
        return
    rows = [row.path for row in listing.rows]
    assert len(rows) == len(set(rows)) and len(listing.label_list) == len(set(listing.label_list))
    depth = {len(Path(path).parts) for path in rows}
    assert len(depth) == 1  # class folders, or parts
    maps = maps_beside(root)
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES:
            hidden = any(map(is_hidden, name.parts))
            in_maps = maps is not None and path.is_relative_to(maps)
            part = depth == {2} or name.parts[0].lower() in map(str.lower, PARTS)
            is_read = not hidden and not in_maps and {len(name.parts)} == depth and part
            assert (name.as_posix() in rows) == is_read, name


def test_class_folders_may_be_links(tmp_path):
    tree(tmp_path, "away/0.jpg", "data/bee/0.jpg", "masks/0.png")
    (tmp_path / "data" / "ant").symlink_to(tmp_path / "away")
    assert found(tmp_path / "data") == ("ant bee", ["ant/0.jpg", "bee/0.jpg"])
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "ant").symlink_to(tmp_path / "masks")
    rows = list_by_folders(tmp_path / "data").rows
    assert [row.path for row in map_files(tmp_path / "maps", rows)] == ["ant/0.jpg"]


@pytest.mark.parametrize(
    ("folders", "shown"),
    [
        (("001.Old_coin", "002.New_coin"), ["Old coin", "New coin"]),
        (("1.Old_coin", "2.Old_coin", "Penny"), ["1.Old_coin", "2.Old_coin", "Penny"]),
        (("a_b", "a b", "3.a_b"), ["a_b", "a b", "3.a_b"]),
        (("3.5_mm", "4.5_mm"), ["3.5 mm", "4.5 mm"]),
        (("1.a", "2.a", "3.1.a"), ["1.a", "2.a", "3.1.a"]),
        (("1.", "_", "e\u0301"), ["1.", " ", "\u00e9"]),
    ],
)
def test_names_of_classes_stay_apart(folders, shown):
    assert shown_names(folders) == shown


@given(st.lists(st.text("12._a \u00e9", min_size=1, max_size=5), unique=True, max_size=8))
def test_as_many_names_as_folders(folders):
    assert len(set(shown_names(folders))) == len(folders)


def test_photographs_are_turned_as_their_exif_says(tmp_path):
    path = tmp_path / "a.jpg"
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise for viewing
    Image.fromarray(pixels).save(path, exif=exif)
    assert picture_size(path) == (40, 20) and read_picture(path).size == (20, 40)
    upright = np.asarray(read_picture(path))
    assert upright[5].mean() > 200 and upright[35].mean() < 50


# ---------------------------------------------------------------------------------------- CUB 2010


@pytest.fixture
def cub2010(tmp_path):
    """The published layout: images/, lists/, annotations-mat/."""
    home = tmp_path / "CUB_200_2010"
    lists = {"train": [], "test": []}
    for k, name in enumerate(CUB_CLASSES):
        for j in range(4):
            path = f"{name}/bird_{j}.jpg"
            picture(home / "images" / path, seed=10 * k + j)
            lists["train" if j < 3 else "test"].append(path)
            mat = (home / "annotations-mat" / path).with_suffix(".mat")
            mat.parent.mkdir(parents=True, exist_ok=True)
            savemat(mat, {"bbox": {"left": 10, "top": 0, "right": 30, "bottom": 15}, "seg": 0})
    (home / "lists").mkdir()
    for part, names in lists.items():
        (home / "lists" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return DataConfig(
        name="cub2010", root=tmp_path, image_size=(48, 64), val_share=0.34, maps="boxes"
    )


def test_cub2010_as_published_with_its_boxes(cub2010):
    parts = {part: read_records(cub2010, part)[0] for part in ("train", "val", "test")}
    assert {part: len(records) for part, records in parts.items()} == {
        "train": 4, "val": 2, "test": 2,
    }  # fmt: skip
    assert [r.image.name for r in parts["test"]] == ["bird_3.jpg"] * 2
    dataset = make_dataset(cub2010, "test", GRID, *PLAIN)
    assert dataset.classes == ["Black footed Albatross", "Groove billed Ani"]
    expected = box_map((10, 0, 30, 15), (30, 40), GRID)
    np.testing.assert_allclose(dataset[0]["human"].view(GRID), expected, atol=1e-6)
    assert dataset[0]["valid"].all() and dataset.readers(0)[0].shape == (0, 12)


@pytest.mark.parametrize(
    "line", ["bird_9.jpg", "images/a/bird_9.jpg", "/etc/\N{BIRD}.jpg", "../b.jpg", r"a\bird_9.jpg"]
)
def test_a_line_of_cub2010_that_is_no_class_and_picture_is_named(cub2010, line):
    with (cub2010.root / "CUB_200_2010" / "lists" / "train.txt").open(
        "a", encoding="utf-8"
    ) as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"train.txt, line 7 is .* where <class folder>/<picture>"):
        read_records(cub2010, "test")


@pytest.mark.parametrize("keep", [0, 60, 200])
def test_a_damaged_box_of_cub2010_is_named(cub2010, keep):
    path = next(cub2010.root.glob("*/annotations-mat/*/bird_3.mat"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"bird_3.mat holds no bbox; restore it"):
        read_records(cub2010, "test")


def test_cub2010_sorted_into_folders(tmp_path):
    class_folders(tmp_path / "cub200" / "train", CUB_CLASSES)
    class_folders(tmp_path / "cub200" / "val", CUB_CLASSES, count=2)
    config = DataConfig(name="cub2010", root=tmp_path, maps="none", val_share=0.2)
    assert len(read_records(config, "train")[0]) == 8 and len(read_records(config, "test")[0]) == 4


@pytest.mark.parametrize("home", ["CUB_200_2010", "cub200", ""])
@pytest.mark.parametrize("apart", [False, True], ids=["of train", "apart"])
def test_cub2010_with_bubbles_under_the_names_of_the_original(tmp_path, monkeypatch, home, apart):
    """Its HITL pictures may be among those of train, or be others; those of val stay out."""
    home = class_folders(tmp_path / home / "train", CUB_CLASSES).parent
    class_folders(home / "val", CUB_CLASSES, count=2)
    for path in sorted((home / "val").glob("*/*")):
        path.rename(path.with_stem(f"v{path.stem}"))
    for name in ("v0.jpg", "b0.jpg" if apart else "0.jpg"):
        picture(home / "train_bubbles" / CUB_CLASSES[0] / name)
        map_file = home / "bubbles_att" / CUB_CLASSES[0] / name
        picture(map_file, seed=5).rename(map_file.with_suffix(".png"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    config = replace(preset("cub2010").data, image_size=(48, 64))
    assert config.maps == "files" and config.maps_dir == home / "bubbles_att"
    train, test = (
        read_records(replace(config, val_share=0), part)[0] for part in ("train", "test")
    )
    mapped = [r.image.relative_to(home).as_posix() for r in train if r.human]
    own = "train_bubbles" if apart else "train"
    assert mapped == [f"{own}/{CUB_CLASSES[0]}/{'b' * apart}0.jpg"]
    assert len(train) == 10 + apart and len(test) == 4 and sum(bool(r.human) for r in test) == 1
    told = left_out(config, CUB2010.pictures(tmp_path))  # of a folder that is read in part
    assert [one.path.name for one in told] == ["v0.jpg"] * apart
    picture(home / "train_bubbles" / "other" / "0.jpg")
    with pytest.raises(ValueError, match="other is a class that train does not have"):
        CUB2010.pictures(tmp_path)


def test_cub2010_that_is_not_there_names_both_layouts(tmp_path):
    config = DataConfig(name="cub2010", root=tmp_path, maps="none")
    with pytest.raises(FileNotFoundError, match=r"neither lists/ and images/ nor train/ and val/"):
        read_records(config, "train")


# -------------------------------------------------------------------------------------- split files


def test_a_split_file_decides_and_validation_is_carved_from_train(cub):
    listing = CUB2011.pictures(cub.root)
    made = splits.per_class(listing.rows, listing.label_list, 0.7, shuffle=True, seed=3)
    path = cub.root / "split.json"
    splits.write_split(made, path)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    config = replace(cub, split_file=path, split_md5=digest)
    parts = {part: read_records(config, part)[0] for part in ("train", "val", "test")}
    names = {
        part: {r.image.relative_to(listing.images).as_posix() for r in parts[part]}
        for part in parts
    }
    assert names["test"] == {row.path for row in made.test} and len(names["test"]) == 6
    assert names["train"] | names["val"] == {row.path for row in made.train}
    assert len(names["val"]) == 4 and not names["train"] & names["val"]
    ids = {row.path: int(row.map_name) for row in listing.rows}
    assert all(
        r.image_id == ids[r.image.relative_to(listing.images).as_posix()] for r in parts["test"]
    )
    assert parts["test"][0].gaze  # gaze is attached by image id
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"split.json changed since this configuration was made"):
        read_records(config, "train")


def test_a_split_file_that_names_a_stranger_is_refused(cub):
    listing = CUB2011.pictures(cub.root)
    path = cub.root / "split.json"
    splits.write_split(listing.published, path)
    path.write_text(path.read_text().replace("bird_3.jpg", "bird_33.jpg"))
    with pytest.raises(ValueError, match=r"bird_33.jpg, which the data set in .* does not have"):
        read_records(replace(cub, split_file=path), "test")


def test_a_split_file_has_its_own_list_of_classes(tmp_path):
    def split(label_list, *rows, part="test"):
        content = {"train": [["ant/1.jpg", 0, "1"]], "label_list": label_list, part: list(rows)}
        (tmp_path / "split.json").write_text(json.dumps(content))
        return folder_config(tmp_path, split_file=tmp_path / "split.json")

    class_folders(tmp_path)
    # Some classes, in another order: the label of a picture is its class's in the file.
    config = split(["cat", "bee"], ["cat/0.jpg", 0, "0"], ["bee/0.jpg", 1, "0"])
    with pytest.raises(
        ValueError, match=r"gives ant/1.jpg to the class 'cat', but its class is 'ant'"
    ):
        read_records(config, "test")
    config = split(["ant", "cat"], ["ant/0.jpg", 0, "0"], ["cat/0.jpg", 1, "0"])
    with pytest.warns(
        UserWarning, match=r"split.json names no picture of 1 class.* \(bee\): left out"
    ):
        records, names = read_records(config, "test")
    assert [names[r.label] for r in records] == ["ant", "cat"]
    assert [r.image.parent.name for r in records] == ["ant", "cat"]
    # Other groups than the folders
    config = split(["insect", "pet"], ["bee/0.jpg", 0, "0"], ["cat/0.jpg", 1, "0"])
    assert read_records(config, "test")[1] == ["insect", "pet"]
    (tmp_path / "cat").rename(tmp_path / "lion")
    with pytest.raises(
        ValueError, match=r"names cat/0.jpg, which the data set in .* does not have"
    ):
        read_records(config, "test")


def test_the_published_split_is_that_of_the_lists(cub):
    split = choose_split(cub, CUB2011.pictures(cub.root))
    assert len(split.test) == 8 and len(split.train) + len(split.val) == 12


# --------------------------------------------------------------------------------- sources of maps


def test_boxes_and_parts_of_cub2011_become_maps(cub):
    boxes = make_dataset(replace(cub, maps="boxes"), "test", GRID, *PLAIN)
    expected = box_map((20, 15, 60, 45), CUB_SIZE, GRID)
    np.testing.assert_allclose(boxes[0]["human"].view(GRID), expected, atol=1e-6)
    parts = make_dataset(replace(cub, maps="parts"), "test", GRID, *PLAIN)
    expected = fixation_map(np.array([[25, 20, 1], [55, 40, 1]]), CUB_SIZE, GRID)
    np.testing.assert_allclose(parts[0]["human"].view(GRID), expected, atol=1e-6)
    assert parts[0]["fixations"].sum() == 2 and boxes[0]["fixations"].sum() == 0


@pytest.mark.parametrize("colour", ["L", "RGB"])
def test_bubble_maps_are_found_by_image_id(cub, colour):
    folder = cub.root / "bubbles"
    folder.mkdir()
    for image in range(1, 2 * CUB_PER_CLASS):  # the last one has none
        values = np.zeros(CUB_SIZE, np.uint8)
        values[20:40, 20:40] = 250
        Image.fromarray(values).convert(colour).save(folder / f"{image}.jpg", quality=95)
    config = replace(cub, maps="files", maps_dir=folder)
    with pytest.warns(UserWarning, match=r"1 of 8 images have no human map \(ids 20\)"):
        dataset = make_dataset(config, "test", GRID, *PLAIN)
    expected = np.zeros(GRID)
    expected[1, 1] = 1  # rows 20 to 40 of 60, columns 20 to 40 of 80
    np.testing.assert_allclose(dataset[0]["human"].view(GRID), expected, atol=0.03)
    training = make_dataset(replace(config, val_share=0.0), "train", GRID, *PLAIN, augment=True)
    item = training[0]
    assert item["valid"].all() and 0.5 < item["human"].max() <= 1


def test_a_bubble_map_of_another_picture_is_refused(cub):
    folder = cub.root / "bubbles"
    folder.mkdir()
    Image.new("L", (60, 80)).save(folder / "7.jpg")  # 7 is 80 wide and 60 high
    with pytest.raises(ValueError, match=r"7.jpg is 60 x 80, but its picture is 80 x 60 pixels"):
        make_dataset(replace(cub, maps="files", maps_dir=folder), "test", GRID, *PLAIN)


def test_two_maps_of_one_picture_and_a_missing_folder_are_refused(cub):
    folder = cub.root / "bubbles"
    config = replace(cub, maps="files", maps_dir=folder)
    with pytest.raises(FileNotFoundError, match="bubbles is missing; set MAPS"):
        read_records(config, "test")
    folder.mkdir()
    for name in ("7.jpg", "7.png"):
        Image.new("L", (80, 60)).save(folder / name)
    with pytest.raises(ValueError, match=r"7.jpg and .*7.png are maps of one picture; keep one"):
        read_records(config, "test")


def corrections(folder: Path, image_id: int) -> Path:
    """A saved correction: the upper left cell to 0, the lower right one to 1; and a broken file."""
    mask = np.zeros(GRID, bool)
    mask[0, 0] = mask[-1, -1] = True
    values = np.zeros(GRID, np.float32)
    values[-1, -1] = 1
    edit = AttentionEdit(mask, values)
    save_correction(Correction.now(str(image_id), edit, "0123", "me"), folder)
    (folder / "broken.json").write_text("{")
    return folder


@pytest.mark.parametrize("name", ["cub2011", "toy"])
def test_a_folder_of_corrections_is_a_source_of_maps(cub, name):
    folder = corrections(cub.root / "corrections", 8 if name == "cub2011" else 200_001)
    config = replace(cub, name=name, maps="corrections", maps_dir=folder, toy_test=4)
    config = replace(config, image_size=(48, 48)) if name == "toy" else config
    with pytest.warns(UserWarning, match="no human map"), pytest.warns(UserWarning, match="broken"):
        dataset = make_dataset(config, "test", GRID, *PLAIN)
    assert dataset.table["has_map"].sum() == 1
    item = dataset[int(dataset.table["has_map"].argmax())]
    assert item["valid"].nonzero().flatten().tolist() == [0, 11]
    assert item["human"].nonzero().flatten().tolist() == [11]


def test_a_correction_stays_with_its_class_when_pictures_are_added(tmp_path):
    class_folders(tmp_path, count=2)
    config = folder_config(tmp_path, maps="corrections", maps_dir=tmp_path / "corrections")
    edit = AttentionEdit(np.ones(GRID, bool), np.ones(GRID, np.float32))
    save_correction(Correction.now("3", edit, "0123", "me", class_name="bee"), config.maps_dir)
    records = [one for part in ("train", "test") for one in read_records(config, part)[0]]
    assert [r.image.parent.name for r in records if r.human] == ["bee"]
    picture(tmp_path / "ant" / "2.gif")
    with pytest.raises(
        ValueError, match=r"image 3, then of the class 'bee', now of 'ant': pictures"
    ):
        read_records(config, "train")


def test_a_correction_stays_with_its_file_when_pictures_are_added(tmp_path):
    class_folders(tmp_path, count=2)
    config = folder_config(tmp_path, maps="corrections", maps_dir=tmp_path / "corrections")
    edit = AttentionEdit(np.ones(GRID, bool), np.ones(GRID, np.float32))
    path = next((tmp_path / "ant").iterdir())
    number = 1 + sorted((tmp_path / "ant").iterdir()).index(path)
    texts = {"class_name": "ant", "file": path.name}
    save_correction(Correction.now(f"{number}", edit, "0123", "me", **texts), config.maps_dir)

    def corrected():
        parts = (read_records(config, part)[0] for part in ("train", "test"))
        return [one.image for records in parts for one in records if one.human]

    assert corrected() == [path]
    picture(tmp_path / "ant" / "!first.gif")  # the ids of all others move
    assert corrected() == [path]
    path.rename(path.with_name(f"other{path.suffix}"))
    with pytest.warns(UserWarning, match=f"ant/{path.name}, which is skipped: there is no"):
        assert corrected() == []


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("ant/0.png", "about.json"), "files"),
        (("correction", "._x.json", "about.json"), "corrections"),
        (("correction", "ant/0.png"), "keep them in two folders, and set MAPS to one"),
        (("about.json", "._0.png", "Thumbs.db"), "holds neither map files .* nor corrections"),
        ((), "holds neither map files .* nor corrections"),
    ],
)
def test_what_a_folder_of_maps_holds_decides_how_it_is_read(cub, monkeypatch, files, kind):
    folder = cub.root / "people"
    folder.mkdir()
    tree(folder, *(name for name in files if name != "correction"))
    if "correction" in files:
        edit = AttentionEdit(np.ones(GRID, bool), np.ones(GRID, np.float32))
        correction = Correction.now("8", edit, "0123", "me")
        save_correction(correction, folder, preview=b"a picture of it, which is no map")
    monkeypatch.setenv("DATA_DIR", str(cub.root))
    monkeypatch.setenv("MAPS", str(folder))
    config = preset("cub2011").data
    assert config.maps in ("files", "corrections") and config.maps_dir == folder
    if " " not in kind:
        assert config.maps == kind
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read_records(config, "test")
        assert not any("._" in str(one.message) for one in told)
        return
    with pytest.raises(ValueError, match=kind):
        read_records(config, "test")


def test_maps_among_the_pictures_are_refused(tmp_path):
    class_folders(tmp_path, ("ant", "bee", "heat"))
    for folder in (tmp_path, tmp_path / "heat"):
        config = folder_config(tmp_path, maps="files", maps_dir=folder)
        with pytest.raises(
            ValueError, match="holds pictures of the data set; keep human maps in a"
        ):
            read_records(config, "train")


def test_two_pictures_of_one_name_cannot_share_a_map(tmp_path):
    tree(tmp_path, "ant/0.jpg", "ant/0.png", "bee/1.jpg", "maps/ant/0.png", "maps/bee/._1.png")
    rows = list_by_folders(tmp_path).rows
    with pytest.raises(
        ValueError, match=r"would be the map of ant/0.jpg and of ant/0.png; .* names"
    ):
        map_files(tmp_path / "maps", rows)
    assert map_files(tmp_path / "maps", rows[:1]) == {rows[0]: tmp_path / "maps" / "ant" / "0.png"}


# ------------------------------------------------------------------------------ texts and letters


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_are_read_in_any_unicode(cub, encoding, ends):
    cub = replace(cub, val_share=0.0)
    plain = {part: read_records(cub, part) for part in ("train", "test")}
    for path in sorted(cub.root.rglob("*.txt")):
        path.write_bytes(ends.join(path.read_text().splitlines()).encode(encoding))
    for part, (records, names) in plain.items():
        again, same = read_records(cub, part)
        assert same == names and [r.image for r in again] == [r.image for r in records]
        assert [len(r.gaze) for r in again] == [len(r.gaze) for r in records]


@pytest.mark.parametrize("name", ["images", "classes"])
def test_a_list_that_is_no_unicode_is_one_sentence(cub, name):
    path = cub.root / "CUB_200_2011" / f"{name}.txt"
    path.write_bytes(path.read_bytes().replace(b"Ani", b"Perdiz_Chac\xe3o"))
    with pytest.raises(
        ValueError, match=rf"{name}.txt, line \d+ has '.*Chac.o.*no UTF-8; save the"
    ):
        read_records(cub, "test")


def test_names_in_a_list_may_hold_spaces_and_rare_separators(cub):
    name = "a \u2028b  c.jpg"
    path = cub.root / "CUB_200_2011" / "images.txt"
    path.write_text(path.read_text().replace("bird_9.jpg", name, 1))
    images = [row.path for row in CUB2011.pictures(cub.root).rows]
    assert f"{CUB_CLASSES[0]}/{name}" in images and len(images) == 2 * CUB_PER_CLASS


NFC, NFD = "\u00e9t\u00e9", "e\u0301te\u0301"


@pytest.mark.parametrize(("disk", "text"), [(NFC, NFD), (NFD, NFC)])
def test_lists_splits_and_maps_are_matched_whatever_the_unicode_form(tmp_path, disk, text):
    home = tmp_path / "CUB_200_2010"
    tree(home, "lists/train.txt", "lists/test.txt", "images/x/0.jpg")
    for part, numbers in (("train", "12"), ("test", "3")):
        (home / "lists" / f"{part}.txt").write_text(
            "".join(f"{text}/{text} {n}.jpg\n" for n in numbers) + f"x/{part}.jpg\n"
        )
        for number in numbers:
            picture(home / "images" / disk / f"{disk} {number}.jpg")
        picture(home / "images" / "x" / f"{part}.jpg")
    tree(tmp_path, f"maps/{text}/{text} 1.png", f"maps/{disk}/{disk} 2.png")
    config = DataConfig(
        name="cub2010", root=tmp_path, maps="files", maps_dir=tmp_path / "maps", val_share=0.0
    )
    records, names = read_records(config, "train")
    assert sorted(names) == ["x", NFC] and all(record.image.is_file() for record in records)
    assert sorted(r.human.name for r in records if r.human) == sorted(
        [f"{text} 1.png", f"{disk} 2.png"]
    )
    made = choose_split(config, CUB2010.pictures(tmp_path))
    turned = [replace(row, path=row.path.replace(disk, text)) for row in made.train]
    splits.write_split(replace(made, train=tuple(turned)), tmp_path / "split.json")
    again = choose_split(
        replace(config, split_file=tmp_path / "split.json"), CUB2010.pictures(tmp_path)
    )
    assert [row.path for row in again.train] == [row.path for row in made.train]


def test_val_and_train_are_the_same_class_in_two_forms(tmp_path):
    tree(tmp_path, f"train/{NFC}/0.jpg", "train/a/0.jpg", f"val/{NFD}/0.jpg", "val/a/0.jpg")
    assert [row.label for row in list_by_folders(tmp_path).rows] == [0, 1, 0, 1]


def test_a_name_that_is_no_utf8_works_all_the_way(tmp_path):
    for folder in (b"caf\xe9", b"bee"):
        for number in range(4):
            source = picture(tmp_path / "x.jpg", seed=number)
            os.makedirs(os.path.join(os.fsencode(tmp_path), folder), exist_ok=True)
            source.rename(
                os.fsdecode(os.path.join(os.fsencode(tmp_path), folder, b"\xe9%d.jpg" % number))
            )
    config = folder_config(tmp_path)
    listing = list_by_folders(tmp_path)
    made = splits.per_class(listing.rows, listing.label_list, 0.5, shuffle=True)
    splits.write_split(made, tmp_path / "split.json")
    config = replace(config, split_file=tmp_path / "split.json", val_share=0.0)
    dataset = make_dataset(config, "train", GRID, *PLAIN)
    assert len(dataset) == 4 and dataset[3]["image"].shape == (3, 48, 64)


@pytest.mark.parametrize(
    ("name", "maps", "message"),
    [
        ("folder", "gaze", "folder comes without gaze; set MAPS to none, or a folder"),
        ("cub2010", "parts", "cub2010 comes without parts; set MAPS to boxes, none, or"),
    ],
)
def test_maps_that_a_data_set_does_not_have_are_refused(tmp_path, name, maps, message):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val")
    with pytest.raises(ValueError, match=message):
        read_records(DataConfig(name=name, root=tmp_path, maps=maps), "train")


def test_any_subset_of_the_gaze_runs(cub):
    both = make_dataset(cub, "test", GRID, *PLAIN)
    second = make_dataset(replace(cub, gaze_runs=(2,)), "test", GRID, *PLAIN)
    assert both[0]["fixations"].sum() == 3 and second[0]["fixations"].sum() == 1
    expected = fixation_map(np.array([[12, 9, 300]]), CUB_SIZE, GRID)
    np.testing.assert_allclose(second[0]["human"].view(GRID), expected, atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"run9.txt is missing; there are runs 1, 2"):
        make_dataset(replace(cub, gaze_runs=(1, 9)), "test", GRID, *PLAIN)


def test_the_one_file_with_all_runs_is_used_where_it_is_alone(cub):
    folder = cub.root / "CUB_GHA"
    lines = [f"{i},80,60,160,120,100,50,140,90,300" for i in range(1, 21)]  # shown twice as large
    (folder / "Fixation.txt").write_text("\n".join(lines) + "\n")
    assert [path.name for path in gaze_files(folder, "all")] == [
        "Fixation_run1.txt", "Fixation_run2.txt",
    ]  # fmt: skip
    (folder / "data_5runs").rename(folder / "elsewhere")
    record = read_records(cub, "test")[0][0]
    np.testing.assert_allclose(record.gaze[0].fixations, [[20, 20, 300]])


def test_the_width_of_a_fixation_in_pixels(cub):
    dataset = make_dataset(replace(cub, sigma=15.0, sigma_unit="pixel"), "test", GRID, *PLAIN)
    looks = np.array([[10, 10, 200], [70, 50, 400], [12, 9, 300]])
    expected = fixation_map(looks, CUB_SIZE, GRID, sigma=np.array([15 * 3 / 60, 15 * 4 / 80]))
    np.testing.assert_allclose(dataset[0]["human"].view(GRID), expected, atol=1e-6)


# ------------------------------------------------------------------------------- damaged list files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_class_labels", "1 one\n", r"labels.txt, line 1 is '1 one' where an id"),
        ("images", "1 a/b.jpg\n1 a/c.jpg\n", "images.txt has the id 1 twice"),
        (
            "bounding_boxes",
            "1 1 2 3\n",
            r"boxes.txt, line 1 is '1 1 2 3' where an id and 4",
        ),
    ],
)
def test_a_damaged_list_is_one_sentence(cub, name, text, message):
    (cub.root / "CUB_200_2011" / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(cub, "test")


@pytest.mark.parametrize("names", [["021.A", "022.B", "040.C", "041.D"], ["A", "B", "C", "D"]])
def test_classes_are_chosen_by_the_number_of_their_folder_or_by_place(names):
    asked = ["22-22, 41", "21"] if "0" in names[0] else ["2,4", "1"]
    assert [chosen_classes(names, words) for words in asked] == [[1, 3], [0]]
    for words in ("", "3-1", "1-", "all", "-2", "1;2"):
        with pytest.raises(ValueError, match="give numbers and ranges, such as 21-40"):
            chosen_classes(names, words)
    with pytest.raises(ValueError, match=r"there is no class 23; the data has 4 of the numbers"):
        chosen_classes(names, "22-23" if "0" in names[0] else "23")


def test_a_part_of_the_classes_is_the_same_pictures_with_labels_of_their_own(cub):
    for part in ("train", "val", "test"):
        everything, names = read_records(cub, part)
        some, chosen = read_records(replace(cub, classes="4"), part)
        assert chosen == names[1:]
        of_it = [record for record in everything if record.label == 1]
        assert [one.image for one in some] == [one.image for one in of_it]
        assert {one.label for one in some} == {0}
    with pytest.raises(ValueError, match="there is no class 2; the data has 2 of the numbers 1 to"):
        read_records(replace(cub, classes="1-4"), "train")
    with pytest.raises(ValueError, match="drawn birds come as a whole; set PRESET"):
        read_records(DataConfig(classes="1-2"), "train")


def test_maps_dir_goes_with_files_only():
    with pytest.raises(ValueError, match='maps is "gaze" and maps_dir bubbles; give a folder'):
        DataConfig(name="cub2011", maps_dir=Path("bubbles"))

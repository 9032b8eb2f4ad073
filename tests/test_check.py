"""The check of a data set: every kind of damage, one at a time, and what lies there unread."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import CUB_CLASSES, CUB_UNSEEN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib.config import DataConfig, file_md5
from lib.data import dataset
from lib.data.check import PROBLEMS, STOPS, check_data
from lib.data.dataset import make_dataset, read_records
from lib.data.sources import CLASS_FOLDERS
from lib.data.unread import UNREAD, left_out

GRID = (3, 4)
NAMES = ["Black footed Albatross", "Groove billed Ani"]
# As in the fixtures: 4 training pictures a class, and 4 to validate on.
FEW = ("class: fewer than 5 training pictures", "validation: fewer than 20 pictures")


def counts(report) -> dict[str, int]:
    """Problems that were found, and how often, beside those of the fixture."""
    return {row["problem"]: row["count"] for row in report.problems() if row["problem"] not in FEW}


def bird(cub, image):
    """The file of the image with an id."""
    name = f"{CUB_CLASSES[(image - 1) // 10]}/bird_{(image - 1) % 10}.jpg"
    return cub.root / "CUB_200_2011" / "images" / name


def test_a_sound_data_set_has_one_picture_without_gaze(cub):
    report = check_data(cub, GRID)
    assert counts(report) == {"map: none": 1} and not report.stops_training
    assert report.details()["where"].tolist() == [str(bird(cub, CUB_UNSEEN)), *NAMES, ""]
    assert report.balance["pictures"].to_dict() == {"train": 8, "val": 4, "test": 8}
    assert report.balance["with a map"].sum() == 19
    assert report.balance.loc["train", "most a class"] == 4
    assert [row["problem"] for row in report.problems()] == [*FEW, "map: none"]
    row = report.problems()[2]
    part = report.details()["part"][0]
    assert row == {
        "problem": "map: none",
        "stops_training": False,
        "count": 1,
        "by_part": {part: 1},
        "examples": [str(bird(cub, CUB_UNSEEN))],
        "remedy": PROBLEMS["map: none"],
    }
    plain = json.loads(json.dumps(report.to_plain()))
    assert plain["can_train"] and plain["problems"][2] == row
    assert [row["part"] for row in plain["balance"]] == ["train", "val", "test"]
    assert plain["balance"][0]["fewest_a_class"] == 4


def test_toy_birds_have_nothing_to_complain_about():
    config = DataConfig(toy_train=40, toy_val=40, toy_test=40)
    report = check_data(config, (8, 8))
    assert not counts(report)
    assert report.balance["with a map"].tolist() == [40, 40, 40]


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
    assert report.stops_training == stops and (problem in STOPS) == stops
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
        values[10:30, 10:30] = 255 - image  # no two are the same file
        Image.fromarray(values).save(folder / f"{image}.jpg")
    return replace(cub, maps="files", maps_dir=folder)


def test_every_kind_of_bad_map_is_found(bubbles):
    assert not counts(check_data(bubbles, GRID))
    Image.new("L", (60, 80), 9).save(bubbles.maps_dir / "7.jpg")  # turned
    (bubbles.maps_dir / "8.jpg").write_bytes(b"no picture")
    Image.new("L", (80, 60)).save(bubbles.maps_dir / "9.jpg")  # black
    Image.new("RGB", (80, 60), (250, 20, 20)).save(bubbles.maps_dir / "10.jpg")
    (bubbles.maps_dir / "17.jpg").unlink()
    shutil.copy(bubbles.maps_dir / "18.jpg", bubbles.maps_dir / "19.jpg")
    report = check_data(bubbles, GRID)
    assert counts(report) == {
        "map: none": 1,
        "map: unreadable or of another size": 2,
        "map: zeros only": 1,
        "map: in colours, read as brightness": 1,
        "map: same file as that of another picture": 1,
    }
    assert report.stops_training and report.balance.loc["test", "with a map"] == 4


def test_maps_that_are_all_missing_stop_training(bubbles):
    for path in bubbles.maps_dir.iterdir():
        path.unlink()
    assert "lists: cannot be used" in counts(check_data(bubbles, GRID))
    Image.new("L", (80, 60), 9).save(bubbles.maps_dir / "of nothing.png")
    report = check_data(bubbles, GRID)
    assert counts(report)["map: none"] == 20 and report.stops_training
    without = check_data(replace(bubbles, maps="none", maps_dir=None), GRID)
    assert not counts(without) and not without.stops_training


# ------------------------------------------------------------------ what lies there and is not read


def draw(path, seed=0, size=(48, 36), **how):
    """A picture of noise: no two seeds give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight pictures in class folders, with a map each."""
    config = DataConfig("folder", tmp_path / "photos", (32, 32), maps="none")
    for k, name in enumerate(("blue", "red")):
        for i in range(8):
            draw(config.root / name / f"p{i}.jpg", 10 * k + i)
            draw(config.root / "maps" / name / f"p{i}.png", 10 * k + i)
    return config


def unread(config) -> dict[str, tuple[int, str]]:
    """How often each reason was found, and its first file or folder below the root."""
    found: dict[str, tuple[int, str]] = {}
    for one in left_out(config, CLASS_FOLDERS.pictures(config.root)):
        count, path = found.get(one.problem, (0, one.path.relative_to(config.root).as_posix()))
        found[one.problem] = (count + one.count, path)
    return found


def as_parts(root):
    """All classes become those of the training part, with another part beside it."""
    shutil.copytree(root, root.parent / "copy", ignore=lambda *_: ["maps"])
    for name in ("blue", "red"):
        shutil.rmtree(root / name)
    shutil.copytree(root.parent / "copy", root / "Train")
    shutil.move(root.parent / "copy", root / "valid")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        *((f"red/a{suffix}", "picture of a kind that is not read")
          for suffix in (".heic", ".CR2", ".dng", ".svg", ".pdf", ".mov", ".jxl")),
        ("red.zip", "archive"),
        ("red/more/a.jpg", "picture in a sub-folder of a class"),
        ("red/more/still/a.jfif", "picture in a sub-folder of a class"),
        ("a.webp", "picture in no class folder"),
        ("holdout/red/a.jpg", "picture in no part or class"),
        ("green/session 1/a.jpg", "picture in no part or class"),
        ("green/notes.txt", "class folder without a picture"),
        ("green/.keep", "class folder without a picture"),
        ("Test/.keep", "class folder without a picture"),
        ("red/._p0.jpg", "hidden file or folder"),
        (".DS_Store", "hidden file or folder"),
        ("__MACOSX/red/a.jpg", "hidden file or folder"),
        ("red/Thumbs.db", "hidden file or folder"),
        ("red/.ipynb_checkpoints/p0-checkpoint.jpg", "hidden file or folder"),
        ("red/p0.jpg.download", "picture without its suffix"),
        ("red/IMG_0001", "picture without its suffix"),
        ("labels.csv", "other file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("parts", [False, True])
def test_every_kind_that_is_left_out_is_named(photos, file, problem, parts):
    if parts:
        as_parts(photos.root)
        top = file.partition("/")[0]
        file = f"Train/{file}" if top in ("red", "green") else file
    before = {path for path in photos.root.rglob("*") if path.is_file()}
    assert not unread(photos)
    path = photos.root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = photos.root / ("Train" if parts else "") / "red" / "p0.jpg"
    shutil.copy(picture, path)
    found = unread(photos)
    assert problem in found and found[problem][0] == 1 and problem in UNREAD
    assert file.startswith(found[problem][1])
    others = {"class folder without a picture", "other file", "hidden file or folder"}
    assert found.keys() <= others | {problem}
    assert {row.path for row in CLASS_FOLDERS.pictures(photos.root).rows} <= {
        path.relative_to(photos.root).as_posix() for path in before
    }


@given(st.lists(st.tuples(
    st.sampled_from(["", "red", "blue", "red/deep", "new", "new/deeper", "train/x", "maps/red"]),
    st.sampled_from(["a.jpg", "b.HEIC", "c.txt", "._d.jpg", "e", "f.npy", "g.json"]),
), max_size=6))  # fmt: skip
def test_no_file_is_neither_read_nor_told(tmp_path_factory, files):
    """Every file is a row, a map, told itself or by its folder, or told with others of its kind."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("red", "blue"):
        for i in range(3):
            draw(root / name / f"p{i}.png", i, (8, 8))
            draw(root / "maps" / name / f"p{i}.png", i, (8, 8))
    for folder, name in set(files):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(b"what it holds is not asked")
    config = DataConfig("folder", root, maps="files", maps_dir=root / "maps")
    try:
        listing = CLASS_FOLDERS.pictures(root)
    except ValueError:  # train/ with classes beside it
        return
    found = left_out(config, listing)
    rows = {listing.images / row.path for row in listing.rows}
    names = {"red": ["p0.png", "p1.png", "p2.png", "a.jpg"], "blue": ["p0.png", "p1.png", "p2.png"]}
    maps = {root / "maps" / name / file for name in names for file in names[name]}
    maps -= {root / "maps/red/a.jpg"} if root / "red/a.jpg" not in rows else set()
    files = {path for path in root.rglob("*") if path.is_file()} - rows - maps
    told = sum(one.count for one in found if one.path.is_file())
    inside = {path for one in found if one.path.is_dir() for path in one.path.rglob("*")}
    assert told + len(files & inside) >= len(files)
    assert not rows & {one.path for one in found}


def test_maps_and_corrections_that_belong_to_no_picture_are_told(photos):
    config = replace(photos, maps="files", maps_dir=photos.root / "maps")
    assert not unread(config)
    draw(config.maps_dir / "red" / "p9.png")
    (config.maps_dir / "about.json").write_text("{}")
    assert unread(config) == {
        "map of no picture": (1, "maps/red/p9.png"),
        "other file among the maps": (1, "maps/about.json"),
    }
    corrections = photos.root.parent / "corrections"
    corrections.mkdir()
    (corrections / "broken.json").write_text('{"schema": 1, "image_id": "1"}')
    found = left_out(replace(config, maps="corrections", maps_dir=corrections),
                     CLASS_FOLDERS.pictures(config.root))  # fmt: skip
    assert [(one.problem, one.path.name) for one in found] == [
        ("correction that cannot be used", "broken.json")
    ]


def test_pictures_that_the_split_does_not_name_are_told(photos):
    split = photos.root.parent / "split.json"
    rows = {"train": [["blue/p0.jpg", 0, "p0"]], "test": [["blue/p1.jpg", 0, "p1"]]}
    split.write_text(json.dumps(rows | {"label_list": ["blue", "red"]}))
    config = replace(photos, split_file=split, split_md5=file_md5(split))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the class without a picture
        assert unread(config) == {"picture in no list or split": (14, "blue/p2.jpg")}


def test_the_walk_ends_in_circles_of_links_and_in_huge_folders(photos, monkeypatch):
    (photos.root / "red" / "circle").symlink_to(photos.root)
    assert not unread(photos)
    (photos.root / "green").symlink_to(photos.root.parent / "moved away")
    assert unread(photos) == {"link that leads nowhere": (1, "green")}
    monkeypatch.setattr("lib.data.unread.WALKED", 50)
    for i in range(4 * 16 + 40):
        (photos.root / "red" / f"{i}.txt").touch()
    assert unread(photos)["more than was looked through"][0] == 1


def test_training_says_once_what_is_left_out(photos, monkeypatch):
    monkeypatch.setattr(dataset, "_TOLD", set())
    draw(photos.root / "red" / "more" / "a.jpg")
    (photos.root / "readme.txt").touch()
    with pytest.warns(UserWarning) as told:
        for part in ("train", "val", "train"):
            make_dataset(photos, part, GRID, (0, 0, 0), (1, 1, 1))
    (text,) = {str(one.message) for one in told}
    assert len(told) == 1 and text == (
        f"not all in {photos.root} is read: 1 x picture in a sub-folder of a class (a.jpg); "
        "`python -m lib check` says more"
    )


# ---------------------------------------------------------------------------------- never raises


def test_what_reading_changes_in_a_picture_is_told(photos):
    red = photos.root / "red"
    alpha = np.full((36, 48, 4), 200, np.uint8)
    Image.fromarray(alpha).save(red / "alpha.png")
    Image.fromarray(np.full((36, 48, 4), 255, np.uint8)).save(red / "opaque.png")
    Image.new("I;16", (48, 36), 700).save(red / "deep.png")
    frames = [Image.new("L", (48, 36), grey) for grey in (9, 99)]
    frames[0].save(red / "frames.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (10_000, 5_001)).save(red / "large.png")
    assert counts(check_data(photos, GRID)) == {
        "picture: transparent": 1,
        "picture: more than 8 bits a channel": 1,
        "picture: several frames": 1,
        "picture: larger than 50 million pixels": 1,
    }


def test_names_that_look_the_same_are_told(photos):
    for name in ("Red_", "bl-ue"):
        shutil.copytree(photos.root / "red", photos.root / name)
    assert counts(check_data(photos, GRID))["class: names look the same"] == 2


def no_root(config):
    shutil.rmtree(config.root)


def no_pictures(config):
    for path in config.root.rglob("*.jpg"):
        path.unlink()


def a_bomb(config):
    """More pixels than Pillow reads."""
    Image.new("1", (20_000, 9_500)).save(config.root / "red" / "bomb.png")


def bad_split(config):
    config.split_file = config.root / "split.json"
    config.split_file.write_text("{")


def bad_maps(config):
    config.maps, config.maps_dir = "files", config.root / "nowhere"


def a_folder_like_a_picture(config):
    (config.root / "red" / "a.jpg").mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(no_root, "lists: cannot be used"), (no_pictures, "lists: cannot be used"),
     (bad_split, "lists: cannot be used"), (bad_maps, "lists: cannot be used"),
     (a_bomb, "picture: unreadable"), (a_folder_like_a_picture, None)],
)  # fmt: skip
def test_nothing_in_the_data_makes_the_check_raise(photos, damage, problem):
    damage(photos)
    report = check_data(photos, GRID)
    assert report.stops_training == (problem is not None)
    assert problem is None or counts(report)[problem] == 1
    json.dumps(report.to_plain(), allow_nan=False)
    lines = report.in_words(photos.root).splitlines()
    assert max(len(line) for line in lines if " " in line.strip()) <= 100


@given(
    st.sampled_from([".jpg", ".png", ".gif", ".tif", ".webp", ".bmp", ".tga"]),
    st.binary(max_size=60),
)
def test_no_content_of_a_file_makes_the_check_raise(tmp_path_factory, suffix, content):
    root = tmp_path_factory.mktemp("photos")
    for i in range(4):
        draw(root / "red" / f"p{i}.png", i, (8, 8))
        draw(root / "blue" / f"p{i}.png", 9 + i, (8, 8))
    start = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff", ".gif": b"GIF89a"}
    (root / "red" / f"odd{suffix}").write_bytes(start.get(suffix, b"") + content)
    report = check_data(DataConfig("folder", root, (8, 8), maps="none"), GRID)
    assert not report.details().query("problem == 'picture: unreadable'").empty


def test_a_class_called_maps_is_told_and_the_verdict_knows_evaluation(photos):
    (photos.root / "maps").rename(photos.root / "other")
    for k in range(2):
        draw(photos.root / "maps" / f"p{k}.jpg", 50 + k)
    assert counts(check_data(photos, GRID))["class: called maps"] == 1
    listed = {part: read_records(photos, part)[0][0].image for part in ("test", "train")}
    for part, verdict in (("test", "evaluation would fail"), ("train", "training would fail")):
        listed[part].write_bytes(b"no picture")
        assert check_data(photos, GRID).verdict == verdict

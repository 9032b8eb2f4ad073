"""Data sets as items: joint geometry, the CUB reader on a tiny folder, the toy birds, real CUB."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CUB_CLASSES, CUB_PER_CLASS, CUB_SIZE, CUB_UNSEEN
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from lib.config import DataConfig, HumanConfig
from lib.data.dataset import BirdDataset, make_dataset
from lib.data.maps import Recording, fixation_map, to_grid
from lib.data.sources import Record
from lib.training.controls import supervised

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = (0.0,) * 3, (1.0,) * 3  # items then hold the pixels divided by 255


def landmark(rng, image_size, crop_scale=(0.6, 1.0)):
    """A record with a white disc on black where its only fixation is, and a config for it."""
    height, width = (int(side) for side in rng.integers(90, 260, 2))
    x, y = rng.uniform(0.3, 0.7, 2) * (width, height)
    row, column = np.mgrid[:height, :width] + 0.5
    disc = np.hypot((column - x) / width, (row - y) / height) < 0.04
    pixels = np.repeat(disc[:, :, None] * np.uint8(255), 3, axis=2)
    gaze = (Recording(1, width, height, np.array([[x, y, 300]], np.float32)),)
    config = DataConfig(image_size=image_size, crop_scale=crop_scale)
    return Record(1, 0, pixels, gaze), config


def cell_means(image, grid):
    """Brightness of each cell of an image [3, H, W] whose sides the grid divides, [gh, gw]."""
    _, height, width = image.shape
    cells = image.reshape(3, grid[0], height // grid[0], grid[1], width // grid[1])
    return cells.mean(dim=(0, 2, 4))


def peak(cells):
    return np.array(np.unravel_index(int(cells.argmax()), cells.shape))


# ---------------------------------------------------------------------------------- joint geometry


@pytest.mark.parametrize(
    ("image_size", "grid"),
    [((56, 56), (14, 14)), ((48, 96), (6, 12)), ((96, 60), (6, 10)), ((70, 60), (5, 4))],
)
def test_crop_and_flip_move_image_and_map_together(image_size, grid):
    rng = np.random.default_rng(1)
    seen, moved = 0, 0
    for seed in range(36):
        record, config = landmark(rng, image_size)
        torch.manual_seed(seed)
        item = BirdDataset([record], ["disc"], config, grid, *PLAIN, augment=True)[0]
        bright, human = cell_means(item["image"], grid), item["human"].view(grid)
        assert item["valid"].all() and human.min() >= 0 and human.max() <= 1
        if bright.max() < 0.1:  # the crop missed the disc
            continue
        seen += 1
        assert np.abs(peak(bright) - peak(human)).max() <= 1, seed
        whole = BirdDataset([record], ["disc"], config, grid, *PLAIN)[0]["human"].view(grid)
        moved += (peak(whole) != peak(human)).any()
    assert seen > 24 and moved > 12  # the crops are not all trivial


@pytest.mark.parametrize(("image_size", "grid"), [((56, 56), (14, 14)), ((48, 96), (6, 12))])
def test_evaluation_keeps_the_landmark_in_place(image_size, grid):
    rng = np.random.default_rng(2)
    for _ in range(20):
        record, config = landmark(rng, image_size)
        item = BirdDataset([record], ["disc"], config, grid, *PLAIN)[0]
        fixated = peak(item["fixations"].view(grid))
        assert (peak(item["human"].view(grid)) == fixated).all()
        assert np.abs(peak(cell_means(item["image"], grid)) - fixated).max() <= 1
        assert item["human"].max() == 1 and item["fixations"].sum() == 1


@pytest.mark.parametrize(("image_size", "grid"), [((56, 56), (14, 14)), ((96, 60), (6, 10))])
def test_crops_and_flips_are_bit_for_bit_those_of_torchvisions_transforms(image_size, grid):
    """Which runs were trained on before: another draw would be another experiment."""
    rng, flipped = np.random.default_rng(2), set()
    for seed in range(12):
        record, config = landmark(rng, image_size)
        dataset = BirdDataset([record], ["disc"], config, grid, *PLAIN, augment=True)
        item, pixels = dataset[0, seed], torch.from_numpy(record.image).permute(2, 0, 1)
        fine = torch.stack([part[0].float() for part in dataset.maps])[None]
        mask = torch.nn.functional.interpolate(fine, pixels.shape[1:], mode="nearest")[0]
        crop = v2.RandomResizedCrop(image_size, config.crop_scale, config.crop_ratio)
        torch.manual_seed(seed)
        pair = crop(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
        picture, mask = v2.RandomHorizontalFlip(config.flip)(*pair)
        human, valid = to_grid(*mask.as_subclass(torch.Tensor), grid)
        assert torch.equal(item["image"], picture.as_subclass(torch.Tensor).float() * (1 / 255))
        assert torch.equal(item["human"], human.clamp(0, 1).flatten())
        assert torch.equal(item["valid"], valid.flatten())
        flipped.add(torch.equal(picture, pair[0]))
    assert flipped == {True, False}


def test_augmented_map_of_the_whole_image_is_the_evaluation_map():
    # crop_scale 1 on a square image leaves nothing to crop, flip 1 mirrors it.
    looks = np.array([[30, 20, 100], [90, 80, 300]], np.float32)
    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    record = Record(1, 0, pixels, (Recording(1, 112, 112, looks),))
    config = DataConfig(image_size=(112, 112), crop_scale=(1.0, 1.0), flip=1.0)
    plain = BirdDataset([record], ["x"], config, (7, 7), *PLAIN)[0]
    torch.manual_seed(0)
    mirrored = BirdDataset([record], ["x"], config, (7, 7), *PLAIN, augment=True)
    # the ratio is drawn too: take the items whose crop was the whole image
    items = [mirrored[0] for _ in range(20)]
    same = [i for i in items if torch.equal(i["image"], plain["image"].flip(-1))]
    assert same
    expected = plain["human"].view(7, 7).flip(-1)
    assert (same[0]["human"].view(7, 7) - expected).abs().max() < 0.06  # area mean against centre


def test_augmentation_follows_torch_manual_seed_only():
    record, config = landmark(np.random.default_rng(3), (56, 56))
    dataset = BirdDataset([record], ["disc"], config, (14, 14), *PLAIN, augment=True)

    def draw(seed):
        torch.manual_seed(seed)
        np.random.seed(seed + 1)
        return dataset[0]

    first, again, other = draw(5), draw(5), draw(6)
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["human"], again["human"])
    assert not torch.equal(first["image"], other["image"])


# --------------------------------------------------------------------------------------------- CUB


def test_cub_items_collate_and_have_the_promised_types(cub):
    dataset = make_dataset(cub, "test", (3, 4), MEAN, STD)
    assert len(dataset) == 8 and dataset.classes == ["Black footed Albatross", "Groove billed Ani"]
    batch = next(iter(DataLoader(dataset, batch_size=8)))
    assert batch["image"].shape == (8, 3, 48, 64) and batch["image"].dtype == torch.float32
    assert batch["human"].shape == batch["fixations"].shape == batch["valid"].shape == (8, 12)
    assert batch["human"].dtype == batch["fixations"].dtype == torch.float32
    assert batch["valid"].dtype == torch.bool and batch["valid"].all()
    assert batch["label"].tolist() == [0] * 4 + [1] * 4
    assert batch["index"].tolist() == list(range(8))
    assert (batch["fixations"].sum(1) == 3).all()
    training = make_dataset(cub, "train", (3, 4), MEAN, STD, augment=True)
    assert set(training[0]) == {"image", "label", "human", "valid", "index"}
    assert next(iter(DataLoader(training, batch_size=4, num_workers=1)))["human"].shape == (4, 12)


def test_cub_splits_are_disjoint_stratified_and_repeatable(cub):
    ids = {
        split: make_dataset(cub, split, (3, 4), MEAN, STD).table
        for split in ("train", "val", "test")
    }
    assert ids["val"]["label"].tolist() == [0, 0, 1, 1]  # round(0.34 * 6) of each class
    official = {i for i in range(1, 21) if (i - 1) % CUB_PER_CLASS < 6}
    train, val, test = (set(ids[split]["image_id"]) for split in ("train", "val", "test"))
    assert train | val == official and not train & val
    assert test == set(range(1, 21)) - official
    again = make_dataset(cub, "val", (3, 4), MEAN, STD).table
    assert again.equals(ids["val"])
    drawn = set()
    for cub.seed in range(4):
        drawn.add(tuple(make_dataset(cub, "val", (3, 4), MEAN, STD).table["image_id"]))
    assert len(drawn) > 1


def test_cub_validation_images_do_not_depend_on_the_other_classes(cub):
    before = make_dataset(cub, "val", (3, 4), MEAN, STD).table.query("label == 1")["image_id"]
    for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes"):
        path = cub.root / "CUB_200_2011" / f"{name}.txt"
        path.write_text("\n".join(path.read_text().splitlines()[CUB_PER_CLASS:]) + "\n")
    (cub.root / "CUB_200_2011" / "classes.txt").write_text(f"4 {CUB_CLASSES[1]}\n")
    table = make_dataset(cub, "val", (3, 4), MEAN, STD).table
    assert table["image_id"].tolist() == before.tolist() and set(table["label"]) == {0}


def test_cub_map_and_boxes_are_those_of_the_squeezed_image(cub):
    cub.val_share = 0.0
    dataset = make_dataset(cub, "train", (3, 4), MEAN, STD)
    row = dataset.table.iloc[0]
    # 60 x 80 to 48 x 64: both sides times 0.8
    assert row[["x0", "y0", "x1", "y1"]].tolist() == pytest.approx([16, 12, 48, 36])
    assert Path(row["path"]).is_file() and row["has_map"]
    looks = np.array([[10, 10, 200], [70, 50, 400], [12, 9, 300]])
    expected = fixation_map(looks, CUB_SIZE, (3, 4), cub.sigma, cub.weight)
    np.testing.assert_allclose(dataset[0]["human"].view(3, 4), expected, atol=1e-6)


def test_readers_are_apart_and_add_up(cub):
    dataset = make_dataset(cub, "test", (3, 4), MEAN, STD)
    maps, counts = dataset.readers(0)
    assert maps.shape == counts.shape == (2, 12)
    assert maps.max(dim=1).values.tolist() == [1, 1]
    assert counts.sum(dim=1).tolist() == [2, 1]
    assert torch.equal(counts.sum(dim=0), dataset[0]["fixations"])


@pytest.mark.parametrize("augment", [False, True])
def test_an_image_without_gaze_is_unsupervised(cub, augment):
    cub.val_share = 0.0
    dataset = make_dataset(cub, "train", (3, 4), MEAN, STD, augment=augment)
    index = dataset.table["image_id"].tolist().index(CUB_UNSEEN)
    item = dataset[index]
    assert not item["valid"].any() and item["human"].sum() == 0
    assert not dataset.table["has_map"][index] and dataset.table["x0"][index] == pytest.approx(16)
    assert dataset.readers(index)[0].shape == (0, 12)


def test_image_is_the_unnormalised_picture(cub):
    dataset = make_dataset(cub, "test", (3, 4), MEAN, STD)
    picture = dataset.image(2)
    assert picture.shape == (48, 64, 3) and picture.dtype == np.uint8
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    back = (dataset[2]["image"] * std + mean).permute(1, 2, 0) * 255
    np.testing.assert_allclose(back, picture, atol=0.01)


def test_a_frame_that_differs_from_the_image_is_refused_on_reading(cub):
    dataset = make_dataset(cub, "test", (3, 4), MEAN, STD)
    path = Path(dataset.table["path"][0])
    Image.new("RGB", (33, 44)).save(path)
    with pytest.raises(ValueError, match=r"image 7 .*33 x 44 pixels.* measured in 80 x 60"):
        dataset[0]


def test_runs_that_disagree_about_a_frame_are_refused(cub):
    path = cub.root / "CUB_GHA" / "data_5runs" / "Fixation_run2.txt"
    path.write_text("7,81,60,5,5,100\n")
    with pytest.raises(ValueError, match="image 7 the size 81 x 60, another run 80 x 60"):
        make_dataset(cub, "test", (3, 4), MEAN, STD)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_broken_jpeg_is_named(cub, content):
    dataset = make_dataset(cub, "test", (3, 4), MEAN, STD)
    path = Path(dataset.table["path"][1])
    path.write_bytes(path.read_bytes()[:600] if content is None else content)
    with pytest.raises(OSError, match=rf"{path.name} cannot be decoded"):
        dataset[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} is missing; set DATA_DIR"):
        dataset[1]


def test_boxes_are_asked_for_where_they_are_needed_alone(cub):
    whole = make_dataset(cub, "train", (3, 4), MEAN, STD)
    (cub.root / "CUB_200_2011" / "bounding_boxes.txt").unlink()
    gaze = make_dataset(cub, "train", (3, 4), MEAN, STD)
    assert gaze.cover() is None and whole.cover() is not None
    assert all(torch.equal(a, b) for a, b in zip(gaze.maps, whole.maps, strict=True))
    with pytest.raises(FileNotFoundError, match=r"bounding_boxes\.txt is missing; set DATA_DIR"):
        make_dataset(replace(cub, maps="box"), "train", (3, 4), MEAN, STD)
    with pytest.raises(ValueError, match=r"no bounding boxes \(of CUB-200-2011: bounding_boxes"):
        supervised(gaze, HumanConfig(maps="boxes"), seed=0)


@pytest.mark.parametrize("missing", ["CUB_200_2011", "CUB_GHA/data_5runs"])
def test_missing_files_name_path_and_remedy(cub, missing):
    (cub.root / missing).rename(cub.root / "gone")
    with pytest.raises(FileNotFoundError, match=r"is missing; set DATA_DIR") as caught:
        make_dataset(cub, "train", (3, 4), MEAN, STD)
    assert str(cub.root / missing) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("images", "1\n", r"images.txt, line 1 is '1' where an id and 1 value"),
        ("classes", "1 001.Black_footed_Albatross\n", "classes.txt has no line for id 4"),
        ("image_class_labels", "1 1\n", "image_class_labels.txt has no line for id 2"),
        ("classes", f"1 {CUB_CLASSES[1]}\n4 {CUB_CLASSES[0]}\n", "image 1 in the folder .*give"),
        ("train_test_split", "1 2\n", "train_test_split.txt has 2 for id 1 where 1 .train. or 0"),
        ("images", "", r"CUB_200_2011 cannot be used: the flags leave train without"),
        *(("bounding_boxes", f"{i} 5 5 {wide} 5\n", f"gives id {i} the box 5 5 {wide} 5 where")
          for i, wide in ((7, "nan"), (7, "-5"), (7, "inf"))),
    ],
)  # fmt: skip
def test_a_cut_official_file_is_refused(cub, name, text, message):
    (cub.root / "CUB_200_2011" / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_dataset(cub, "test", (3, 4), MEAN, STD)


def test_unknown_names_are_refused_and_a_validation_split_may_be_empty(cub):
    with pytest.raises(ValueError, match="split 'all' is unknown; use train, val or test"):
        make_dataset(cub, "all", (3, 4), MEAN, STD)
    with pytest.raises(ValueError, match="data set 'cars' is unknown; use one of toy, cub2011"):
        make_dataset(DataConfig(name="cars"), "val", (3, 4), MEAN, STD)
    cub.val_share = 0.0
    empty = make_dataset(cub, "val", (3, 4), MEAN, STD)
    assert len(empty) == 0 and len(empty.classes) == 2 and not empty.has_map.any()
    assert {"image_id", "label", "class_name", "path", "has_map"} <= {*empty.table}


# --------------------------------------------------------------------------------------------- toy


def test_toy_items_and_table():
    config = DataConfig(toy_train=12, toy_val=5, toy_test=6)
    dataset = make_dataset(config, "train", (8, 8), MEAN, STD)
    assert len(dataset) == 12 and len(dataset.classes) == 8
    item = dataset[-1]
    assert item["index"] == 11 and item["image"].shape == (3, 64, 64)
    assert item["human"].max() == 1 and item["valid"].all() and item["fixations"].sum() > 5
    table = dataset.table
    assert (table["path"] == "").all() and table["has_map"].all()
    assert table["decoy"].dtype == np.int64 and table["dx0"].between(0, 64).all()
    assert (table["x0"] < table["x1"]).all() and (table["y1"] <= 64).all()
    maps, counts = dataset.readers(0)
    assert maps.shape == counts.shape and maps.shape[1] == 64 and len(maps) > 1
    sizes = [len(make_dataset(config, split, (8, 8), MEAN, STD)) for split in ("val", "test")]
    assert sizes == [5, 6]


def test_toy_gaze_lies_on_the_bird():
    dataset = make_dataset(DataConfig(toy_train=12), "train", (8, 8), MEAN, STD)
    centre = (torch.arange(8) + 0.5) * 8
    for item, row in zip(dataset, dataset.table.itertuples(), strict=True):
        mass = item["fixations"].view(8, 8) / item["fixations"].sum()
        assert row.x0 - 8 < (mass.sum(0) * centre).sum() < row.x1 + 8
        assert row.y0 - 8 < (mass.sum(1) * centre).sum() < row.y1 + 8


def test_toy_wants_a_square():
    with pytest.raises(ValueError, match="image_size is 64 x 96, but toy birds"):
        make_dataset(DataConfig(image_size=(64, 96)), "train", (8, 12), MEAN, STD)


# -------------------------------------------------------------------------------------------- real


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real CUB-200-2011 is not at {REAL}")
def test_real_cub_frames_agree_and_birds_are_looked_at():
    config = DataConfig(name="cub2011", root=REAL, image_size=(224, 224))
    sets = {
        split: make_dataset(config, split, (16, 16), MEAN, STD)
        for split in ("train", "val", "test")
    }
    assert sum(len(dataset) for dataset in sets.values()) == 1115
    assert len(sets["train"]) + len(sets["val"]) == 600 and sets["test"].table["has_map"].all()
    dataset = sets["test"]
    for index in range(0, len(dataset), 25):  # reading also checks the frame
        item, row = dataset[index], dataset.table.iloc[index]
        row_of, column_of = (np.mgrid[:16, :16] + 0.5) * 14
        on_bird = (column_of > row.x0 - 14) & (column_of < row.x1 + 14)
        on_bird &= (row_of > row.y0 - 14) & (row_of < row.y1 + 14)
        looks = item["fixations"].view(16, 16).numpy()
        assert looks[on_bird].sum() > 0.5 * looks.sum(), row.path


# ----------------------------------------------------------------------------------- decoded cache


def test_the_cache_gives_the_very_pictures_of_evaluation(cub):
    plain = make_dataset(cub, "test", (3, 4), MEAN, STD)
    cached = make_dataset(replace(cub, cache=cub.root / "decoded"), "test", (3, 4), MEAN, STD)
    for one, other in zip(plain, cached, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)
    np.testing.assert_array_equal(plain.image(3), cached.image(3))
    # 48 x 64 pixels, 3 bytes each, and a little for the table
    size = sum(path.stat().st_size for path in (cub.root / "decoded").iterdir())
    assert 0 <= size - len(cached) * 48 * 64 * 3 < 1000


def test_training_crops_from_the_cache_follow_their_map_and_differ_little(cub):
    rng = np.random.default_rng(0)
    for number in range(6):  # large smooth training pictures: the cache has to shrink them
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        path = cub.root / "CUB_200_2011" / "images" / CUB_CLASSES[0] / f"bird_{number}.jpg"
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=95)
    for path in (cub.root / "CUB_GHA" / "data_5runs").iterdir():
        lines = [re.sub(r"^([1-6]),80,60,", r"\1,400,300,", li) for li in path.read_text().split()]
        path.write_text("\n".join(lines) + "\n")
    config = replace(cub, val_share=0.0, image_size=(112, 112), crop_scale=(1.0, 1.0), flip=0.0)
    plain, cached = (
        make_dataset(replace(config, cache=cache), "train", (7, 7), *PLAIN, augment=True)
        for cache in (None, cub.root / "decoded")
    )
    assert min(cached._decoded[0].shape[1:]) == 112 < 300  # nothing smaller than the smallest crop
    for index in range(6):
        items = []
        for dataset in (plain, cached):
            torch.manual_seed(0)  # the crop is nearly the whole picture, and the same share of it
            items.append(dataset[index])
        assert 255 * (items[0]["image"] - items[1]["image"]).abs().mean() < 4
        assert (items[0]["human"] - items[1]["human"]).abs().max() < 0.1


def test_workers_share_the_cache_and_name_a_broken_picture(cub):
    config = replace(cub, cache=cub.root / "decoded")
    cached = make_dataset(config, "test", (3, 4), MEAN, STD)
    plain = make_dataset(cub, "test", (3, 4), MEAN, STD)
    for path in cached.table["path"]:
        Path(path).write_bytes(b"the cache does not look at it")
    batches = [batch["image"] for batch in DataLoader(cached, batch_size=4, num_workers=2)]
    assert torch.equal(torch.cat(batches), torch.stack([cached[i]["image"] for i in range(8)]))
    with pytest.raises(OSError, match=r"bird_6.jpg cannot be decoded"):
        list(DataLoader(plain, batch_size=4, num_workers=1))

"""Images, labels and human maps as items for training and evaluation.

Two layers: a reader turns a data set into a list of `Record`s (where the picture is, its label,
who looked where); `BirdDataset` turns records into tensors. A new data set is a new reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm.auto import tqdm

from lib import toybirds
from lib.config import DataConfig
from lib.gaze import Recording, fixation_counts, fixation_map, read_fixations, to_grid

Split = Literal["train", "val", "test"]

FINE = 4  # cells of a training map per grid cell and axis: a crop then moves it by quarter patches
ASPECT = (3 / 4, 4 / 3)  # width to height of a training crop, in pixels of the original
DATA_REMEDY = "set DATA_DIR to the folder that holds CUB_200_2011 and CUB_GHA, or fill datasets/"


@dataclass(frozen=True)
class Record:
    """One picture before any tensor is made of it."""

    image_id: int
    label: int
    image: Path | np.ndarray  # a file, or uint8 [h, w, 3]
    gaze: tuple[Recording, ...] = ()  # one per reader with at least one fixation; one size for all
    boxes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # prefix -> x0, y0, x1, y1
    size: tuple[int, int] | None = None  # height, width that the boxes are measured in
    columns: dict[str, int] = field(default_factory=dict)  # further columns of the table


class BirdDataset(Dataset):
    """Pictures with labels and human attention maps on the patch grid of a model (P = gh * gw).

    An item is a dict that torch's default collate can stack:
        image: float32 [3, H, W], normalised by mean and std
        label: int, index into `classes`
        human: float32 [P] in [0, 1], row-major
        valid: bool [P], cells whose human value is known; all False for an image without a map
        index: int, position in this data set and in `table`
        fixations: float32 [P], number of fixations of all readers (only without augmentation)

    Without augmentation the whole image is squeezed to `image_size`, so that every fixation stays
    in view, and `human` is rendered on the grid itself: its maximum is 1. With augmentation image
    and map get the same random crop and flip; then the maximum can be below 1, and a map is all 0
    (and valid) where the crop missed everything that people looked at.

    Attributes:
        classes: class names by label.
        config, grid: as given.
        table: DataFrame, a row an item: image_id, label, class_name, path ("" for drawn images),
            has_map; x0, y0, x1, y1 of the bird in pixels of the squeezed image; for the toy birds
            also decoy (colour index, -1 for none) and dx0, dy0, dx1, dy1 of the decoy.

    Reading an item raises OSError naming the file when it is missing or broken, ValueError naming
    the image id when its size is not the one that the gaze was measured in.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        config: DataConfig,
        grid: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
    ) -> None:
        self.classes = list(classes)
        self.config = config
        self.grid = (int(grid[0]), int(grid[1]))
        self.augment = augment
        self.records = list(records)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        deviation = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) / deviation
        self._maps = self._render()
        self._has_map = self._maps.amax(dim=(1, 2)) > 0
        self.table = _table(self.records, self.classes, config.image_size)
        self.table.insert(4, "has_map", self._has_map.numpy())
        self._joint = v2.Compose(
            [
                v2.RandomResizedCrop(
                    tuple(config.image_size), config.crop_scale, ASPECT, antialias=True
                ),
                v2.RandomHorizontalFlip(config.flip),
            ]
        )

    def _render(self) -> Tensor:
        """All human maps, [N, gh, gw], or [N, FINE * gh, FINE * gw] for training.

        Rendered once, here and not on first use: what a loader's worker process caches is its own
        and is lost with it, while this one tensor is shared by all of them. Half precision keeps
        the fine maps of the 6,000 CUB images at 38 MB (14 x 14) and is exact to 0.0005.
        """
        fine = FINE if self.augment else 1
        grid = (fine * self.grid[0], fine * self.grid[1])
        dtype = torch.float16 if self.augment else torch.float32
        maps = torch.zeros(len(self.records), *grid, dtype=dtype)
        for i, record in enumerate(tqdm(self.records, "human maps", delay=1.0, leave=False)):
            if record.gaze:
                looks = np.concatenate([recording.fixations for recording in record.gaze])
                found = torch.from_numpy(self._map(looks, record, grid, self.config.sigma * fine))
                maps[i] = self._levelled(found) if self.augment else found
        return maps

    def _levelled(self, fine: Tensor) -> Tensor:
        """A fine map whose mean over grid cells has the maximum 1, as in evaluation.

        The mean over a cell is below the fine peak: without this, training would ask for some 15 %
        less attention than evaluation shows.
        """
        pooled, _ = to_grid(fine, torch.ones_like(fine), self.grid)
        return fine / pooled.max().clamp(min=1e-6)

    def _map(
        self, looks: np.ndarray, record: Record, grid: tuple[int, int], sigma: float
    ) -> np.ndarray:
        return fixation_map(looks, _frame(record.gaze), grid, sigma, self.config.weight)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        index = range(len(self))[index]  # negative ones too, and IndexError past the end
        record = self.records[index]
        pixels = _pixels(record)
        item: dict[str, Tensor | int] = {"label": record.label, "index": index}
        if self.augment:
            pixels, item["human"], item["valid"] = self._augmented(pixels, index)
        else:
            pixels = self._squeezed(pixels)
            item["human"] = self._maps[index].flatten()
            item["valid"] = self._has_map[index].repeat(self._maps[index].numel())
            item["fixations"] = self._counts(index).sum(dim=0)
        image = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        item["image"] = image.mul_(self._scale).add_(self._shift)
        return item

    def _augmented(self, pixels: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same crop and flip for image and map: uint8 [3, H, W], float32 [P], bool [P].

        torchvision transforms only inputs of one size jointly, so the fine map is first enlarged
        to the picture: the map adds about 1 ms, half of what decoding a JPEG costs.
        """
        fine = self._maps[index].float()[None, None]
        mask = torch.full((2, *pixels.shape[1:]), float(self._has_map[index]))  # map and validity
        mask[0] = F.interpolate(fine, pixels.shape[1:], mode="nearest")[0, 0]
        picture, mask = self._joint(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
        dense, known = mask.as_subclass(Tensor)  # a padded border, if any, is filled with invalid 0
        human, valid = to_grid(dense, known, self.grid)
        return picture.as_subclass(Tensor), human.clamp(0, 1).flatten(), valid.flatten()

    def _squeezed(self, pixels: Tensor) -> Tensor:
        return v2.functional.resize(pixels, list(self.config.image_size), antialias=True)

    def _counts(self, index: int) -> Tensor:
        """Fixations per cell and reader on the evaluation grid, float32 [R, P]."""
        gaze = self.records[index].gaze
        counts = torch.zeros(len(gaze), self.grid[0] * self.grid[1])
        for row, look in zip(counts, gaze, strict=True):
            found = fixation_counts(look.fixations, _frame(gaze), self.grid)
            row.copy_(torch.from_numpy(found.ravel()))
        return counts

    def image(self, index: int) -> np.ndarray:
        """The squeezed picture for figures: uint8 [H, W, 3], RGB, not normalised, not augmented."""
        return self._squeezed(_pixels(self.records[index])).permute(1, 2, 0).contiguous().numpy()

    def readers(self, index: int) -> tuple[Tensor, Tensor]:
        """Each reader apart: maps float32 [R, P] in [0, 1] and fixation counts float32 [R, P].

        On the grid of the whole image (augmentation does not matter); R is the number of readers
        who looked at this image, 0 where nobody did.
        """
        record = self.records[index]
        maps = torch.zeros(len(record.gaze), self.grid[0] * self.grid[1])
        for row, look in zip(maps, record.gaze, strict=True):
            found = self._map(look.fixations, record, self.grid, self.config.sigma)
            row.copy_(torch.from_numpy(found.ravel()))
        return maps, self._counts(index)


def make_dataset(
    config: DataConfig,
    split: Split,
    grid: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: bool = False,
) -> BirdDataset:
    """Read one split of the data set that `config.name` names.

    `grid` (gh, gw), `mean` and `std` are the model's. `augment` is for training batches; leave it
    off to measure, on the training split too. Raises ValueError for a name or split that does not
    exist or is empty, FileNotFoundError with the remedy where the files are missing.
    """
    if config.name not in READERS:
        raise ValueError(f"data set {config.name!r} is unknown; use one of {', '.join(READERS)}.")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r} is unknown; use train, val or test.")
    records, classes = READERS[config.name](config, split)
    return BirdDataset(records, classes, config, grid, mean, std, augment)


def _toy_records(config: DataConfig, split: Split) -> tuple[list[Record], list[str]]:
    height, width = config.image_size
    if height != width:
        raise ValueError(
            f"image_size is {height} x {width}, but toy birds are drawn on a square; "
            "give both sides the same length."
        )
    count = {"train": config.toy_train, "val": config.toy_val, "test": config.toy_test}[split]
    birds = _drawn(split, count, config.seed, height, config.agreement)
    records = [
        Record(
            image_id=i,
            label=int(birds.labels[i]),
            image=birds.images[i],
            gaze=tuple(Recording(i, width, height, looks) for looks in birds.gaze[i] if len(looks)),
            boxes={"": tuple(birds.boxes[i]), "d": tuple(birds.decoy_boxes[i])},
            size=(height, width),
            columns={"decoy": int(birds.decoys[i])},
        )
        for i in range(count)
    ]
    return records, [species.name for species in toybirds.SPECIES]


@lru_cache(maxsize=8)
def _drawn(split: str, count: int, seed: int, size: int, agreement: float) -> toybirds.ToyBirds:
    """Drawn once a process: a comparison reads the same split for every run. Not to be changed."""
    return toybirds.make(split, count, seed, size=size, agreement=agreement)


def _cub2011_records(config: DataConfig, split: Split) -> tuple[list[Record], list[str]]:
    """Read CUB-200-2011 (Wah et al., 2011), whole or cut to some classes, with its CUB-GHA gaze.

    Labels count from 0 in the order of classes.txt. The validation images are a share of each
    class's official training images, drawn by `config.seed` and the class's own id: the same ones
    whatever other classes are present.
    """
    folder = Path(config.root) / "CUB_200_2011"
    files, classes, labels, official, boxes = (
        _cub_table(folder / f"{name}.txt", columns)
        for name, columns in [
            ("images", 1),
            ("classes", 1),
            ("image_class_labels", 1),
            ("train_test_split", 1),
            ("bounding_boxes", 4),
        ]
    )
    position = {class_id: i for i, class_id in enumerate(classes)}
    class_of = {
        image: int(_look_up(labels, image, folder / "image_class_labels.txt")[0]) for image in files
    }
    is_train = {
        image: _look_up(official, image, folder / "train_test_split.txt")[0] == "1"
        for image in files
    }
    chosen = _cub_split(class_of, is_train, split, config)
    gaze = _cub_gaze(Path(config.root) / "CUB_GHA" / "data_5runs")
    records = []
    for image in tqdm(chosen, desc=f"{split} records", delay=1.0, leave=False):
        path = folder / "images" / files[image][0]
        looks = tuple(gaze.get(image, ()))
        x, y, w, h = map(float, _look_up(boxes, image, folder / "bounding_boxes.txt"))
        label = _look_up(position, class_of[image], folder / "classes.txt")
        size = _frame(looks) if looks else _file_size(path)
        records.append(Record(image, label, path, looks, {"": (x, y, x + w, y + h)}, size))
    # "001.Black_footed_Albatross" -> "Black footed Albatross"
    names = [name[0].split(".", 1)[-1].replace("_", " ") for name in classes.values()]
    return records, names


READERS = {"toy": _toy_records, "cub2011": _cub2011_records}


def _cub_table(path: Path, columns: int) -> dict[int, list[str]]:
    """Lines `id value...` of an official file, in its order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.")
    table = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != columns + 1 or not words[0].isdigit():
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r} where an id and {columns} value(s) are "
                "expected; restore the file from CUB_200_2011.tgz."
            )
        table[int(words[0])] = words[1:]
    return table


def _look_up(table: dict, key: int, path: Path):
    try:
        return table[key]
    except KeyError:
        raise ValueError(
            f"{path} has no line for id {key}; restore the file from CUB_200_2011.tgz."
        ) from None


def _cub_split(
    class_of: dict[int, int], is_train: dict[int, bool], split: Split, config: DataConfig
) -> list[int]:
    """Image ids of a split, ascending."""
    if split == "test":
        chosen = [image for image in class_of if not is_train[image]]
    else:
        by_class: dict[int, list[int]] = {}
        for image in sorted(class_of):
            if is_train[image]:
                by_class.setdefault(class_of[image], []).append(image)
        chosen = []
        for class_id, images in by_class.items():
            order = np.random.default_rng([config.seed, class_id]).permutation(images).tolist()
            held = round(config.val_share * len(images))
            chosen += order[:held] if split == "val" else order[held:]
    if not chosen:
        raise ValueError(
            f"the {split} split is empty (val_share {config.val_share:g}); "
            "choose another val_share or more images."
        )
    return sorted(chosen)


def _cub_gaze(folder: Path) -> dict[int, list[Recording]]:
    """Recordings with at least one fixation of all runs, by image id."""
    paths = sorted(folder.glob("Fixation_run*.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder}/Fixation_run*.txt is missing; {DATA_REMEDY}.")
    gaze: dict[int, list[Recording]] = {}
    for path in tqdm(paths, desc="gaze files", delay=1.0, leave=False):
        for image, look in read_fixations(path).items():
            if not len(look.fixations):
                continue
            known = gaze.setdefault(image, [])
            if known and _frame(known) != (look.height, look.width):
                raise ValueError(
                    f"{path} gives image {image} the size {look.width} x {look.height}, another "
                    f"run {known[0].width} x {known[0].height}; restore the gaze files."
                )
            known.append(look)
    return gaze


def _frame(gaze: Sequence[Recording]) -> tuple[int, int]:
    """Height and width that the fixations are measured in."""
    return gaze[0].height, gaze[0].width


def _file_size(path: Path) -> tuple[int, int]:
    """Height and width from the header of a file, without decoding it."""
    try:
        with Image.open(path) as header:
            return header.height, header.width
    except OSError as error:
        raise _broken(path) from error


def _pixels(record: Record) -> Tensor:
    """The picture as uint8 [3, h, w], RGB, checked against the frame of its gaze.

    The check is made here, where the size is known anyway: reading 11,788 headers at the start
    would cost more than anything else does there.
    """
    if isinstance(record.image, np.ndarray):
        return torch.from_numpy(record.image).permute(2, 0, 1)
    try:
        with Image.open(record.image) as picture:
            _check_frame(record, picture.height, picture.width)
            return v2.functional.pil_to_tensor(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises both on broken files
        raise _broken(record.image) from error


def _check_frame(record: Record, height: int, width: int) -> None:
    if record.gaze and (height, width) != _frame(record.gaze):
        look = record.gaze[0]
        raise ValueError(
            f"image {record.image_id} ({record.image}) has {width} x {height} pixels, but its gaze "
            f"was measured in {look.width} x {look.height}; use the original image."
        )


def _broken(path: Path) -> OSError:
    if not path.is_file():
        return FileNotFoundError(f"{path} is missing; {DATA_REMEDY}.")
    return OSError(f"{path} cannot be decoded; restore it from the published archive.")


def _table(
    records: Sequence[Record], classes: Sequence[str], image_size: tuple[int, int]
) -> pd.DataFrame:
    """One row a record, without has_map; boxes converted to pixels of the squeezed image."""
    rows = []
    for record in records:
        row = {
            "image_id": record.image_id,
            "label": record.label,
            "class_name": classes[record.label],
            "path": str(record.image) if isinstance(record.image, Path) else "",
            **record.columns,
        }
        for prefix, box in record.boxes.items():
            scale = np.tile(np.divide(image_size, record.size)[::-1], 2)  # x, y, x, y
            names = [prefix + corner for corner in ("x0", "y0", "x1", "y1")]
            row |= zip(names, np.asarray(box, dtype=np.float64) * scale, strict=True)
        rows.append(row)
    return pd.DataFrame(rows)

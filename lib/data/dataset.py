"""Images, labels and human maps as items for training and evaluation.

Two layers: lib/data/sources.py turns a data set into a list of `Record`s (where the picture is, its
label, who looked where); `BirdDataset` turns records into tensors.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2
from tqdm.auto import tqdm

from lib.config import DataConfig
from lib.data.classes import labels_among
from lib.data.cub import CUB2010, CUB2011
from lib.data.maps import HumanSource, box_map, fixation_counts, human_map, to_grid
from lib.data.pictures import DecodedImages, decoded_images, read_picture
from lib.data.sources import CLASS_FOLDERS, DataSet, Record
from lib.data.splits import PARTS, Part
from lib.data.toy.birds import toy_records
from lib.data.unread import in_a_sentence, left_out

# The data sets on disk by name; "toy" is drawn.
DATA_SETS: dict[str, DataSet] = {"cub2011": CUB2011, "cub2010": CUB2010, "folder": CLASS_FOLDERS}

CORNERS = ("x0", "y0", "x1", "y1")  # columns of a box in the table, behind its prefix
FINE = 4  # cells of a training map per grid cell and axis: a crop then moves it by quarter patches
_TOLD: set[tuple[Path, str]] = set()  # what was said about data, and of which


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
    in view, and `human` is rendered on the grid itself: its maximum is 1 (a box: the share of the
    patch that it covers). With augmentation image and map get the same random crop and flip; then
    the maximum can be below 1, and a map is all 0 (and valid) where the crop missed everything
    that people looked at. See `lib.data.maps.human_map` for where maps come from.

    With `config.cache` the pictures are decoded once and kept in that folder: squeezed, or for
    training with a shorter side from which the smallest crop still has the pixels of the model's
    input. A training crop is then another draw than without the cache; lib/data/pictures.py says
    how exact it is.

    Attributes:
        classes: class names by label.
        config, grid: as given.
        table: DataFrame, a row an item: image_id, label, class_name, path ("" for drawn images),
            has_map; x0, y0, x1, y1 of the bird in pixels of the squeezed image; for the toy birds
            also decoy (colour index, -1 for none) and dx0, dy0, dx1, dy1 of the decoy.

    Warns once how many images have no human map, if the data set is to have any.

    Training asks for `(index, seed)`: crop and flip are then a function of the seed alone, whatever
    process draws them and whatever was drawn before, so that a run can be resumed.

    Reading an item raises OSError naming the file when it is missing or broken, ValueError naming
    the image id when its size is not the one that the gaze was measured in.
    """

    part: Part | None = None  # that it is of a data set on disk or drawn, if it is one

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
        self.table = _table(self.records, self.classes, config.image_size)
        self.table.insert(4, "has_map", False)
        self.use_maps(*self.render(self.records))
        self._tell_missing()
        self._decoded = self._open_cache()
        self._fixations: dict[int, Tensor] = {}  # counted once: every epoch validates on them

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """All human maps and their validity, as `render` gives them. Not to be changed."""
        return self._maps, self._valid

    @property
    def has_map(self) -> np.ndarray:
        """Which images have a human map, bool [N]."""
        return self.table["has_map"].to_numpy()

    def use_maps(self, maps: Tensor, valid: Tensor) -> None:
        """Puts other maps in the place of the data's own; shapes as `render` gives them."""
        self._maps, self._valid = maps.to(torch.float16 if self.augment else torch.float32), valid
        self.table["has_map"] = valid.flatten(1).any(dim=1).numpy()

    def render(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """All human maps and their validity, [N, gh, gw], or [N, FINE * gh, FINE * gw] to train.

        Rendered once, here and not on first use: what a loader's worker process caches is its own
        and is lost with it, while this one tensor is shared by all of them. Half precision keeps
        the fine maps of the 6,000 CUB images at 38 MB (14 x 14) and is exact to 0.0005.
        """
        fine = FINE if self.augment else 1
        shape = (len(records), fine * self.grid[0], fine * self.grid[1])
        maps = torch.zeros(shape, dtype=torch.float16 if self.augment else torch.float32)
        valid = torch.zeros(shape, dtype=torch.bool)
        # Map files are decoded, which frees the interpreter; everything else is faster in one.
        files = any(isinstance(record.human, Path) for record in records)
        with ThreadPoolExecutor(os.cpu_count() if files else 1) as pool:
            found = pool.map(lambda r: self._map(r.human, r.size, fine), records)
            bar = tqdm(found, "human maps", len(records), delay=1.0, leave=False)
            for i, (values, known) in enumerate(bar):
                maps[i], valid[i] = values, known
        return maps, valid

    def _map(
        self, source: HumanSource | None, size: tuple[int, int] | None, fine: int
    ) -> tuple[Tensor, Tensor]:
        if size is None and isinstance(source, Path):
            source = None  # the picture cannot be read either, and reading the item says so
        config = self.config
        style = (config.sigma, config.sigma_unit, config.weight)
        return human_map(source, size, self.grid, *style, fine, tuple(config.image_size))

    def _tell_missing(self) -> None:
        missing = [r.image_id for r, has in zip(self.records, self.has_map, strict=True) if not has]
        if missing and self.config.maps != "none":
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            text = (
                f"{len(missing)} of {len(self.records)} images have no human map (ids {shown}); "
                "they take part with their label alone."
            )
            if _is_new(self.config.root, text):
                warnings.warn(text, stacklevel=4)

    def _open_cache(self) -> DecodedImages | None:
        if self.config.cache is None or self.config.name == "toy" or not self.records:
            return None
        size: tuple[int, int] | int = tuple(self.config.image_size)
        if self.augment:
            size = math.ceil(max(size) / math.sqrt(self.config.crop_scale[0]))
        paths = [record.image for record in self.records]
        return decoded_images(paths, self.config.cache, size, lambda i: _pixels(self.records[i]))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor | int]:
        """The item at `index`; of `(index, seed)`, with the crop and flip that the seed draws."""
        if isinstance(index, tuple):
            with torch.random.fork_rng(devices=()):  # what was drawn before goes on afterwards
                torch.default_generator.manual_seed(index[1])
                return self[index[0]]
        index = range(len(self))[index]  # negative ones too, and IndexError past the end
        if self.augment:
            item: dict[str, Tensor | int] = {"label": self.records[index].label, "index": index}
            pixels, item["human"], item["valid"] = self._augmented(index)
        else:
            pixels, item = self._squeezed(index), self.annotations(index)
        image = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        item["image"] = image.mul_(self._scale).add_(self._shift)
        return item

    def annotations(self, index: int) -> dict[str, Tensor | int]:
        """The item of a data set without augmentation, all but its image: no picture is read."""
        if index not in self._fixations:
            self._fixations[index] = self._counts(index).sum(dim=0)
        return {
            "label": self.records[index].label,
            "index": index,
            "human": self._maps[index].flatten(),
            "valid": self._valid[index].flatten(),
            "fixations": self._fixations[index],
        }

    def _augmented(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same crop and flip for image and map: uint8 [3, H, W], float32 [P], bool [P].

        Functions of torchvision are called, not its transforms: those take as long as the work.
        """
        pixels = _pixels(self.records[index]) if self._decoded is None else self._decoded[index]
        height, width = pixels.shape[1:]
        ratio, scale = self.config.crop_ratio, list(self.config.crop_scale)
        if ratio is None:  # the one aspect ratio allowed is that of the picture
            ratio = (width / height, width / height)
        elif ratio == "input":  # that of what the model sees; the share is of the largest such crop
            form = self.config.image_size[1] / self.config.image_size[0]
            across, down = min(width, height * form), min(height, width / form)
            ratio, scale = (form, form), [s * across * down / (width * height) for s in scale]
        crop = v2.RandomResizedCrop.get_params(pixels, scale, list(ratio))
        is_flipped = torch.rand(1) < self.config.flip
        size, known = list(self.config.image_size), self._valid[index]
        picture = v2.functional.resized_crop_image(pixels, *crop, size)
        picture = picture.flip(-1) if is_flipped else picture
        if not known.any():
            nothing = torch.zeros(math.prod(self.grid))
            return picture, nothing, nothing.bool()
        # The map is enlarged to the picture, cropped and resized, all by the nearest: one look-up.
        top, left, *cut = crop
        down = nearest(known.shape[0], height)[top:][nearest(cut[0], size[0])]
        across = nearest(known.shape[1], width)[left:][nearest(cut[1], size[1])]
        mask = torch.stack([self._maps[index], known])[:, down[:, None], across]
        human, valid = to_grid(*(mask.flip(-1) if is_flipped else mask), self.grid)
        return picture, human.clamp(0, 1).flatten(), valid.flatten()

    def _squeezed(self, index: int) -> Tensor:
        """The whole picture as uint8 [3, H, W]."""
        if self._decoded is not None and not self.augment:
            return self._decoded[index]
        pixels = _pixels(self.records[index])
        return v2.functional.resize(pixels, list(self.config.image_size), antialias=True)

    def _counts(self, index: int) -> Tensor:
        """Fixations per cell and reader on the evaluation grid, float32 [R, P]."""
        gaze = self.records[index].gaze
        counts = [fixation_counts(look.fixations, look.size, self.grid) for look in gaze]
        return torch.from_numpy(np.reshape(counts, (-1, math.prod(self.grid))).astype(np.float32))

    def corners(self, prefix: str = "") -> np.ndarray:
        """x0, y0, x1, y1 of the boxes of the table, float64 [N, 4]; NaN where there is none."""
        columns = [prefix + corner for corner in CORNERS]
        return self.table.reindex(columns=columns).to_numpy(np.float64)

    def cover(self, prefix: str = "", grid: tuple[int, int] | None = None) -> Tensor | None:
        """Share of each cell that a box of the table covers, float32 [N, P] in [0, 1].

        `prefix` names the box ("" the bird's, "d" the decoy's), `grid` is that of the model unless
        given. No box covers nothing; None where the table has no such boxes at all.
        """
        if prefix + CORNERS[0] not in self.table:
            return None
        size, grid = tuple(self.config.image_size), grid or self.grid
        maps = [box_map(box, size, grid).ravel() for box in self.corners(prefix)]
        return torch.from_numpy(np.stack(maps))

    def parts(self, index: int) -> Tensor | None:
        """Number of the bird's visible parts in each cell, float32 [P]; None: not known."""
        record = self.records[index]
        if record.parts is None or record.size is None:
            return None
        return torch.from_numpy(fixation_counts(record.parts, record.size, self.grid)).flatten()

    def image(self, index: int) -> np.ndarray:
        """The squeezed picture for figures: uint8 [H, W, 3], RGB, not normalised, not augmented."""
        return self._squeezed(index).permute(1, 2, 0).contiguous().numpy()

    def readers(self, index: int) -> tuple[Tensor, Tensor]:
        """Each reader apart: maps float32 [R, P] in [0, 1] and fixation counts float32 [R, P].

        On the grid of the whole image (augmentation does not matter); R is the number of readers
        who looked at this image, 0 where nobody did or the map is no gaze.
        """
        record = self.records[index]
        counts = self._counts(index)
        maps = [self._map((look,), record.size, 1)[0].flatten() for look in record.gaze]
        return torch.stack(maps) if maps else torch.zeros_like(counts), counts


@lru_cache(maxsize=4096)
def nearest(pixels: int, size: int) -> Tensor:
    """Which of `pixels` in a line each of `size` is that it is resized to, int64 [size]."""
    line = torch.arange(pixels, dtype=torch.float32)[None, None]
    return F.interpolate(line, size, mode="nearest")[0, 0].long()


def read_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    """The records of one part of a data set, and the names of all classes by label.

    Raises ValueError (a `SplitError` among them) and FileNotFoundError, one sentence with the
    remedy each. Broken and missing pictures are not noticed here: reading them is.
    """
    if config.name == "toy":
        if config.classes:
            raise ValueError(
                f"classes is {config.classes}, but drawn birds come as a whole; set PRESET to "
                "another, or unset CLASSES"
            )
        return toy_records(config, part)
    if config.name not in DATA_SETS:
        known = ", ".join(("toy", *DATA_SETS))
        raise ValueError(f"data set {config.name!r} is unknown; use one of {known}.")
    return DATA_SETS[config.name].records(config, part)


def make_dataset(
    config: DataConfig,
    split: Part,
    grid: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: bool = False,
    classes: Sequence[str] | None = None,
) -> BirdDataset:
    """Read one split of the data set that `config.name` names.

    `grid` (gh, gw), `mean` and `std` are the model's, and so are `classes`, the names of its scores
    where it has some: labels count in them. `augment` is for training batches; leave it off to
    measure, on the training split too. Of few pictures the validation split is empty. Raises
    ValueError for a name or split that does not exist, `OtherClasses` for classes that are not the
    model's, FileNotFoundError with the remedy where the files are missing.
    """
    if split not in PARTS:
        raise ValueError(f"split {split!r} is unknown; use train, val or test.")
    records, found = read_records(config, split)
    if classes is not None:
        labels = labels_among(classes, found)
        if labels != sorted(labels):  # folders were numbered anew: as the training met them
            moved = [replace(record, label=labels[record.label]) for record in records]
            records = sorted(moved, key=lambda record: record.label)
        found = classes
    if split == "train" and config.name != "toy":
        _tell_left_out(config)
    dataset = BirdDataset(records, found, config, grid, mean, std, augment)
    dataset.part = split
    return dataset


def _is_new(root: Path, words: str) -> bool:
    """Whether this was not said of the data in a folder before, in this process.

    Every run of a comparison reads the same images. Python's own "once" forgets whenever a library
    touches the warning filters.
    """
    told = (root, words) in _TOLD
    _TOLD.add((root, words))
    return not told


def _tell_left_out(config: DataConfig) -> None:
    """Warns once a process of what lies in the data's folders and is not read."""
    if not _is_new(config.root, f"left out, with {config.maps_dir} and {config.split_file}"):
        return  # nor are the folders walked through again
    with warnings.catch_warnings():  # of the files themselves: reading the records has told them
        warnings.simplefilter("ignore")
        text = in_a_sentence(left_out(config, DATA_SETS[config.name].pictures(config.root)))
    if text:
        words = f"not all in {config.root} is read: {text}; `python -m lib check` says more"
        warnings.warn(words, stacklevel=3)


def subset(dataset: BirdDataset, images: Sequence[int] | None) -> Subset:
    """Some images of a data set, by their index in it; None is all.

    Raises:
        ValueError: no image at all, one twice, or an index that the data set does not have.
    """
    chosen = list(range(len(dataset))) if images is None else [int(i) for i in images]
    wrong = [i for i in chosen if not 0 <= i < len(dataset)]
    if wrong:
        raise ValueError(f"image {wrong[0]} is asked for; this split has 0 to {len(dataset) - 1}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"images names {len(chosen)}, {len(set(chosen))} apart; name each once")
    return Subset(dataset, chosen)


def evenly_spaced(images: Sized, count: int) -> list[int]:
    """Places of `count` images at even distances; all where there are no more."""
    return np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist()


def _pixels(record: Record) -> Tensor:
    """The picture as uint8 [3, h, w], RGB, checked against the frame of its gaze.

    The check is made here, where the size is known anyway: reading 11,788 headers at the start
    would cost more than anything else does there.
    """
    if isinstance(record.image, np.ndarray):
        return torch.from_numpy(record.image).permute(2, 0, 1)
    picture = read_picture(record.image)
    if record.gaze:
        look = record.gaze[0]
        if (picture.width, picture.height) != (look.width, look.height):
            raise ValueError(
                f"image {record.image_id} ({record.image}) has {picture.width} x {picture.height} "
                f"pixels, but its gaze was measured in {look.width} x {look.height}; use the "
                "original image."
            )
    return v2.functional.pil_to_tensor(picture)


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
            size = record.size or (np.nan, np.nan)
            scale = np.tile(np.divide(image_size, size)[::-1], 2)  # x, y, x, y
            names = [prefix + corner for corner in CORNERS]
            row |= zip(names, np.asarray(box, dtype=np.float64) * scale, strict=True)
        rows.append(row)
    # Of no record, as a validation split may have: the columns that every table has.
    return pd.DataFrame(rows, columns=None if rows else ["image_id", "label", "class_name", "path"])


def conflicting_decoys(table: pd.DataFrame) -> pd.Series:
    """Whether a picture's decoy names another class; bool, False where there is no decoy."""
    return (table["decoy"] != table["label"]) & (table["decoy"] >= 0)


def decoy_cover(dataset: BirdDataset) -> Tensor | None:
    """Share of every cell that the decoy covers, `[N, P]` in [0, 1]; None without decoys."""
    return dataset.cover("d")

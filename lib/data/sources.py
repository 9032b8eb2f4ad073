"""From the files of a data set to `Record`s: where the picture is, its label, who looked where.

Two steps for pictures on disk. A lister finds all pictures of a data set and the split that was
published with it (`LISTERS`); `read_records` then chooses the split and attaches human maps. A new
data set is a new lister.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from tqdm.auto import tqdm

from lib.config import DataConfig, file_md5
from lib.data.cub import (
    box_of,
    box_of_2010,
    boxes_by_id,
    frame_of,
    gaze_of,
    list_cub2010,
    list_cub2011,
    parts_by_id,
    parts_of,
)
from lib.data.folders import list_folder, map_files, painted_maps
from lib.data.maps import Box, Recording, Source
from lib.data.pictures import picture_size
from lib.data.records import Listing, Part, Record, look_up
from lib.data.splits import Row, Split, per_class, read_split, with_validation
from lib.data.toy.birds import ToyBirds, make
from lib.data.toy.scene import SPECIES

TOY_FIRST_ID = {"train": 0, "val": 100_000, "test": 200_000}  # an id names one drawn bird only


def read_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    """The records of one part of a data set, and the names of all classes by label.

    Raises ValueError (a `SplitError` among them) and FileNotFoundError, one sentence with the
    remedy each. Broken and missing pictures are not noticed here: reading them is.
    """
    if config.name == "toy":
        return _toy_records(config, part)
    listing = list_pictures(config)
    split = choose_split(config, listing)
    rows = getattr(split, part)
    if not rows:
        raise ValueError(
            f"the {part} split is empty (val_share {config.val_share:g}); "
            "choose another val_share or more images."
        )
    human = _human_sources(config, listing, (*split.train, *split.val, *split.test))
    boxes = boxes_by_id(listing.home) if config.name == "cub2011" else {}
    parts = parts_by_id(listing.home) if config.name == "cub2011" else {}
    records = []
    for row in tqdm(rows, desc=f"{part} records", delay=1.0, leave=False):
        path, image_id = listing.images / row.path, listing.ids[row.path]
        source = human(row)
        size = frame_of(source) if isinstance(source, tuple) and source else picture_size(path)
        box = {"": look_up(boxes, image_id, "bounding_boxes.txt")} if boxes else {}
        found = parts.get(image_id)
        records.append(Record(image_id, row.label, path, source, box, size, parts=found))
    return records, [_words(name) for name in listing.label_list]


def list_pictures(config: DataConfig) -> Listing:
    """All pictures of the data set that `config.name` names; ValueError for an unknown name."""
    if config.name not in LISTERS:
        known = ", ".join(("toy", *LISTERS))
        raise ValueError(f"data set {config.name!r} is unknown; use one of {known}.")
    return LISTERS[config.name](config)


def choose_split(config: DataConfig, listing: Listing) -> Split:
    """The split file of the configuration, else the published split, else 8 : 2 by class.

    Validation images are carved from train where the split has none: no checkpoint is ever chosen
    on test images.
    """
    if config.split_file is not None:
        split = _split_from_file(config, listing)
    else:
        split = listing.published or per_class(
            listing.rows, listing.label_list, share=0.8, shuffle=True, seed=config.seed
        )
    return split if split.val else with_validation(split, config.val_share, config.seed)


def _split_from_file(config: DataConfig, listing: Listing) -> Split:
    path = config.split_file
    if config.split_md5 not in (None, file_md5(path)):
        raise ValueError(f"{path} changed since this configuration was made; start again with it.")
    split = read_split(path)
    for row in (*split.train, *split.val, *split.test):
        if row.path not in listing.ids:
            raise ValueError(
                f"{path} names {row.path}, which the data set in {listing.home} does not have; "
                "make the split again with `python -m lib split`."
            )
    return split


def _words(class_folder: str) -> str:
    """The name for readers: "001.Black_footed_Albatross" -> "Black footed Albatross"."""
    return re.sub(r"^\d+\.", "", class_folder).replace("_", " ")


LISTERS: dict[str, Callable[[DataConfig], Listing]] = {
    "cub2011": list_cub2011,
    "cub2010": list_cub2010,
    "folder": list_folder,
}


def _human_sources(
    config: DataConfig, listing: Listing, rows: Sequence[Row]
) -> Callable[[Row], Source | None]:
    """A function from a row of the split to what people gave for it."""
    if config.maps == "none":
        return lambda row: None
    if config.maps == "files":
        return map_files(config.maps_dir, rows).get
    if config.maps == "corrections":
        painted = painted_maps(config.maps_dir)
        return lambda row: painted.get(listing.ids[row.path])
    makers = {
        ("cub2011", "gaze"): gaze_of,
        ("cub2011", "boxes"): box_of,
        ("cub2011", "parts"): parts_of,
        ("cub2010", "boxes"): box_of_2010,
    }
    if (config.name, config.maps) not in makers:
        have = [maps for name, maps in makers if name == config.name]
        raise ValueError(
            f"{config.name} comes without {config.maps}; set MAPS to one of "
            f"{', '.join((*have, 'none'))}, or to a folder of map files."
        )
    return makers[config.name, config.maps](config, listing)


def _toy_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    height, width = config.image_size
    if height != width:
        raise ValueError(
            f"image_size is {height} x {width}, but toy birds are drawn on a square; "
            "give both sides the same length."
        )
    count = {"train": config.toy_train, "val": config.toy_val, "test": config.toy_test}[part]
    birds = _drawn(part, count, config.seed, height, config.agreement)
    first = TOY_FIRST_ID[part]
    painted = painted_maps(config.maps_dir) if config.maps == "corrections" else {}
    records = []
    for i in range(count):
        image_id, box = first + i, tuple(birds.boxes[i])
        places = np.column_stack([birds.parts[i], np.ones(len(birds.parts[i]), np.float32)])
        recordings = tuple(
            Recording(image_id, width, height, looks) for looks in birds.gaze[i] if len(looks)
        )
        sources = {
            "gaze": recordings,
            "boxes": Box(box, width, height),
            "parts": (Recording(image_id, width, height, places),),
            "corrections": painted.get(image_id),
            "none": None,
        }
        if config.maps not in sources:
            raise ValueError(
                f"toy birds come without {config.maps}; set MAPS to gaze, boxes, parts, none, or "
                "to a folder of corrections."
            )
        records.append(
            Record(
                image_id=image_id,
                label=int(birds.labels[i]),
                image=birds.images[i],
                human=sources[config.maps],
                boxes={"": box, "d": tuple(birds.decoy_boxes[i])},
                size=(height, width),
                columns={"decoy": int(birds.decoys[i])},
                parts=places,
            )
        )
    return records, [species.name for species in SPECIES]


@lru_cache(maxsize=8)
def _drawn(part: str, count: int, seed: int, size: int, agreement: float) -> ToyBirds:
    """Drawn once a process: a comparison reads the same split for every run. Not to be changed."""
    return make(part, count, seed, size=size, agreement=agreement)

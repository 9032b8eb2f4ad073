"""Which maps a training image is supervised with: people's, or those of a control or an ablation.

Only training images are changed: what a model is measured against is always what people did.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lib.config import HumanConfig
from lib.data.dataset import BirdDataset

SHIFT = 2.0  # patches that noise="shifted" moves a map by, each in a direction of its own
BLUR = 2.0  # standard deviation in patches that noise="blurred" adds


def supervised(dataset: BirdDataset, human: HumanConfig, seed: int) -> BirdDataset:
    """The data set with the maps that `human.maps`, `human.noise` and `human.annotated` ask for.

    Pictures and records are shared with `dataset`; what is random is drawn from `seed`, and the
    images that stay annotated are the first ones of one random order: 5 contain those of 1.

    Nobody has seen the maps of the others: the mean map is that of the annotated images, and they
    are shuffled among themselves.

    Args:
        dataset: training images, with or without augmentation.

    Raises:
        ValueError: names what the data cannot give: bounding boxes, several readers, a second map.
    """
    if (human.maps, human.noise, human.annotated) == ("human", "none", "all"):
        return dataset
    changed = copy.copy(dataset)
    changed.table = dataset.table.copy()
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.flatnonzero(dataset.has_map))
    order, left = np.split(order, [_count(human.annotated, len(order))])
    maps, valid = dataset.maps
    maps, valid = maps.to(torch.float32, copy=True), valid.clone()
    if human.noise == "half_readers":
        maps, valid = _half_of_the_readers(dataset)
    if human.maps == "shuffled":
        if len(order) < 2:
            raise ValueError(f'maps is "shuffled", which needs two human maps of {len(order)}')
        following = np.roll(order, 1)  # one circle through all: no image keeps its own
        maps[order], valid[order] = maps[following], valid[following]
    elif human.maps == "mean":
        maps[order] = _to_one((maps * valid)[order].sum(0) / valid[order].sum(0).clamp(min=1))
        valid[order] = True
    elif human.maps == "box":
        boxes = dataset.cover(grid=tuple(maps.shape[1:]))
        if boxes is None:
            raise ValueError(
                'maps is "box", but this data set has no bounding boxes (of CUB-200-2011: '
                "bounding_boxes.txt); use another"
            )
        valid = torch.tensor(dataset.has_map)[:, None, None].expand(maps.shape).clone()
        maps = torch.where(valid, boxes.view(maps.shape), 0.0)
    if human.noise == "shifted":
        angles = rng.uniform(0, 2 * math.pi, len(maps))
        cells = maps.shape[-1] / dataset.grid[1]  # of a map, per patch
        for i in order:
            dy, dx = (round(SHIFT * cells * f(angles[i])) for f in (math.sin, math.cos))
            moved = ndimage.shift(maps[i].numpy(), (dy, dx), order=0)  # what comes in is 0
            maps[i], valid[i] = torch.from_numpy(moved), True
    elif human.noise == "blurred":
        sigma = [BLUR * maps.shape[-1 - axis] / dataset.grid[1 - axis] for axis in (0, 1)]
        reach = [2 * math.ceil(3 * s) + 1 for s in sigma]
        for i in order:  # a map may be smaller than the kernel reaches: nothing lies outside
            room = [reach[0] // 2, reach[1] // 2]
            blurred = F.gaussian_blur(F.pad(maps[i : i + 1], room), reach, sigma)
            maps[i] = _to_one(F.center_crop(blurred, list(maps[i].shape))[0])
    valid[left] = False
    changed.use_maps(maps, valid)
    return changed


def _count(annotated: str, available: int) -> int:
    """ "all", "25" or "10%" of the images that have a map; at least one of them."""
    if annotated == "all":
        return available
    if annotated.endswith("%"):
        return max(1, round(float(annotated[:-1]) / 100 * available))
    return int(annotated)


def _to_one(values: Tensor) -> Tensor:
    """Scaled so that the highest cell is 1."""
    return values / values.max().clamp(min=1e-12)


def _half_of_the_readers(dataset: BirdDataset) -> tuple[Tensor, Tensor]:
    """Maps of the first half of the readers of each image, rounded up."""
    if max((len(record.gaze) for record in dataset.records), default=0) < 2:
        raise ValueError(
            'noise is "half_readers", but no image has two readers; use gaze maps, or another noise'
        )
    halved = [
        replace(record, human=record.gaze[: -(-len(record.gaze) // 2)]) if record.gaze else record
        for record in dataset.records
    ]
    maps, valid = dataset.render(halved)
    return maps.float(), valid

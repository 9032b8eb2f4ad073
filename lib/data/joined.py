"""Data sets made of others: parts joined for those who correct by hand, or another picture size."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib.data.classes import refuse_other_labels
from lib.data.dataset import CORNERS, BirdDataset


class JoinedDataset(BirdDataset):
    """Several parts of a data set, one after the other; each keeps its cache of decoded pictures.

    The table has one column more, `part`: train or val. Models are right on nearly all pictures
    that they were trained on, so what is worth correcting lies among the others. A validation
    picture that taught a model has no say any more in how good that model is. Test pictures are
    kept to measure, and refused.

    Args:
        parts: without augmentation, of one data set on one grid; parts without a picture are fine.

    Raises:
        ValueError: a part is of test pictures or is augmented, or two have other classes, another
            grid or a picture in common.
    """

    def __init__(self, *parts: BirdDataset) -> None:
        first = parts[0]
        for one in parts:
            if one.part == "test":
                raise ValueError(
                    "test pictures are kept to measure, and nobody corrects them; join "
                    "training and validation pictures"
                )
            if one.augment or one.grid != first.grid:
                raise ValueError("only parts on one grid can be joined, made with augment=False")
            refuse_other_labels(first.classes, one.classes)
        vars(self).update(vars(first))  # normalisation, classes, configuration
        self.part = None
        self.records = [record for one in parts for record in one.records]
        tables = [one.table.assign(part=one.part or "") for one in parts if len(one)]
        self.table = pd.concat(tables or [first.table.assign(part="")], ignore_index=True)
        twice = self.table["image_id"].duplicated()
        if twice.any():
            name = self.table["image_id"][twice].iloc[0]
            raise ValueError(f"picture {name} is in two parts; join parts that share none")
        self._maps, self._valid = map(torch.cat, zip(*(one.maps for one in parts), strict=True))
        self._fixations = {}
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def _squeezed(self, index: int) -> Tensor:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return self._parts[part]._squeezed(index - (self._ends[part] - len(self._parts[part])))


class ResizedDataset(BirdDataset):
    """The pictures of a data set at another size, and on another grid, one at a time.

    Nothing is computed here for all of them: a picture is read and its maps are made when they are
    asked for, and the cache of decoded pictures, which has another size, is not used. The width of
    a fixation's Gaussian stays what it was in the picture, so that a finer map shows the same.

    Args:
        dataset: without augmentation.
        image_size: height and width in pixels. grid: (gh, gw) of a model for such pictures.
    """

    def __init__(
        self, dataset: BirdDataset, image_size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        vars(self).update(vars(dataset))  # records, classes, normalisation
        finer = np.sqrt(np.prod(grid) / np.prod(dataset.grid))
        sigma = dataset.config.sigma * (finer if dataset.config.sigma_unit == "patch" else 1)
        changes = {"image_size": tuple(image_size), "sigma": float(sigma), "cache": None}
        self.config, self.grid = replace(dataset.config, **changes), grid
        scale = np.tile(np.divide(image_size, dataset.config.image_size)[::-1], 2)  # x, y, x, y
        self.table = self.table.copy()
        for prefix in {prefix for record in self.records for prefix in record.boxes}:
            self.table[[prefix + corner for corner in CORNERS]] *= scale
        self._decoded, self._fixations = None, {}

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """All human maps and their validity, `[N, gh, gw]`: rendered when first asked for."""
        return self.render(self.records)

    def annotations(self, index: int) -> dict[str, Tensor | int]:
        """As in the data set, with the maps of this grid."""
        record = self.records[index]
        human, valid = self._map(record.human, record.size, 1)
        return {
            "label": record.label,
            "index": index,
            "human": human.flatten(),
            "valid": valid.flatten(),
            "fixations": self._counts(index).sum(dim=0),
        }

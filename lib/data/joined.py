"""Training and validation pictures as one data set, for those who correct them by hand."""

from __future__ import annotations

import itertools
from bisect import bisect_right

import pandas as pd
import torch
from torch import Tensor

from lib.data.classes import refuse_other_labels
from lib.data.dataset import BirdDataset


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

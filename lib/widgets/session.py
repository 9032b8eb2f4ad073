"""A model and a data set for the attention editor: NumPy in, NumPy out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from lib.data.classes import refuse_other_labels
from lib.data.dataset import BirdDataset
from lib.data.maps import box_map
from lib.edit import (
    AttentionEdit,
    Layout,
    resolve_blocks,
    sigmoid_attention,
)
from lib.model.live import LiveImage
from lib.model.mean_edit import read_mean
from lib.model.vit import SigmoidViT

KEPT_IMAGES = 8  # pictures a LiveSession keeps; one of a ViT-S/16 at 224 pixels takes 14 MB


@dataclass(frozen=True)
class Shown:
    """One picture of a data set, as the editor shows it."""

    index: int  # position in the data set
    image_id: str
    image: np.ndarray  # uint8 [H, W, 3], RGB, as large as the model sees it
    label: int
    class_name: str
    file: str  # name of the picture's file; "" where it is drawn
    human: np.ndarray | None  # float32 [gh, gw] in [0, 1], NaN where not known; None: no map
    box: np.ndarray | None  # float32 [gh, gw], share of the cell in the bird's box; None: no box


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a picture, after an edit if there is one."""

    probabilities: np.ndarray  # float32 [classes]
    attention: np.ndarray  # float32 [depth, gh, gw]: class row's softmax on patches, mean of heads
    class_token: np.ndarray  # float32 [depth]: what the class row keeps on the class token itself


class Session(Protocol):
    """What the editor asks of a model and its pictures; a `LiveSession` answers it."""

    classes: list[str]  # names by label
    grid: tuple[int, int]  # (gh, gw), the patches of the model
    layout: Layout  # blocks of the model
    depth: int
    num_heads: int
    fingerprint: str  # of the weights: another one when the model has changed

    def __len__(self) -> int: ...

    def open(self, index: int) -> Shown: ...

    def sigmoid(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def seen_together(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome: ...


class LiveSession:
    """A model and a data set for the editor: NumPy in, NumPy out.

    The pictures used last are kept as `LiveImage`s. Call it from one thread, as the editor does.

    Args:
        model: put in eval mode; its weights must not change, see `replace_model`.
        dataset: without augmentation, on the model's grid.

    Attributes:
        model, dataset: as given; the model by `replace_model` in the end.
        classes: class names by label. grid: (gh, gw). layout, depth, num_heads, num_prefix:
            the model's.
        fingerprint: 16 hex digits that name the weights.

    Every method that takes an index raises IndexError outside the data set.

    Raises:
        ValueError: the data set is augmented, or has another grid, or other classes than the model,
            by their names where it knows them.
    """

    def __init__(self, model: SigmoidViT, dataset: BirdDataset) -> None:
        if dataset.augment:
            raise ValueError(
                "the data set is augmented, so a picture looks different each time; make it with "
                "augment=False"
            )
        self.dataset = dataset
        self._live = lru_cache(maxsize=KEPT_IMAGES)(self._run_trunk)
        self.classes = list(dataset.classes)
        self.replace_model(model)

    def replace_model(self, model: SigmoidViT) -> None:
        """Go on with another model, or with the same one whose weights have changed."""
        self._refuse_misfit(model)
        self.model = model.eval()
        self.grid = model.grid
        self.layout, self.num_prefix = model.layout, model.num_prefix
        self.depth, self.num_heads = model.depth, model.num_heads
        self.fingerprint = _fingerprint(model)
        self._live.cache_clear()

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> Shown:
        """The picture, and what people said of it."""
        index = self._position(index)
        item, row = self.dataset[index], self.dataset.table.iloc[index]
        valid = item["valid"]
        human = torch.where(valid, item["human"], torch.nan).view(self.grid).numpy()
        return Shown(
            index=index,
            image_id=str(row["image_id"]),
            image=self.dataset.image(index),
            label=item["label"],
            class_name=self.classes[item["label"]],
            file=Path(row["path"]).name,
            human=human if valid.any() else None,
            box=self._box(row),
        )

    def sigmoid(self, index: int, block: int, offset: str) -> np.ndarray:
        """Sigmoid attention of the class row before any edit: float32 [heads, gh, gw]."""
        rows = self._live(self._position(index)).rows
        (block,) = resolve_blocks((block,), self.depth)
        read = sigmoid_attention(rows[block].float(), offset, self.num_prefix)
        return read.unflatten(-1, self.grid).numpy()

    def seen_together(self, index: int, block: int, offset: str) -> np.ndarray:
        """What the heads see together before any edit: float32 [gh, gw], see `read_mean`."""
        rows = self._live(self._position(index)).rows
        (block,) = resolve_blocks((block,), self.depth)
        read = read_mean(rows[block].float()[:, None], offset, self.num_prefix)[0]
        return read.unflatten(-1, self.grid).numpy()

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome:
        """Prediction and attention under an edit, or without one.

        Raises:
            ValueError: the edit is for another grid, or names a block or head that is not there.
        """
        if edit is not None and edit.grid != self.grid:
            raise ValueError(
                f"the edit is on {edit.grid[0]} x {edit.grid[1]} patches, but the model has "
                f"{self.grid[0]} x {self.grid[1]}; paint it again on this model's grid"
            )
        scores, rows = self._live(self._position(index)).run(edit)
        # Of a block without a row to read NaN: the mean of no heads.
        mass = torch.stack([torch.softmax(row.float(), dim=-1).mean(dim=0) for row in rows])
        return Outcome(
            probabilities=torch.softmax(scores.float(), dim=-1).numpy(),
            attention=mass[:, self.num_prefix :].unflatten(-1, self.grid).numpy(),
            class_token=mass[:, 0].numpy(),
        )

    def _run_trunk(self, index: int) -> LiveImage:
        return LiveImage(self.model, self.dataset[index]["image"])

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is asked for; the data set has 0 to {len(self) - 1}")
        return int(index)

    def _box(self, row: pd.Series) -> np.ndarray | None:
        corners = [row.get(name, np.nan) for name in ("x0", "y0", "x1", "y1")]
        if np.isnan(corners).any():
            return None
        return box_map(corners, self.dataset.config.image_size, self.grid)

    def _refuse_misfit(self, model: SigmoidViT) -> None:
        if model.grid != self.dataset.grid:
            raise ValueError(
                f"the model has {model.grid[0]} x {model.grid[1]} patches, but the data set "
                f"{self.dataset.grid[0]} x {self.dataset.grid[1]}; make it with the model's grid"
            )
        refuse_other_labels(model.classes, self.dataset.classes)
        if model.vit.num_classes != len(self.classes):
            raise ValueError(
                f"the model has {model.vit.num_classes} classes, but the data set "
                f"{len(self.classes)}; use a model that was trained on these classes"
            )


@torch.no_grad()
def _fingerprint(model: SigmoidViT) -> str:
    """16 hex digits of the SHA-256 of all weights: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.vit.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

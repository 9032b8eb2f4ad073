"""A model and a data set for the attention editor: NumPy in, NumPy out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from lib.data.classes import refuse_other_labels
from lib.data.dataset import BirdDataset
from lib.data.joined import ResizedDataset
from lib.data.maps import box_map
from lib.edit import AttentionEdit, Layout, sigmoid_attention
from lib.model.live import LiveImage
from lib.model.mean_edit import read_mean
from lib.model.resolution import as_size, at_size, own_size
from lib.model.vit import SigmoidViT

# Pictures a LiveSession keeps; one of a ViT-S/16 at 224 pixels takes 14 MB. At a larger size,
# fewer of them fit into the same memory.
KEPT_IMAGES = 8


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
    # Softmax on the patches, mean of the heads, of the row that is read in each block: the class
    # token's, or the pooling query's. float32 [depth, gh, gw], NaN in a block without such a row.
    attention: np.ndarray
    prefix: np.ndarray  # float32 [depth]: what it keeps on the tokens in front of the patches


@dataclass(frozen=True)
class AtSize:
    """A model for one picture size, and the pictures in that size."""

    model: SigmoidViT
    dataset: BirdDataset


class Session(Protocol):
    """What the editor asks of a model and its pictures; a `LiveSession` answers it."""

    classes: list[str]  # names by label
    grid: tuple[int, int]  # (gh, gw), the patches of the model
    layout: Layout  # blocks of the model, their heads, and which have a row to read
    num_prefix: int  # tokens in front of the patches
    fingerprint: str  # of the weights: another one when the model has changed

    def __len__(self) -> int: ...

    def open(self, index: int) -> Shown: ...

    def sigmoid(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def seen_together(self, index: int, block: int, offset: str) -> np.ndarray: ...

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome: ...


def block_name(layout: Layout, block: int) -> str:
    """How a sentence names one block: "block 11", or "the pooling"."""
    name = layout.names[block]
    return "the pooling" if name == "pool" else f"block {name}"


def blocks_in_words(layout: Layout, blocks: str | tuple[int, ...]) -> str:
    """How a sentence names the blocks of an edit, its words or indices."""
    words = {"last": "the last block", "last2": "the last two blocks", "all": "all blocks"}
    if layout.pooled:
        words |= {"last": "the pooling", "last2": "the last block and the pooling"}
        words |= {"pool": "the pooling"}
    if isinstance(blocks, str):
        return words[blocks]
    names = [block_name(layout, block) for block in blocks]
    return ", ".join([names[0], *(name.removeprefix("block ") for name in names[1:])])


def scope_in_words(edit: AttentionEdit, layout: Layout) -> str:
    """Where an edit is made, short."""
    heads = {"mean": "mean of the heads", "all": "all heads"}
    words = [
        blocks_in_words(layout, edit.blocks).replace("the ", ""),
        heads.get(edit.heads) or f"head {', '.join(map(str, edit.heads))}",
        *["all rows"] * (edit.queries == "all"),
        *["offset none"] * (edit.offset == "none"),
        *[f"strength {edit.strength:.2f}"] * (edit.strength < 1),
    ]
    return ", ".join(words)


def refuse_scope(layout: Layout, edit: AttentionEdit) -> None:
    """ValueError where an edit names a block or a head that cannot be edited in a model."""
    heads = () if isinstance(edit.heads, str) else edit.heads  # a correction's count from 0
    for block in layout.resolve(edit.blocks, edit.queries):
        count = layout.heads[block]
        if heads and not 0 <= min(heads) <= max(heads) < count:
            wrong = next(head for head in heads if not 0 <= head < count)
            raise ValueError(
                f"heads holds {wrong}, but {block_name(layout, block)} has {count} heads"
            )


class LiveSession:
    """A model and a data set for the editor: NumPy in, NumPy out.

    The pictures used last are kept as `LiveImage`s. Call it from one thread, as the editor does.

    Args:
        model: put in eval mode; its weights must not change, see `replace_model`.
        dataset: without augmentation, on the model's grid.
        image_size: height and width in pixels at which the model is asked, see `see_at`; None is
            its own.

    Attributes:
        model, dataset: as given; the model by `replace_model` in the end.
        now: both at the size at which the model is asked.
        classes: class names by label. grid: (gh, gw), of `now`. layout, num_prefix: the model's.
        fingerprint: 16 hex digits that name the weights.

    Every method that takes an index raises IndexError outside the data set.

    Raises:
        ValueError: the data set is augmented, or has another grid, or other classes than the model,
            by their names where it knows them.
    """

    def __init__(
        self,
        model: SigmoidViT,
        dataset: BirdDataset,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        if dataset.augment:
            raise ValueError(
                "the data set is augmented, so a picture looks different each time; make it with "
                "augment=False"
            )
        self.dataset = dataset
        self.classes = list(dataset.classes)
        self._refuse_misfit(model)
        self.image_size = own_size(model) if image_size is None else as_size(model, image_size)
        self.replace_model(model)

    def replace_model(self, model: SigmoidViT) -> None:
        """Go on with another model, or with the same one whose weights have changed."""
        self._refuse_misfit(model)
        self.model = model.eval()
        self.layout, self.num_prefix = model.layout, model.num_prefix
        self.fingerprint = _fingerprint(model)
        self._as_trained = lru_cache(maxsize=KEPT_IMAGES)(self._probabilities)
        self.see_at(self.image_size)

    def see_at(self, image_size: int | Sequence[int]) -> None:
        """Asks the model at another picture size from now on, see `lib.model.resolution`.

        Twice the side is four times the cells: grid, maps, edits and outcomes are those of that
        size, and the scores, too. The model that was given stays as it is.

        Raises:
            ValueError: no multiple of the model's patches.
        """
        model = at_size(self.model, image_size)
        self.image_size, self.grid = own_size(model), model.grid
        dataset = self.dataset
        if model is not self.model:
            dataset = ResizedDataset(dataset, self.image_size, self.grid)
        self.now = AtSize(model, dataset)
        share = min(1, math.prod(self.model.grid) / math.prod(self.grid))
        self._live = lru_cache(max(1, round(KEPT_IMAGES * share)))(self._run_trunk)

    def as_trained(self, index: int) -> np.ndarray | None:
        """Probabilities at the model's own size, float32 [classes]; None where that is asked."""
        at_own = self.now.model is self.model
        return None if at_own else self._as_trained(self._position(index))

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> Shown:
        """The picture, and what people said of it."""
        index = self._position(index)
        dataset = self.now.dataset
        item, row = dataset.annotations(index), dataset.table.iloc[index]
        valid = item["valid"]
        human = torch.where(valid, item["human"], torch.nan).view(self.grid).numpy()
        return Shown(
            index=index,
            image_id=str(row["image_id"]),
            image=dataset.image(index),
            label=item["label"],
            class_name=self.classes[item["label"]],
            file=Path(row["path"]).name,
            human=human if valid.any() else None,
            box=self._box(row),
        )

    def sigmoid(self, index: int, block: int, offset: str) -> np.ndarray:
        """Sigmoid attention of the row that is read, before any edit: float32 [heads, gh, gw].

        Raises ValueError for a block that is not there, or has no such row.
        """
        rows = self._live(self._position(index)).rows
        (block,) = self.layout.resolve((block,))
        read = sigmoid_attention(rows[block].float(), offset, self.num_prefix)
        return read.unflatten(-1, self.grid).numpy()

    def seen_together(self, index: int, block: int, offset: str) -> np.ndarray:
        """What the heads see together before any edit: float32 [gh, gw], see `read_mean`."""
        rows = self._live(self._position(index)).rows
        (block,) = self.layout.resolve((block,))
        read = read_mean(rows[block].float()[:, None], offset, self.num_prefix)[0]
        return read.unflatten(-1, self.grid).numpy()

    def outcome(self, index: int, edit: AttentionEdit | None = None) -> Outcome:
        """Prediction and attention under an edit, or without one.

        Raises:
            ValueError: the edit is for another grid, or names a block or head that is not there,
                or has no row to edit.
        """
        if edit is not None and edit.grid != self.grid:
            raise ValueError(
                f"the edit is on {edit.grid[0]} x {edit.grid[1]} patches, but the model has "
                f"{self.grid[0]} x {self.grid[1]}; paint it again on this model's grid"
            )
        scores, rows = self._live(self._position(index)).run(edit)
        # [depth, N]; the mean of no heads is NaN
        mass = torch.stack([torch.softmax(row.float(), dim=-1).mean(dim=0) for row in rows])
        return Outcome(
            probabilities=torch.softmax(scores.float(), dim=-1).numpy(),
            attention=mass[:, self.num_prefix :].unflatten(-1, self.grid).numpy(),
            prefix=mass[:, : self.num_prefix].sum(dim=1).numpy(),
        )

    def _run_trunk(self, index: int) -> LiveImage:
        return LiveImage(self.now.model, self.now.dataset[index]["image"])

    @torch.inference_mode()
    def _probabilities(self, index: int) -> np.ndarray:
        image = self.dataset[index]["image"][None].to(next(self.model.parameters()))
        return torch.softmax(self.model(image)[0].float(), dim=-1).cpu().numpy()

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is asked for; the data set has 0 to {len(self) - 1}")
        return int(index)

    def _box(self, row: pd.Series) -> np.ndarray | None:
        corners = [row.get(name, np.nan) for name in ("x0", "y0", "x1", "y1")]
        if np.isnan(corners).any():
            return None
        return box_map(corners, self.image_size, self.grid)

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

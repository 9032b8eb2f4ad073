"""Cached tokens: the frozen trunk is run once an image, then only the blocks that learn.

What enters the first block that learns is kept in memory; for trainings on disk as well, so that
every run on the same trunk, in whatever process, finds it there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate
from tqdm.auto import tqdm

from lib.config import RunConfig
from lib.data.classes import refuse_other_labels
from lib.data.dataset import BirdDataset
from lib.data.pictures import pictures_key
from lib.files import make_folder, write_bytes
from lib.model.adapter import restoring
from lib.model.predict import loader, tf32_products, to_device
from lib.model.vit import SigmoidViT
from lib.training.learning import learning_blocks, precision
from lib.training.state import MAPS_AND_CROPS, PLACES, flat

TRUNK_BATCH = 32  # pictures that pass the trunk together
FETCHED = 8  # batches of tokens that are copied from a GPU at once: each copy waits for it
Tick = Callable[[int], None]


class CachedTokens(Dataset):
    """A data set whose images are replaced by the tokens `[N, dim]` that enter the last blocks.

    An image passes the frozen trunk when it is first asked for. Its tokens are kept in half
    precision in the computer's memory: 0.15 MB with ViT-S/16. All else is as in `dataset`.

    Args:
        model: its blocks but the last `blocks` must not change any more.
        tokens: `[n, N, dim]` of all images, where they have passed the trunk before.
        precision: that the trunk computes in, see `lib.training.learning.precision`.

    Raises:
        ValueError: the data set is augmented, or its classes are not the model's (OtherClasses).
    """

    in_memory = True  # for `loader`

    def __init__(
        self,
        model: SigmoidViT,
        dataset: BirdDataset,
        blocks: int,
        tokens: Tensor | None = None,
        precision: str = "no",
    ) -> None:
        if dataset.augment:
            raise ValueError(
                "the pictures are augmented, so their tokens cannot be kept; make the data set "
                "with augment=False"
            )
        refuse_other_labels(model.classes, dataset.classes)
        self.model, self.dataset, self.blocks = model, dataset, blocks
        self.tokens, self.precision = tokens, precision
        self._left = set(range(len(dataset)) if tokens is None else ())  # before the trunk
        self._annotations = cache(dataset.annotations)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Position of every image by its id."""
        ids = self.dataset.table["image_id"]
        return {str(image_id): index for index, image_id in enumerate(ids)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """As `BirdDataset`, with "tokens", and how many "blocks" follow them, but no "image".

        A seed for crop and flip is of no use here.
        """
        return {name: values[0] for name, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """Items, stacked."""
        chosen = [int(one[0] if isinstance(one, tuple) else one) for one in indices]
        self.keep(chosen)
        found = default_collate([self._annotations(index) for index in chosen])
        found["tokens"] = self.tokens.index_select(0, torch.tensor(chosen))
        return found | {"blocks": torch.full((len(chosen),), self.blocks)}

    __getitems__ = batch  # what a DataLoader asks for

    def keep(
        self,
        indices: Sequence[int],
        tick: Tick | None = None,
        workers: int | Literal["auto"] = "auto",
    ) -> None:
        """Takes images through the trunk unless that was done before.

        Args:
            tick: called with the number of images left, before each part of them; where not given,
                a tqdm bar is shown.
            workers: processes that load images.
        """
        missing = [i for i in dict.fromkeys(map(int, indices)) if i in self._left]
        if not missing:
            return
        device = next(self.model.parameters()).device
        parts = iter(loader(Subset(self.dataset, missing), TRUNK_BATCH, device, workers))
        of = " ".join(filter(None, (self.dataset.config.name, self.dataset.part)))
        bar = tqdm(
            total=len(missing),
            desc=f"frozen trunk, {of}",
            unit="image",
            leave=False,
            delay=1.0,
            disable=tick is not None,
        )
        waiting: list[tuple[Tensor, Tensor]] = []
        for count in range(len(missing), 0, -TRUNK_BATCH):
            if tick is not None:
                tick(count)
            part = to_device(next(parts), device)
            tokens = _run_trunk(self.model, part["image"], self.blocks, self.precision)
            waiting.append((part["index"], tokens))
            if len(waiting) == FETCHED or count <= TRUNK_BATCH:
                self._store(*map(torch.cat, zip(*waiting, strict=True)))
                waiting.clear()
            bar.update(len(part["index"]))
        bar.close()

    def _store(self, indices: Tensor, tokens: Tensor) -> None:
        if self.tokens is None:  # memory that nothing was written to yet takes no room
            self.tokens = torch.empty(len(self), *tokens.shape[1:], dtype=tokens.dtype)
        self.tokens[indices] = tokens.cpu()
        self._left.difference_update(indices.tolist())


# Runs of one comparison share their frozen trunk: its tokens are read once a process.
@lru_cache(maxsize=4)  # train, val and test of one data set, and one more
def _stored(file: Path) -> Tensor:
    return safetensors.torch.load_file(file)["tokens"]


forget_tokens = _stored.cache_clear  # those that this process holds in memory; those on disk stay


def with_cached_tokens(
    model: SigmoidViT,
    dataset: BirdDataset,
    config: RunConfig,
    folder: Path,
    asked: str = "no",
) -> CachedTokens:
    """The data set with the trunk's tokens, computed now unless this trunk met it before.

    Args:
        model: on the device that is to run the trunk.
        folder: gets `<digest>.safetensors`, about 150 kB an image for a ViT-S/16 at 224 pixels. The
            digest is of the pictures (names below their folder, byte sizes, times), of the
            architecture, of the frozen weights, of how many blocks are frozen, and of the precision
            unless it is float32; not of the human maps, which are read anew every time.
        asked: precision of the trunk: that of the steps for training images. What is measured is
            float32, as it is for a model without cached tokens.
    """
    asked = precision(asked, next(model.parameters()).device)
    # The head alone learns from the last block's output; that block gives the class row as well.
    blocks = max(1, learning_blocks(config.train.trainable, model.depth))
    if not len(dataset):
        return CachedTokens(model, dataset, blocks)
    file = folder / f"{_digest(model, dataset, config, blocks, asked)[:32]}.safetensors"
    if not file.is_file():
        make_folder(folder)
        with FileLock(file.with_suffix(".lock")):  # the jobs of a sweep run the trunk once
            if not file.is_file():
                for half in folder.glob(f"{file.name}.*.tmp"):  # of a process that was killed
                    half.unlink()
                found = CachedTokens(model, dataset, blocks, precision=asked)
                found.keep(range(len(dataset)), workers=config.train.workers)
                write_bytes(file, *_as_safetensors(found.tokens))
                del found  # the file takes its place in memory
    return CachedTokens(model, dataset, blocks, _stored(file))


def _as_safetensors(tokens: Tensor) -> tuple[bytes, memoryview]:
    """The parts of a file: safetensors itself would hold all tokens two times more."""
    content = memoryview(tokens.numpy()).cast("B")
    told = {"dtype": "F16", "shape": list(tokens.shape), "data_offsets": [0, len(content)]}
    header = json.dumps({"tokens": told}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, content


def _digest(
    model: SigmoidViT, dataset: BirdDataset, config: RunConfig, blocks: int, asked: str
) -> str:
    """Of all that decides the tokens that enter the last `blocks` blocks."""
    left_out = (*PLACES, *MAPS_AND_CROPS, "data.classes")  # the table has those
    told = {k: v for k, v in flat(config).items() if k.startswith(("data.", "model."))}
    told = {k: v for k, v in told.items() if k not in left_out}
    # Files of before there were these fields keep their names.
    young = {"data.normalisation": None, "data.toy_level": "border", "model.norm_eps": None}
    told = {k: v for k, v in told.items() if k not in young or v != young[k]}
    table = dataset.table.drop(columns=["has_map", "path"]).to_csv()
    paths = [record.image for record in dataset.records if isinstance(record.image, Path)]
    pictures = pictures_key(paths, list(config.data.image_size)) if paths else ""
    architecture = (model.normalisation, model.num_heads, blocks)
    architecture += (asked,) * (asked != "no")  # files of float32 have older names
    digest = hashlib.sha256(repr((told, table, pictures, architecture)).encode())
    learned = (f"blocks.{index}." for index in range(model.depth - blocks, model.depth))
    learned = ("norm.", "fc_norm.", "head", "attn_pool.", *learned)
    for name, value in model.vit.state_dict().items():
        if not name.startswith(learned):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _run_trunk(model: SigmoidViT, images: Tensor, blocks: int, precision: str) -> Tensor:
    """What enters the last `blocks` blocks, `[B, N, dim]` in half precision, on the device."""
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    mixed = torch.autocast(images.device.type, kind, enabled=kind is not None)
    with restoring(model), tf32_products(precision == "tf32"), mixed:
        model.eval()
        return model.tokens(images.to(next(model.parameters()).dtype), -blocks).half()

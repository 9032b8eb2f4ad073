"""Cached tokens: the frozen trunk is run once an image, then only the blocks that learn.

What enters the first block that learns is kept in half precision, in memory and on disk, so that
every run on the same trunk, in whatever process, finds it there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from lib import config as cfg
from lib.config import RunConfig
from lib.data.dataset import BirdDataset
from lib.files import make_folder, write_bytes
from lib.model.vit import SigmoidViT
from lib.training.learning import learning_blocks


class CachedTokens(Dataset):
    """A data set whose images are replaced by the tokens `[N, dim]` that enter the last blocks.

    `tokens` is `[n, N, dim]` in half precision; labels, maps and fixations stay as they are. They
    have the last `blocks` blocks of the model before them.
    """

    def __init__(self, tokens: Tensor, items: list[dict], blocks: int) -> None:
        self.tokens, self.items, self.blocks = tokens, items, blocks

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        """As `BirdDataset`; a seed for crop and flip is of no use here."""
        index = index[0] if isinstance(index, tuple) else index
        return {"tokens": self.tokens[index], **self.items[index]}


# Runs of one comparison share their frozen trunk: its tokens are read once a process.
_CACHE: dict[str, Tensor] = {}

# Fields of DataConfig that the tokens of whole pictures do not depend on: of maps and of crops.
_NO_MATTER = ("maps", "maps_dir", "gaze_runs", "sigma", "sigma_unit", "weight", "cache")
_NO_MATTER += ("crop_scale", "crop_ratio", "flip")


def forget_tokens() -> None:
    """Drops the tokens that this process holds in memory; those on disk stay."""
    _CACHE.clear()


@torch.no_grad()
def with_cached_tokens(
    model: SigmoidViT, dataset: BirdDataset, config: RunConfig, folder: Path
) -> CachedTokens:
    """The data set with the trunk's tokens, computed now unless this trunk met it before.

    Args:
        model: on the device that is to run the trunk.
        folder: gets `<digest>.safetensors`, about 150 kB an image for a ViT-S/16 at 224 pixels. The
            digest is of the pictures, of the architecture, of the frozen weights, and of how many
            blocks are frozen; not of the human maps, which are read anew every time.
    """
    # The head alone learns from the last block's output; that block gives the class row as well.
    blocks = max(1, learning_blocks(config.train.trainable, model.depth))
    key = _digest(model, dataset, config, blocks)
    if key not in _CACHE:
        file = folder / f"{key[:32]}.safetensors"
        if not file.is_file():
            make_folder(folder)
            with FileLock(file.with_suffix(".lock")):  # the jobs of a sweep run the trunk once
                if not file.is_file():
                    for half in folder.glob(f"{file.name}.*.tmp"):  # of a process that was killed
                        half.unlink()
                    tokens = _run_trunk(model, dataset, blocks, config.train.workers)
                    write_bytes(file, safetensors.torch.save({"tokens": tokens}))
        while len(_CACHE) >= 4:  # train, val and test of one data set, and one more
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = safetensors.torch.load_file(file)["tokens"]
    items = [dataset.annotations(i) for i in range(len(dataset))]
    return CachedTokens(_CACHE[key], items, blocks)


def _digest(model: SigmoidViT, dataset: BirdDataset, config: RunConfig, blocks: int) -> str:
    """Of all that decides the tokens that enter the last `blocks` blocks."""
    data = {k: v for k, v in cfg.flat(config.data).items() if k not in _NO_MATTER}
    images = dataset.table.drop(columns="has_map").to_csv()
    architecture = (cfg.flat(config.model), model.normalisation, model.num_heads, blocks)
    digest = hashlib.sha256(repr((data, images, architecture)).encode())
    learned = (f"blocks.{index}." for index in range(model.depth - blocks, model.depth))
    learned = ("norm.", "fc_norm.", "head", *learned)
    for name, value in model.vit.state_dict().items():
        if not name.startswith(learned):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _run_trunk(model: SigmoidViT, dataset: BirdDataset, blocks: int, workers: int) -> Tensor:
    """What enters the last `blocks` blocks, `[n, N, dim]` in half precision."""
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(dataset, batch_size=32, num_workers=workers)
    bar = tqdm(loader, desc="tokens of the frozen trunk", leave=False)
    return torch.cat([model.tokens(b["image"].to(device), -blocks).half().cpu() for b in bar])

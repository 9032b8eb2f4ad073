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
from lib.data import BirdDataset
from lib.files import make_folder, write_bytes
from lib.model import SigmoidViT
from lib.optim import learning_blocks


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
_CACHE: dict[str, CachedTokens] = {}


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
            digest is of the data, of the frozen weights, and of how many blocks are frozen.
    """
    # The head alone learns from the last block's output; that block gives the class row as well.
    blocks = max(1, learning_blocks(config.train.trainable, model.depth))
    learned = (f"blocks.{index}." for index in range(model.depth - blocks, model.depth))
    learned = ("norm.", "fc_norm.", "head", *learned)
    digest = hashlib.sha256(cfg.to_json(config.data).encode())
    digest.update(f"{blocks}{dataset.table.to_csv()}".encode())
    for name, value in model.vit.state_dict().items():
        if not name.startswith(learned):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    key = digest.hexdigest()
    if key not in _CACHE:
        file = folder / f"{key[:32]}.safetensors"
        if not file.is_file():
            make_folder(folder)
            with FileLock(file.with_suffix(".lock")):  # the jobs of a sweep run the trunk once
                if not file.is_file():
                    tokens = _run_trunk(model, dataset, blocks, config.train.workers)
                    write_bytes(file, safetensors.torch.save({"tokens": tokens}))
        tokens = safetensors.torch.load_file(file)["tokens"]
        while len(_CACHE) >= 4:  # train, val and test of one data set, and one more
            _CACHE.pop(next(iter(_CACHE)))
        items = [dataset.annotations(i) for i in range(len(dataset))]
        _CACHE[key] = CachedTokens(tokens, items, blocks)
    return _CACHE[key]


def _run_trunk(model: SigmoidViT, dataset: BirdDataset, blocks: int, workers: int) -> Tensor:
    """What enters the last `blocks` blocks, `[n, N, dim]` in half precision."""
    device = next(model.parameters()).device
    model.eval()
    loader = DataLoader(dataset, batch_size=32, num_workers=workers)
    bar = tqdm(loader, desc="tokens of the frozen trunk", leave=False)
    return torch.cat([model.tokens(b["image"].to(device), -blocks).half().cpu() for b in bar])

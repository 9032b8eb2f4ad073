"""Speed, side by side: training steps, decoded and cached pictures, edits from kept activations.

Both sides run in one process, in turns, on the same input; the figure is the ratio of a pair of
neighbouring turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.attention import LADDER, AttentionEdit
from lib.config import DataConfig, HumanConfig, TrainConfig
from lib.data import BirdDataset
from lib.live import LiveImage
from lib.model import SigmoidViT, create_model
from lib.readers import read_records
from lib.train import loss_terms


def explicit_scores(vit: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """timm's forward pass with every attention written out as an N x N matrix.

    The way of the original experiment, kept as a yardstick: scores and the last class row.
    """
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks:
        attn, normed = block.attn, block.norm1(x)
        qkv = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, N, d] each
        logits = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).mT
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.drop_path1(block.ls1(attn.proj(attn.norm(mixed))))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return vit.forward_head(vit.norm(x)), logits[:, :, 0]


def training_steps(
    name: str = "vit_small_patch16_224",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 12,
    seed: int = 0,
) -> pd.DataFrame:
    """Seconds of one training step of each way, in turns.

    Args:
        name: timm model. image_size: pixels. batch_size: images a step. rounds: measured turns,
            after one that is thrown away.

    Returns:
        one row a way and round: way, round, seconds, ratio (to plain timm in the same round).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    base = create_model(name, 200, (image_size, image_size)).to(device).train()
    patches = base.grid[0] * base.grid[1]
    batch = {
        "image": torch.randn(batch_size, 3, image_size, image_size, device=device),
        "label": torch.randint(0, 200, (batch_size,), device=device),
        "human": torch.rand(batch_size, patches, device=device),
        "valid": torch.ones(batch_size, patches, dtype=torch.bool, device=device),
    }

    def ours(model: SigmoidViT, **human: object) -> Tensor:
        config = TrainConfig(human=HumanConfig(**human))
        cross_entropy, human_loss, _ = loss_terms(model, batch, config)
        return cross_entropy + config.human.lam * human_loss

    def explicit(model: SigmoidViT) -> Tensor:
        scores, row = explicit_scores(model.vit, batch["image"])
        read = torch.sigmoid(row[..., model.num_prefix :])
        return F.cross_entropy(scores, batch["label"]) + F.mse_loss(
            read, batch["human"][:, None].expand_as(read)
        )

    ways: dict[str, Callable[[SigmoidViT], Tensor]] = {
        "plain timm": lambda m: F.cross_entropy(m.vit(batch["image"]), batch["label"]),
        "explicit N x N attention, mse": explicit,
        "ours, control": lambda m: ours(m, lam=0.0),
        "ours, HITL last block": lambda m: ours(m, loss="kl", blocks="last"),
        "ours, HITL all blocks": lambda m: ours(m, loss="kl", blocks="all"),
    }
    # Each way has its own model and optimiser: none finds the other's gradients in the cache.
    models = {way: copy.deepcopy(base) for way in ways}
    optimizers = {way: torch.optim.AdamW(m.parameters(), lr=1e-5) for way, m in models.items()}
    rows = []
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
        seconds = {}
        for way, loss_of in ways.items():
            _synchronise(device)
            start = time.perf_counter()
            loss_of(models[way]).backward()
            optimizers[way].step()
            optimizers[way].zero_grad(set_to_none=True)
            _synchronise(device)
            seconds[way] = time.perf_counter() - start
        if number > 0:
            rows += [
                {"way": way, "round": number, "seconds": s, "ratio": s / seconds["plain timm"]}
                for way, s in seconds.items()
            ]
    return pd.DataFrame(rows)


def image_loading(
    config: DataConfig, grid: tuple[int, int], images: int = 256, rounds: int = 5
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Seconds to read the same training pictures decoded every time, and from the decoded cache.

    One process reads, as one worker of a DataLoader does: crop, flip and map included. The cache
    is built in a temporary folder and lies in the system's file cache when it is read, as it does
    from the second epoch on where memory allows.

    Args:
        config: a data set of pictures. grid: of the model. images: how many are read. rounds:
            measured turns, after one that is thrown away.

    Returns:
        one row a way and round: way, round, seconds, ratio (to decoding in the same round); and
        the cost: seconds to build, bytes a picture on disk and as JPEG.
    """
    records, classes = read_records(config, "train")
    rng = np.random.default_rng(0)
    chosen = [records[i] for i in rng.permutation(len(records))[:images]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ways = {}
        for way, cache in (("decoded cache", Path(folder)), ("decoding", None)):
            data = replace(config, cache=cache)
            ways[way] = BirdDataset(chosen, classes, data, grid, (0.5,) * 3, (0.5,) * 3, True)
            if cache:
                built = time.perf_counter() - start
        for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
            seconds = {}
            for way, dataset in reversed(ways.items()):
                start = time.perf_counter()
                for i in range(len(dataset)):
                    dataset[i]
                seconds[way] = time.perf_counter() - start
            if number > 0:
                rows += [
                    {"way": way, "round": number, "seconds": s, "ratio": s / seconds["decoding"]}
                    for way, s in seconds.items()
                ]
        on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    cost = {
        "pictures": len(chosen),
        "seconds to build": built,
        "bytes a picture, cache": on_disk / len(chosen),
        "bytes a picture, JPEG": float(np.mean([r.image.stat().st_size for r in chosen])),
    }
    return pd.DataFrame(rows), cost


def live_edits(
    name: str = "vit_small_patch16_224", image_size: int = 224, rounds: int = 30, seed: int = 0
) -> pd.DataFrame:
    """Seconds from an edit of one picture to its class scores, against a full forward pass.

    The edit is of about a quarter of the patches, made wider rung by rung; the full forward pass
    is SigmoidViT's own with the edit of the last block, and timm's stands beside it. Each turn runs
    a way again and again for 50 ms, as the edits of one stroke follow each other, and takes the
    mean.

    Args:
        name: timm model. image_size: pixels. rounds: measured turns, after one that is thrown away.

    Returns:
        one row a way and round: way, round, seconds, ratio (of the full forward pass in the same
        round to this way: times faster).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = create_model(name, 200, (image_size, image_size)).to(device).eval()
    images = torch.randn(1, 3, image_size, image_size, device=device)
    mask = torch.rand(model.grid, device=device) < 0.25
    edits = {way: AttentionEdit(mask, 0.9, **scope) for way, scope in LADDER.items()}
    live = LiveImage(model, images[0])
    ways: dict[str, Callable[[], object]] = {
        "timm, no edit": lambda: model.vit(images),
        "full forward": lambda: model(images, edit=edits["last block"]),
        **{way: partial(live.run, edit) for way, edit in edits.items()},
    }
    rows = []
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
        with torch.inference_mode():
            seconds = {way: _seconds_a_run(run, device) for way, run in ways.items()}
        if number > 0:
            rows += [
                {"way": way, "round": number, "seconds": s, "ratio": seconds["full forward"] / s}
                for way, s in seconds.items()
            ]
    return pd.DataFrame(rows)


def _seconds_a_run(run: Callable[[], object], device: str, least: float = 0.05) -> float:
    """Mean of as many runs as it takes to fill `least` seconds."""
    runs, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < least:
        run()
        _synchronise(device)
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """Median seconds and ratio of each way, in the order measured."""
    return table.groupby("way", sort=False)[["seconds", "ratio"]].median()


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
